"""Recipes: what they are by name and in examples/, what is refused, how budgets and patterns are read."""

from pathlib import Path

import pytest
import tiny_quant
import yaml

from arsp.config import resolve_config, to_yaml, validate
from arsp.errors import ConfigError
from arsp.quant.pipeline import QuantizeConfig
from arsp.quant.recipe import KEPT, RECIPES, Recipe, matches, parse_budget, recipe_card

EXAMPLES = Path(__file__).parents[2] / "examples"


def from_file(path):
    """As the command resolves ``-c path``."""
    asked = resolve_config(QuantizeConfig, files=[path])
    return resolve_config(QuantizeConfig, files=[path], card=recipe_card(asked.recipe))


def named(name):
    return resolve_config(QuantizeConfig, named={"recipe": name}, card=recipe_card(name))


def given_keys(values, prefix=""):
    """Dotted keys of a recipe, lists and numbers as leaves."""
    for key, value in values.items():
        yield from given_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


@pytest.mark.parametrize("name", RECIPES)
def test_the_example_of_a_recipe_is_the_recipe(name):
    path = EXAMPLES / f"quantize-{name}.yaml"
    assert from_file(path) == named(name)
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("name", RECIPES)
def test_the_example_says_all_that_the_recipe_sets(name):
    written = dict(given_keys(yaml.safe_load((EXAMPLES / f"quantize-{name}.yaml").read_text())))
    missing = {key for key, value in given_keys(RECIPES[name]) if written.get(key) != value}
    assert not missing and written["recipe"] == name


def test_every_example_belongs_to_a_recipe():
    assert {path.stem for path in EXAMPLES.glob("quantize-*.yaml")} == {f"quantize-{name}" for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_printed_is_read_back(name, tmp_path):
    (tmp_path / "printed.yaml").write_text(to_yaml(named(name)))
    assert from_file(tmp_path / "printed.yaml") == named(name)


def test_recipes_run_the_model_where_their_codes_depend_on_it():
    assert {name for name in RECIPES if tiny_quant.recipe(name).needs_inputs} == {"w4a8-gptq", "w4a8-awq", "vidit-q"}
    assert [name for name in RECIPES if tiny_quant.recipe(name).budget.size is not None] == ["mixdq"]
    assert [name for name in RECIPES if tiny_quant.recipe(name).simulate] == ["litevar"]
    assert tiny_quant.recipe("w4a8", balance={"alpha": 0.5}).needs_inputs


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="w4a8-gpt"):
        recipe_card("w4a8-gpt")
    with pytest.raises(ConfigError) as error:
        recipe_card("w4a8-gpt")
    assert "w4a8-gptq" in error.value.hint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": {"bits": 3}}, "weights.bits"),
        ({"weights": {"group_size": 96}}, "group sizes are 32, 64, 128, or -1"),
        ({"weights": {"group_size": 0}}, "group sizes are"),
        ({"weights": {"rounding": "adaround"}}, "weights.rounding"),
        ({"weights": {"damp": 0}}, "weights.damp"),
        ({"weights": {"grup_size": 32}}, "unknown key 'weights.grup_size'"),
        ({"balance": {"alpha": 1.5}}, "balance.alpha"),
        ({"layers": {"only": []}}, "layers.only"),
        ({"layers": {"formats": {"*.w1": [5, 32]}}}, "layers.formats"),
        ({"layers": {"formats": {"*.w1": [4, 33]}}}, "layers.formats"),
        ({"calibration": {"num": 0}}, "calibration.num"),
        ({"calibration": {"check": 0}}, "calibration.check"),
        ({"budget": {"choices": [[4, 128]]}}, "budget.choices"),
        ({"budget": {"size": "40"}}, "a budget of bytes is written"),
        ({"budget": {"size": "2ms"}}, "a budget of bytes is written"),
        ({"budget": {"size": "2MB", "of": "latency"}}, "a budget of latency is written"),
        ({"weights": {"rounding": "awq"}, "balance": {"alpha": 0.5}}, "drop balance.alpha"),
        ({"simulate": "fp8"}, "simulate"),
        ({"simulate": "litevar", "balance": {"rotate": True}}, "simulate: litevar rounds to nearest"),
        ({"simulate": "tensor", "weights": {"rounding": "gptq"}}, "simulate: tensor rounds to nearest"),
        ({"simulate": "tensor", "budget": {"size": "0.3x"}}, "simulate: tensor"),
    ],
)
def test_values_that_mean_nothing_are_refused(changes, said):
    with pytest.raises(ConfigError) as error:
        validate(Recipe, changes)
    assert said in error.value.message


@pytest.mark.parametrize(
    ("text", "of", "expected"),
    [
        ("0.3x", "bytes", (0.3, "x")),
        (".5x", "latency", (0.5, "x")),
        ("500KB", "bytes", (5e5, "bytes")),
        (" 40 MB ", "bytes", (4e7, "bytes")),
        ("2.5GB", "bytes", (2.5e9, "bytes")),
        ("800us", "latency", (800, "us")),
        ("2ms", "latency", (2000, "us")),
    ],
)
def test_budgets_have_units(text, of, expected):
    assert parse_budget(text, of) == expected


@pytest.mark.parametrize(
    ("text", "of"), [("0x", "bytes"), ("0.0MB", "bytes"), ("-1x", "bytes"), ("x", "bytes"), ("1mb", "bytes"), ("", "bytes")]
)
def test_budgets_of_nothing_are_refused(text, of):
    with pytest.raises(ValueError, match="a budget of bytes is written"):
        parse_budget(text, of)


def test_patterns_fit_whole_names_across_dots():
    assert matches("layers.0.feed_forward.w1", ["*.w1"]) and matches("tok_embeddings", KEPT) and matches("head_nm.ada_lin.1", KEPT)
    assert not matches("head", KEPT) and not matches("layers.0.feed_forward.w1", ["w1", "layers.?.w1"])
    assert matches("a", ["b", "a"]) and not matches("a", [])
