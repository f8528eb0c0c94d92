"""GPU tests and GPU timings of this machine in under eight minutes: ``python benchmarks/gpu_check.py --out DIR``.

Runs every test marked ``gpu``, times every CUDA kernel (gpu_kernels.py), then the stacks below, each in its own process, and writes
DIR/<gpu>.json and DIR/<gpu>.md. Without a CUDA device nothing is measured: the kernels are compiled for every architecture (where nvcc
is there) and run on the emulated device of the tests; DIR/no-device.json and .md say so and hold the registers of every kernel.

Exit codes: 0 all ran and passed; 5 no CUDA device, and what needs none passed; 7 a test, a compilation or a timing failed or did not
fit into the time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arsp.errors import EXIT_GATE, EXIT_OK, EXIT_RESOURCE, ResourceError
from arsp.runs import environment, now, write_json

ROOT = Path(__file__).resolve().parent.parent
BUDGET_S = 450  # of the eight minutes; what does not fit is reported as not run
TESTS_S = 150  # at most, for all tests, compiling the kernels among them
KERNELS_S = 120  # at most, for the timings of kernels
EMULATED = sorted((ROOT / "tests" / "kernels").glob("test_cuda_*.py"))  # tests of kernels that need no device
EAGER = ["--random-weights", "--baseline", "eager"]
CODES_ONLY = ["--no-decode", "--batch-size"]
RANDOM = ["--random-weights", "--dtype", "bfloat16"]
DD_L = [f"llamagen-l-256-dd1{more}" for more in ("", ",graphs=true", ",graphs=true,student_steps=2")]
GPT_B = ["llamagen-b-256", "llamagen-b-256,graphs=true", *EAGER, "--dtype", "bfloat16"]
GPT_L = ["llamagen-l-256", "llamagen-l-256,graphs=true", *EAGER, "--dtype", "bfloat16"]
BF16 = "dtype=bfloat16,decoder_dtype=bfloat16"
VAR = ["var-d16", f"var-d16,{BF16}"]
TIMINGS = {  # the official way of a VAR is in float32, and a VAR is timed to its images; the others make codes
    "LlamaGen-L 256 and its DD1 student, batch 1": [
        *GPT_L, "llamagen-l-256,graphs=true,compile=true", *DD_L, *CODES_ONLY, "1", "--repeats", "3",
    ],
    "LlamaGen-XXL 384, batch 1": [
        "llamagen-xxl-384", "llamagen-xxl-384,graphs=true", "--compare", *RANDOM, *CODES_ONLY, "1", "--repeats", "2",
    ],
    "LlamaGen-3B 384, batch 1: bfloat16 and W4A8": [
        "llamagen-3b-384,graphs=true", "llamagen-3b-384,graphs=true,apply=w4a8", "--compare", *RANDOM, *CODES_ONLY, "1", "--repeats", "3",
    ],
    "LlamaGen-B 256, batch 1": [*GPT_B, *CODES_ONLY, "1", "--repeats", "3"],
    "LlamaGen-B 256, batch 32": [*GPT_B, *CODES_ONLY, "32", "--repeats", "3"],
    "embedded AR and student, batch 1": [
        "llamagen", "llamagen,graphs=true", "llamagen-dd1,graphs=true", "--compare", *CODES_ONLY, "1", "--repeats", "10",
    ],
    "embedded AR and seeded, batch 1": ["llamagen", "llamagen,sampler=seeded", "--compare", *CODES_ONLY, "1"],
    "VAR-d16 256, batch 1": [*VAR, f"var-d16,{BF16},graphs=true", *EAGER, "--batch-size", "1"],
    "VAR-d16 256 and its DD1 student, codes, batch 1": [
        "var-d16,graphs=true", "var-d16-dd1", "var-d16-dd1,graphs=true", "--compare", *RANDOM, *CODES_ONLY, "1", "--repeats", "5",
    ],
    "VAR-d30 256, codes, batch 1": ["var-d30", "var-d30,graphs=true", "--compare", *RANDOM, *CODES_ONLY, "1", "--repeats", "5"],
    "VAR-d16 256, batch 16": [*VAR, *EAGER, "--parts", "--batch-size", "16"],
    "CoDe VAR-d30:VAR-d16@8, batch 1": [
        f"var-d30,{BF16}", f"var-d30,{BF16},collab=var-d30:var-d16@8", "--compare", "--random-weights", "--batch-size", "1",
    ],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu-check"), help="folder for the results")
    out = parser.parse_args().out
    import torch

    out.mkdir(parents=True, exist_ok=True)
    return with_device(out) if torch.cuda.is_available() else without_device(out)


def with_device(out: Path) -> int:
    started = time.monotonic()
    result: dict[str, Any] = {"schema": 1, "started": now(), "environment": environment("cuda:0")}
    result["tests"] = run_tests(TESTS_S, ["-m", "gpu"])
    result["kernels"] = run_kernels(min(KERNELS_S, BUDGET_S - (time.monotonic() - started)), out)
    result["timings"] = {}
    for name, arguments in TIMINGS.items():
        result["timings"][name] = run_timing(name, arguments, BUDGET_S - (time.monotonic() - started), out)
    result |= {"finished": now(), "seconds": time.monotonic() - started}
    machine = re.sub(r"[^a-z0-9]+", "-", result["environment"]["gpu"].lower()).strip("-")
    write_json(out / f"{machine}.json", result)
    table = to_markdown(result)
    (out / f"{machine}.md").write_text(table)
    print(table)
    parts = [result["tests"], result["kernels"], *result["timings"].values()]
    return EXIT_OK if all(part["status"] == "ok" for part in parts) else EXIT_GATE


def without_device(out: Path) -> int:
    """What can be said without a device: kernels compile, keep their values in registers, and compute the right numbers when emulated."""
    print("no CUDA device: nothing is measured here. Kernels are compiled and run on the emulated device of the tests.", file=sys.stderr)
    started = time.monotonic()
    result: dict[str, Any] = {"schema": 1, "started": now(), "environment": environment("cpu"), "measured": False}
    result["compilation"] = compile_kernels()
    result["tests"] = run_tests(BUDGET_S - (time.monotonic() - started), ["-m", "not gpu and not slow", *map(str, EMULATED)])
    result |= {"finished": now(), "seconds": time.monotonic() - started}
    write_json(out / "no-device.json", result)
    text = no_device_markdown(result)
    (out / "no-device.md").write_text(text)
    print(text)
    failed = "failed" in (result["tests"]["status"], result["compilation"]["status"])
    return EXIT_GATE if failed else EXIT_RESOURCE


def compile_kernels() -> dict[str, Any]:
    """Every kernel for every architecture: registers, shared memory and spills. A spill is a failure; no nvcc is not."""
    from arsp.kernels import nvcc

    try:
        compiler = nvcc.find_nvcc()
    except ResourceError as error:
        return {"status": "not run", "reason": error.message}
    report: dict[str, Any] = {"nvcc": ".".join(map(str, nvcc.nvcc_version(str(compiler)))), "kernels": []}
    sources = [path for path in nvcc.source_files() if path.suffix == ".cu"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            objects = [Path(folder) / f"{path.stem}.o" for path in sources]
            said = pool.map(lambda source, target: nvcc.compile_object(source, nvcc.ARCHITECTURES, target, ptx=True), sources, objects)
            report["kernels"] = [
                {"file": source.name, **line} for source, text in zip(sources, said, strict=True) for line in nvcc.resources(text)
            ]
        except ResourceError as error:
            return report | {"status": "failed", "reason": error.message}
    spilled = [line for line in report["kernels"] if line["spill_stores"] or line["spill_loads"]]
    return report | ({"status": "failed", "reason": f"spills: {spilled}"} if spilled else {"status": "ok"})


def no_device_markdown(result: dict[str, Any]) -> str:
    """The result without a device for people: one line a file and architecture."""
    compilation, tests = result["compilation"], result["tests"]
    lines = [
        "# No CUDA device: nothing was measured",
        "",
        f"arsp {result['environment']['arsp']}, commit {result['environment']['commit']}, {result['started']}. What follows needs no "
        "device; it says nothing of speed, of the memory model or of real hardware.",
        "",
        f"- Kernels on the emulated device, layouts, build: {tests['status']} ({tests['summary']}).",
        f"- Compilation: {compilation['status']}"
        + (f" ({compilation['reason']})." if "reason" in compilation else f", nvcc {compilation['nvcc']}."),
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in compilation.get("kernels", ()):
        groups.setdefault((line["file"], line["arch"]), []).append(line)
    if groups:
        lines += ["", "| file | architecture | kernels | most registers | spills (bytes) |", "|---|---|---|---|---|"]
    for (file, arch), kernels in sorted(groups.items()):
        spills = sum(line["spill_stores"] + line["spill_loads"] for line in kernels)
        lines.append(f"| {file} | {arch} | {len(kernels)} | {max(line['registers'] for line in kernels)} | {spills} |")
    return "\n".join([*lines, *tests["failures"]]) + "\n"


def run(command: list[str], seconds: float) -> tuple[int | None, str, str]:
    """Exit code (None: out of time), stdout, stderr."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None, "", f"stopped after {seconds:.0f} s"
    return done.returncode, done.stdout, done.stderr


