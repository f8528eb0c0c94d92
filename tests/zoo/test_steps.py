"""Schedules of several models and profiles: what cannot make one image is refused before any weight is read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_models
import tiny_var
import torch

from arsp.decode.schedule import ScaleRow
from arsp.errors import ArspError, ConfigError, InputError
from arsp.models.attention import DensePolicy
from arsp.sparse.policy import LiteVARPolicy
from arsp.sparse.profile import uniform_share
from arsp.sparse.window import empty_windows
from arsp.stack import StackConfig, check
from arsp.zoo import bundle, load
from arsp.zoo.load import load_model, resolve
from arsp.zoo.steps import check_steps, load_steps, packaged_profile, parts_of, policy_of

K = len(tiny_var.SIDES)
SMALL = replace(tiny_var.CONFIG, depth=1, embed_dim=8)


@pytest.fixture
def models(tmp_path):
    """Names of tiny models by what is special about them."""
    other_sides = (1, 2, 3, 4)
    made = {
        "big": tiny_var.teacher_bundle(tmp_path / "big"),
        "small": tiny_var.teacher_bundle(tmp_path / "small", SMALL, seed=5),
        "tokenizer": tiny_var.teacher_bundle(tmp_path / "tokenizer", tokenizer_seed=9),
        "sides": tiny_var.teacher_bundle(
            tmp_path / "sides", replace(tiny_var.CONFIG, patch_nums=other_sides), vq=replace(tiny_var.VQ, patch_nums=other_sides)
        ),
        "vocab": tiny_var.teacher_bundle(tmp_path / "vocab", replace(tiny_var.CONFIG, vocab_size=8), vq=replace(tiny_var.VQ, vocab_size=8)),
        "width": tiny_var.teacher_bundle(tmp_path / "width", replace(tiny_var.CONFIG, code_dim=8), vq=replace(tiny_var.VQ, z_channels=8)),
        "classes": tiny_var.teacher_bundle(tmp_path / "classes", replace(tiny_var.CONFIG, num_classes=4)),
        "refiner": tiny_var.teacher_bundle(tmp_path / "refiner", SMALL, scales=[2, 2]),
        "student": tiny_var.student_bundle(tmp_path / "student"),
        "raster": tiny_models.teacher_bundle(tmp_path / "raster"),
    }
    return {name: str(path) for name, path in made.items()}


@pytest.fixture
def no_weights(monkeypatch):
    """Reading the weights of a model or tokenizer fails the test; profiles may be read."""
    real = bundle.load_weights
    allowed = lambda path, name, manifest: real(path, name, manifest) if name == "profile.safetensors" else pytest.fail(f"{name} was read")  # noqa: E501
    monkeypatch.setattr(bundle, "load_weights", allowed)
    monkeypatch.setattr(load, "_weights", lambda source: pytest.fail("weights were read"))


def rows(*first: ScaleRow) -> list[ScaleRow]:
    """The first rows, and the last of them up to the last scale."""
    return [*first, *[first[-1]] * (K - len(first))]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("tokenizer", "different tokenizers"),
        ("sides", "patch_nums [1, 2, 3, 4] and [1, 2, 4]"),
        ("vocab", "vocab_size 8 and 16"),
        ("width", "code_dim 8 and 4"),
        ("classes", "num_classes 4 and 3"),
        ("student", "var student"),
        ("raster", "llamagen teacher"),
    ],
)
def test_models_that_cannot_make_one_image_are_refused_with_the_reason(models, no_weights, other, reason):
    with pytest.raises(ConfigError) as caught:
        check_steps(rows(ScaleRow(), ScaleRow(model=models[other])), resolve(models["big"]))
    assert reason in caught.value.message and caught.value.exit_code == 3


def test_a_model_makes_only_the_scales_it_was_trained_for(models, no_weights):
    big, refiner = resolve(models["big"]), ScaleRow(model=models["refiner"])
    assert len(check_steps(rows(ScaleRow(), ScaleRow(), refiner), big)) == K
    for refused in (rows(ScaleRow(), refiner), rows(refiner)):
        with pytest.raises(ConfigError, match="trained for scales 2-2 only"):
            check_steps(refused, big)
    with pytest.raises(ConfigError, match="here it would make scale 0"):
        check(StackConfig(model=models["refiner"]))


def test_an_unknown_model_of_a_row_is_refused(models, no_weights):
    with pytest.raises(ConfigError, match="unknown model 'vra'"):
        check_steps(rows(ScaleRow(), ScaleRow(model="vra")), resolve(models["big"]))
    with pytest.raises(InputError, match="no such file"):
        check_steps(rows(ScaleRow(), ScaleRow(model="runs/none")), resolve(models["big"]))


def test_models_of_one_tokenizer_and_their_depths_are_accepted(models, no_weights):
    sources = check_steps(rows(ScaleRow(depth=2), ScaleRow(depth=1), ScaleRow(model=models["small"], depth=1)), resolve(models["big"]))
    assert [source.name for source in sources] == [models["big"], models["big"], models["small"]]


@pytest.mark.parametrize(("model", "depth"), [("big", 3), ("small", 2)])
def test_a_depth_that_the_model_of_the_row_does_not_have_is_refused(models, no_weights, model, depth):
    row = ScaleRow(depth=depth) if model == "big" else ScaleRow(model=models[model], depth=depth)
    with pytest.raises(ConfigError, match=rf"scale 1 asks for {depth} blocks, .*{model} has {depth - 1}"):
        check_steps(rows(ScaleRow(model=row.model), row), resolve(models["big"]))


def test_a_row_cannot_have_a_depth_and_windows(models, no_weights, tmp_path):
    profile = tiny_var.profile_bundle(tmp_path / "p", resolve(models["big"]))
    with pytest.raises(ConfigError, match="both a depth and litevar"):
        check_steps(rows(ScaleRow(depth=1, attention=f"litevar={profile}")), resolve(models["big"]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fingerprint": "ab" * 32}, "calibrated on"),
        ({"fingerprint": None}, "weights unknown"),
        ({"patch_nums": (1, 2, 3)}, "patch_nums"),
        ({"win": empty_windows(K, 3, 2), "share": uniform_share("map", 3, K)}, "layers"),
        ({"win": empty_windows(K, 2, 4)}, "heads"),
    ],
)
def test_a_profile_of_another_model_is_refused_with_the_reason(models, no_weights, tmp_path, changes, reason):
    source = resolve(models["big"])
    profile = tiny_var.profile_bundle(tmp_path / "p", source, **changes)
    with pytest.raises(InputError) as caught:
        check_steps(rows(ScaleRow(attention=f"litevar={profile}")), source)
    assert reason in caught.value.message and "arsp sparsify" in caught.value.hint and caught.value.exit_code == 4


def test_the_profile_of_a_row_is_checked_against_the_model_of_that_row(models, no_weights, tmp_path):
    big, small = resolve(models["big"]), resolve(models["small"])
    own = f"litevar={tiny_var.profile_bundle(tmp_path / 'p', small)}"
    check_steps(rows(ScaleRow(), ScaleRow(model=small.name, attention=own)), big)
    with pytest.raises(InputError, match="layers"):
        check_steps(rows(ScaleRow(attention=own)), big)


def test_a_profile_whose_windows_drop_all_keys_of_a_query_is_refused(models, no_weights, tmp_path):
    source = resolve(models["big"])
    profile = tiny_var.profile_bundle(tmp_path / "p", source)
    tensors = bundle.load_file(f"{profile}/profile.safetensors")
    tensors["win"][1, 0, 2] = 0
    bundle.save_file(tensors, f"{profile}/profile.safetensors")
    manifest = bundle.read_manifest(tmp_path / "p")
    manifest["sha256"]["profile.safetensors"] = bundle.sha256_file(tmp_path / "p" / "profile.safetensors")
    bundle.write_json(tmp_path / "p" / bundle.MANIFEST, manifest)
    with pytest.raises(ConfigError, match="scale 2 of layer 1, head 0 drops all keys"):
        policy_of(f"litevar={profile}", source)


def test_a_damaged_profile_is_refused(models, no_weights, tmp_path):
    profile = tiny_var.profile_bundle(tmp_path / "p", resolve(models["big"]))
    (tmp_path / "p" / "profile.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged"):
        policy_of(f"litevar={profile}", resolve(models["big"]))


@pytest.mark.parametrize("attention", ["litvar=p", "sparse", "dense=p"])
def test_unknown_attention_is_refused(models, no_weights, attention):
    with pytest.raises(ConfigError, match="unknown attention preset"):
        policy_of(attention, resolve(models["big"]))


@pytest.mark.parametrize("attention", ["litevar=runs/none", "litevar=MODEL"])
def test_what_is_no_profile_is_refused(models, no_weights, attention):
    with pytest.raises(InputError, match="profile|bundle"):
        policy_of(attention.replace("MODEL", models["big"]), resolve(models["big"]))


def test_a_model_without_packaged_profile_says_how_to_make_one(models, no_weights):
    with pytest.raises(ConfigError) as caught:
        packaged_profile(resolve(models["big"]))
    assert "arsp sparsify" in caught.value.hint
    with pytest.raises(ConfigError, match="no packaged profile"):
        policy_of("litevar", resolve("var-d16"))


def test_random_weights_take_a_profile_of_any_weights_but_not_of_another_shape(models, no_weights, tmp_path):
    source = resolve(models["big"])
    profile = tiny_var.profile_bundle(tmp_path / "p", source, fingerprint="ab" * 32)
    assert isinstance(policy_of(f"litevar={profile}", source, random_weights=True), LiteVARPolicy)
    with pytest.raises(ArspError, match="layers"):
        policy_of(f"litevar={profile}", resolve(models["small"]), random_weights=True)


def test_official_files_take_the_tokenizer_of_the_stack(models, tmp_path):
    path = tmp_path / "var.safetensors"
    levels = torch.repeat_interleave(torch.arange(K), torch.tensor([side**2 for side in tiny_var.SIDES]))
    bundle.save_file({**tiny_var.var_model().state_dict(), "lvl_1L": levels[None]}, path)
    sources = check_steps(rows(ScaleRow(), ScaleRow(model=str(path))), resolve(models["big"]))
    assert sources[-1].path == path and sources[-1].tokenizer_identity is None


def test_each_model_is_loaded_once_a_precision_and_each_policy_once(models, tmp_path):
    main = load_model(models["big"])
    profile = f"litevar={tiny_var.profile_bundle(tmp_path / 'p', main.source)}"
    steps = load_steps(
        [ScaleRow(attention=profile), ScaleRow(attention=profile, precision="bfloat16"), ScaleRow(model=models["small"], cfg="shared")],
        main, "cpu", torch.float32,
    )  # fmt: skip
    assert steps[0].model is main.module and steps[1].model is not main.module and steps[1].model.head.weight.dtype == torch.bfloat16
    assert steps[0].policy is steps[1].policy and isinstance(steps[2].policy, DensePolicy)
    assert [step.owner for step in steps] == ["", "", models["small"]] and steps[2].model.config.depth == 1
    assert [step.share(0, 1) for step in steps] == ["map", "map", "map"] and [step.shared for step in steps] == [False, False, True]
    same = load_steps([ScaleRow(model=models["small"])] * K, main, "cpu", torch.float32)
    assert len({id(step.model) for step in same}) == 1


def test_uniform_windows_need_no_profile_and_fit_any_weights(models):
    policy = policy_of("litevar=r2", resolve(models["big"]))
    assert (policy.profile.win == 2).all() and policy.profile.fingerprint is None and policy.share(0, 0) == "none"
    assert policy.profile.win.shape == (2, 2, K, K)
    assert parts_of(rows(ScaleRow(attention="litevar=r2")), resolve(models["big"])) == {}, "there is no file to name"
    for wrong in ("litevar=r0", "litevar=r", "litevar=r100"):
        with pytest.raises(InputError, match=wrong.partition("=")[2]):
            policy_of(wrong, resolve(models["big"]))
