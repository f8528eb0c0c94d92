"""What cannot make an image is refused before weights are read: one message, the documented exit code, nothing written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny_models
import tiny_var
import torch
from command_line import invoke, refused
from safetensors.torch import load_file, save_file

from arsp.runs import sha256_file, write_json
from arsp.sparse.profile import uniform_share
from arsp.sparse.window import empty_windows
from arsp.zoo import bundle, load
from arsp.zoo.load import resolve

pytestmark = pytest.mark.usefixtures("one_thread")
SIDES = (1, 2, 3, 4)
CONFIG, VQ = replace(tiny_var.CONFIG, patch_nums=SIDES), replace(tiny_var.VQ, patch_nums=SIDES)
SMALL = replace(CONFIG, depth=1, embed_dim=8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models by what is special about them, and profiles of ``big``."""
    folder = tmp_path_factory.mktemp("models")
    tiny_var.teacher_bundle(folder / "big", CONFIG, vq=VQ)
    tiny_var.teacher_bundle(folder / "twin", CONFIG, seed=8, vq=VQ)
    tiny_var.teacher_bundle(folder / "small", SMALL, seed=5, vq=VQ)
    tiny_var.teacher_bundle(folder / "foreign", SMALL, seed=5, vq=VQ, tokenizer_seed=9)
    tiny_var.teacher_bundle(folder / "three", replace(CONFIG, patch_nums=(1, 2, 4)), vq=replace(VQ, patch_nums=(1, 2, 4)))
    tiny_var.teacher_bundle(folder / "classes", replace(SMALL, num_classes=4), vq=VQ)
    tiny_var.student_bundle(folder / "student", folder / "three")
    tiny_models.teacher_bundle(folder / "raster")
    big = resolve(str(folder / "big"))
    tiny_var.profile_bundle(folder / "profile", big, 1)
    tiny_var.profile_bundle(folder / "sides", big, patch_nums=(1, 2, 3, 5))
    tiny_var.profile_bundle(folder / "heads", big, win=empty_windows(len(SIDES), 2, 4))
    tiny_var.profile_bundle(folder / "deep", big, win=empty_windows(len(SIDES), 3, 2), share=uniform_share("map", 3, len(SIDES)))
    return folder


@pytest.fixture
def place(models, monkeypatch, tmp_path):
    """The models by name, with no weights to be read but those of profiles, and nothing to be written."""
    monkeypatch.chdir(models)
    monkeypatch.setenv("ARSP_RUNS", str(tmp_path / "runs"))
    real = bundle.load_weights
    allowed = lambda path, name, manifest: real(path, name, manifest) if name == "profile.safetensors" else pytest.fail(f"{name} was read")  # noqa: E501
    monkeypatch.setattr(bundle, "load_weights", allowed)
    monkeypatch.setattr(load, "_weights", lambda source: pytest.fail("weights were read"))
    before = sorted(models.rglob("*"))
    yield tmp_path
    assert not (tmp_path / "runs").exists() and sorted(models.rglob("*")) == before, "something was written"


def sample(*words):
    return invoke("sample", *words)


# -- two models in one image ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", ["0", "4", "99"])
def test_a_hand_over_outside_the_scales_is_refused(place, count):
    refused(sample("--collab", f"big:small@{count}"), 3, "1 <= N <= 3")


@pytest.mark.parametrize("text", ["big:small@-1", "big:small@2.5", "big:small@two", "big:small@", "big:small", "big@2", ":small@2"])
def test_a_hand_over_of_another_form_is_refused(place, text):
    refused(sample("--model", "big", "--collab", text), 3, "BIG:SMALL@N", "var:var-small@4")


@pytest.mark.parametrize("option", ["--collab", "--schedule"])
def test_an_empty_option_is_refused(place, option):
    refused(sample("--model", "big", option, ""), 3, option.removeprefix("--"))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--collab", "big:foreign@2"], 3, "different tokenizers"),
        (["--collab", "foreign:big@2"], 3, "different tokenizers"),
        (["--collab", "big:three@2"], 3, "patch_nums [1, 2, 4] and [1, 2, 3, 4]"),
        (["--collab", "big:classes@2"], 3, "num_classes 4 and 3"),
        (["--collab", "big:missing@2"], 3, "unknown model 'missing'"),
        (["--collab", "missing:small@2"], 3, "unknown model 'missing'"),
        (["--collab", "big:./missing@2"], 4, "no such file"),
        (["--collab", "big:profile@2"], 3, "profile"),
        (["--collab", "big:student@2"], 3, "student"),
        (["--collab", "big:raster@2"], 3, "raster is a llamagen teacher"),
        (["--collab", "raster:big@2"], 3, "needs a next-scale teacher"),
        (["--collab", "student:big@2"], 3, "needs a next-scale teacher"),
        (["--collab", "big:small@2", "--model", "small"], 3, "the big model is not --model small"),
        (["--collab", "big:small@2", "--model", "llamagen"], 3, "needs a next-scale teacher"),
    ],
)
def test_models_that_cannot_make_one_image_are_refused(place, words, code, said):
    refused(sample(*words), code, said)


