"""Sensitivity of layers: alone, kept and continued; formats under a budget: as good as the best of all, within it, or refused."""

import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import tiny_quant
import torch

from arsp.config import validate
from arsp.errors import ConfigError, Interrupted
from arsp.quant import sensitivity
from arsp.quant.agreement import Judge
from arsp.quant.install import install, linear_layers
from arsp.quant.recipe import BudgetConfig
from arsp.quant.sensitivity import check_budget, choices, costs, latencies, measure_sensitivity, mix
from arsp.quant.transform import Format, choose_layers, quantise_layers

pytestmark = pytest.mark.usefixtures("one_thread")
ONLY = ["layers.0.attention.wo", "layers.1.feed_forward.w2", "output"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_quant.load(kind, folder) for kind in ("llamagen", "var")}


@pytest.fixture(scope="module")
def judge(models):
    return Judge(tiny_quant.samples(models["llamagen"], num=2))


def recipe_of(size="0.4x", only=ONLY, **budget):
    return tiny_quant.recipe(layers={"only": only}, budget={"size": size, "choices": [[4, -1], [4, 32], [8, -1]], **budget})


def options_of(model, recipe):
    return choices(model.module, choose_layers(model.module, recipe), recipe.budget)


@pytest.fixture(scope="module")
def measured(judge, models, tmp_path_factory):
    recipe = recipe_of()
    options = options_of(models["llamagen"], recipe)
    file = tmp_path_factory.mktemp("s") / "sensitivity.json"
    return SimpleNamespace(scores=measure_sensitivity(judge, options, recipe, None, file), options=options, file=file)


# -- sensitivity --------------------------------------------------------------------------------------------------------------


def test_choices_are_the_formats_that_fit_a_layer_once_each(models):
    options = options_of(models["llamagen"], recipe_of(choices=[[4, 128], [4, 64], [4, 32], [8, -1], [8, 32]]))
    assert list(options) == ONLY
    assert options["output"] == {"W4": Format(4), "W4g32": Format(4, 32), "W8": Format(8)}  # 64 inputs: groups of 64 are all of them
    assert list(options["layers.1.feed_forward.w2"]) == ["W4g64", "W4g32", "W8"]


def test_a_score_is_that_of_the_model_with_one_layer_quantised(measured, judge, models):
    assert measured.scores.keys() == set(ONLY)
    recipe = recipe_of()
    for name, key in (("output", "W4"), ("layers.1.feed_forward.w2", "W4g32"), ("layers.0.attention.wo", "W8")):
        module = copy.deepcopy(models["llamagen"].module)
        layers = quantise_layers(module, {name: measured.options[name][key]}, recipe)
        expected = judge(install(module, layers, torch.float32))
        found = measured.scores[name][key]
        assert found["kl"] == pytest.approx(expected.kl_by_step, rel=0.05) and found["sqnr"] == pytest.approx(expected.sqnr_db, abs=0.5)
    for scores in measured.scores.values():
        assert scores["W8"]["kl"] < scores["W4g32"]["kl"] and scores["W8"]["sqnr"] > scores["W4g32"]["sqnr"]


def test_what_is_measured_is_kept_and_not_repeated(measured, judge, models, tmp_path, monkeypatch):
    """Stopped behind the second layer, continued, finished: every layer is measured once, and the result is that of one run."""
    assert json.loads(measured.file.read_text()) == measured.scores
    recipe, file, calls = recipe_of(), tmp_path / "sensitivity.json", []
    counted = lambda module: (calls.append(1), judge(module))[1]
    counted.samples = judge.samples
    told = []

    def stop(layers):
        told.append(layers)
        if len(told) == 2:
            raise Interrupted("stopped", 130)

    with pytest.raises(Interrupted):
        measure_sensitivity(counted, measured.options, recipe, None, file, stop)
    assert len(json.loads(file.read_text())) == 2 and len(calls) == 3 + 3
    assert measure_sensitivity(counted, measured.options, recipe, None, file) == measured.scores
    assert len(calls) == 3 * 3
    assert measure_sensitivity(counted, measured.options, recipe, None, file) == measured.scores and len(calls) == 9
    fewer = {name: dict(itertools.islice(formats.items(), 2)) for name, formats in measured.options.items()}
    assert measure_sensitivity(counted, fewer, recipe, None, file)["output"].keys() == fewer["output"].keys() and len(calls) == 15


