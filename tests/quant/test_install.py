"""Models with integer layers against the same models computed layer by layer by hand, producers fused or not."""

import copy

import pytest
import tiny_quant
import torch
from torch import nn

from arsp.decode.next_scale import NextScaleDecoder
from arsp.decode.schedule import ScaleStep
from arsp.errors import ConfigError
from arsp.models.attention import DensePolicy
from arsp.models.llamagen import RMSNorm
from arsp.models.var import GELU, Modulate
from arsp.quant.install import find, fuse, install, linear_layers, readers, simulate, sites
from arsp.quant.linear import InputFormat, Producer, QuantisedGELU, QuantisedRMSNorm, QuantLinear, SimulatedLinear
from arsp.quant.quantiser import dequantise
from arsp.quant.transform import choose_layers, quantise_layers
from arsp.testing.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_quant.load(kind, folder) for kind in tiny_quant.KINDS}


class ByHand(nn.Module):
    """A quantised layer that takes what the float layer would take."""

    def __init__(self, layer):
        super().__init__()
        self.parts = (layer.weight, layer.bias_N, layer.input_format)

    def forward(self, x, gelu=False, outputs=None, bias=None, residual=None, gain=1):
        y = tiny_quant.by_hand(*self.parts, x)
        if outputs is not None:
            y = y[..., outputs] + bias
        y = nn.functional.gelu(y, approximate="tanh") if gelu else y
        return y if residual is None else residual + gain * y


def quantised(model, recipe):
    return quantise_layers(model.module, choose_layers(model.module, recipe), recipe)


def logits(samples, module):
    return torch.cat([part.flatten(0, 1) for part in samples.logits(module)])


RECIPES = {
    "W8": dict(weights={"bits": 8}, balance={"rotate": False}),
    "W8 rotated": dict(weights={"bits": 8}),
    "W4 groups": dict(weights={"group_size": 32}, balance={"rotate": False}),
    "W4 rotated": dict(weights={"group_size": 64}),
    "mixed": dict(layers={"formats": {"*.w1": [8, -1], "*.fc1": [8, -1], "*.w3": [4, 32]}}),
    "nothing kept": dict(layers={"keep": []}),
}


@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("kind", tiny_quant.KINDS)
def test_a_model_equals_its_layers_by_hand(models, kind, changes):
    model, recipe = models[kind], tiny_quant.recipe(**changes)
    samples, layers = tiny_quant.samples(model), quantised(model, recipe)
    hand, apart = copy.deepcopy(model.module), copy.deepcopy(model.module)
    for name, layer in layers.items():
        hand.set_submodule(name, ByHand(layer))
        apart.set_submodule(name, QuantLinear(layer.weight, layer.bias_N, layer.input_format, torch.float32))
    given, expected = logits(samples, model.module), logits(samples, hand)
    noise = float((expected - given).norm())
    for found, allowed, what in (
        (logits(samples, apart), 0.1 if kind.startswith("var") else 0.02, "integer layers"),  # of a VAR behind a GELU of the kernel's own
        (logits(samples, install(copy.deepcopy(model.module), layers, torch.float32)), 0.5, "with fused producers"),
    ):  # a value half way between two codes may go either way; a layer in a wrong place would be as far off as the model is large
        error = float((found - expected).norm())
        assert error <= allowed * noise, f"{what}: {error:.3g} off the result by hand, which is {noise:.3g} off the model"


@pytest.mark.parametrize("kind", ["var", "var-student", "llamagen"])
def test_producers_are_fused_where_the_readers_agree(models, kind):
    model = models[kind]
    plain = install(copy.deepcopy(model.module), quantised(model, tiny_quant.recipe(balance={"rotate": False})), torch.float32)
    rotated = install(copy.deepcopy(model.module), quantised(model, tiny_quant.recipe()), torch.float32)
    unshifted = tiny_quant.recipe(balance={"rotate": False}, activations={"shift_gelu": False})
    unshifted = install(copy.deepcopy(model.module), quantised(model, unshifted), torch.float32)
    fused = lambda module: {name for name, part in module.named_modules() if isinstance(part, Producer)}
    every = set(readers(model.module))
    gelu = {name for name in every if isinstance(find(model.module, name), GELU)}
    assert fused(plain) == every and fused(rotated) == fused(unshifted) == every - gelu
    assert bool(gelu) == kind.startswith("var")