@pytest.mark.parametrize(
    ("collab", "said"), [("big:foreign@2", "different tokenizers"), ("big:small@4", "1 <= N <= 3"), ("big:missing@2", "unknown model")]
)
def test_every_command_refuses_them(place, collab, said):
    refused(invoke("bench", f"big,collab={collab}"), 3, said)
    refused(invoke("bench", "cost", "--collab", collab), 3, said)
    refused(invoke("evaluate", "big", "--num", 4, f"stack.collab={collab}"), 3, said)


# -- schedules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("- {scales: 1, modle: small}", 3, "modle"),
        ("- {scales: 1-3, model: missing}", 3, "unknown model 'missing'"),
        ("- {scales: 0-4, cfg: full}", 3, "within 0-3"),
        ("- {scales: 4}", 3, "within 0-3"),
        ("- {scales: 2-1}", 3, "within 0-3"),
        ("- {scales: -1}", 3, "within 0-3"),
        ("- {scales: 1.5}", 3, "within 0-3"),
        ("- {scales: [0, 1]}", 3, "within 0-3"),
        ("- {scales: null}", 3, "within 0-3"),
        ("- {scales: 0-2}\n- {scales: 2-3, cfg: off}", 3, "scale 2 is named twice"),
        ("- {scales: 1, attention: litvar}", 3, "unknown attention preset 'litvar'"),
        ("- {scales: 1, attention: 7}", 3, "attention"),
        ("- {scales: 1, attention: litevar}", 3, "no packaged profile"),
        ("- {scales: 1, attention: litevar=}", 3, "no packaged profile"),
        ("- {scales: 1, attention: litevar=missing}", 4, "missing"),
        ("- {scales: 1, cfg: half}", 3, "cfg"),
        ("- {scales: 1, precision: int4}", 3, "precision"),
        ("- {scales: 0-3, depth: 3}", 3, "asks for 3 blocks"),
        ("- {scales: 1, depth: two}", 3, "depth"),
        ("- {scales: 1, cfg: off}", 3, "the null half cannot come back"),
        ("- {scales: 1, model: small}", 3, "a model comes back (the stack's model, small, the stack's model)"),
        ("scales: 1", 4, "expected a list"),
        ("- 1", 4, "expected a list"),
        ("- {model: small}", 4, "expected a list"),
        ("{", 4, "cannot be read"),
        ("- {scales: 1, 2: 3}", 3, "2"),
        ("", 4, "expected a list"),
        ("[]", 4, "expected a list"),
    ],
)
def test_schedules_that_mean_nothing_are_refused(place, text, code, said):
    (place / "rows.yaml").write_text(text + "\n")
    refused(sample("--model", "big", "--schedule", place / "rows.yaml"), code, said)


def test_files_that_are_no_schedule_are_refused(place):
    (place / "bytes").write_bytes(b"\xff\x00\xfe")
    for path in (place / "bytes", place / "missing.yaml", place):
        refused(sample("--model", "big", "--schedule", path), 4, "cannot be read")


def test_a_schedule_and_options_that_fill_the_same_cells_are_refused(place):
    (place / "rows.yaml").write_text("- {scales: 0-3, attention: litevar=profile, cfg: shared}\n")
    schedule = ("--model", "big", "--schedule", place / "rows.yaml")
    refused(sample(*schedule, "--collab", "big:small@2"), 3, "both choose models")
    refused(sample(*schedule, "--apply", "litevar=profile"), 3, "says something else already")
    refused(sample(*schedule, "--share", "map"), 3, "says something else already")


# -- profiles ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "profile", "said"),
    [
        ("twin", "profile", "calibrated on"),
        ("small", "profile", "layers 2"),
        ("three", "profile", "patch_nums [1, 2, 3, 4]"),
        ("big", "sides", "patch_nums [1, 2, 3, 5]"),
        ("big", "heads", "heads 4"),
        ("big", "deep", "layers 3"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "bench cost"])
def test_a_profile_of_another_model_is_refused(place, command, model, profile, said):
    result = invoke(*command.split(), "--model", model, "--apply", f"litevar={profile}")
    refused(result, 4, said, f"arsp sparsify --model {model}")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--apply", "litevar=missing"], 4, "missing"),
        (["--apply", "litevar=big"], 4, "not a profile"),
        (["--apply", "litevar=big/model.safetensors"], 4, "big/model.safetensors"),
        (["--apply", "litevar"], 3, "arsp sparsify --model big"),
        (["--apply", "litevar="], 3, "arsp sparsify --model big"),
        (["--apply", "lightvar=profile"], 3, "litevar=PROFILE"),
        (["--apply", ""], 3, "litevar=PROFILE"),
        (["--apply", "litevar=profile", "--apply", "litevar=profile"], 3, "says something else already"),
        (["--share", "output"], 3, "share"),
        (["--share", "none"], 3, "share"),
        (["--share", "map", "--cfg", 0], 3, "no halves to share"),
        (["--apply", "litevar=profile", "--cfg", -1], 3, "cfg"),
    ],
)
def test_what_is_no_policy_is_refused(place, words, code, said):
    refused(sample("--model", "big", *words), code, said)