def test_a_model_is_put_right_when_the_judge_fails(measured, judge, models, tmp_path):
    def failing(module):
        raise Interrupted("stopped", 130)

    failing.samples = judge.samples
    with pytest.raises(Interrupted):
        measure_sensitivity(failing, measured.options, recipe_of(), None, tmp_path / "s.json")
    assert set(ONLY) <= set(linear_layers(models["llamagen"].module))


def test_a_layer_that_loses_nothing_has_a_finite_score(judge, models, tmp_path, monkeypatch):
    layer = models["llamagen"].module.get_submodule("layers.0.attention.wo")
    monkeypatch.setattr(layer.weight, "data", torch.zeros_like(layer.weight))
    again, recipe = Judge(judge.samples), recipe_of(only=["layers.0.attention.wo"], score="sqnr")
    options = options_of(models["llamagen"], recipe)
    scores = measure_sensitivity(again, options, recipe, None, tmp_path / "s.json")
    assert scores["layers.0.attention.wo"]["W4"] == {"kl": 0.0, "sqnr": sensitivity.MOST_DB}
    found, size = costs(models["llamagen"].module, options, recipe.budget)
    assert mix(again, options, scores, found, size, recipe, None)


# -- costs --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["0.4x", "10KB"])
def test_bytes_are_those_of_the_packed_layers(models, size):
    recipe = recipe_of(size)
    options, module = options_of(models["llamagen"], recipe), models["llamagen"].module
    found, budget = costs(module, options, recipe.budget)
    whole = sum(2 * module.get_submodule(name).weight.numel() for name in ONLY)
    for name, formats in options.items():
        for key, format_ in formats.items():
            expected = format_.bytes(module.get_submodule(name)) / (whole if size == "0.4x" else 1)
            assert found[name][key] == pytest.approx(expected), (name, key)
    assert budget == (0.4 if size == "0.4x" else 1e4)


@pytest.fixture
def clock(monkeypatch):
    """Times that are known: a millisecond for every work by its place; the works that were timed."""
    timed = []

    def measure(works, **settings):
        timed.extend(works)
        for work in works.values():
            work()
        return {name: SimpleNamespace(median_ms=1.0 + index) for index, name in enumerate(works)}

    monkeypatch.setattr(sensitivity, "measure", measure)
    return timed


def test_latencies_are_measured_once_a_shape_and_format(models, clock):
    recipe = recipe_of("2ms", only=["*.w1", "*.w3", "output"], of="latency", rows=3)
    options = options_of(models["llamagen"], recipe)
    found, whole = latencies(models["llamagen"].module, options, 3)
    assert clock == [
        *(f"192x64 {key}" for key in ("W4", "W4g32", "W8", "bfloat16")),
        *(f"16x64 {key}" for key in ("W4", "W4g32", "W8", "bfloat16")),
    ]
    assert found["layers.0.feed_forward.w1"] == found["layers.1.feed_forward.w3"] == {"W4": 1000, "W4g32": 2000, "W8": 3000}
    assert whole == 4 * 4000 + 8000
    relative, size = costs(models["llamagen"].module, options, recipe_of("0.5x", of="latency").budget)
    assert size == 0.5 and relative["output"]["W8"] == pytest.approx(7000 / whole)


def test_a_latency_budget_is_kept(models, judge, measured, clock):
    recipe = recipe_of("16ms", of="latency")
    found, size = costs(models["llamagen"].module, measured.options, recipe.budget)
    chosen = mix(judge, measured.options, measured.scores, found, size, recipe, None)
    assert size == 16000 and sum(found[name][str(format_)] for name, format_ in chosen.items()) <= size


# -- the mix ------------------------------------------------------------------------------------------------------------------


def total(scores, choice, score):
    return sum(scores[name][key][score] for name, key in choice.items())


@pytest.mark.parametrize("score", ["kl", "sqnr"])
@pytest.mark.parametrize("size", ["0.28x", "0.3x", "0.35x", "0.4x", "0.5x", "1x", "11KB"])
def test_the_formats_are_the_best_of_all_within_the_budget(models, judge, measured, score, size):
    recipe = recipe_of(size, score=score)
    found, budget = costs(models["llamagen"].module, measured.options, recipe.budget)
    chosen = mix(judge, measured.options, measured.scores, found, budget, recipe, None)
    chosen = {name: str(format_) for name, format_ in chosen.items()}
    every = [dict(zip(ONLY, keys, strict=True)) for keys in itertools.product(*(measured.options[name] for name in ONLY))]
    allowed = [choice for choice in every if sum(found[name][key] for name, key in choice.items()) <= budget]
    best = (min if score == "kl" else max)(total(measured.scores, choice, score) for choice in allowed)
    assert chosen in allowed and total(measured.scores, chosen, score) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("key", ["W4", "W4g32", "W8"])
