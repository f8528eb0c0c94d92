"""``arsp bench`` from its arguments to its record; what is timed is tested in tests/bench."""

import json
import os
import subprocess
import sys
from typing import get_args

import pytest

from arsp.bench import compare, cost
from arsp.bench.timing import Timing
from arsp.cli import bench as cli
from arsp.errors import ConfigError, UsageError


def arsp(*arguments, tmp_path, code=0):
    env = {**os.environ, "ARSP_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "arsp", *arguments], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"exit {done.returncode}, expected {code}\n{done.stderr}"
    return done


def test_stack_text_is_a_name_and_configuration_values():
    recipe, dtype = cli.parse_stack("llamagen,cfg=2,top_p=0.9,student_steps=1", False, "float32")
    assert dtype == "float32" and cli.parse_stack("llamagen,dtype=bfloat16", False, "float32")[1] == "bfloat16"
    assert (recipe.model, recipe.cfg, recipe.top_p, recipe.student_steps, recipe.random_weights) == ("llamagen", 2.0, 0.9, 1, False)
    with pytest.raises(UsageError, match="'fast' is not key=value"):
        cli.parse_stack("llamagen,fast", False, "float32")
    with pytest.raises(ConfigError) as caught:
        cli.parse_stack("llamagen,top_q=0.9", False, "float32")
    assert "top_p" in f"{caught.value.message} {caught.value.hint}"


def test_cost_block_follows_from_the_rounds():
    contender = compare.Contender("x", lambda: None, num=12, batch_size=4, cost={"kv_bytes": 7}, stats=lambda: {"passes": 16})
    block = contender.measured(Timing("x", (3.0, 6.0, 9.0), 100))
    assert block["latency_ms"]["p50"] == pytest.approx(2000.0), "6 s for three batches"
    assert block["images_per_s"] == pytest.approx(2.0)
    assert (block["kv_bytes"], block["passes"], block["peak_mem_bytes"], block["simulated"]) == (7, 16, 100, False)


def test_equal_names_are_told_apart():
    assert cli.unused("a", []) == "a"
    assert cli.unused("a", ["a", "a #2"]) == "a #3"


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["bench", "--compare", "llamagen-b-256", "--random-weights"], 2, "needs two stacks"),
        (["bench", "lamagen"], 3, "llamagen"),
        (["bench", "llamagen,dtype=int8"], 2, "unknown dtype"),
        (["bench", "llamagen,decoder_dtype=bfloat16", "--no-decode"], 3, "only codes are made"),
        (["bench", "llamagen-b-256", "--repeats", "0"], 3, "repeats"),
        (["bench", "llamagen-b-256"], 4, "not on this machine"),
        (["bench", "kernels", "--op", "large_linear"], 3, "op"),
        (["bench", "kernels", "--op", "windowed_scale_attention", "--rows", "2"], 2, "--rows has no effect"),
    ],
)
def test_bad_input_gives_one_message_and_its_exit_code(tmp_path, arguments, code, words):
    done = arsp(*arguments, tmp_path=tmp_path, code=code)
    assert words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == "" and not (tmp_path / "runs").exists(), "nothing is left behind"


def test_dry_run_prints_the_plan_and_loads_nothing(tmp_path):
    done = arsp("bench", "llamagen-b-256", "--random-weights", "--baseline", "eager", "--dry-run", "--json", tmp_path=tmp_path)
    plan = json.loads(done.stdout)["plan"]
    assert plan["baseline"] == "eager" and plan["stacks"][0]["model"] == "llamagen-b-256"
    assert not (tmp_path / "runs").exists()


