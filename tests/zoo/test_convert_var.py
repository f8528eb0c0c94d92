import argparse
import os
import pickle
from collections import OrderedDict
from dataclasses import asdict, replace

import pytest
import tiny_models
import torch
from safetensors.torch import save_file

from arsp.errors import InputError
from arsp.models.var import VAR, VARIANTS, VARConfig, block_causal_mask
from arsp.models.var_student import VARStudent
from arsp.testing.golden import find_cases
from arsp.tokenizers.var_vqvae import VQVAE, VQVAEConfig
from arsp.zoo import convert, convert_var
from arsp.zoo.bundle import load_into

SIDES = (1, 2, 3)
TINY = VARConfig(depth=2, embed_dim=16, num_heads=2, num_classes=3, vocab_size=8, code_dim=4, patch_nums=SIDES)
TINY_VQ = VQVAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, vocab_size=8, patch_nums=SIDES)

# the published figures: parameters and tensors of a file, level ids, mask and one key bias a block included
PUBLISHED = {
    "VAR-d16": (310_283_520, 220), "VAR-d20": (600_917_136, 272), "VAR-d24": (1_033_399_360, 324),
    "VAR-d30": (2_010_020_356, 402), "VAR-d36-512": (2_353_893_904, 446),
}  # fmt: skip


def meta(build):
    with torch.device("meta"):
        return build()


def same(found, expected):
    assert found.keys() == expected.keys(), f"keys differ: {found.keys() ^ expected.keys()}"
    unequal = [key for key in expected if not torch.equal(found[key], expected[key])]
    assert not unequal, f"other values in {unequal}"