def test_a_site_is_its_producer_or_its_only_reader(models):
    gpt, var = models["llamagen"].module, models["var"].module
    assert readers(gpt)["layers.0.ffn_norm"] == ("layers.0.feed_forward.w1", "layers.0.feed_forward.w3")
    found = sites(gpt, linear_layers(gpt))
    assert found["layers.1.ffn_norm"] == ["layers.1.feed_forward.w1", "layers.1.feed_forward.w3"]
    assert found["layers.1.attention.wo"] == ["layers.1.attention.wo"] and found["norm"] == ["output"]
    found = sites(var, linear_layers(var))
    assert found["head_nm.modulate"] == ["head"] and found["blocks.0.ffn.act"] == ["blocks.0.ffn.fc2"]
    assert found["blocks.0.ada_lin.1"] == ["blocks.0.ada_lin.1"] and found["word_embed"] == ["word_embed"]
    assert sites(gpt, ["layers.0.feed_forward.w3"]) == {"layers.0.ffn_norm": ["layers.0.feed_forward.w3"]}


def test_readers_that_a_model_declares_exist(models):
    for kind, model in models.items():
        for producer, names in readers(model.module).items():
            assert find(model.module, producer) is not None, f"{kind}: {producer}"
            assert all(isinstance(find(model.module, name), nn.Linear) for name in names), f"{kind}: {names}"


def test_readers_of_different_formats_or_of_no_integers_are_not_fused(models):
    model = models["llamagen"]
    norm, readers_of_it = "layers.0.ffn_norm", ("layers.0.feed_forward.w1", "layers.0.feed_forward.w3")
    plain = quantised(model, tiny_quant.recipe(balance={"rotate": False}, layers={"only": list(readers_of_it)}))
    smooth = torch.rand(64) + 0.5
    for formats, is_fused in (
        ((InputFormat(), InputFormat()), True),
        ((InputFormat(smooth), InputFormat(smooth.clone())), True),
        ((InputFormat(smooth), InputFormat()), False),
        ((InputFormat(smooth), InputFormat(smooth * 2)), False),
        ((InputFormat(None, torch.ones(64, dtype=torch.int8)), InputFormat()), False),
        ((InputFormat(shifted=True), InputFormat(shifted=True)), False),  # only a GELU is never below the shift
    ):
        module = copy.deepcopy(model.module)
        for name, form in zip(readers_of_it, formats, strict=True):
            module.set_submodule(name, QuantLinear(plain[name].weight, None, form, torch.float32))
        assert isinstance(find(fuse(module), norm), QuantisedRMSNorm) == is_fused, formats
    module = copy.deepcopy(model.module)
    install(module, {readers_of_it[0]: plain[readers_of_it[0]]}, torch.float32)
    assert type(find(module, norm)) is RMSNorm


def test_fusing_again_changes_nothing(models):
    model = models["var"]
    module = install(copy.deepcopy(model.module), quantised(model, tiny_quant.recipe(balance={"rotate": False})), torch.float32)
    parts = dict(module.named_modules())
    assert all(part is parts[name] for name, part in fuse(module).named_modules())


@pytest.mark.parametrize("balance", [{"rotate": False}, {"rotate": True}])
@pytest.mark.parametrize("share", ["map", "output"])
def test_guidance_halves_share_maps_with_integer_layers(models, share, balance):
    """The null half hands over values alone, or nothing: the same as by hand, and another result than without sharing."""
    model = models["var"]
    samples, guidance = tiny_quant.samples(model), tiny_quant.rule(model)[0]
    request, codes_BL = samples.batches[0]
    layers = quantised(model, tiny_quant.recipe(balance=balance))
    hand = copy.deepcopy(model.module)
    for name, layer in layers.items():
        hand.set_submodule(name, ByHand(layer))

    class Policy(DensePolicy):
        def share(self, layer, scale):
            return share

    def run(module, shared):
        steps = [ScaleStep(module, policy=Policy())] * 3 if shared else None
        return NextScaleDecoder(module, model.tokenizer.quantize, guidance, steps).teacher_forced(request, codes_BL)

    module = install(copy.deepcopy(model.module), layers, torch.float32)
    given, expected, found = run(model.module, True), run(hand, True), run(module, True)
    assert float((found - expected).norm()) <= 0.5 * float((expected - given).norm())
    assert not torch.equal(run(module, False), found)


