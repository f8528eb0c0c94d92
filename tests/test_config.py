"""Strict configuration: precedence, unknown keys, YAML that runs again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from arsp.config import StrictModel, config_hash, parse_yaml, resolve_config, split_override, to_yaml
from arsp.errors import ConfigError, InputError, UsageError


class Optimizer(StrictModel):
    lr: float = Field(1e-3, gt=0)
    """Learning rate."""
    beta: float | None = None


class Recipe(StrictModel):
    optimizer: Optimizer = Optimizer()
    """How weights move."""
    solver: Literal["euler", "2m"] = "2m"
    seed: int = 0
    name: str = "x: #y"
    sizes: list[int] = [1, 2]
    bound: float = math.inf
    extra: dict[str, float] = {}


class Required(StrictModel):
    teacher: str
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _ordered(self) -> Required:
        if self.low > self.high:
            raise ValueError("--low must not exceed --high")
        return self


def test_later_sources_win_key_by_key(tmp_path: Path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("optimizer: {lr: 0.2, beta: 0.2}\nsolver: euler\nseed: 2\n")
    second.write_text("optimizer: {lr: 0.3}\nseed: 3\n")
    card = {"seed": 1, "name": "card", "optimizer": {"lr": 0.1}}
    named = {"seed": 4, "optimizer.beta": None}
    got = resolve_config(Recipe, files=[first, second], named=named, overrides=["optimizer.lr=5e-1"], card=card)
    assert (got.name, got.solver, got.optimizer.beta, got.seed, got.optimizer.lr) == ("card", "euler", 0.2, 4, 0.5)


def test_named_option_none_means_not_given():
    assert resolve_config(Recipe, named={"seed": None}, card={"seed": 7}).seed == 7


def test_an_override_can_set_null():
    assert resolve_config(Recipe, card={"optimizer": {"beta": 0.5}}, overrides=["optimizer.beta=null"]).optimizer.beta is None


@pytest.mark.parametrize(
    ("override", "path", "suggestion"),
    [
        ("optimizer.lrr=1", "optimizer.lrr", "optimizer.lr"),
        ("lr=1", "lr", "optimizer.lr"),
        ("sead=1", "sead", "seed"),
        ("optimiser.lr=1", "optimiser", "optimizer"),
    ],
)
def test_unknown_key_names_the_full_path_and_the_nearest_key(override: str, path: str, suggestion: str):
    with pytest.raises(ConfigError) as caught:
        resolve_config(Recipe, overrides=[override])
    assert f"'{path}'" in caught.value.message
    assert f"Did you mean: {suggestion}" in caught.value.hint
    assert caught.value.exit_code == 3


def test_unknown_key_is_refused_on_direct_construction_at_any_depth():
    with pytest.raises(ConfigError, match="'optimizer.lrr'"):
        Recipe(optimizer={"lrr": 1})
    with pytest.raises(ConfigError, match="'lrr'"):
        Optimizer(lrr=1)


@pytest.mark.parametrize("override", ["seed=x", "optimizer.lr=0", "solver=rk4", "optimizer=3", "optimizer.lr.deep=1"])
def test_bad_value_is_a_config_error_that_shows_it(override: str):
    with pytest.raises(ConfigError, match=override.split("=")[0].removesuffix(".deep")):
        resolve_config(Recipe, overrides=[override])


def test_missing_required_key_is_named():
    with pytest.raises(ConfigError, match="'teacher' is required"):
        resolve_config(Required)


def test_a_validators_message_is_passed_on_as_written():
    with pytest.raises(ConfigError) as caught:
        resolve_config(Required, named={"teacher": "t"}, overrides=["low=5"])
    assert caught.value.message == "--low must not exceed --high"


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 1


def test_printed_yaml_runs_to_the_same_configuration(tmp_path: Path):
    config = resolve_config(Recipe, overrides=["optimizer.lr=1e-5", "name='a: b'", "sizes=[3]", "extra.k=1e-9"])
    text = to_yaml(config)
    (tmp_path / "c.yaml").write_text(text)
    assert resolve_config(Recipe, files=[tmp_path / "c.yaml"]) == config
    assert "# Learning rate." in text


def test_numbers_and_words_read_as_people_write_them():
    assert parse_yaml("1e-3") == 1e-3
    assert parse_yaml("no") == "no"
    assert parse_yaml("true") is True
    assert parse_yaml("[1, 2.5, .inf, -1.e2, 16]") == [1, 2.5, math.inf, -100.0, 16]
    assert parse_yaml("1.2.3") == "1.2.3"


@pytest.mark.parametrize(
    ("content", "error"),
    [("a: [", ConfigError), ("- 1\n", ConfigError), ("seed: 1\nseed: 2\n", ConfigError), (b"\xff\xfe\x00", InputError), (None, InputError)],
)
def test_unreadable_file_is_one_error_that_names_it(tmp_path: Path, content: str | bytes | None, error: type[Exception]):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match="c.yaml"):
        resolve_config(Recipe, files=[path])


def test_empty_file_changes_nothing(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert resolve_config(Recipe, files=[tmp_path / "c.yaml"]) == Recipe()


@pytest.mark.parametrize("text", ["foo", "=1", "a b=1", "a..b=1", "--seed=1", "a=[1"])
def test_malformed_override_is_a_usage_error(text: str):
    with pytest.raises(UsageError):
        split_override(text)


def test_hash_depends_on_values_not_on_order():
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1})
    assert config_hash(Recipe()) != config_hash(Recipe(seed=1))
    assert len(config_hash(Recipe())) == 64


def test_one_key_of_a_section_keeps_what_the_schema_sets_in_the_others():
    class Section(StrictModel):
        steps: int = 1
        ema: float = 0.0

    class Schema(StrictModel):
        optim: Section = Section(steps=100, ema=0.99)

    assert resolve_config(Schema, overrides=["optim.steps=7"]).optim == Section(steps=7, ema=0.99)
    assert resolve_config(Schema, named={"optim.ema": 0.5}).optim == Section(steps=100, ema=0.5)
    assert resolve_config(Schema).optim == Section(steps=100, ema=0.99)
