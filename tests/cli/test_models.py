from pathlib import Path

import pytest
import tiny_models
import torch
from command_line import invoke, record_of

from arsp.runs import sha256_file
from arsp.zoo import bundle, convert, load
from arsp.zoo.load import card_names


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "cache_root", lambda: tmp_path / "cache")
    tiny_models.student_bundle(tmp_path / "student", tiny_models.teacher_bundle(tmp_path / "teacher"))
    tiny_models.tokenizer_bundle(tmp_path / "tok")
    return tmp_path


def arsp(*words):
    return invoke("models", *words)


def refused(result, code, *words):
    assert result.exit_code == code, f"exit {result.exit_code}, expected {code}: {result.stderr}"
    missing = [word for word in words if word not in result.stderr]
    assert not missing and "Traceback" not in result.stderr, f"{missing} not in: {result.stderr}"
    assert result.stdout == ""


def test_all_models_are_listed_with_where_their_weights_are(place):
    rows = {row["name"]: row for row in record_of(arsp("ls", "--json"))["models"]}
    assert list(rows) == card_names()
    assert rows["llamagen"]["weights"] == "embedded" and rows["llamagen"]["tokens"] == 16 and rows["llamagen-dd1"]["kind"] == "student"
    assert rows["llamagen-b-256"]["weights"] == "not here" and rows["llamagen-b-384"]["tokens"] == 576
    table = arsp("ls")
    assert table.exit_code == 0 and all(name in table.stdout for name in rows)


def test_every_model_known_by_name_can_be_described(place):
    for name in card_names():
        details = record_of(arsp("info", name, "--json"))
        assert details["name"] == name and details["parameters"] > 10_000 and details["about"], name


def test_official_files_in_the_cache_are_found(place):
    (place / "cache" / "checkpoints").mkdir(parents=True)
    (place / "cache" / "checkpoints" / "c2i_B_256.pt").write_bytes(b"weights")
    rows = {row["name"]: row for row in record_of(arsp("ls", "--json"))["models"]}
    assert rows["llamagen-b-256"]["weights"] == "here" and rows["llamagen-l-256"]["weights"] == "not here"
    assert record_of(arsp("verify", "llamagen-b-256", "--json"))["files"][0]["file"] == "c2i_B_256.pt"


@pytest.mark.parametrize("name", ["teacher", "student", "tok"])
def test_bundles_are_described_without_reading_their_weights(place, monkeypatch, name):
    monkeypatch.setattr(bundle, "load_weights", lambda *a: pytest.fail("weights were read"))
    details = record_of(arsp("info", name, "--json"))
    module = {"teacher": tiny_models.gpt_model, "student": tiny_models.student_model, "tok": tiny_models.vq_model}[name]()
    assert details["parameters"] == sum(p.numel() for p in module.parameters())
    assert details["files"]["model.safetensors"] == (place / name / "model.safetensors").stat().st_size
    assert details["known"] == ([0, 5] if name == "student" else None)
    table = arsp("info", name)
    assert table.exit_code == 0 and "parameters" in table.stdout


def test_official_files_are_described_from_their_shapes(place, monkeypatch):
    monkeypatch.setitem(convert._HEADS, (1, 16), 2)
    torch.save({"ema": tiny_models.student_model().state_dict()}, place / "llamagen-B.pt")
    torch.save({"model": tiny_models.gpt_model().state_dict()}, place / "c2i_384.pt")
    assert record_of(arsp("info", "llamagen-B.pt", "--json"))["kind"] == "student"
    details = record_of(arsp("info", "c2i_384.pt", "--json"))
    assert details["kind"] == "teacher" and details["config"]["block_size"] == 576


def test_verify_lists_the_hash_of_every_file(place):
    record = record_of(arsp("verify", "teacher", "--json"))
    assert record["ok"] and {f["file"]: f["sha256"] for f in record["files"]} == {
        p.name: sha256_file(p) for p in (place / "teacher").glob("*.safetensors")
    }


def test_verify_of_a_damaged_or_missing_file_is_exit_4(place):
    file = place / "teacher" / "tokenizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused(arsp("verify", "teacher"), 4, "tokenizer.safetensors", "damaged")
    file.unlink()
    refused(arsp("verify", "teacher"), 4, "tokenizer.safetensors", "missing")
    refused(arsp("verify", "llamagen-b-256"), 4, "c2i_B_256.pt")


def test_the_embedded_models_are_intact(place):
    for name in ("llamagen", "llamagen-small", "llamagen-dd1"):
        assert record_of(arsp("verify", name, "--json"))["ok"], name
    assert sum(p.stat().st_size for p in load.TINY.rglob("*") if p.is_file()) <= 25e6


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["info", "lamagen"], 3, "Did you mean: llamagen"),
        (["verify", "lamagen"], 3, "Did you mean: llamagen"),
        (["info", "runs/none"], 4, "no such file"),
        (["info", "empty"], 4, "not a bundle"),
        (["info", "x.pt"], 4, "x.pt"),
        (["ls", "--device", "cpu"], 2, ""),
        (["info"], 2, ""),
        (["info", "llamagen", "a=1"], 2, "no configuration"),
    ],
)
def test_bad_input_ends_in_its_exit_code(place, words, code, said):
    (place / "empty").mkdir()
    Path("x.pt").write_text("no weights")
    refused(arsp(*words), code, said)


def test_a_dry_run_says_what_it_would_do(place):
    assert record_of(arsp("verify", "teacher", "--dry-run", "--json")) == {"plan": {"verify": "teacher"}}
