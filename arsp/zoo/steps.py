"""The rows of a step schedule -> loaded steps: refused before any weight is read where models or profiles do not belong together."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import torch

from arsp.decode.schedule import ScaleRow, ScaleStep, check_rows
from arsp.errors import ConfigError
from arsp.models.attention import DensePolicy
from arsp.runs import sha256_file
from arsp.zoo.bundle import read_manifest
from arsp.zoo.load import LoadedModel, ModelSource, load_model, resolve, stored_sha256

ALIKE = {  # configuration values that models of one image must share, by order
    "next-scale": ("patch_nums", "vocab_size", "code_dim", "num_classes"),
    "raster": ("block_size", "vocab_size", "num_classes", "model_type"),
}  # fmt: skip


def check_steps(rows: list[ScaleRow], main: ModelSource, random_weights: bool = False) -> list[ModelSource]:
    """The model of each row. ConfigError: two tokenizers, two layouts, a model at a scale it was not trained for, a schedule that reads
    what was not computed. InputError: a profile that is damaged or was made for another model."""
    check_rows(rows)
    found: dict[str, ModelSource] = {"": main}
    for row in rows:
        if row.model not in found:
            found[row.model] = beside(resolve(row.model), main)
        policy_of(row.attention, found[row.model], random_weights)
    sources = [found[row.model] for row in rows]
    for k, (row, source) in enumerate(zip(rows, sources, strict=True)):
        first, last = source.card.get("scales") or (0, len(rows) - 1)
        if not first <= k <= last:
            raise ConfigError(
                f"{source.name} was trained for scales {first}-{last} only; here it would make scale {k}.",
                "Let another model of its tokenizer make the others: --collab BIG:SMALL@N.",
            )
        if row.depth is not None and row.depth > source.config["depth"]:
            raise ConfigError(f"schedule: scale {k} asks for {row.depth} blocks, {source.name} has {source.config['depth']}.")
        if row.depth is not None and row.attention != "dense":
            raise ConfigError(f"schedule: scale {k} has both a depth and {row.attention}: windows are calibrated for all blocks.")
    return sources


def beside(source: ModelSource, main: ModelSource) -> ModelSource:
    """``source``, if it can share an image with ``main``; ConfigError with the reason if not."""
    if source.kind != "teacher" or source.family is not main.family:
        raise ConfigError(
            f"{source.name} is a {source.family.name} {source.kind}; {main.name} needs {main.family.name} teachers beside it."
        )
    for key in ALIKE[main.layout.order]:
        if source.config[key] != main.config[key]:
            raise ConfigError(
                f"{source.name} and {main.name} cannot make one image: {key} {source.config[key]} and {main.config[key]}.",
                "Take two models of one tokenizer.",
            )
    if source.tokenizer_identity not in (None, main.tokenizer_identity):  # official files hold none and take the stack's
        raise ConfigError(
            f"{source.name} and {main.name} have different tokenizers ({source.tokenizer_identity}, {main.tokenizer_identity}).",
            "Take two models of one tokenizer.",
        )
    return source


def policy_of(attention: str, source: ModelSource, random_weights: bool = False) -> Any:
    """``dense`` or ``litevar[=PROFILE]`` -> a policy checked against the model; without PROFILE the model's packaged one, and for ``rR``
    (``r1``) windows of radius R everywhere, calibrated on nothing."""
    if attention == "dense":
        return DensePolicy()
    name, _, path = attention.partition("=")
    if name != "litevar":
        raise ConfigError(f"unknown attention preset '{attention}'.", "Use dense, or litevar=PROFILE (made by arsp sparsify).")
    from arsp.sparse.policy import LiteVARPolicy
    from arsp.sparse.profile import load_profile, uniform_profile

    config = source.config
    if radius := uniform_radius(path):
        sizes = dict(patch_nums=config["patch_nums"], depth=config["depth"], heads=config["num_heads"])
        return LiteVARPolicy(uniform_profile(source.name, radius, **sizes))
    profile = load_profile(path or packaged_profile(source))
    profile.check_model(
        source.name, patch_nums=config["patch_nums"], depth=config["depth"], heads=config["num_heads"],
        fingerprint=None if random_weights else _fingerprint(source),
    )  # fmt: skip
    return LiteVARPolicy(profile)


def uniform_radius(profile: str) -> int | None:
    """R of the profile name ``rR``; None for any other name."""
    found = re.fullmatch(r"r([1-9]\d?)", profile)
    return int(found[1]) if found else None


def _fingerprint(source: ModelSource) -> str | None:
    """SHA-256 of the weights a model would be loaded with; None where they are not on this machine."""
    if source.path is None or source.path.is_dir():
        return stored_sha256(source)
    return _file_sha256(source.path, source.path.stat().st_mtime_ns)


@functools.cache
def _file_sha256(path: Path, mtime_ns: int) -> str:
    return sha256_file(path)


def packaged_profile(source: ModelSource) -> str:
    """The default profile that came with an embedded model. ConfigError when there is none."""
    path = None if source.path is None else source.path.parent / f"{source.path.name}-litevar"
    if source.origin != "embedded" or not path.is_dir():
        raise ConfigError(f"litevar: {source.name} has no packaged profile.", f"Make one: arsp sparsify --model {source.name}")
    return str(path)


def parts_of(rows: list[ScaleRow], main: ModelSource) -> dict[str, str | None]:
    """SHA-256 of what the rows name beside the main model, models and profiles; None for official files."""
    models = {row.model: resolve(row.model) for row in rows if row.model}
    found = {name: stored_sha256(source) for name, source in models.items()}
    for row in rows:
        if row.attention != "dense" and not uniform_radius(row.attention.partition("=")[2]):
            given = row.attention.partition("=")[2]
            path = given or packaged_profile(models.get(row.model, main))
            found[given or Path(path).name] = read_manifest(resolve(path).path)["sha256"]["profile.safetensors"]
    return found


def load_steps(
    rows: list[ScaleRow], main: LoadedModel, device: torch.device | str, dtype: torch.dtype, random_weights: bool = False
) -> list[ScaleStep]:
    """Load what the rows name beside ``main``: each model once a precision, each policy once a model."""
    sources = check_steps(rows, main.source, random_weights)
    modules: dict[tuple[str, torch.dtype], Any] = {("", dtype): main.module}
    policies: dict[tuple[str, str], Any] = {}
    steps = []
    for row, source in zip(rows, sources, strict=True):
        precision = getattr(torch, row.precision) if row.precision else dtype
        key, rule = (row.model, precision), (row.model, row.attention)
        if key not in modules:
            modules[key] = load_model(source, device, precision, random_weights=random_weights, with_tokenizer=False).module
        if rule not in policies:
            policies[rule] = policy_of(row.attention, source, random_weights)
        steps.append(
            ScaleStep(modules[key], row.model, policies[rule], row.depth, guided=row.cfg != "off", shared=row.cfg == "shared")
        )  # fmt: skip
    return steps
