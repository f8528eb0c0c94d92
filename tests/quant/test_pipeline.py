"""Quantisation end to end on tiny models: what is refused beforehand, what a run makes, and that its figures are those of its bundle."""

import json
from contextlib import contextmanager

import pytest
import tiny_models
import tiny_quant
import torch
from safetensors.torch import load_file

from arsp.config import deep_merge, validate
from arsp.data.images import save_png_dir
from arsp.errors import ConfigError, InputError, NumericalError
from arsp.quant.agreement import Judge
from arsp.quant.calibrate import own_samples
from arsp.quant.install import linear_layers
from arsp.quant.linear import QuantLinear
from arsp.quant.pipeline import QuantizeConfig, check, run
from arsp.quant.recipe import RECIPES, recipe_card
from arsp.zoo.load import load_model, resolve

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = {"calibration": {"num": 4, "check": 4, "batch_size": 2}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_quant.load(kind, folder) for kind in tiny_quant.KINDS}


def config_of(model, recipe="w4a8", **changes):
    given = deep_merge(deep_merge(recipe_card(recipe), FEW), changes)
    return validate(QuantizeConfig, {"model": model.name, "recipe": recipe, **given})


@contextmanager
def stage(total, text):
    yield lambda n=1: None


def quantise(model, path, recipe="w4a8", **changes):
    config = config_of(model, recipe, **changes)
    check(config, model.source)
    path.mkdir(exist_ok=True)
    return run(config, model, *tiny_quant.rule(model), path, stage=stage)


SMALL = {"budget": {"size": "0.4x", "sweep": 2}, "layers": {"only": ["layers.1.*", "blocks.1.*"]}}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", tiny_quant.KINDS)
def test_every_recipe_makes_a_bundle_of_every_model(models, kind, recipe, tmp_path):
    model = models[kind]
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    result = quantise(model, tmp_path, recipe, rest="float32", **(SMALL if recipe == "mixdq" else {}))
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())
    loaded = load_model(str(tmp_path))  # a run directory is as good as its bundle
    judge = Judge(own_samples(model, *tiny_quant.rule(model), num=4, batch_size=2, seed=2_000_004))
    assert judge(loaded.module) == result.agreement
    assert (
        result.bundle == tmp_path / "bundle"
        and 0 <= result.agreement.kl < 1
        and result.agreement.positions == 4 * len(before and range(model.source.layout.num_tokens))
    )
    assert (result.picture is not None) == (recipe == "mixdq")
    layers = {line["layer"] for line in result.layers}
    assert result.bytes["quantised_fp16"] == sum(2 * model.module.get_submodule(name).weight.numel() for name in layers)
    if recipe == "litevar":
        assert result.bytes["quantised"] == result.bytes["quantised_fp16"]
        assert all(line["format"].endswith("A8 simulated") for line in result.layers)
    else:
        assert {name for name, part in loaded.module.named_modules() if isinstance(part, QuantLinear)} == layers


@pytest.mark.parametrize("recipe", ["w4a8", "w8a8", "w4a8-awq"])
def test_bytes_of_the_report_are_those_of_the_file(models, recipe, tmp_path):
    result = quantise(models["var"], tmp_path, recipe)
    stored = load_file(tmp_path / "bundle" / "model.safetensors")
    for line in result.layers:
        leaves = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
        assert line["bytes"] == sum(stored[key].nbytes for leaf in leaves if (key := f"{line['layer']}.{leaf}") in stored), line
        assert line["sqnr_db"] > (35 if recipe == "w8a8" else 12), line
    assert result.bytes["quantised"] == sum(line["bytes"] for line in result.layers)
    assert sum(tiny_quant.weight_bytes(load_model(str(tmp_path)).module).values()) < 0.75 * sum(
        p.nbytes for p in models["var"].module.parameters()
    )


def test_formats_are_told_with_what_becomes_of_the_inputs(models, tmp_path):
    changes = {"balance": {"alpha": 0.5, "rotate": True, "layers": ["*qkv"]}, "layers": {"formats": {"*.fc1": [8, -1]}}}
    changes |= {"weights": {"group_size": 128}}
    result = quantise(models["var"], tmp_path, **changes)
    formats = {line["layer"].rpartition(".")[2]: line["format"] for line in result.layers}
    assert formats["mat_qkv"] == "W4A8 scaled rotated" and formats["fc1"] == "W8A8" and formats["fc2"] == "W4g128A8 shifted"


