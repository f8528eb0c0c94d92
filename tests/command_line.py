"""What the command tests share: run ``arsp`` in this process and judge its result."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from arsp.cli.app import app


def invoke(*words: Any):
    """The result of ``arsp WORDS`` (exit code, stdout, stderr)."""
    return CliRunner().invoke(app, [*map(str, words)])


def record_of(result) -> dict[str, Any]:
    """The JSON document on stdout of a command that succeeded."""
    assert result.exit_code == 0, f"exit {result.exit_code}: {result.stderr}"
    return json.loads(result.stdout)


def refused(result, code: int, *words: str) -> None:
    """One error message with all ``words``, the documented exit code, nothing on stdout, no traceback."""
    assert result.exit_code == code, f"exit {result.exit_code}, expected {code}: {result.stderr}"
    missing = [word for word in words if word not in result.stderr]
    assert not missing and "Traceback" not in result.stderr, f"{missing} not in: {result.stderr}"
    assert result.stdout == "" and result.stderr.count("error: ") == 1
