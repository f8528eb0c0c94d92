"""Strict configuration: one schema a concern, unknown keys are errors, YAML files and dotted overrides.

Precedence, weakest first: schema defaults, model card, YAML files in order, named options, trailing ``key.path=value``.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from arsp.errors import ConfigError, InputError, UsageError

Schema = TypeVar("Schema", bound="StrictModel")


class StrictModel(BaseModel):
    """Base of every schema: frozen, unknown keys refused, the docstring under a field is its documentation.

    Raises:
        ConfigError: on construction with an unknown key or a bad value, naming the full dotted path.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, protected_namespaces=())

    def __init__(self, **data: Any):
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise config_error(error, type(self)) from None

    __init__.__pydantic_base_init__ = True  # nested models are validated with their parent, so that paths stay complete


def nested_models(annotation: Any) -> list[type[BaseModel]]:
    """The schema classes mentioned in a field's annotation (``X``, ``X | None``, ``list[X]``, ...)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in nested_models(inner)]


def dotted_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a schema as a dotted path, parents included."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        for model in nested_models(field.annotation):
            yield from dotted_keys(model, f"{prefix}{name}.")


def nearest_keys(path: str, schema: type[BaseModel]) -> str:
    """``Did you mean: a.b? Keys: ...`` for an unknown dotted key: near as a whole, or by its last part anywhere in the schema."""
    known = list(dict.fromkeys(dotted_keys(schema)))
    leaf, parent = path.rpartition(".")[2], path.rpartition(".")[0]
    close = difflib.get_close_matches(path, known, n=3, cutoff=0.6)
    leaves = difflib.get_close_matches(leaf, {key.rpartition(".")[2] for key in known}, n=3, cutoff=0.6)
    close += [key for key in known if key.rpartition(".")[2] in leaves and key not in close]
    lead = f"Did you mean: {', '.join(close[:3])}? " if close else ""
    siblings = [key for key in known if key.rpartition(".")[0] == parent] or known
    return f"{lead}Keys: {', '.join(siblings)}."


def config_error(error: ValidationError, schema: type[BaseModel]) -> ConfigError:
    """One ConfigError from everything pydantic found; unknown keys first, because a typo explains the other errors."""
    lines, hint = [], None
    for item in sorted(error.errors(), key=lambda found: found["type"] != "extra_forbidden"):
        path = ".".join(str(part) for part in item["loc"]) or "configuration"
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key '{path}'")
            hint = hint or nearest_keys(path, schema)
        elif item["type"] == "missing":
            lines.append(f"'{path}' is required")
        else:
            text = item["msg"].removeprefix("Value error, ")
            lines.append(text if path == "configuration" else f"'{path}': {text[:1].lower()}{text[1:]}, got {item['input']!r}")
    return ConfigError("; ".join(lines), hint)


def validate(schema: type[Schema], data: Mapping[str, Any]) -> Schema:
    """``data`` as a ``schema``. Raises ConfigError."""
    try:
        return schema.model_validate(dict(data))
    except ValidationError as error:
        raise config_error(error, schema) from None


class _Loader(yaml.SafeLoader):
    """YAML with the 1.2 reading of scalars: ``1e-3`` is a number, ``no`` and ``on`` are words; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d[\d_]*)?\.\d[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*\.(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """Parse YAML text (safe tags only). Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file. Raises InputError (missing, not text), ConfigError (not YAML, not a mapping)."""
    try:
        data = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"configuration file not found: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read configuration file {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, not a {type(data).__name__}")
    return data


def split_override(text: str) -> tuple[str, Any]:
    """``key.path=value`` -> (key.path, value parsed as YAML). Raises UsageError."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key.strip()):
        raise UsageError(f"'{text}' is not of the form key.path=value", "overrides come last, e.g. seed=1; options start with --")
    try:
        return key.strip(), parse_yaml(value)
    except yaml.YAMLError:
        raise UsageError(f"the value of '{text}' is not valid YAML", "quote it for YAML as well, e.g. 'name=\"a: b\"'") from None


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` on top; mappings merge, everything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = deep_merge(merged[key], value) if both else value
    return merged


def nest(key: str, value: Any) -> dict[str, Any]:
    """``a.b``, v -> ``{"a": {"b": v}}``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def section_defaults(schema: type[BaseModel]) -> dict[str, Any]:
    """What the schema's own default instances of its sections set: giving one key of a section keeps the others."""
    sections = {
        name: field.get_default(call_default_factory=True) for name, field in schema.model_fields.items() if not field.is_required()
    }
    return {name: value.model_dump(exclude_unset=True) for name, value in sections.items() if isinstance(value, BaseModel)}


def resolve_config(
    schema: type[Schema],
    *,
    files: list[Path] | None = None,
    named: Mapping[str, Any] | None = None,
    overrides: list[str] | None = None,
    card: Mapping[str, Any] | None = None,
) -> Schema:
    """The configuration from all its sources (see the module's precedence).

    Args:
        card: presets of the model card. files: YAML mappings. named: command-line options by (dotted) key, None = not given.
        overrides: ``key.path=value`` texts, the value parsed as YAML.

    Raises:
        ConfigError: unknown key (with the nearest ones) or bad value. InputError: unreadable file. UsageError: malformed override.
    """
    data: dict[str, Any] = deep_merge(section_defaults(schema), card or {})
    for path in files or []:
        data = deep_merge(data, load_yaml(path))
    pairs = [(key, value) for key, value in (named or {}).items() if value is not None]
    for key, value in pairs + [split_override(text) for text in overrides or []]:
        data = deep_merge(data, nest(key, value))
    return validate(schema, data)


def to_dict(config: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return config.model_dump(mode="json") if isinstance(config, BaseModel) else dict(config)


def to_yaml(config: BaseModel) -> str:
    """Runnable YAML with each field's documentation as a comment; ``resolve_config(files=[it])`` gives the same configuration."""
    lines = []
    for name, field in type(config).model_fields.items():
        if field.description:
            lines += [f"# {line}" for line in textwrap.wrap(" ".join(field.description.split()), 110)]
        value = getattr(config, name)
        if isinstance(value, BaseModel) and type(value).model_fields:
            lines += [f"{name}:", textwrap.indent(to_yaml(value).rstrip("\n"), "  ")]
        else:
            plain = config.model_dump(mode="json", include={name})
            lines.append(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110).rstrip("\n"))
    return "\n".join(lines) + "\n"


def config_hash(config: BaseModel | Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the configuration's canonical JSON: sorted keys, no spaces."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
