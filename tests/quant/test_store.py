"""Quantised bundles: what is loaded is what was made, the layout is that of compressed-tensors, and damage is named."""

import copy
import json
import math

import pytest
import tiny_quant
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from arsp.errors import InputError
from arsp.quant import store
from arsp.quant.calibrate import observe
from arsp.quant.install import QuantisedLayer, install, linear_layers, simulate, sites
from arsp.quant.linear import InputFormat, QuantLinear, SimulatedLinear
from arsp.quant.pack import packed_bytes
from arsp.quant.pipeline import QuantizeConfig, export
from arsp.quant.quantiser import CHANNEL, QuantisedWeight
from arsp.quant.recipe import Recipe
from arsp.quant.transform import choose_layers, quantise_layers
from arsp.runs import sha256_file, write_json
from arsp.testing.golden import find_cases
from arsp.zoo.load import load_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_quant.load(kind, folder) for kind in tiny_quant.KINDS}


def config_of(name="w4a8", rest="float32", **changes):
    recipe = tiny_quant.recipe(name, **changes)
    return QuantizeConfig(recipe=name, rest=rest, **{key: getattr(recipe, key) for key in Recipe.model_fields})


def bundle_of(model, path, name="w4a8", rest="float32", **changes):
    """A quantised bundle, and the layers in it."""
    config = config_of(name, rest, **changes)
    formats = choose_layers(model.module, config)
    statistics = observe(tiny_quant.samples(model), sites(model.module, formats)) if config.needs_inputs else None
    layers = {} if config.simulate else quantise_layers(model.module, formats, config, statistics)
    kept = [name for name in linear_layers(model.module) if name not in formats]
    return export(config, model, formats, layers, kept, path), layers


def logits(samples, module):
    return torch.cat([part.flatten(0, 1) for part in samples.logits(module)])


