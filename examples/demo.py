"""The main job from start to end, for real: distil the embedded teacher into one step, sample everything, measure, report.

    make demo            (or: .venv/bin/python examples/demo.py --out .demo)

About 15 minutes on two CPU cores. Every line it runs is an arsp command that is printed first; run again after an interruption
it continues where it stopped. The result is DIR/report.html.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

CLASSES = [str(i) for i in range(10)]


def run(arguments: list[str], environment: dict[str, str], capture: bool = False) -> str:
    """Run one arsp command, progress on stderr; stop with its exit code if it fails."""
    print(f"\n$ arsp {' '.join(arguments)}", file=sys.stderr, flush=True)
    result = subprocess.run(
        [sys.executable, "-m", "arsp", *arguments], env=environment, stdout=subprocess.PIPE if capture else sys.stderr, text=True
    )
    if result.returncode:
        print(f"demo: stopped (exit code {result.returncode}); run the same command again to continue.", file=sys.stderr)
        sys.exit(result.returncode)
    return result.stdout or ""


def stacks(student: Path) -> dict[str, list[str]]:
    """Name -> the options of ``arsp sample`` that make it."""
    return {
        "teacher": ["--model", "llamagen"],
        "student-2-step": ["--model", "llamagen-dd1", "--student-steps", "2"],
        "student-1-step": ["--model", "llamagen-dd1", "--student-steps", "1"],
        "fresh-1-step": ["--model", str(student), "--student-steps", "1"],
        "control-naive": ["--model", "llamagen", "--baseline", "naive"],
        "control-mode": ["--model", "llamagen", "--baseline", "mode"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="where everything goes")
    parser.add_argument("--num", type=int, default=1000, help="images a stack is measured on")
    parser.add_argument("--steps", type=int, help="updates of the fresh student (default: that of arsp distill)")
    parser.add_argument("--trajectories", type=int, help="trajectories of the fresh student (default: that of arsp distill)")
    options = parser.parse_args()
    started, out = time.monotonic(), options.out.resolve()
    environment = {**os.environ, "ARSP_RUNS": str(out / "runs"), "OMP_WAIT_POLICY": "PASSIVE"}

    distil = ["distill", "--teacher", "llamagen", "--out", str(out / "fresh-student")]
    for name in ("steps", "trajectories"):
        if getattr(options, name):
            distil += [f"--{name}", str(getattr(options, name))]
    run(distil, environment)
    records = []
    for name, arguments in stacks(out / "fresh-student").items():
        classes = [part for label in CLASSES for part in ("--class", label)]
        run(["sample", *arguments, "--num", str(options.num), *classes, "--out", str(out / name)], environment)
        run(["eval", str(out / name), "--metric", "fid,acc", "--out", str(out / f"{name}-eval")], environment)
        records.append(out / f"{name}-eval")
    report = out / "report.html"
    command = [
        "report",
        *map(str, records),
        "--html",
        str(report),
        "--png",
        str(out / "report.png"),
        "--md",
        str(out / "report.md"),
        "--title",
        "One-step distillation of the embedded teacher",
        "--json",
    ]
    made = json.loads(run(command, environment, capture=True))
    print((out / "report.md").read_text())
    print(f"report: {report}  ({len(made['artifacts'])} files, {(time.monotonic() - started) / 60:.1f} minutes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