def weights_of(config=TINY, seed=0):
    model = VAR(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.state_dict()


def tokenizer_weights(config=TINY_VQ):
    torch.manual_seed(1)
    return VQVAE(config).state_dict()


def level_ids(sides):
    return torch.arange(len(sides)).repeat_interleave(torch.tensor([pn * pn for pn in sides]))[None]


def buffers(config=TINY, sides=None, visible=None):
    """What official files hold beside the parameters."""
    sides = sides or config.patch_nums
    visible = block_causal_mask(sides) if visible is None else visible
    mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
    biases = {f"blocks.{i}.attn.zero_k_bias": torch.zeros(config.embed_dim) for i in range(config.depth)}
    return {"lvl_1L": level_ids(sides), "attn_bias_for_masking": mask, **biases}


def student_weights(config=TINY, seed=0):
    """The released layout of a distilled student, without its buffers."""
    C, E, L = config.embed_dim, config.code_dim, config.num_tokens
    shapes = {
        "pos_1LC": (1, L + 1, C),
        "lvl_embed.weight": (config.num_scales + 1, C),
        "n_d_embed.weight": (2, C),
        "final_layer_conti.scale_shift_table": (2, C),
        "final_layer_conti.linear.weight": (E, C),
        "final_layer_conti.linear.bias": (E,),
    }
    for i in range(config.depth + 1):
        shapes |= {f"layerwise_n_d_embed.{i}.weight": (C, C), f"layerwise_n_d_embed.{i}.bias": (C,)}
    generator = torch.Generator().manual_seed(seed)
    return {**weights_of(config, seed), **{key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}}


def student_buffers(config=TINY):
    ids = level_ids((1, *config.patch_nums))[0]
    visible = (ids[:, None] > ids[None]) | torch.eye(len(ids), dtype=torch.bool)
    return buffers(config, (1, *config.patch_nums), visible[None, None])


def trainer(**parts):
    """A trainer checkpoint: optimizer state and options beside the weights."""
    optimizer = {"optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4}]}}
    options = OrderedDict(depth=2, pn="1_2_3", tlr=1e-4, patch_nums=(1, 2, 3), exp_name="text", local_debug=False)
    return {"epoch": 3, "iter": 0, "trainer": {"config": {"patch_nums": (1, 2, 3)}, "var_opt": optimizer, **parts}, "args": options}


@pytest.mark.parametrize("name", VARIANTS)
def test_named_sizes_have_the_published_parameters_and_tensors_and_are_told_by_shapes(name, tmp_path):
    config = VARConfig(**VARIANTS[name])
    model = meta(lambda: VAR(config))
    found = sum(p.numel() for p in model.parameters())
    assert found == PUBLISHED[name][0], f"{name}: {found:,} parameters, published {PUBLISHED[name][0]:,}"
    weights = model.state_dict()
    assert len(weights) + 2 + config.depth == PUBLISHED[name][1], f"{name}: {len(weights)} tensors beside the buffers"
    assert VARConfig.from_dict(convert_var.var_config(weights, tmp_path)) == config
    assert VARConfig.from_dict(convert_var.var_config({**weights, "lvl_1L": level_ids(config.patch_nums)}, tmp_path)) == config


def test_the_released_tokenizer_has_the_published_parameters_and_tensors(tmp_path):
    model = meta(lambda: VQVAE(VQVAEConfig()))
    weights = model.state_dict()
    found = sum(p.numel() for p in model.parameters())
    assert (len(weights), found) == (324, 108_948_355), f"{len(weights)} tensors, {found:,} parameters"
    expected = {k: list(v) if k == "ch_mult" else v for k, v in asdict(VQVAEConfig()).items()}
    config = convert_var.vq_config(weights, tmp_path)
    assert config == {key: expected[key] for key in config} and "patch_nums" not in config


def test_the_released_student_has_the_published_tensors_and_parameters(tmp_path):
    config = VARConfig(**VARIANTS["VAR-d16"])
    expected = meta(lambda: VARStudent(config, 32)).state_dict()
    assert len(expected) == 240, f"{len(expected)} parameters' tensors, published 240"
    found = sum(value.numel() for value in expected.values()) / 1e6
    assert found == pytest.approx(328.17, abs=0.01), f"{found:.2f} M parameters, published 328.17 M"
    sizes = convert_var.var_config(expected, tmp_path)
    assert sizes["student"] and VARConfig.from_dict(sizes) == config


FULL = buffers()
WRAPPINGS = {
    "flat": lambda w: {**w, **FULL},
    "no-buffers-but-levels": lambda w: {**w, "lvl_1L": FULL["lvl_1L"]},
    "trainer": lambda w: trainer(var_wo_ddp={**w, **FULL}, vae_local=tokenizer_weights()),
    "trainer-alone": lambda w: {"var_wo_ddp": {**w, **FULL}},
    "ddp-prefix": lambda w: {f"module.{k}": v for k, v in {**w, **FULL}.items()},
    "compiled": lambda w: trainer(var_wo_ddp={f"_orig_mod.{k}": v for k, v in {**w, **FULL}.items()}),
    "compiled-ddp": lambda w: {"state_dict": {f"_orig_mod.module.{k}": v for k, v in {**w, **FULL}.items()}},
    "namespace": lambda w: {"model": {**w, **FULL}, "args": argparse.Namespace(depth=2)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("more", [{}, {"shared_aln": True}], ids=["own", "shared"])
def test_every_layout_gives_the_same_weights_without_the_buffers(wrapping, more, tmp_path):
    config = replace(TINY, **more)
    weights = weights_of(config)
    torch.save(WRAPPINGS[wrapping](weights), tmp_path / "ar-ckpt-best.pth")
    found, sizes = convert_var.read_var(tmp_path / "ar-ckpt-best.pth")
    same(found, weights)
    assert VARConfig.from_dict(sizes) == config and "student" not in sizes
    load_into(VAR(VARConfig.from_dict(sizes)), found, "the file")


def test_safetensors_and_files_of_the_older_pickle_layout_are_read_alike(tmp_path):
    weights = weights_of()
    save_file({**weights, **FULL}, tmp_path / "var.safetensors")
    torch.save({**weights, **FULL}, tmp_path / "var.pth", _use_new_zipfile_serialization=False)
    for name in ("var.safetensors", "var.pth"):
        same(convert_var.read_var(tmp_path / name)[0], weights)


def test_a_file_without_attention_scales_is_one_without_l2_attention_and_64_channels_a_head(tmp_path):
    config = replace(TINY, embed_dim=128, attn_l2_norm=False)
    torch.save({**weights_of(config), **buffers(config)}, tmp_path / "early.pth")
    assert VARConfig.from_dict(convert_var.read_var(tmp_path / "early.pth")[1]) == config


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="var"), ids=str)
def test_recorded_official_weights_are_read(case, tmp_path):
    weights = {key.removeprefix("var."): value for key, value in case.weights.items() if key.startswith("var.")}
    save_file(weights, tmp_path / "var.safetensors")
    expected = {**case.config, "patch_nums": tuple(case.config["patch_nums"])}
    if not expected["attn_l2_norm"] and expected["embed_dim"] % 64:
        with pytest.raises(InputError, match=f"depth {expected['depth']}, width {expected['embed_dim']}"):
            convert_var.read_var(tmp_path / "var.safetensors")
        return
    found, sizes = convert_var.read_var(tmp_path / "var.safetensors")
    if not expected["attn_l2_norm"]:
        expected["num_heads"] = expected["embed_dim"] // 64  # no tensor tells
    config = VARConfig.from_dict(sizes)
    assert all(getattr(config, key) == value for key, value in expected.items() if hasattr(config, key)), sizes
    load_into(VAR(config), found, str(case))


STUDENT_WRAPPINGS = {
    "average-without-buffers": lambda a, r, b: trainer(ema_parameters=a, var_wo_ddp={**r, **b}),
    "average-with-buffers": lambda a, r, b: trainer(ema_parameters={**a, **b}, var_wo_ddp={**r, **b}),
    "average-alone": lambda a, r, b: trainer(ema_parameters={**a, "lvl_1L": b["lvl_1L"]}),
    "prefix": lambda a, r, b: trainer(ema_parameters={f"module.{k}": v for k, v in a.items()}, var_wo_ddp={**r, **b}),
    "no-average": lambda a, r, b: trainer(var_wo_ddp={**a, **b}),
    "flat": lambda a, r, b: {**a, **b},
}


@pytest.mark.parametrize("wrapping", STUDENT_WRAPPINGS)
def test_the_average_of_a_student_is_preferred_and_may_lack_its_buffers(wrapping, tmp_path):
    average, raw = student_weights(seed=1), student_weights(seed=2)
    torch.save(STUDENT_WRAPPINGS[wrapping](average, raw, student_buffers()), tmp_path / "var-d16.pth")
    found, sizes = convert_var.read_var(tmp_path / "var-d16.pth")
    same(found, average)
    assert (sizes["student"], sizes["code_dim"], sizes["patch_nums"]) == (True, 4, [1, 2, 3])


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="var_dd"), ids=str)
def test_recorded_student_weights_are_read(case, tmp_path):
    save_file(case.weights, tmp_path / "student.safetensors")
    found, sizes = convert_var.read_var(tmp_path / "student.safetensors")
    assert sizes["student"] and sizes["patch_nums"] == case.config["patch_nums"] and sizes["code_dim"] == case.config["Cvae"]
    assert found.keys() | {k for k in case.weights if convert_var._is_derived(k)} == case.weights.keys()