CASES = {
    "w4a8": ("w4a8", {}),
    "w8a8": ("w8a8", {}),
    "groups of 32, shifted": ("w4a8", {"weights": {"group_size": 32}, "balance": {"rotate": False}}),
    "mixed": ("w4a8", {"layers": {"formats": {"*.w1": [8, -1], "*.fc1": [8, -1]}}, "weights": {"group_size": 64}}),
    "awq": ("w4a8-awq", {}),
    "vidit-q": ("vidit-q", {"weights": {"group_size": 64}}),
    "nothing kept": ("w8a8", {"layers": {"keep": []}}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("kind", tiny_quant.KINDS)
def test_a_loaded_model_is_the_model_that_was_made_bit_for_bit(models, kind, case, tmp_path):
    model, (name, changes) = models[kind], case
    path, layers = bundle_of(model, tmp_path / "q", name, **changes)
    made = install(copy.deepcopy(model.module), layers, torch.float32)
    loaded = load_model(str(path))
    samples = tiny_quant.samples(model)
    assert torch.equal(logits(samples, loaded.module), logits(samples, made))
    assert loaded.source.card["classes"] == model.source.card["classes"] and loaded.source.kind == model.source.kind
    assert loaded.source.card["sampling"] == model.source.card["sampling"]


@pytest.mark.parametrize("kind", ["var", "var-student"])
def test_static_scales_are_loaded_and_declared(models, kind, tmp_path):
    path, layers = bundle_of(models[kind], tmp_path / "q", "w8a8", activations={"scales": "static"}, balance={"rotate": False})
    static = {name for name, layer in layers.items() if layer.input_format.static_S is not None}
    assert static
    made = install(copy.deepcopy(models[kind].module), layers, torch.float32)
    samples = tiny_quant.samples(models[kind])
    assert torch.equal(logits(samples, load_model(str(path)).module), logits(samples, made))
    block = json.loads((path / "arsp.json").read_text())["quantization"]
    declared = {name for g in block["config_groups"].values() if not g["input_activations"]["dynamic"] for name in g["targets"]}
    assert declared == static


@pytest.mark.parametrize("kind", ["llamagen", "var"])
@pytest.mark.parametrize("rest", ["float16", "bfloat16"])
def test_what_is_not_quantised_has_the_precision_that_was_asked_for(models, kind, rest, tmp_path):
    path, layers = bundle_of(models[kind], tmp_path / "q", rest=rest)
    weights = load_file(path / "model.safetensors")
    own = set(store.layer_tensors(layers))
    assert {weights[key].dtype for key in weights.keys() - own} == {getattr(torch, rest)}
    assert {key: value.dtype for key, value in weights.items() if key in own} == {
        key: value.dtype for key, value in store.layer_tensors(layers).items()
    }


def test_no_float_copy_of_a_quantised_layer_is_kept(models, tmp_path):
    """Of W4A8 in memory: codes as in the file, scales, zero points of a byte in place of four bits, biases and what balances inputs."""
    for kind in ("llamagen", "var"):
        model = models[kind]
        path, layers = bundle_of(model, tmp_path / kind, weights={"group_size": 64})
        loaded = load_model(str(path)).module
        shapes = {name: tuple(layer.weight.codes_NK.shape) for name, layer in layers.items()}
        packed = sum(packed_bytes(N, K, 4, 64 if K > 64 else CHANNEL) for N, K in shapes.values())
        more = sum(8 * N + K for N, K in shapes.values())  # a bias, a byte where four bits are stored, signs
        found = tiny_quant.weight_bytes(loaded)
        assert found["W4"] <= packed + more, f"{kind}: {found['W4']} bytes in memory, {packed} in the file"
        rest = sum(value.numel() for key, value in model.module.state_dict().items() if key.rpartition(".")[0] not in layers)
        assert found["other"] == 4 * rest
        floats = [p for part in loaded.modules() if isinstance(part, QuantLinear) for p in (*part.parameters(), *part.buffers())]
        assert max(p.numel() for p in floats if p.is_floating_point()) <= max(N * K // 64 for N, K in shapes.values())


def test_layers_leave_the_loaded_weights_one_after_another(models, tmp_path):
    path, layers = bundle_of(models["var"], tmp_path / "q")
    weights = load_file(path / "model.safetensors")
    block = json.loads((path / "arsp.json").read_text())["quantization"]
    with torch.device("meta"):
        module = models["var"].source.family.build(models["var"].source.config)
    store.install_from(module, block, weights, torch.float32, "q")
    assert weights.keys() == {key for key in models["var"].module.state_dict() if key.rpartition(".")[0] not in layers}


# -- the layout ---------------------------------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="ct_pack"), ids=str)
def test_the_tensors_of_a_layer_are_those_of_compressed_tensors(case):
    io, config = case.io, case.config
    codes, zeros = ((io[key].int() + 8).to(torch.uint8) for key in ("q_signed", "zero_signed"))
    weight = QuantisedWeight(codes, io["proj.weight_scale"], zeros, config["bits"], config["group"])
    found = store.layer_tensors({"proj": QuantisedLayer(weight, None, InputFormat())})
    recorded = {key: value for key, value in io.items() if key.startswith("proj.")}
    assert found.keys() == recorded.keys() and all(torch.equal(found[key], value) for key, value in recorded.items())
    extra = InputFormat(torch.ones(weight.codes_NK.shape[1]), torch.ones(weight.codes_NK.shape[1], dtype=torch.int8))
    more = store.layer_tensors({"proj": QuantisedLayer(weight, torch.zeros(len(codes)), extra)})
    assert more.keys() - found.keys() == {"proj.bias", "proj.input_smooth", "proj.rotation_sign"}


def test_the_manifest_declares_every_layer_once_in_the_words_of_compressed_tensors(models, tmp_path):
    changes = {"layers": {"formats": {"*.fc1": [8, -1], "*.mat_qkv": [4, 32]}}, "weights": {"group_size": -1}, "balance": {"rotate": False}}
    path, layers = bundle_of(models["var"], tmp_path / "q", **changes)
    manifest = json.loads((path / "arsp.json").read_text())
    block = manifest["quantization"]
    assert block["quant_method"] == "compressed-tensors" and block["format"] == "mixed-precision"
    weights = {tuple(sorted(group["targets"])): group["weights"] for group in block["config_groups"].values()}
    named = lambda *ends: tuple(sorted(name for name in layers if name.endswith(ends)))
    four = {"num_bits": 4, "type": "int", "symmetric": False}
    assert weights == {
        named("mat_qkv"): {**four, "strategy": "group", "group_size": 32},
        named("fc1"): {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        named("proj", "fc2", "ada_lin.1", "head"): {**four, "strategy": "channel"},
    }
    formats = {group["format"] for group in block["config_groups"].values() if group["weights"]["num_bits"] == 8}
    assert formats == {"int-quantized"}
    inputs = [group["input_activations"] for group in block["config_groups"].values()]
    assert all(i == {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True} for i in inputs)
    assert block["ignore"] == ["word_embed", "head_nm.ada_lin.1"]
    ours = block["arsp"]
    assert ours["format_version"] == store.FORMAT_VERSION and ours["simulated"] is None
    assert ours["shifted"] == [f"blocks.{i}.ffn.fc2" for i in range(2)]
    assert ours["recipe"]["name"] == "w4a8" and ours["base"]["sha256"] == models["var"].sha256
    assert manifest["parents"] == [{"model": models["var"].name, "sha256": models["var"].sha256}]
    with safe_open(path / "model.safetensors", "pt") as file:
        assert {"blocks.0.ffn.fc1.weight", "blocks.0.attn.mat_qkv.weight_packed"} <= set(file.keys())
        assert file.get_tensor("blocks.0.ffn.fc1.weight").dtype == torch.int8


@pytest.mark.parametrize(("name", "format_"), [("w4a8", "pack-quantized"), ("w8a8", "int-quantized")])
def test_one_format_for_all_layers_is_named_as_such(models, tmp_path, name, format_):
    path, _ = bundle_of(models["llamagen"], tmp_path / "q", name, layers={"formats": {}})
    block = json.loads((path / "arsp.json").read_text())["quantization"]
    assert block["format"] == format_ and len(block["config_groups"]) == (2 if name == "w4a8" else 1)


# -- simulated ----------------------------------------------------------------------------------------------------------------


def test_a_simulated_bundle_holds_the_weights_as_they_were_and_rounds_on_load(models, tmp_path):
    model = models["var"]
    path, _ = bundle_of(model, tmp_path / "q", "litevar", layers={"formats": {"head": [8, -1]}})
    weights = load_file(path / "model.safetensors")
    assert weights.keys() == model.module.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in model.module.state_dict().items())
    block = json.loads((path / "arsp.json").read_text())["quantization"]
    bits = block["arsp"]["simulated"]["bits"]
    assert (
        "config_groups" not in block
        and block["arsp"]["simulated"]["kind"] == "litevar"
        and set(bits.values()) == {4, 8}
        and bits["head"] == 8
    )
    assert not any(name.endswith("fc2") for name in bits) and "blocks.0.ffn.fc2" in block["ignore"]
    loaded = load_model(str(path))
    assert {name for name, part in loaded.module.named_modules() if isinstance(part, SimulatedLinear)} == bits.keys()
    samples = tiny_quant.samples(model)
    expected = simulate(copy.deepcopy(model.module), bits, "litevar")
    assert torch.equal(logits(samples, loaded.module), logits(samples, expected))
    assert store.is_simulated(block) and not store.is_simulated(None)


# -- damage -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """A W4A8 bundle with balancing and shifted inputs."""
    changes = {"balance": {"alpha": 0.5, "rotate": True, "layers": ["*qkv"]}, "weights": {"group_size": 32}}
    return bundle_of(models["var"], tmp_path_factory.mktemp("q") / "q", **changes)[0]


def changed(whole, path, weights=None, **block):
    """A copy with other tensors (None: left out) or another block, hashes correct."""
    path.mkdir()
    tensors = load_file(whole / "model.safetensors") | (weights or {})
    save_file({key: value for key, value in tensors.items() if value is not None}, path / "model.safetensors")
    (path / "tokenizer.safetensors").write_bytes((whole / "tokenizer.safetensors").read_bytes())
    manifest = json.loads((whole / "arsp.json").read_text())
    manifest["quantization"] |= block
    manifest["sha256"]["model.safetensors"] = sha256_file(path / "model.safetensors")
    write_json(path / "arsp.json", manifest)
    return path


QKV = "blocks.1.attn.mat_qkv"


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({f"{QKV}.weight_packed": None}, f"no {QKV}.weight"),
        ({f"{QKV}.weight_scale": None}, f"no {QKV}.weight_scale"),
        ({f"{QKV}.weight_shape": None}, f"no {QKV}.weight_shape"),
        ({f"{QKV}.weight_shape": torch.tensor([64, 64])}, f"{QKV}.weight"),
        ({f"{QKV}.weight_packed": torch.zeros(192, 7, dtype=torch.int32)}, f"{QKV}.weight_packed"),
        ({f"{QKV}.weight_scale": torch.full((192, 2), math.nan)}, "not finite"),
        ({f"{QKV}.weight_zero_point": torch.zeros(3, 2, dtype=torch.int32)}, f"{QKV}.weight_zero_point"),
        ({f"{QKV}.input_smooth": torch.ones(63)}, f"{QKV}.input_smooth"),
        ({f"{QKV}.input_smooth": torch.full((64,), math.inf)}, "NaN or infinite"),
        ({f"{QKV}.rotation_sign": torch.ones(64)}, f"{QKV}.rotation_sign"),
        ({f"{QKV}.input_scale": torch.ones(2)}, f"{QKV}.input_scale"),
        ({f"{QKV}.bias": torch.zeros(192)}, "agree on a bias"),
        ({"blocks.0.attn.proj.bias": None}, "agree on a bias"),
        ({"blocks.0.attn.proj.bias": torch.zeros(63)}, "blocks.0.attn.proj.bias"),
        ({f"{QKV}.weight_g_idx": torch.zeros(64)}, f"unexpected 1 ({QKV}.weight_g_idx)"),
        ({"blocks.0.attn.q_bias": None}, "missing 1 (blocks.0.attn.q_bias)"),
        ({"class_emb.weight": torch.full((4, 64), math.nan)}, "class_emb.weight holds NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_named(whole, tmp_path, weights, said):
    with pytest.raises(InputError) as error:
        load_model(str(changed(whole, tmp_path / "q", weights)))
    assert said in error.value.message and error.value.exit_code == 4


def group(*names):
    return {"config_groups": {"group_0": {"targets": list(names), "weights": {"num_bits": 4}}}}


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"arsp": {"format_version": 2}}, "quantised format 2; this arsp reads up to 1"),
        ({"arsp": None}, "not of arsp"),
        ({"arsp": {"format_version": "1"}}, "not of arsp"),
        ({"config_groups": {}}, "which layers"),
        ({"config_groups": []}, "which layers"),
        ({"config_groups": {"group_0": {}}}, "which layers"),
        ({"config_groups": {"group_0": {"targets": [3]}}}, "which layers"),
        (group("blocks.9.attn.proj"), "no linear layer blocks.9.attn.proj"),
        (group("blocks.0.norm1"), "no linear layer blocks.0.norm1"),
        (group("word_embed"), "no word_embed.weight_scale"),
        ({"arsp": {"format_version": 1, "simulated": {"kind": "fp8", "bits": {"head": 8}}}}, "which layers"),
        ({"arsp": {"format_version": 1, "simulated": {"kind": "litevar"}}}, "which layers"),
        ({"arsp": {"format_version": 1, "simulated": {"kind": "litevar", "bits": {"head": "8"}}}}, "which layers"),
    ],
)
def test_blocks_that_say_nothing_are_refused(whole, tmp_path, block, said):
    with pytest.raises(InputError) as error:
        load_model(str(changed(whole, tmp_path / "q", **block)))
    assert said in error.value.message and error.value.exit_code == 4


def test_a_simulated_layer_that_is_not_there_is_named(models, tmp_path):
    path, _ = bundle_of(models["var"], tmp_path / "q", "litevar")
    ours = {"format_version": 1, "simulated": {"kind": "litevar", "bits": {"blocks.7.ffn.fc1": 4}}}
    with pytest.raises(InputError, match="no linear layer blocks.7.ffn.fc1"):
        load_model(str(changed(path, tmp_path / "other", arsp=ours)))


def test_a_layer_named_twice_and_a_flipped_bit_are_refused(whole, tmp_path):
    block = json.loads((whole / "arsp.json").read_text())["quantization"]
    targets = [name for each in block["config_groups"].values() for name in each["targets"]]
    with pytest.raises(InputError, match="no linear layer blocks"):
        load_model(str(changed(whole, tmp_path / "twice", **group(*targets, QKV))))
    path = changed(whole, tmp_path / "flipped")
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        load_model(str(path))