def test_record_of_a_comparison_holds_every_stack_and_the_ratio(tmp_path, monkeypatch):
    from arsp.runs import Run

    contenders = [
        compare.Contender("eager", lambda: None, 1, 1, {"name": "eager"}, {}),
        compare.Contender(
            "ours",
            lambda: None,
            1,
            1,
            {"name": "ours", "dtype": "float32"},
            {"moved_bytes_per_batch": 8e9, "macs": 1.0},
            lambda: {"passes": 4},
        ),
    ]
    timings = {"eager": Timing("eager", (4.0, 8.0, 6.0), 5), "ours": Timing("ours", (2.0, 4.0, 3.0), None)}
    monkeypatch.setattr(cost, "measure_roofline", lambda device: cost.Roofline(8e9, 1e9))
    config = cli.BenchConfig(stacks=["x"], baseline="eager", repeats=3)
    with Run.open("bench", "x", config, tmp_path / "run", resume=False) as run:
        run.record["environment"]["device"] = "cpu"
        cli.fill_record(run, config, contenders, timings, True)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (ratio,) = (metric for metric in record["metrics"] if metric["name"] == "speedup")
    assert (ratio["value"], ratio["low"], ratio["high"], ratio["stack"]) == (2.0, 2.0, 2.0, "ours")
    assert record["stack"]["name"] == "ours" and record["cost"]["ceiling_ms"] == pytest.approx(1000.0)
    assert [entry["name"] for entry in record["stacks"]] == ["eager", "ours"]
    assert "2.00x" in _text(cli.bench_table(record))


def test_kernel_record_holds_a_ratio_for_every_shape_of_the_chosen_ops(tmp_path, monkeypatch):
    from arsp.bench import kernels as bench_kernels
    from arsp.bench.timing import measure
    from arsp.errors import ResourceError
    from arsp.kernels import build

    try:
        build.ensure_library()
    except ResourceError as error:
        pytest.skip(error.message)
    monkeypatch.setattr(bench_kernels, "measure", lambda work, **options: measure(work, repeats=1, warmup=0, memory=False))
    monkeypatch.setattr(bench_kernels, "MAPS", {48: (1, 2, 3), 64: (1, 2, 4)})
    monkeypatch.setattr(bench_kernels, "SHAPES", {"wo": (64, 32)})
    monkeypatch.setattr(bench_kernels, "QUANTISED_SHAPES", {"proj": (64, 128)})
    monkeypatch.setattr(bench_kernels, "STREAM_BYTES", 1)
    monkeypatch.setattr(bench_kernels, "WINDOW_ROWS", 3)
    from typer.testing import CliRunner

    from arsp.cli.app import app

    monkeypatch.setenv("ARSP_RUNS", str(tmp_path))
    expected = {
        "small_linear": ["wo, 3 rows"],
        "w8a8_linear": ["proj, 3 rows"],
        "w4a8_linear": ["proj, 3 rows"],
        "quantize_per_token": ["width 128, 3 rows", "width 128, rotated, 3 rows"],
        **{name: ["width 128, 3 rows"] for name in get_args(cli.RowOp)[1:]},
        "windowed_scale_attention": [f"d16 {px} px, window {r}, 2 rows" for px in (48, 64) for r in (1, 2, 3)],
        "cached_attention": [f"{name} slots, 2 rows" for name in ("B, 64", "B, 256", "XL, 576")],
        "keyed_argmax": ["plain, 3 rows"],
        "verify": ["plain, 3 rows", "top-k 2000, top-p 0.95, 3 rows"],
    }
    kept = {}
    for op, names in (("all", list(expected)), *((name, [name]) for name in expected)):
        rows = ["--rows", "3"] if set(cli.LAYER_OPS) & set(names) else []
        done = CliRunner().invoke(app, ["bench", "kernels", "--op", op, *rows, "--threads", "1", "--json"])
        assert done.exit_code == 0, done.output
        metrics = json.loads(done.stdout)["metrics"]
        assert {metric["name"] for metric in metrics} == {"ratio"}
        assert [metric["protocol"] for metric in metrics] == [line for name in names for line in expected[name]]
        assert all(metric["value"] > 0 and metric["low"] <= metric["value"] <= metric["high"] for metric in metrics)
        kept[op] = metrics[0].get("kept")
    # pairs along one side: 3 of 3 with the map of side 1, 4 of 6 with side 2, 7 of 9 with side 3
    assert kept["windowed_scale_attention"] == pytest.approx((3**2 + 4**2 + 7**2) / (9 * 14))


def _text(table):
    from rich.console import Console

    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()
