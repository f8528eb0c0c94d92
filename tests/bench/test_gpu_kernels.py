"""benchmarks/gpu_kernels.py at tiny sizes on the CPU: every case runs, and bytes and shares are what they are called."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_kernels.py"
spec = importlib.util.spec_from_file_location("gpu_kernels", PATH)
gpu_kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_kernels)


@pytest.fixture(scope="module")
def bench():
    return gpu_kernels.Bench("cpu", calls=2, cold_bytes=1 << 12, repeats=2)


def check(lines, num):
    lines = list(lines)
    assert len(lines) == num
    for line in lines:
        assert line["us"] > 0 and line["bytes"] > 0 and line["share"] == pytest.approx(line["roof_us"] / line["us"])
        assert line.get("against", "torch") in line.get("others_us", {"torch": 1})
    return {(line["op"], line["case"]): line for line in lines}


def test_layers_count_weights_scales_zero_points_and_rows(bench):
    lines = check(gpu_kernels.bench_linear(bench, {"toy w1 and w3": (64, 256)}, (1, 65)), 8)
    assert lines["w4a8_swiglu", "toy w1 and w3, 1 rows"]["bytes"] == 64 * 128 + 64 * 2 * 5 + 256 + 32
    assert set(lines["w8a8_linear, wgmma", "toy w1 and w3, 65 rows"]["others_us"]) == {"mma.sync", "bfloat16"}
    lines = check(gpu_kernels.bench_linear(bench, {"toy": (48, 256)}, (1, 3)), 4)
    assert lines["w4a8_linear", "toy, 3 rows"]["bytes"] == 48 * 128 + 48 * 2 * 5 + 3 * (256 + 96)
    assert lines["w8a8_linear", "toy, 1 rows"]["bytes"] == 48 * 256 + 48 * 4 + 256 + 96
    assert lines["w8a8_linear", "toy, 1 rows"]["operations"] == 2 * 48 * 256


def test_producers_read_what_they_read_and_write_codes_and_scales(bench):
    lines = check(gpu_kernels.bench_producers(bench, ((3, 64),)), 6)
    assert lines["rms_norm_quantize", "3 x 64"]["bytes"] == 3 * 64 * 3 + 12
    assert lines["swiglu_quantize", "3 x 64"]["bytes"] == 3 * 64 * 5 + 12


def test_attention_names_the_share_of_pairs_and_the_fastest_dense_one(bench, monkeypatch):
    monkeypatch.setitem(gpu_kernels.SIDES, 256, (1, 2, 4))
    ((_, line),) = check(gpu_kernels.bench_attention(bench, [(256, 1, 1)]), 1).items()
    assert 0 < line["kept"] < 1 and line["against"] == min(line["others_us"], key=line["others_us"].get)


def test_attention_to_a_cache_counts_the_slots_that_rows_hold(bench, monkeypatch):
    monkeypatch.setitem(gpu_kernels.DECODERS, "toy", (2, 8))
    lines = check(gpu_kernels.bench_decode_attention(bench, [("toy", 1, 20, 3, False), ("toy", 1, 20, 1, True)]), 2)
    whole, ragged = lines.values()
    assert whole["bytes"] == 2 * 2 * 8 * (2 * (17 + 17) + 6 * 2 * 3) and any("mask" not in name for name in whole["others_us"])
    assert ragged["bytes"] == 2 * 2 * 8 * (2 * (9 + 19) + 6 * 2 * 1) and all("mask" in name for name in ragged["others_us"])


def test_draws_and_flows_run(bench):
    assert len(check(gpu_kernels.bench_verify(bench, (1,), 100), 9)) == 9
    ((_, line),) = check(gpu_kernels.bench_flow_map(bench, {"toy": (3, 50, 8, 20)}), 1).items()
    assert 1 <= line["evaluations"] <= 65


def test_trajectories_say_what_share_the_teacher_has(bench):
    ((_, line),) = check(gpu_kernels.bench_trajectories(bench, "llamagen", 2), 1).items()
    assert line["against"] == "teacher alone" and 0 < line["ratio"] and line["evaluations"] >= 1


def test_copies_are_cold_together(bench):
    assert len(bench.copies(1 << 11, object)) == 2 and len(bench.copies(1, object)) == 2, "at most one a call"
    assert len(gpu_kernels.Bench("cpu", calls=9, cold_bytes=100, repeats=1).copies(30, object)) == 4
