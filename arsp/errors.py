"""The one exception type a user meets: what happened, what to type next, and the exit code (docs/design.md, section 5)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_CONFIG = 3
EXIT_INPUT = 4
EXIT_RESOURCE = 5
EXIT_NUMERICAL = 6
EXIT_GATE = 7
EXIT_LOCKED = 8
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class ArspError(Exception):
    """Base of all expected failures. ``message``: what, where, expected. ``hint``: the next command to type."""

    exit_code = EXIT_BUG

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ArspError):
    """The command line itself is wrong (an option's value, two options that exclude each other)."""

    exit_code = EXIT_USAGE


class ConfigError(ArspError):
    """A configuration value, an unknown name, or a stack of methods that cannot work together."""

    exit_code = EXIT_CONFIG


class InputError(ArspError):
    """An input file or directory is missing, corrupt, or does not match what it is used with."""

    exit_code = EXIT_INPUT


class ResourceError(ArspError):
    """Memory, disk or device is not available."""

    exit_code = EXIT_RESOURCE


class NumericalError(ArspError):
    """NaN, infinity or divergence."""

    exit_code = EXIT_NUMERICAL


class GateError(ArspError):
    """A --fail-if condition holds."""

    exit_code = EXIT_GATE


class LockedError(ArspError):
    """The run directory is in use, or belongs to another configuration."""

    exit_code = EXIT_LOCKED


class Interrupted(ArspError):
    """SIGINT or SIGTERM arrived and the run stopped at a safe point; ``exit_code`` is 130 or 143."""

    def __init__(self, message: str, exit_code: int, hint: str | None = None):
        super().__init__(message, hint)
        self.exit_code = exit_code


def nearest(name: str, known: Iterable[str]) -> str:
    """The text ``Did you mean: a, b? Available: ...`` for an unknown name."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    lead = f"Did you mean: {', '.join(close)}? " if close else ""
    return f"{lead}Available: {', '.join(known) or 'nothing'}."