@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize("student", [False, True], ids=["teacher", "student"])
def test_level_ids_may_be_missing_only_from_an_official_layout(size, student, tmp_path):
    config = replace(TINY, patch_nums=convert_var.PATCH_NUMS[size])
    make = student_weights if student else weights_of
    torch.save(make(config), tmp_path / "official.pth")
    assert tuple(convert_var.read_var(tmp_path / "official.pth")[1]["patch_nums"]) == config.patch_nums
    torch.save(make(), tmp_path / "own.pth")
    with pytest.raises(InputError, match="own.pth.* width 16, .* scales.*none of the official layouts.*lvl_1L"):
        convert_var.read_var(tmp_path / "own.pth")


def wrong_models():
    weights = weights_of()
    good = {**weights, **FULL}
    sees_all = {"attn_bias_for_masking": torch.zeros(1, 1, 14, 14)}
    return {
        "gap": {k.replace("blocks.1.", "blocks.5."): v for k, v in good.items()},
        "no-first": {k: v for k, v in good.items() if not k.startswith("blocks.0.")},
        "missing": {k: v for k, v in good.items() if k != "head.bias"},
        "foreign": {**good, "lora.weight": torch.zeros(2, 2)},
        "later-block": {k: v for k, v in good.items() if k != "blocks.1.attn.proj.weight"},
        "two-adaln": {**good, "shared_ada_lin.1.weight": torch.zeros(96, 16)},
        "wide-head": {**good, "head.weight": torch.zeros(8, 17)},
        "flat-head": {**good, "head.weight": torch.zeros(8)},
        "heads": {**good, "blocks.0.attn.scale_mul_1H11": torch.zeros(1, 3, 1, 1)},
        "levels-falling": {**good, "lvl_1L": good["lvl_1L"].flip(1)},
        "levels-uneven": {**good, "lvl_1L": torch.tensor([[0] * 2 + [1] * 4 + [2] * 8])},
        "levels-short": {**good, "lvl_1L": level_ids((1, 2))},
        "levels-shrink": {**good, "lvl_1L": level_ids((2, 1, 3))},
        "mask-open": {**good, **sees_all},
        "mask-size": {**good, "attn_bias_for_masking": torch.zeros(1, 1, 13, 13)},
        "key-bias": {**good, "blocks.1.attn.zero_k_bias": torch.ones(16)},
        "student-mask": {**student_weights(), **buffers(sides=(1, *SIDES))},
        "student-without-head": {
            k: v for k, v in {**student_weights(), **student_buffers()}.items() if not k.startswith("final_layer_conti")
        },
    }