def run_tests(seconds: float, which: list[str]) -> dict[str, Any]:
    """Some tests: status, the summary line of pytest, and the failures it names."""
    print("tests ...", file=sys.stderr)
    code, text, errors = run([sys.executable, "-m", "pytest", "-q", *which, "-p", "no:cacheprovider"], seconds)
    lines = [line for line in text.splitlines() if line.strip()]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"status": "ok" if code == 0 else "failed", "summary": lines[-1].strip("= ") if lines else errors[-500:], "failures": failures}


def run_kernels(seconds: float, out: Path) -> dict[str, Any]:
    """gpu_kernels.py: status, its lines, and the groups of cases that failed."""
    print("kernels ...", file=sys.stderr)
    path = out.resolve() / "kernels.json"
    path.unlink(missing_ok=True)
    code, _, errors = run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_kernels.py"), "--out", str(path), "--seconds", str(0.8 * seconds)], seconds
    )
    result = json.loads(path.read_text()) if path.exists() else {"lines": [], "failed": {}}
    failed = dict(result["failed"]) if code == EXIT_GATE or code == EXIT_OK else {**result["failed"], "all": errors.strip()[-1000:]}
    lines = {key: result.get(key) for key in ("lines", "copy_gb_per_s")}
    return {"status": "failed", "reason": str(failed), **lines} if failed else {"status": "ok", **lines}


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
        "| what, codes (of a VAR: images) | stack | p50 ms / batch | images/s | passes | peak MB | share of bandwidth | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, timing in result["timings"].items():
        if timing["status"] != "ok":
            lines.append(f"| {name} | {timing['status']}: {timing['reason'].splitlines()[0]} | | | | | | |")
            continue
        ratios = {metric["stack"]: metric["value"] for metric in timing["metrics"] if metric["name"] == "speedup"}
        for entry in timing["stacks"]:
            cost, ratio = entry["cost"], ratios.get(entry["name"])
            memory = cost["peak_mem_bytes"]
            cells = [name, entry["name"], f"{cost['latency_ms']['p50']:.1f}", f"{cost['images_per_s']:.2f}", f"{cost['passes']:.0f}"]
            cells += ["-" if memory is None else f"{memory / 1e6:.0f}", bandwidth_share(cost, timing), f"{ratio:.2f}x" if ratio else ""]
            lines.append("| " + " | ".join(cells) + " |")
    kernels = result["kernels"]
    lines += ["", f"Kernels: {kernels['status']}" + (f" ({kernels['reason']})" if "reason" in kernels else "") + "."]
    if kernels["lines"]:
        lines[-1] += f" Bandwidth of a copy: {kernels['copy_gb_per_s']:.0f} GB/s."
        lines += [
            "",
            "| op | case | us | roofline us | share of copy bandwidth | fastest other | speed-up |",
            "|---|---|---|---|---|---|---|",
        ]
    for line in kernels["lines"]:
        ratio = f"{line['ratio']:.2f}x [{line['low']:.2f}, {line['high']:.2f}]" if "ratio" in line else ""
        cells = [
            line["op"],
            line["case"],
            f"{line['us']:.1f}",
            f"{line['roof_us']:.1f}",
            f"{100 * line['share']:.0f} %",
            line.get("against", ""),
            ratio,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *result["tests"]["failures"]]) + "\n"


def bandwidth_share(cost: dict[str, Any], timing: dict[str, Any]) -> str:
    """The time to read the weights and the valid cache of every pass at the bandwidth of this device, over the time taken."""
    if "moved_bytes_per_batch" not in cost:
        return "-"
    return f"{100 * cost['moved_bytes_per_batch'] / timing['roofline']['bytes_per_s'] / (cost['latency_ms']['p50'] / 1e3):.0f} %"


if __name__ == "__main__":
    sys.exit(main())
