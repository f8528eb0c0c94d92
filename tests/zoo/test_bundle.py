import json
import os

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from arsp.errors import InputError
from arsp.runs import sha256_file
from arsp.zoo import bundle
from arsp.zoo.load import load_model, load_tokenizer, resolve, resolve_tokenizer, verify


@pytest.fixture
def teacher(tmp_path):
    return tiny_models.teacher_bundle(tmp_path / "teacher")


def edit(path, **changes):
    """Change the manifest of a bundle; None removes an entry."""
    manifest = json.loads((path / "arsp.json").read_text()) | changes
    (path / "arsp.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def put(path, weights, name="model.safetensors"):
    """Replace a weights file and make its stored hash agree."""
    save_file(weights, path / name)
    agree(path)


def agree(path):
    """Write the hashes of the files as they are now into the manifest."""
    edit(path, sha256={file.name: sha256_file(file) for file in path.glob("*.safetensors")})


def refused(path, *words):
    with pytest.raises(InputError) as caught:
        load_model(str(path))
    text = f"{caught.value.message} {caught.value.hint}"
    missing = [word for word in words if word not in text]
    assert not missing and "\n" not in caught.value.message, f"{missing} not in: {text}"


def test_a_bundle_loads_what_was_saved(teacher):
    loaded = load_model(str(teacher))
    for key, value in tiny_models.gpt_model().state_dict().items():
        assert torch.equal(loaded.module.state_dict()[key], value), key
    assert loaded.sha256 == sha256_file(teacher / "model.safetensors")
    assert loaded.source.card["classes"] == tiny_models.CLASSES


def test_a_run_directory_stands_for_the_bundle_in_it(tmp_path):
    tiny_models.teacher_bundle(tmp_path / "run" / "bundle")
    assert resolve(str(tmp_path / "run")).path == tmp_path / "run" / "bundle"


def test_a_failing_save_leaves_nothing(tmp_path):
    weights = tiny_models.gpt_model().state_dict()
    with pytest.raises(AttributeError):
        bundle.save_bundle(tmp_path / "b", family="llamagen", kind="teacher", config={}, model={**weights, "broken": 3}, tokenizer=None)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_save_over_an_old_bundle_keeps_the_old_one(teacher, monkeypatch):
    before = sha256_file(teacher / "model.safetensors")
    monkeypatch.setattr(bundle, "write_json", lambda path, obj: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tiny_models.tokenizer_bundle(teacher)
    assert [p.name for p in teacher.parent.iterdir()] == ["teacher"]
    assert sha256_file(teacher / "model.safetensors") == before and resolve(str(teacher)).kind == "teacher"


def test_weights_of_another_content_are_refused(teacher):
    content = bytearray((teacher / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (teacher / "model.safetensors").write_bytes(content)
    refused(teacher, "damaged", "SHA-256", "model.safetensors")
    with pytest.raises(InputError, match="damaged"):
        verify(str(teacher))


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_truncated_weights_are_refused_even_when_the_manifest_agrees(teacher, share):
    content = (teacher / "model.safetensors").read_bytes()
    (teacher / "model.safetensors").write_bytes(content[: int(share * len(content))])
    refused(teacher, "model.safetensors")
    agree(teacher)
    refused(teacher, "model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.safetensors"])
def test_a_missing_weights_file_is_named(teacher, name):
    (teacher / name).unlink()
    if name == "model.safetensors":
        refused(teacher, name, "missing")
    with pytest.raises(InputError, match=name):
        verify(str(teacher))


def test_a_teacher_whose_own_tokenizer_is_missing_says_so(teacher):
    (teacher / "tokenizer.safetensors").unlink()
    refused(teacher, "tokenizer.safetensors", "missing")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(teacher, value):
    weights = load_file(teacher / "model.safetensors")
    weights["norm.weight"][3] = value
    put(teacher, weights)
    refused(teacher, "norm.weight", "NaN or infinite")


def test_weights_of_another_shape_are_refused_with_both_shapes(teacher):
    weights = load_file(teacher / "model.safetensors")
    put(teacher, {**weights, "norm.weight": torch.ones(17)})
    refused(teacher, "norm.weight: (17,) instead of (16,)")


def test_missing_and_foreign_keys_are_counted_and_named(teacher):
    weights = load_file(teacher / "model.safetensors")
    del weights["output.weight"]
    put(teacher, {**weights, "extra": torch.ones(1)})
    refused(teacher, "missing 1 (output.weight)", "unexpected 1 (extra)")


def test_a_newer_schema_asks_for_an_upgrade(teacher):
    edit(teacher, schema=bundle.SCHEMA + 1)
    refused(teacher, f"schema {bundle.SCHEMA + 1}", "Upgrade")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "3", "{}", '{"schema": "one"}', "\udcff"])
def test_a_manifest_that_is_none_is_refused(teacher, text):
    (teacher / "arsp.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(teacher, "arsp.json")


@pytest.mark.parametrize(
    "changes", [{"kind": "poem"}, {"kind": None}, {"config": [1]}, {"config": {}}, {"sha256": "x"}, {"family": 7}, {"tokenizer": "vq"}]
)
def test_a_manifest_with_foreign_entries_is_refused(teacher, changes):
    edit(teacher, **changes)
    refused(teacher, str(teacher))


def test_a_folder_without_manifest_is_no_bundle(tmp_path):
    refused(tmp_path, "not a bundle")


def test_a_student_bundle_needs_its_own_entries(tmp_path):
    path = tiny_models.student_bundle(tmp_path / "s")
    edit(path, known=None)
    refused(path, "'known'")


def test_a_bundle_in_half_precision_loads_in_full(tmp_path):
    model = tiny_models.gpt_model().state_dict()
    config = json.loads((tiny_models.teacher_bundle(tmp_path / "t") / "arsp.json").read_text())["config"]
    bundle.save_bundle(tmp_path / "b", family="llamagen", kind="teacher", config=config, model=model, dtype=torch.bfloat16)
    loaded = load_model(str(tmp_path / "b"))
    for key, value in model.items():
        assert torch.equal(loaded.module.state_dict()[key], value.bfloat16().float()), key
    assert loaded.tokenizer is None


def test_the_tokenizer_of_a_bundle_outside_the_package_is_not_taken_for_an_embedded_one(tmp_path):
    path = tiny_models.tokenizer_bundle(tmp_path / "tok").resolve()
    assert resolve_tokenizer(str(path)).origin == "bundle"
    assert resolve_tokenizer("shapes-vq16").origin == "embedded"
    assert load_tokenizer(str(path)).config == tiny_models.VQ
    assert load_tokenizer(str(tiny_models.teacher_bundle(tmp_path / "t"))).config == tiny_models.VQ


def test_the_packaged_tokenizer_is_intact():
    assert load_tokenizer("shapes-vq16").codebook_VE.shape == (256, 8)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_manifest_is_an_input_error(teacher):
    (teacher / "arsp.json").chmod(0)
    refused(teacher, "arsp.json")
