"""What ``arsp bench`` knows of a schedule beside its time: multiply-adds, attention that was run, memory behind the hand-over."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_var
from command_line import invoke, record_of

from arsp.bench import cost_var
from arsp.zoo.load import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
SIDES = (1, 2, 3, 4, 6)
CONFIG, VQ = replace(tiny_var.CONFIG, patch_nums=SIDES), replace(tiny_var.VQ, patch_nums=SIDES)
SMALL = replace(CONFIG, depth=1, embed_dim=8)
QUICK = ("--repeats", 1, "--warmup", 0)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a big and a small teacher of five scales."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("arsp.sparse.policy.skips_windows", lambda *tensors: True)  # also where nothing can be compiled
    tiny_var.teacher_bundle(tmp_path / "big", CONFIG, vq=VQ)
    tiny_var.teacher_bundle(tmp_path / "small", SMALL, seed=5, vq=VQ)


def bench(*stacks):
    record = record_of(invoke("bench", "--compare", *stacks, *QUICK, "--json", "-q"))
    return [entry["cost"] for entry in record["stacks"]]


def test_windows_and_dense_in_one_run(place):
    dense, windowed = bench("big", "big,apply=litevar=r1")
    (report,) = windowed["attention"]
    assert "attention" not in dense and report["executed_share"] == report["pairs"]["executed"] / report["pairs"]["dense"] < 1
    assert dense["simulated"] is windowed["simulated"] is False
    counted = {part["name"]: part["macs"] for part in windowed["macs_by_part"]}
    plain = {part["name"]: part["macs"] for part in dense["macs_by_part"]}
    assert counted["attention"] == pytest.approx(plain["attention"] * report["executed_share"])
    assert {name: macs for name, macs in counted.items() if name != "attention"} == {
        name: macs for name, macs in plain.items() if name != "attention"
    }
    table = invoke("bench", "--compare", "big", "big,apply=litevar=r1", *QUICK, "-q").stdout
    assert "attention run" in table and "100" in table and f"{100 * report['executed_share']:.4g}" in table


def test_two_models_and_the_big_one_alone_in_one_run(place):
    alone, both = bench("big", "big,collab=big:small@3")
    small = load_model("small").module
    weights = 4 * sum(parameter.numel() for parameter in small.parameters())
    cache = 2 * 2 * SMALL.embed_dim * sum(pn * pn for pn in SIDES[:-1]) * 4
    assert (both["last_kv_bytes"], both["last_bytes"], both["last_weight_bytes"]) == (cache, weights + cache, weights)
    assert "last_bytes" not in alone and both["weight_bytes"] == alone["weight_bytes"] + weights
    found = cost_var.collab_cost(CONFIG, SMALL, 3)
    decoder = cost_var.total_macs(cost_var.tokenizer_parts(VQ))
    assert (alone["macs"], both["macs"]) == (found.alone + decoder, found.draft + found.refine + decoder)
