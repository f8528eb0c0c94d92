"""GPU tests and GPU timings of this machine in under eight minutes: ``python benchmarks/gpu_check.py --out DIR``.

Runs every test marked ``gpu``, then the timings below, each in its own process, and writes DIR/<gpu>.json and DIR/<gpu>.md.
Exit codes: 0 all ran and passed, 5 no CUDA device, 7 a test or a timing failed or did not fit into the time.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arsp.errors import EXIT_GATE, EXIT_OK, EXIT_RESOURCE
from arsp.runs import environment, now, write_json

ROOT = Path(__file__).resolve().parent.parent
BUDGET_S = 450  # of the eight minutes; what does not fit is reported as not run
TESTS_S = 200  # at most, for all tests
EAGER = ["--random-weights", "--baseline", "eager"]
GPT_B, VAR = ["llamagen-b-256", *EAGER, "--dtype", "bfloat16"], ["var-d16", "var-d16,dtype=bfloat16,decoder_dtype=bfloat16", *EAGER]
TIMINGS = {  # the official way of a VAR is in float32, and a VAR is timed to its images; the others make codes
    "embedded AR, batch 1": ["llamagen", "--no-decode", "--batch-size", "1", "--repeats", "10"],
    "embedded AR, batch 32": ["llamagen", "--no-decode", "--batch-size", "32", "--repeats", "10"],
    "embedded AR and seeded, batch 1": ["llamagen", "llamagen,sampler=seeded", "--compare", "--no-decode", "--batch-size", "1"],
    "LlamaGen-B 256, batch 1": [*GPT_B, "--no-decode", "--batch-size", "1"],
    "LlamaGen-B 256, batch 32": [*GPT_B, "--no-decode", "--batch-size", "32"],
    "VAR-d16 256, batch 1": [*VAR, "--parts", "--batch-size", "1"],
    "VAR-d16 256, batch 16": [*VAR, "--batch-size", "16"],
    "CoDe VAR-d30:VAR-d16@8, batch 1": [
        "var-d30,dtype=bfloat16,decoder_dtype=bfloat16", "var-d30,dtype=bfloat16,decoder_dtype=bfloat16,collab=var-d30:var-d16@8",
        "--compare", "--random-weights", "--batch-size", "1",
    ],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu-check"), help="folder for the results")
    out = parser.parse_args().out
    import torch

    if not torch.cuda.is_available():
        print("error: gpu_check needs a CUDA device and torch sees none.", file=sys.stderr)
        print("hint: run it on a machine with a GPU and a CUDA build of torch; nvidia-smi lists the devices.", file=sys.stderr)
        return EXIT_RESOURCE
    started = time.monotonic()
    result: dict[str, Any] = {"schema": 1, "started": now(), "environment": environment("cuda:0")}
    result["tests"] = run_tests(min(TESTS_S, BUDGET_S))
    result["timings"] = {}
    for name, arguments in TIMINGS.items():
        result["timings"][name] = run_timing(name, arguments, BUDGET_S - (time.monotonic() - started), out)
    result |= {"finished": now(), "seconds": time.monotonic() - started}
    machine = re.sub(r"[^a-z0-9]+", "-", result["environment"]["gpu"].lower()).strip("-")
    write_json(out / f"{machine}.json", result)
    table = to_markdown(result)
    (out / f"{machine}.md").write_text(table)
    print(table)
    good = result["tests"]["status"] == "ok" and all(timing["status"] == "ok" for timing in result["timings"].values())
    return EXIT_OK if good else EXIT_GATE


def run(command: list[str], seconds: float) -> tuple[int | None, str, str]:
    """Exit code (None: out of time), stdout, stderr."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None, "", f"stopped after {seconds:.0f} s"
    return done.returncode, done.stdout, done.stderr


def run_tests(seconds: float) -> dict[str, Any]:
    """All tests marked gpu: status, the summary line of pytest, and the failures it names."""
    print("tests marked gpu ...", file=sys.stderr)
    code, text, errors = run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"], seconds)
    lines = [line for line in text.splitlines() if line.strip()]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"status": "ok" if code == 0 else "failed", "summary": lines[-1].strip("= ") if lines else errors[-500:], "failures": failures}


def run_timing(name: str, arguments: list[str], seconds: float, out: Path) -> dict[str, Any]:
    """One ``arsp bench``: status and, where it worked, the stacks and metrics of its record."""
    if seconds < 10:
        return {"status": "not run", "reason": "out of time"}
    print(f"{name} ...", file=sys.stderr)
    folder = out.resolve() / "runs" / re.sub(r"\W+", "-", name)
    command = [sys.executable, "-m", "arsp", "bench", *arguments, "--device", "cuda", "--json", "-q", "--out", str(folder)]
    code, text, errors = run(command, seconds)
    if code != 0:
        return {"status": "failed", "reason": errors.strip()[-1000:], "command": command[2:]}
    record = json.loads(text)
    return {
        "status": "ok",
        "command": command[2:],
        **{key: record[key] for key in ("config", "stacks", "metrics", "roofline", "parts") if key in record},
    }


def to_markdown(result: dict[str, Any]) -> str:
    """The result for people."""
    env = result["environment"]
    lines = [
        f"# {env['gpu']}",
        "",
        f"torch {env['torch']}, CUDA {env['cuda']}, arsp {env['arsp']}, commit {env['commit']}, {result['started']}. "
        f"Tests marked gpu: {result['tests']['status']} ({result['tests']['summary']}).",
        "",
        "| what, codes (of a VAR: images) | stack | p50 ms / batch | images/s | passes | peak MB | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, timing in result["timings"].items():
        if timing["status"] != "ok":
            lines.append(f"| {name} | {timing['status']}: {timing['reason'].splitlines()[0]} | | | | | |")
            continue
        ratios = {metric["stack"]: metric["value"] for metric in timing["metrics"] if metric["name"] == "speedup"}
        for entry in timing["stacks"]:
            cost, ratio = entry["cost"], ratios.get(entry["name"])
            memory = cost["peak_mem_bytes"]
            cells = [name, entry["name"], f"{cost['latency_ms']['p50']:.1f}", f"{cost['images_per_s']:.2f}", f"{cost['passes']:.0f}"]
            cells += ["-" if memory is None else f"{memory / 1e6:.0f}", f"{ratio:.2f}x" if ratio else ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *result["tests"]["failures"]]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