def changed(folder, target, tensors=None, **config):
    """A copy of the profile of ``big`` with other tensors or configuration, its hashes correct."""
    target.mkdir()
    save_file(tensors or load_file(folder / "profile" / "profile.safetensors"), target / "profile.safetensors")
    manifest = json.loads((folder / "profile" / "arsp.json").read_text())
    manifest["config"] |= config
    manifest["sha256"]["profile.safetensors"] = sha256_file(target / "profile.safetensors")
    write_json(target / "arsp.json", {key: value for key, value in manifest.items()})
    return target


def test_a_profile_that_contradicts_itself_is_refused(place, models):
    tensors = load_file(models / "profile" / "profile.safetensors")
    win, share = tensors["win"], tensors["share"]
    empty, strange, growing = win.clone(), win.clone(), share.clone()
    empty[1, 0, 2, :3] = 0
    strange[0, 0, 3, 3] = -2
    growing[1, 2:] = 0
    for i, (values, config, code, said) in enumerate(
        [
            ({"win": empty, "share": share}, {}, 3, "scale 2 of layer 1, head 0 drops all keys"),
            ({"win": strange, "share": share}, {}, 3, "windows are -1, 0 or positive"),
            ({"win": win, "share": growing}, {}, 3, "layer 1 shares 'map' at scale 1 and 'none' at scale 2"),
            ({"win": win, "share": share + 2}, {}, 3, "shares are none, map or output"),
            ({"win": win[0], "share": share}, {}, 3, "do not describe"),
            ({"win": win[:0], "share": share[:0]}, {}, 3, "do not describe"),
            ({"win": win.float(), "share": share}, {}, 4, "not a valid profile: win"),
            ({"win": win}, {}, 4, "not a valid profile: share"),
            (None, {"geometry": "3d"}, 3, "geometry"),
            (None, {"mask": "soft"}, 3, "mask"),
            (None, {"patch_nums": [1, 2, 3]}, 3, "do not describe"),
            (None, {"patch_nums": None}, 4, "not a valid profile: patch_nums"),
            (None, {"patch_nums": 4}, 4, "not a valid profile: patch_nums"),
            (None, {"patch_nums": [1, 2, 3, "x"]}, 4, "not a valid profile: patch_nums"),
            (None, {"fingerprint": 7, "model": None}, 4, "not a valid profile: model, fingerprint"),
            (None, {"tau": "x", "calibration": []}, 4, "not a valid profile: tau, calibration"),
            (None, {"format": "one"}, 4, "not a valid profile: format"),
            (None, {"format": 2}, 4, "Upgrade arsp"),
        ]
    ):
        path = changed(models, place / f"p{i}", values, **config)
        refused(sample("--model", "big", "--apply", f"litevar={path}"), code, said)


def test_a_damaged_profile_is_refused(place, models):
    good = (models / "profile" / "profile.safetensors").read_bytes()
    flipped = bytearray(good)
    flipped[-1] ^= 1
    for i, content in enumerate((good[:-3], good[:4], b"", bytes(flipped), None)):
        path = changed(models, place / f"p{i}")
        (path / "profile.safetensors").unlink() if content is None else (path / "profile.safetensors").write_bytes(content)
        refused(sample("--model", "big", "--apply", f"litevar={path}"), 4, "profile.safetensors")
    for i, text in enumerate(("{", "[]", "{}", '{"schema": 1, "kind": "profile"}', "\x00")):
        path = changed(models, place / f"m{i}")
        (path / "arsp.json").write_text(text)
        refused(sample("--model", "big", "--apply", f"litevar={path}"), 4, "arsp.json")


# -- sparsify ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--model", "raster"], 3, "no next-scale teacher"),
        (["--model", "student"], 3, "no next-scale teacher"),
        (["--model", "profile"], 3, "no next-scale teacher"),
        (["--model", "missing"], 3, "unknown model 'missing'"),
        (["--share", "maps"], 3, "share"),
        (["--share", "map", "--cfg", 0], 2, "no halves"),
        (["--max-share-error", 0.1], 2, "--share map"),
        (["--share", "map", "--max-share-error", -1], 3, "max_share_error"),
        (["--tau", 0], 3, "tau"),
        (["--tau", 1.1], 3, "tau"),
        (["--cut", 1], 3, "cut"),
        (["--num", 0], 3, "num"),
        (["--windows", "3d"], 3, "windows"),
        (["--mask", "soft"], 3, "mask"),
        (["--policy", "fastvar"], 3, "policy"),
        (["--tokenizer", "vq.safetensors"], 3, "--tokenizer"),
    ],
)
def test_sparsify_refuses(place, words, code, said):
    model = [] if "--model" in words else ["--model", "big"]
    refused(invoke("sparsify", *model, *words), code, said)


def test_no_tensor_escapes_the_guard(place):
    """The fixture notices weights that are read."""
    with pytest.raises(pytest.fail.Exception):
        bundle.load_weights(place, "model.safetensors", {})
    assert torch.is_tensor(load_file("profile/profile.safetensors")["win"])
