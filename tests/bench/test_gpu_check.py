"""benchmarks/gpu_check.py: what it does without a device, what its exit codes mean, and its tables."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from arsp.errors import ResourceError
from arsp.kernels import nvcc

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"
spec = importlib.util.spec_from_file_location("gpu_check", PATH)
gpu_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_check)

PASSED = {"status": "ok", "summary": "3 passed", "failures": []}
FAILED = {"status": "failed", "summary": "1 failed", "failures": ["FAILED tests/x.py"]}
SPILLS = """ptxas info    : Compiling entry function 'k' for 'sm_80'
    8 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script in ``tmp_path`` and returns its exit code."""

    def call(device, tests):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path)])
        monkeypatch.setattr(gpu_check, "run_tests", lambda seconds, which: tests)
        return gpu_check.main()

    return call


def test_without_a_device_kernels_are_compiled_and_emulated_and_nothing_is_called_measured(run, tmp_path, monkeypatch, capsys):
    compiled = []

    def compile_object(source, architectures, target, ptx):
        compiled.append((source.name, architectures, ptx))
        return "ptxas info    : Compiling entry function 'k' for 'sm_80'\nptxas info    : Used 96 registers, 128 bytes smem"

    monkeypatch.setattr(nvcc, "find_nvcc", lambda: Path("/nvcc"))
    monkeypatch.setattr(nvcc, "nvcc_version", lambda path: (13, 0))
    monkeypatch.setattr(nvcc, "compile_object", compile_object)
    assert run(False, PASSED) == 5
    assert {name for name, *_ in compiled} == {path.name for path in nvcc.source_files() if path.suffix == ".cu"}
    assert all(archs == nvcc.ARCHITECTURES and ptx for _, archs, ptx in compiled)
    record = json.loads((tmp_path / "no-device.json").read_text())
    assert record["measured"] is False and "timings" not in record and record["compilation"]["kernels"][0]["registers"] == 96
    text = (tmp_path / "no-device.md").read_text()
    assert text.startswith("# No CUDA device: nothing was measured") and "| verify.cu | sm_80 | 1 | 96 | 0 |" in text
    assert "nothing is measured" in capsys.readouterr().err
    assert run(False, FAILED) == 7


def test_spills_and_failing_compilers_fail_the_check_and_a_missing_one_does_not(run, tmp_path, monkeypatch):
    def missing():
        raise ResourceError("no CUDA compiler")

    monkeypatch.setattr(nvcc, "find_nvcc", missing)
    assert run(False, PASSED) == 5 and "not run (no CUDA compiler)" in (tmp_path / "no-device.md").read_text()
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: Path("/nvcc"))
    monkeypatch.setattr(nvcc, "nvcc_version", lambda path: (13, 0))
    monkeypatch.setattr(nvcc, "compile_object", lambda *arguments, ptx: SPILLS)
    assert run(False, PASSED) == 7 and "spills" in (tmp_path / "no-device.md").read_text()

    def broken(*arguments, ptx):
        raise ResourceError("nvcc exit 2")

    monkeypatch.setattr(nvcc, "compile_object", broken)
    assert run(False, PASSED) == 7 and "failed (nvcc exit 2)" in (tmp_path / "no-device.md").read_text()


def test_with_a_device_the_tables_hold_kernels_and_stacks(run, tmp_path, monkeypatch):
    line = {"op": "w4a8_linear", "case": "3B, 1 rows", "us": 9.0, "roof_us": 6.5, "share": 0.72, "against": "bfloat16"}
    line |= {"ratio": 2.9, "low": 2.8, "high": 3.0}
    kernels = {"status": "ok", "lines": [line], "copy_gb_per_s": 4000.0}
    cost = {"latency_ms": {"p50": 10.0}, "images_per_s": 1.0, "passes": 5.0, "peak_mem_bytes": None}
    stacks = [{"name": "a", "cost": cost | {"moved_bytes_per_batch": 6e6}}, {"name": "b", "cost": cost}]
    timing = {"status": "ok", "stacks": stacks, "metrics": [], "roofline": {"bytes_per_s": 1e9}}
    monkeypatch.setattr(
        gpu_check, "environment", lambda device: {"gpu": "Some GPU", "torch": "2", "cuda": "13", "arsp": "0", "commit": "c"}
    )
    monkeypatch.setattr(gpu_check, "run_kernels", lambda seconds, out: kernels)
    monkeypatch.setattr(gpu_check, "run_timing", lambda name, arguments, seconds, out: timing)
    assert run(True, PASSED) == 0
    text = (tmp_path / "some-gpu.md").read_text()
    assert (
        "| w4a8_linear | 3B, 1 rows | 9.0 | 6.5 | 72 % | bfloat16 | 2.90x [2.80, 3.00] |" in text
        and "Bandwidth of a copy: 4000 GB/s" in text
    )
    assert "| a | 10.0 | 1.00 | 5 | - | 60 % |" in text and "| b | 10.0 | 1.00 | 5 | - | - |" in text
    assert json.loads((tmp_path / "some-gpu.json").read_text())["kernels"]["lines"] == [line]
    assert run(True, FAILED) == 7
    kernels |= {"status": "failed", "reason": "verify: no"}
    assert run(True, PASSED) == 7
