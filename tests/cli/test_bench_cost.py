"""``arsp bench cost`` on official sizes without weights."""

import pytest
from command_line import invoke, record_of, refused

from arsp.bench import cost as raster
from arsp.models.llamagen import GPTConfig
from arsp.zoo.load import resolve


def count(*words):
    return record_of(invoke("bench", "cost", *words, "--json"))


def test_litevar_figures_each_with_its_formula():
    record = count("--model", "var-d30", "--windows", "kept:0.2966", "--share", "map")
    lines = {line["name"]: line for line in record["counted"]["attention"]}
    assert "286,434" in lines["attention, dense"]["formula"]
    saved = [
        round(100 * lines[f"attention, {name}"]["saved"], 1)
        for name in ("windowed", "windowed and shared", "as the LiteVAR paper counts sharing")
    ]
    assert saved == [70.3, 77.8, 85.2] and all(line["formula"] for line in lines.values())
    names = [part["name"] for part in record["counted"]["parts"]]
    assert names == [
        "word_embed",
        "ada_lin",
        "head ada_lin",
        "qkv",
        "attention",
        "proj",
        "fc1",
        "fc2",
        "head",
        "f_hat",
        "tokenizer decoder",
    ]
    assert record["cost"]["macs"] == sum(part["macs"] for part in record["counted"]["parts"])


def test_windows_are_given_by_geometry():
    kept = lambda windows: 1 - count("--model", "var-d16", "--windows", windows)["counted"]["attention"][1]["saved"]
    assert [round(kept(windows), 3) for windows in ("1d:f=1", "1d:f=3", "2d:r=2")] == [0.221, 0.526, 0.193]


def test_collaboration_and_guidance():
    assert count("--collab", "var-d30:var-d16@8")["cost"]["ratio"] == pytest.approx(1.90, abs=0.01)
    both, one = (count("--model", "var-d16", *more)["cost"] for more in ((), ("--no-guidance",)))
    assert both["kv_bytes"] == 2 * one["kv_bytes"] and both["transformer_macs"] > 1.9 * one["transformer_macs"]


def test_raster_models_are_counted_by_their_own_rules():
    record = count("--model", "llamagen-b-256")
    expected = raster.decode_macs(GPTConfig.from_dict(resolve("llamagen-b-256").config), rows=2)
    assert record["cost"]["macs"] == expected == sum(part["macs"] for part in record["counted"]["parts"])


def test_the_table_shows_formulas_and_totals():
    shown = invoke("bench", "cost", "--model", "var-d36-512", "--windows", "2d:r=1").stdout
    assert "3,269,850" in shown and "R 6 C^2" in shown and "total" in shown and "4x4 query tiles" in shown


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--windows", "3d"), 3, "2d:r=R"),
        (("--windows", "2d:r=0"), 3, "2d:r=R"),
        (("--windows", "kept:1.2.3"), 3, "2d:r=R"),
        (("--model", "llamagen", "--share", "map"), 3, "no VAR"),
        (("--collab", "var-d30:var-d16@10"), 3, "N <= 9"),
        (("--collab", "var-d30:var-d16@8", "--share", "map"), 2, "two dense models"),
        (("--collab", "var-d30:llamagen@8"), 3, "no VAR"),
        (("--share", "map", "--no-guidance"), 2, "no halves"),
        (("--apply", "litevar=x", "--windows", "2d:r=1"), 2, "its own windows"),
        (("--apply", "quant=x"), 3, "litevar=PROFILE"),
        (("--apply", "litevar"), 3, "no packaged profile"),
        (("--apply", "litevar=nowhere"), 4, "not a bundle"),
    ],
)
def test_bad_input_is_refused(words, code, message, runs_dir):
    refused(invoke("bench", "cost", *words), code, message)
    assert not list(runs_dir.iterdir()), "nothing is left behind"
