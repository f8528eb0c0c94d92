"""Every command of the README runs. Long ones get a small budget appended; the make targets are checked through what they call."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import invoke

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
LINES = [re.sub(r"\s+#.*$", "", line).strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
ARSP = [line for line in LINES if line.startswith("arsp ")]
MAKE = [line for line in LINES if line.startswith("make ")]
TINY_DISTILL = "--steps 2 --trajectories 60 trajectories.held_out=20 trajectories.batch_size=20 trajectories.shard_size=60 probe_images=20"
BUDGET = {  # what is appended to the long ones
    "arsp distill --teacher var": f"{TINY_DISTILL} trajectories.short=20",
    "arsp distill": TINY_DISTILL,
    "arsp train tokenizer --family var": "--steps 2 --batch-size 2 optim.eval_every=2 vq.vocab_size=64",
    "arsp train tokenizer": "--steps 2 --batch-size 2 optim.eval_every=2",
    "arsp train teacher": "--steps 2 --batch-size 2",
    "arsp train features": "--steps 2 --batch-size 2 optim.eval_every=2",
    "arsp bench llamagen-b-256": "--num 1 --repeats 1 --warmup 0",
    "arsp bench var-d16": "--num 1 --repeats 1 --warmup 0",
    "arsp bench --compare llamagen-b-256": "--repeats 1 --warmup 0",
    "arsp bench --compare": "--repeats 2",
    "arsp quantize --model llamagen --recipe w4a8 --json": "",  # goes on in a pipe
    "arsp quantize": "--num 4 calibration.check=4 calibration.batch_size=4",
    "arsp bench kernels": "--op verify --repeats 2",
    "arsp sparsify": "--num 8",
}


def test_the_readme_holds_nothing_but_arsp_and_make_commands():
    assert ARSP and MAKE and set(LINES) == {*ARSP, *MAKE}


@pytest.mark.slow
@pytest.mark.parametrize("line", ARSP)
def test_command_of_the_readme_runs(line, tmp_path, monkeypatch):
    """Pipelines and options for the whole process in a shell, the others here: importing takes longer than most of them."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    extra = next((more for start, more in BUDGET.items() if line.startswith(start)), "")
    if " | " in line or "--threads" in line:
        parts = [shlex.join([sys.executable, "-m", part.split()[0]]) + " " + part.split(" ", 1)[1] for part in line.split(" | ")]
        result = subprocess.run(
            ["bash", "-o", "pipefail", "-c", f"{' | '.join(parts)} {extra}"], capture_output=True, text=True, timeout=540
        )
        code, errors = result.returncode, result.stderr
    else:
        result = invoke(*shlex.split(f"{line} {extra}")[1:])
        code, errors = result.exit_code, result.stderr
    assert code == 0, f"{line}\nexit code {code}\n{errors[-2000:]}"
    assert "Traceback" not in errors


def test_make_targets_of_the_readme_exist():
    for line in MAKE:
        result = subprocess.run([*line.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0 and "python" in result.stdout, f"{line}: {result.stderr}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_goes_from_teacher_to_report(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "examples" / "demo.py"),
        "--out",
        str(tmp_path / "demo"),
        "--num",
        "20",
        "--steps",
        "2",
        "--trajectories",
        "1100",
    ]
    for attempt in ("first", "again"):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=540)
        assert result.returncode == 0, f"{attempt}: {result.stderr[-2000:]}"
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    for name in ("llamagen-dd1 1-step", "llamagen-dd1 2-step", "llamagen mode", "llamagen naive"):
        assert name in page, name