@pytest.mark.parametrize("kind", tiny_quant.KINDS)
def test_a_model_in_bfloat16_is_as_good_as_its_codes(models, kind):
    model = models[kind]
    samples = tiny_quant.samples(model)
    module = install(copy.deepcopy(model.module), quantised(model, tiny_quant.recipe()), torch.float32)
    expected = logits(samples, module)
    codes = {name: part.codes.clone() for name, part in module.named_modules() if isinstance(part, QuantLinear)}
    module.to(torch.bfloat16)
    found = logits(samples, module)
    assert found.dtype == torch.float32 and tiny_quant.sqnr_db(expected, found) > 20
    for name, part in module.named_modules():
        if isinstance(part, QuantLinear):
            assert part.dtype == torch.bfloat16 and torch.equal(part.codes, codes[name]), name


def test_the_codes_of_a_layer_stand_for_its_weight(models):
    """What is installed is what was rounded: no layer takes the place of another."""
    model = models["var"]
    for name, layer in quantised(model, tiny_quant.recipe("w8a8", balance={"rotate": False})).items():
        weight_NK = model.module.get_submodule(name).weight
        assert_close(dequantise(layer.weight), weight_NK, abs_tol=float(weight_NK.abs().max()) / 200, what=name)


def test_bytes_are_told_by_part(models):
    model = models["var"]
    bits = {"*.fc1": [8, -1]}
    layers = quantised(model, tiny_quant.recipe(layers={"formats": bits, "only": ["blocks.*.ffn.*"]}, weights={"group_size": 128}))
    found = tiny_quant.weight_bytes(install(copy.deepcopy(model.module), layers, torch.float32))
    w8 = 2 * (256 * 64 + 256 * 4 + 256 * 4 + 64)  # codes, scales, bias, signs
    w4 = 2 * (64 * 256 // 2 + 64 * 2 * 5 + 64 * 4 + 256)
    assert found["W8"] == w8 and found["W4"] == w4
    rest = sum(p.nbytes for p in model.module.parameters())
    rest -= sum(model.module.get_submodule(name).weight.nbytes + model.module.get_submodule(name).bias.nbytes for name in layers)
    assert found["other"] == rest


@pytest.mark.parametrize("kind", ["litevar", "tensor"])
def test_simulated_layers_take_the_place_of_the_named_ones(models, kind):
    model = models["var"]
    module = simulate(copy.deepcopy(model.module), {"blocks.0.attn.proj": 4, "head": 8}, kind)
    found = {name for name, part in module.named_modules() if isinstance(part, SimulatedLinear)}
    assert found == {"blocks.0.attn.proj", "head"}
    samples = tiny_quant.samples(model)
    good = simulate(copy.deepcopy(model.module), {"blocks.0.attn.proj": 8, "head": 8}, kind)
    quality = [tiny_quant.sqnr_db(logits(samples, model.module), logits(samples, part)) for part in (module, good)]
    assert 5 < quality[0] < quality[1]


def test_parts_are_found_by_name_or_not_at_all(models):
    module = models["var"].module
    assert isinstance(find(module, "blocks.1.norm1"), Modulate) and find(module, "") is module
    assert find(module, "blocks.7.norm1") is None and find(module, "blocks.0.norm9") is None
    with pytest.raises(ConfigError, match="already"):
        quantised_again = install(copy.deepcopy(module), quantised(models["var"], tiny_quant.recipe()), torch.float32)
        choose_layers(quantised_again, tiny_quant.recipe())


def test_a_producer_keeps_the_key_of_its_weight(models):
    model = models["llamagen"]
    module = install(copy.deepcopy(model.module), quantised(model, tiny_quant.recipe()), torch.float32)
    layers = quantised(model, tiny_quant.recipe())
    expected = {key for key in model.module.state_dict() if key.rpartition(".")[0] not in layers}
    assert set(module.state_dict()) == expected and isinstance(find(module, "norm"), QuantisedRMSNorm)


def test_quantised_gelu_reads_the_layer_before_it(models):
    model = models["var"]
    module = install(copy.deepcopy(model.module), quantised(model, tiny_quant.recipe(balance={"rotate": False})), torch.float32)
    assert isinstance(module.blocks[0].ffn.act, QuantisedGELU) and module.blocks[0].ffn.fc2.input_format.shifted
    rows = module.blocks[0].ffn.act(module.blocks[0].ffn.fc1, torch.randn(2, 3, 64))
    assert rows.offsets is not None and rows.shape == (2, 3, 256)
