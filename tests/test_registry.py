"""Registries: lazy, shared, strict about names, and the same whether arsp is installed or not."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from arsp import registry
from arsp.errors import ConfigError
from arsp.registry import BUILTINS, Registry


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> str:
    """A table of its own, forgotten after the test."""
    monkeypatch.setattr(registry, "_registered", {})
    return "gadgets"


def test_nothing_is_imported_before_it_is_asked_for(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "arsp_test_plugin.py").write_text("class Inner:\n    value = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    Registry(kind).register("seven", "arsp_test_plugin:Inner.value")
    assert Registry(kind).names() == ["seven"]
    assert "arsp_test_plugin" not in sys.modules
    assert Registry(kind).get("seven") == 7


def test_an_object_can_be_registered_directly(kind: str):
    Registry(kind).register("print", print)
    assert Registry(kind).get("print") is print


def test_unknown_name_gives_the_nearest_ones(kind: str):
    Registry(kind).register("euler", "math:e")
    with pytest.raises(ConfigError, match="unknown gadget 'eulr'") as caught:
        Registry(kind).get("eulr")
    assert caught.value.hint == "Did you mean: euler? Available: euler."


def test_a_name_is_never_taken_over_silently(kind: str):
    Registry(kind).register("a", "math:e")
    Registry(kind).register("a", "math:e")
    with pytest.raises(ConfigError, match="taken by math:e"):
        Registry(kind).register("a", "math:pi")


@pytest.mark.parametrize("target", ["arsp_no_such_module:x", "math:no_such_thing"])
def test_a_broken_plugin_is_a_config_error_that_names_it(kind: str, target: str):
    Registry(kind).register("broken", target)
    with pytest.raises(ConfigError, match="gadgets: 'broken'"):
        Registry(kind).get("broken")


def _point(name: str, value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name, value, "arsp.gadgets")


def test_entry_points_of_other_packages_are_found(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "entry_points", lambda group: [_point("pi", "math:pi")] if group == "arsp.gadgets" else [])
    assert Registry(kind).get("pi") == pytest.approx(3.14159, abs=1e-5)


def test_a_plugin_cannot_shadow_a_builtin(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(BUILTINS, "gadgets", {"pi": "math:pi"})
    monkeypatch.setattr(registry, "entry_points", lambda group: [_point("pi", "math:e")])
    with pytest.raises(ConfigError, match="'pi' of a plug-in"):
        Registry(kind).names()


def test_every_builtin_can_be_imported():
    for kind, table in BUILTINS.items():
        for name in table:
            assert Registry(kind).get(name) is not None, f"{kind}: {name}"


def test_builtins_are_the_entry_points_of_the_project_file():
    tomllib = pytest.importorskip("tomllib", reason="tomllib is part of Python 3.11")
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    declared = {group.removeprefix("arsp."): table for group, table in project.get("entry-points", {}).items()}
    assert declared == BUILTINS