@pytest.mark.parametrize("name", wrong_models())
def test_a_model_that_is_not_quite_one_ends_in_one_message_that_says_what_it_is(name, tmp_path):
    torch.save(wrong_models()[name], tmp_path / "wrong.pth")
    with pytest.raises(InputError) as caught:
        convert_var.read_var(tmp_path / "wrong.pth")
    message = caught.value.message
    assert "wrong.pth" in message and "\n" not in message and len(message) < 600, message
    if name not in ("no-first", "flat-head"):
        assert "depth 2, width 16" in message and "scales" in message, message


def test_the_message_names_the_depth_and_the_first_wrong_weight(tmp_path):
    torch.save(wrong_models()["later-block"], tmp_path / "wrong.pth")
    with pytest.raises(InputError, match=r"a VAR of depth 2, width 16, scales \[1, 2, 3\].*missing 1 \(blocks\.1\.attn\.proj\.weight\)"):
        convert_var.read_var(tmp_path / "wrong.pth")


PHIS = {4: "partly", 1: "all", 0: "none", 2: "two"}


@pytest.mark.parametrize("share", PHIS, ids=PHIS.values())
@pytest.mark.parametrize("wrapping", ["flat", "trainer", "prefix"])
def test_a_tokenizer_is_told_by_its_keys(share, wrapping, tmp_path):
    config = replace(TINY_VQ, share_quant_resi=share)
    weights = tokenizer_weights(config)
    wrapped = {
        "flat": weights,
        "trainer": trainer(var_wo_ddp={**weights_of(), **FULL}, vae_local=weights),
        "prefix": {f"_orig_mod.{k}": v for k, v in weights.items()},
    }
    torch.save(wrapped[wrapping], tmp_path / "vae.pth")
    found, sizes = convert_var.read_var_vq(tmp_path / "vae.pth")
    same(found, weights)
    assert VQVAEConfig(**{**sizes, "ch_mult": tuple(sizes["ch_mult"]), "patch_nums": SIDES}) == config


def test_one_tokenizer_file_serves_models_of_other_scales(tmp_path):
    weights = tokenizer_weights()
    weights[convert_var._USAGE].fill_(1.0)
    torch.save(weights, tmp_path / "vae.pth")
    assert convert_var.read_var_vq(tmp_path / "vae.pth", 3)[0][convert_var._USAGE].all()
    found, sizes = convert_var.read_var_vq(tmp_path / "vae.pth", 5)
    assert found[convert_var._USAGE].shape == (5, 8) and not found[convert_var._USAGE].any()
    load_into(VQVAE(VQVAEConfig(**{**sizes, "ch_mult": (1, 2), "patch_nums": (1, 2, 3, 4, 6)})), found, "vae.pth")
    del weights[convert_var._USAGE]
    torch.save(weights, tmp_path / "bare.pth")
    assert convert_var.read_var_vq(tmp_path / "bare.pth", 4)[0][convert_var._USAGE].shape == (4, 8)


def test_a_tokenizer_with_a_phi_for_every_scale_serves_only_as_many(tmp_path):
    torch.save(tokenizer_weights(replace(TINY_VQ, share_quant_resi=0)), tmp_path / "vae.pth")
    with pytest.raises(InputError, match="each of its 3 scales, but 4"):
        convert_var.read_var_vq(tmp_path / "vae.pth", 4)


