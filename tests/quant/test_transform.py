"""From a recipe to integers: which layers in which formats, balancing that leaves the product as it is, errors that are named."""

import copy

import pytest
import tiny_quant
import torch
from torch import nn

from arsp.errors import ConfigError, InputError
from arsp.kernels.reference import rotate
from arsp.quant.balance import balance_scale, rotation_signs
from arsp.quant.calibrate import observe
from arsp.quant.install import find, install, linear_layers, sites
from arsp.quant.linear import InputFormat, QuantLinear, SimulatedLinear
from arsp.quant.pack import to_tensors
from arsp.quant.quantiser import CHANNEL, dequantise
from arsp.quant.transform import Format, balanced_weight, choose_layers, data_free, quantise_layers, transformed_gram

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_quant.load(kind, folder) for kind in tiny_quant.KINDS}


@pytest.fixture(scope="module")
def statistics(models):
    """Of every site of every model."""
    return {kind: observe(tiny_quant.samples(m), sites(m.module, linear_layers(m.module))) for kind, m in models.items()}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- which layers -------------------------------------------------------------------------------------------------------------


def test_layers_that_a_recipe_keeps_are_not_chosen(models):
    chosen = choose_layers(models["var"].module, tiny_quant.recipe())
    assert set(linear_layers(models["var"].module)) - set(chosen) == {"word_embed", "head_nm.ada_lin.1"}
    student = models["llamagen-student"].module
    assert set(linear_layers(student)) - set(choose_layers(student, tiny_quant.recipe())) == {"tok_embeddings", "final_layer_conti.linear"}
    only = tiny_quant.recipe(layers={"only": ["layers.1.*", "output"], "keep": ["*.wo"]})
    assert set(choose_layers(models["llamagen"].module, only)) == {
        *(f"layers.1.{name}" for name in ("attention.wqkv", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")), "output"
    }  # fmt: skip


def test_formats_are_those_of_the_first_pattern_that_fits_and_of_the_inputs(models):
    formats = {"*.0.*.w1": [8, 128], "*.w1": [4, 32], "*.w2": [4, 128]}
    chosen = choose_layers(models["llamagen"].module, tiny_quant.recipe(layers={"formats": formats}, weights={"group_size": 32}))
    assert chosen["layers.0.feed_forward.w1"] == Format(8, CHANNEL)  # 8 bits have one scale an output
    assert chosen["layers.1.feed_forward.w1"] == Format(4, 32)
    assert chosen["layers.0.feed_forward.w2"] == Format(4, 64)  # 192 inputs are no multiple of 128
    assert chosen["output"] == Format(4, 32)


def test_a_group_that_is_all_inputs_is_one_scale_an_output():
    assert Format(4, 64).fitting(nn.Linear(64, 8)) == Format(4, 128).fitting(nn.Linear(64, 8)) == Format(4)
    assert Format(4, 64).fitting(nn.Linear(128, 8)) == Format(4, 64) and Format(4, 64).fitting(nn.Linear(100, 8)) == Format(4)
    assert str(Format(4, 64)) == "W4g64" and str(Format(8)) == "W8"


@pytest.mark.parametrize("bits,group", [(4, 32), (4, 64), (4, -1), (8, -1)])
def test_bytes_are_those_of_the_packed_tensors(models, bits, group):
    model, recipe = models["llamagen"], tiny_quant.recipe(weights={"bits": bits, "group_size": group}, layers={"formats": {}})
    formats = choose_layers(model.module, recipe)
    for name, layer in quantise_layers(model.module, formats, recipe).items():
        packed = to_tensors(layer.weight, name)
        assert formats[name].bytes(model.module.get_submodule(name)) == sum(tensor.nbytes for tensor in packed.values()), name


def test_a_recipe_that_names_no_layer_says_what_there_is(models):
    for layers in ({"only": ["*.wq"]}, {"only": ["layers.0.attention.wqk"]}, {"keep": ["*"]}):
        with pytest.raises(ConfigError, match="names no layer") as error:
            choose_layers(models["llamagen"].module, tiny_quant.recipe(layers=layers))
        assert "layers.0.attention.wqkv" in error.value.hint


# -- balancing ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [64, 96, 100, 7])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_balancing_leaves_the_exact_product_as_it_is(K, smooth, rotated):
    x_MK, weight_NK = normal(9, K), normal(5, K, seed=1)
    form = InputFormat(normal(K, seed=2).exp().float() if smooth else None, rotation_signs(K, 3) if rotated else None)
    x = x_MK if form.smooth_K is None else x_MK * form.smooth_K.double()
    x = x if form.signs_K is None else rotate(x, form.signs_K)
    balanced = balanced_weight(weight_NK, form)
    assert balanced.dtype == torch.float32
    expected = x_MK @ weight_NK.T
    error = float((x @ balanced.double().T - expected).abs().max() / expected.abs().max())
    assert error < 1e-6, f"the product changes by {error:.1e}"
    gram_KK = transformed_gram(x_MK.T @ x_MK, form)
    assert float((gram_KK - x.T @ x).abs().max()) < 1e-12 * float(gram_KK.abs().max())


@pytest.mark.parametrize("kind", ["llamagen", "var-student"])
def test_readers_of_one_tensor_share_its_balancing(models, statistics, kind):
    model = models[kind]
    recipe = tiny_quant.recipe("vidit-q", balance={"alpha": 0.4})
    layers = quantise_layers(model.module, choose_layers(model.module, recipe), recipe, statistics[kind])
    for site, names in sites(model.module, layers).items():
        first, *others = [layers[name].input_format for name in names]
        assert all(other is first or other.equals(first) for other in others), site
        every = torch.cat([model.module.get_submodule(name).weight for name in names]).float()
        expected = 1 / balance_scale(statistics[kind][site].largest_K(), every, 0.4)
        assert torch.equal(first.smooth_K, expected) and first.signs_K is not None, site


def test_only_the_named_layers_are_balanced(models, statistics):
    recipe = tiny_quant.recipe("vidit-q", balance={"layers": ["*qkv"]})
    layers = quantise_layers(models["var"].module, choose_layers(models["var"].module, recipe), recipe, statistics["var"])
    balanced = {name for name, layer in layers.items() if layer.input_format.smooth_K is not None}
    assert balanced == {f"blocks.{i}.attn.mat_qkv" for i in range(2)}
    assert {name for name, layer in layers.items() if layer.input_format.shifted} == {f"blocks.{i}.ffn.fc2" for i in range(2)}


@pytest.mark.parametrize("kind", ["var", "llamagen"])
@pytest.mark.parametrize("changes", [{}, {"activations": {"shift_gelu": False}}, {"balance": {"rotate": True}}])
def test_what_a_gelu_made_is_shifted_where_it_is_not_balanced(models, kind, changes):
    recipe = tiny_quant.recipe(**{"balance": {"rotate": False}, **changes})
    layers = quantise_layers(models[kind].module, choose_layers(models[kind].module, recipe), recipe)
    shifted = {name for name, layer in layers.items() if layer.input_format.shifted}
    assert shifted == ({f"blocks.{i}.ffn.fc2" for i in range(2)} if kind == "var" and not changes else set())


def test_awq_scales_are_shared_and_better_than_rounding_to_nearest(models, statistics):
    """By the error of the outputs on the inputs that were seen."""
    model, seen = models["llamagen"], statistics["llamagen"]
    plain, awq = tiny_quant.recipe(balance={"rotate": False}), tiny_quant.recipe("w4a8-awq")
    formats = choose_layers(model.module, awq)
    found = [quantise_layers(model.module, formats, recipe, seen) for recipe in (plain, awq)]
    errors = []
    for layers in found:
        total = 0.0
        for site, names in sites(model.module, formats).items():
            for name in names:
                smooth_K = layers[name].input_format.smooth_K
                weight_NK = dequantise(layers[name].weight).double() * (1 if smooth_K is None else smooth_K.double())
                d_NK = weight_NK - model.module.get_submodule(name).weight.double()
                total += float(((d_NK @ seen[site].moments.gram_KK) * d_NK).sum())
        errors.append(total)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_better_than_rounding_to_nearest(models, statistics, act_order):
    model, seen = models["var"], statistics["var"]
    formats = choose_layers(model.module, tiny_quant.recipe())
    errors = []
    for weights in ({"rounding": "nearest"}, {"rounding": "gptq", "act_order": act_order}):
        layers = quantise_layers(model.module, formats, tiny_quant.recipe(weights=weights), seen)
        total = 0.0
        for site, names in sites(model.module, formats).items():
            for name in names:
                form = layers[name].input_format
                d_NK = dequantise(layers[name].weight).double() - balanced_weight(model.module.get_submodule(name).weight, form).double()
                total += float(((d_NK @ transformed_gram(seen[site].moments.gram_KK, form)) * d_NK).sum())
        errors.append(total)
    assert errors[1] < 0.8 * errors[0]


def test_statistics_of_more_sites_than_are_quantised_do_no_harm(models, statistics):
    model, recipe = models["llamagen"], tiny_quant.recipe("w4a8-gptq")
    formats = choose_layers(model.module, recipe)
    one = {"layers.0.feed_forward.w3": formats["layers.0.feed_forward.w3"]}
    alone = quantise_layers(model.module, one, recipe, statistics["llamagen"])
    every = quantise_layers(model.module, formats, recipe, statistics["llamagen"])
    name = "layers.0.feed_forward.w3"
    assert alone.keys() == {name} and torch.equal(alone[name].weight.codes_NK, every[name].weight.codes_NK)


# -- static scales ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["var", "var-student"])
def test_static_steps_hold_what_was_seen_at_every_scale(models, statistics, kind):
    recipe = tiny_quant.recipe("w8a8", balance={"rotate": False}, activations={"scales": "static"})
    model = models[kind]
    layers = quantise_layers(model.module, choose_layers(model.module, recipe), recipe, statistics[kind])
    static = {name: layer.input_format.static_S for name, layer in layers.items() if layer.input_format.static_S is not None}
    assert {name.rpartition(".")[2] for name in static} == {"mat_qkv", "proj", "fc1"}  # of blocks, and not shifted
    site = "blocks.1.norm2"
    assert torch.equal(static["blocks.1.ffn.fc1"], statistics[kind][site].peaks_SK.amax(1) / 127)
    samples = tiny_quant.samples(model)
    quantised = install(copy.deepcopy(model.module), layers, torch.float32)
    given, found = (torch.cat([p.flatten(0, 1) for p in samples.logits(m)]) for m in (model.module, quantised))
    assert tiny_quant.sqnr_db(given, found) > 20


# -- whole models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny_quant.KINDS)
def test_the_model_is_left_as_it_is(models, statistics, kind):
    module = models[kind].module
    before = {key: value.clone() for key, value in module.state_dict().items()}
    told = []
    recipe = tiny_quant.recipe("vidit-q")
    layers = quantise_layers(module, choose_layers(module, recipe), recipe, statistics[kind], told.append)
    assert sorted(told) == sorted(layers) and linear_layers(module).keys() >= layers.keys()
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    for name, layer in layers.items():
        own = find(module, name).bias
        assert (layer.bias_N is None) == (own is None) and (own is None or torch.equal(layer.bias_N, own)), name


def test_weights_of_zeros_are_exact_and_those_of_one_value_up_to_its_scale(models):
    module = copy.deepcopy(models["llamagen"].module)
    module.layers[0].attention.wo.weight.zero_()
    module.output.weight.fill_(0.25)
    for name in ("w8a8", "w4a8"):
        recipe = tiny_quant.recipe(name, balance={"rotate": False})
        layers = quantise_layers(module, choose_layers(module, recipe), recipe)
        assert torch.equal(dequantise(layers["layers.0.attention.wo"].weight), torch.zeros(64, 64))
        assert float((dequantise(layers["output"].weight) - 0.25).abs().max()) < 0.25 / 2**11


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a8-gptq", "w4a8-awq", "vidit-q"])
def test_a_weight_that_is_not_finite_is_named(models, statistics, name, value):
    module = copy.deepcopy(models["var"].module)
    module.blocks[1].attn.proj.weight[3, 4] = value
    recipe = tiny_quant.recipe(name)
    with pytest.raises(InputError) as error:
        quantise_layers(module, choose_layers(module, recipe), recipe, statistics["var"])
    assert "blocks.1.attn.proj" in error.value.message


def test_recipes_that_read_weights_alone_are_transforms(models):
    module = data_free("w4a8").apply(copy.deepcopy(models["var"].module))
    assert sum(isinstance(part, QuantLinear) for part in module.modules()) == len(choose_layers(models["var"].module, tiny_quant.recipe()))
    module = data_free("litevar").apply(copy.deepcopy(models["var"].module))
    assert any(isinstance(part, SimulatedLinear) for part in module.modules())
    for name in ("w4a8-gptq", "w4a8-awq", "vidit-q", "mixdq"):
        with pytest.raises(ConfigError, match="own samples"):
            data_free(name)
    with pytest.raises(ConfigError, match="quantised already"):
        data_free("w8a8").apply(data_free("w4a8").apply(copy.deepcopy(models["var"].module)))
