"""Lazy tables from names to code: built-ins and plug-ins arrive by the same door, nothing is imported before it is asked for.

A plug-in package adds to a table with an entry point, e.g. ``[project.entry-points."arsp.samplers"]  mine = "my_package:Sampler"``.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from arsp.errors import ConfigError, nearest

# What arsp itself registers, so that a checkout that is not installed works too. pyproject.toml repeats it (a test compares them).
BUILTINS: dict[str, dict[str, str]] = {
    "families": {"llamagen": "arsp.zoo.families:LLAMAGEN", "var": "arsp.zoo.families:VAR"},
    "methods": {"dd1": "arsp.distill.pipeline:distill"},
    "samplers": {"ar": "arsp.decode.ar:ARGenerator"},
}

_registered: dict[str, dict[str, Any]] = {}


class Registry:
    """The table of one kind ("samplers", "metrics", ...). All instances of a kind share what was registered.

    Raises (``get``, ``register``):
        ConfigError: unknown name (with the nearest ones), a name taken by something else, a plug-in that does not import.
    """

    def __init__(self, kind: str):
        self.kind = kind

    def register(self, name: str, target: Any) -> None:
        """Add ``target``: the text ``"module:attribute"``, imported on first use, or the object itself."""
        table = self._table()
        if table.get(name, target) != target:
            raise ConfigError(f"{self.kind}: the name '{name}' is taken by {table[name]}, refusing {target}")
        _registered.setdefault(self.kind, {})[name] = target

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._table())

    def get(self, name: str) -> Any:
        """The object called ``name``, imported now."""
        table = self._table()
        if name not in table:
            singular = f"{self.kind[:-3]}y" if self.kind.endswith("ies") else self.kind.removesuffix("s")
            raise ConfigError(f"unknown {singular} '{name}'", nearest(name, table))
        target = table[name]
        return load_target(target, f"{self.kind}: '{name}'") if isinstance(target, str) else target

    def _table(self) -> dict[str, Any]:
        table = {**BUILTINS.get(self.kind, {}), **_registered.get(self.kind, {})}
        for point in entry_points(group=f"arsp.{self.kind}"):
            if table.setdefault(point.name, point.value) != point.value:
                package = point.dist.name if point.dist else "a plug-in"
                raise ConfigError(
                    f"{self.kind}: the name '{point.name}' of {package} ({point.value}) is taken by {table[point.name]}",
                    f"uninstall {package} or ask its author to rename it",
                )
        return table


def load_target(target: str, what: str) -> Any:
    """Import ``"module:attribute"``. Raises ConfigError naming ``what`` when the module or the attribute is not there."""
    module_name, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{what} ({target}) cannot be imported: {error}", "reinstall the package that provides it") from error
    return found