def wrong_tokenizers():
    good = tokenizer_weights()
    return {
        "no-encoder": {k: v for k, v in good.items() if not k.startswith("encoder.")},
        "no-phi": {k: v for k, v in good.items() if "quant_resi" not in k},
        "lost-phi": {k: v for k, v in good.items() if "qresi_ls.2" not in k},
        "one-bias": {k: v for k, v in good.items() if k != "decoder.conv_out.bias"},
        "odd-width": {**good, "encoder.conv_in.weight": torch.zeros(33, 3, 3, 3)},
        "empty": {**good, "encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)},
        "usage": {**good, convert_var._USAGE: torch.tensor(3.0)},
    }


@pytest.mark.parametrize("name", wrong_tokenizers())
def test_a_tokenizer_that_is_not_quite_one_is_refused_with_one_message(name, tmp_path):
    torch.save(wrong_tokenizers()[name], tmp_path / "wrong.pth")
    with pytest.raises(InputError, match="wrong.pth") as caught:
        convert_var.read_var_vq(tmp_path / "wrong.pth")
    assert "\n" not in caught.value.message and len(caught.value.message) < 600, caught.value.message


class Surprise:
    def __reduce__(self):
        return os.system, ("touch surprise",)


def test_a_pickle_that_needs_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(trainer(var_wo_ddp={**weights_of(), **FULL}, more=Surprise()), tmp_path / "zip.pth")
    torch.save({**weights_of(), "more": Surprise()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Surprise()))
    for name in ("zip.pth", "old.pth", "bare.pth"):
        for read in (convert_var.read_var, convert_var.read_var_vq, convert.detect_family):
            with pytest.raises(InputError, match=name):
                read(tmp_path / name)
    assert not (tmp_path / "surprise").exists()


def test_broken_files_end_in_one_message_that_names_them(tmp_path):
    torch.save({**weights_of(), **FULL}, tmp_path / "good.bin")
    content = (tmp_path / "good.bin").read_bytes()
    for part in (1, 100, len(content) // 2, len(content) - 10):
        (tmp_path / f"cut-{part}.pth").write_bytes(content[:part])
    (tmp_path / "text.pth").write_text("<html>Not Found</html>")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 100)
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save({"trainer": [1, 2]}, tmp_path / "list.pth")
    torch.save(trainer(var_wo_ddp=None, vae_local={}), tmp_path / "hollow.pth")
    for path in [*tmp_path.glob("*.pth"), *tmp_path.glob("*.safetensors"), tmp_path / "absent.pth"]:
        for read in (convert_var.read_var, convert_var.read_var_vq):
            with pytest.raises(InputError) as caught:
                read(path)
            message = caught.value.message
            assert path.name in message and "\n" not in message and len(message) < 600, message


def files_of_all_kinds():
    return {
        "a LlamaGen model": {"model": tiny_models.gpt_model().state_dict(), "args": argparse.Namespace()},
        "a LlamaGen tokenizer": {"model": tiny_models.vq_model().state_dict()},
        "a VAR model": {f"module.{k}": v for k, v in {**weights_of(), **FULL}.items()},
        "a VAR tokenizer": {"state_dict": tokenizer_weights()},
    }


READERS = {
    "a LlamaGen model": convert.read_llamagen,
    "a LlamaGen tokenizer": convert.read_llamagen_vq,
    "a VAR model": convert_var.read_var,
    "a VAR tokenizer": convert_var.read_var_vq,
}


@pytest.mark.parametrize("what", READERS)
def test_the_family_is_told_by_keys_and_files_of_another_kind_are_refused_with_their_own(what, tmp_path, monkeypatch):
    monkeypatch.setitem(convert._HEADS, (tiny_models.GPT_CONFIG.n_layer, tiny_models.GPT_CONFIG.dim), tiny_models.GPT_CONFIG.n_head)
    held = files_of_all_kinds()[what]
    path = tmp_path / "some_256.pt"
    torch.save(held, path)
    assert convert.detect_family(path) == convert.detect_family(held) == ("var" if "VAR" in what else "llamagen")
    assert READERS[what](path)[0]
    for other, read in READERS.items():
        if other != what:
            with pytest.raises(InputError, match="some_256.pt") as caught:
                read(path)
            assert what in caught.value.hint, f"{other}: {caught.value.message} {caught.value.hint}"


def test_trainer_checkpoints_and_students_are_of_the_var_family_and_other_files_of_none(tmp_path):
    assert convert.detect_family(trainer(var_wo_ddp=weights_of(), vae_local=tokenizer_weights())) == "var"
    assert convert.detect_family(trainer(ema_parameters=student_weights())) == "var"
    for other in ({"conv1.weight": torch.zeros(3)}, {}, [1], torch.zeros(2), {"model": {3: {"pos": torch.zeros(1)}}}):
        torch.save(other, tmp_path / "other.pt")
        assert convert.detect_family(tmp_path / "other.pt") is None