def test_what_is_kept_is_stored_in_the_precision_asked_for(models, tmp_path):
    quantise(models["llamagen"], tmp_path / "h")
    half = load_file(tmp_path / "h" / "bundle" / "model.safetensors")
    assert half["tok_embeddings.weight"].dtype == torch.float16 and half["norm.weight"].dtype == torch.float16
    manifest = json.loads((tmp_path / "h" / "bundle" / "arsp.json").read_text())
    assert manifest["classes"] == tiny_models.CLASSES and manifest["about"].endswith("quantised by recipe w4a8")


def test_a_number_too_large_for_half_precision_is_named(models, tmp_path, monkeypatch):
    table = models["llamagen"].module.tok_embeddings.weight
    large = table.data.clone()
    large[3, 5] = 1e5
    monkeypatch.setattr(table, "data", large)
    with pytest.raises(NumericalError, match="tok_embeddings.weight does not fit into float16"):
        quantise(models["llamagen"], tmp_path / "a")
    assert not list((tmp_path / "a").iterdir())
    quantise(models["llamagen"], tmp_path / "b", rest="bfloat16")


def test_a_budget_is_kept_and_shown(models, tmp_path):
    result = quantise(models["llamagen"], tmp_path, budget={"size": "0.4x", "choices": [[4, 32], [8, -1]]})
    assert result.bytes["quantised"] <= 0.4 * result.bytes["quantised_fp16"]
    assert {line["format"][:5] for line in result.layers} == {"W4g32", "W8A8 "}
    scores = json.loads((tmp_path / "sensitivity.json").read_text())
    assert scores.keys() == {line["layer"] for line in result.layers}
    assert result.picture.read_bytes().startswith(b"\x89PNG")


def test_calibration_images_are_looked_at_in_place_of_samples(models, tmp_path):
    model = models["llamagen"]
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_png_dir(images, tmp_path / "images")
    source = {"calibration": {"source": str(tmp_path / "images")}}
    own, given = (quantise(model, tmp_path / n, "w4a8-gptq", **c) for n, c in (("own", {}), ("given", source)))
    codes = [load_file(result.bundle / "model.safetensors")["layers.1.feed_forward.w2.weight_packed"] for result in (own, given)]
    assert not torch.equal(*codes)


# -- before any weight is read ------------------------------------------------------------------------------------------------


def test_what_cannot_be_quantised_is_refused_by_its_configuration(models, tmp_path):
    teacher, student = models["llamagen"], models["llamagen-student"]
    quantise(teacher, tmp_path / "q")
    tokenizer = tiny_models.tokenizer_bundle(tmp_path / "tok")
    for source, changes, said in (
        (resolve(str(tmp_path / "q")), {}, "quantised already"),
        (resolve(str(tokenizer)), {}, "of kind 'tokenizer'"),
        (resolve("llamagen-t2i-xl-256"), {}, "conditioned on text"),
        (teacher.source, {"activations": {"scales": "static"}, "balance": {"rotate": False}}, "every scale of a next-scale model"),
        (student.source, {"calibration": {"source": "images"}}, "its own noise"),
        (teacher.source, {"layers": {"only": ["*.wq"]}}, "names no layer"),
        (teacher.source, {"budget": {"size": "0.1x"}}, "the smallest feasible one is 0."),
        (teacher.source, {"budget": {"size": "1KB"}}, "KB."),
    ):
        with pytest.raises(ConfigError) as error:
            check(config_of(teacher, **changes), source)
        assert said in error.value.message, error.value.message


def test_a_folder_without_images_is_refused(models, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        with pytest.raises(InputError, match=name):
            check(config_of(models["llamagen"], calibration={"source": str(tmp_path / name)}), models["llamagen"].source)


def test_formats_are_known_before_a_weight_is_read(models):
    formats = check(config_of(models["var"], weights={"group_size": 32}), models["var"].source)
    assert formats.keys() <= linear_layers(models["var"].module).keys() and str(formats["blocks.0.ffn.fc1"]) == "W4g32"