def test_mixed_formats_are_as_good_as_uniform_ones_of_the_same_cost(models, judge, measured, key):
    options = {name: formats for name, formats in measured.options.items() if key in formats}
    module = models["llamagen"].module
    found, _ = costs(module, options, recipe_of("1KB").budget)
    size = sum(found[name][key] for name in options)
    recipe = recipe_of(f"{size / 1e3}KB")
    chosen = mix(judge, options, measured.scores, found, size, recipe, None)
    assert sum(found[name][str(format_)] for name, format_ in chosen.items()) <= size
    mixed = total(measured.scores, {name: str(format_) for name, format_ in chosen.items()}, "kl")
    assert mixed <= total(measured.scores, dict.fromkeys(options, key), "kl") * (1 + 1e-9)


@pytest.mark.parametrize(("size", "of"), [("0.01x", "bytes"), ("1KB", "bytes"), ("0.0001x", "latency"), ("5us", "latency")])
def test_a_budget_that_cannot_be_met_names_the_smallest_that_can(models, judge, measured, clock, size, of):
    recipe = recipe_of(size, of=of)
    found, budget = costs(models["llamagen"].module, measured.options, recipe.budget)
    with pytest.raises(ConfigError, match=f"the budget {size} cannot be met") as error:
        mix(judge, measured.options, measured.scores, found, budget, recipe, None)
    named = error.value.hint.split()[2]
    assert f"smallest feasible one is {named}." in error.value.message
    again = recipe_of(named, of=of)
    found, budget = costs(models["llamagen"].module, measured.options, again.budget)
    check_budget(found, budget, again.budget)
    chosen = mix(judge, measured.options, measured.scores, found, budget, again, None)
    assert all(found[name][str(format_)] == min(found[name].values()) for name, format_ in chosen.items())


def test_a_large_smallest_budget_is_written_as_it_is_read():
    for least in (1234.5678, 987654.3, 1.23456e7, 9.8765432e9):
        config = validate(BudgetConfig, {"size": "1KB"})
        with pytest.raises(ConfigError) as error:
            check_budget({"a": {"W4": least}}, 1000, config)
        size = validate(BudgetConfig, {"size": error.value.hint.split()[2]})
        check_budget({"a": {"W4": least}}, sensitivity.parse_budget(size.size, "bytes")[0], size)


def test_decoupled_scores_split_the_budget_as_the_model_likes_best(models, tmp_path):
    model = models["var"]
    recipe = recipe_of("0.33x", only=["blocks.0.attn.*", "blocks.1.ffn.*"], score="decoupled", sweep=4)
    judge, options = Judge(tiny_quant.samples(model, num=2)), options_of(model, recipe)
    scores = measure_sensitivity(judge, options, recipe, None, tmp_path / "s.json")
    found, size = costs(model.module, options, recipe.budget)
    told = []
    chosen = mix(judge, options, scores, found, size, recipe, None, told.append)
    assert chosen.keys() == options.keys() and 1 <= len(told) <= 5
    assert sum(found[name][str(format_)] for name, format_ in chosen.items()) <= size
    tried = [float(text.rpartition("KL ")[2].partition(",")[0]) for text in told]
    layers = quantise_layers(model.module, chosen, recipe)
    assert judge(install(copy.deepcopy(model.module), layers, torch.float32)).kl_by_step == pytest.approx(min(tried), rel=1e-3)


def test_decoupled_scores_of_one_kind_of_layers_are_not_split(models, judge, measured):
    """Attention alone, or a budget that no split leaves enough of: one programme for all."""
    for only, size in ((["layers.0.attention.wo", "output"], "0.4x"), (ONLY, "0.27x")):
        recipe = recipe_of(size, only=only, score="decoupled", sweep=1)
        options = {name: measured.options[name] for name in only}
        found, budget = costs(models["llamagen"].module, options, recipe.budget)
        told = []
        chosen = mix(judge, options, measured.scores, found, budget, recipe, None, told.append)
        assert chosen.keys() == options.keys() and sum(found[name][str(format_)] for name, format_ in chosen.items()) <= budget
        assert not any("attention" in text for text in told)
