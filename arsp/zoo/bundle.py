"""Bundles: the directories that commands exchange. ``arsp.json`` (schema version, family, kind, configuration, parents, SHA-256 of
each file) beside ``model.safetensors`` and, for a self-contained one, ``tokenizer.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arsp.errors import InputError
from arsp.runs import atomic_dir, sha256_file, write_json

SCHEMA = 1
MANIFEST = "arsp.json"
KINDS = ("teacher", "student", "tokenizer", "features", "profile")


def save_bundle(
    path: Path, *, family: str, kind: str, config: dict[str, Any], model: dict[str, Tensor], tokenizer: dict[str, Any] | None = None,
    tokenizer_weights: dict[str, Tensor] | None = None, dtype: torch.dtype | None = None, **more: Any,
) -> Path:  # fmt: skip
    """Write a bundle atomically. ``tokenizer`` is ``{"bundle": name}`` or ``{"config": ...}`` with ``tokenizer_weights``; ``dtype``
    converts floating weights (tokenizers included). Further keyword arguments go into the manifest."""
    with atomic_dir(path) as temporary:
        save_file(_cast(model, dtype), temporary / "model.safetensors")
        if tokenizer_weights is not None:
            save_file(_cast(tokenizer_weights, dtype), temporary / "tokenizer.safetensors")
        files = {file.name: sha256_file(file) for file in sorted(temporary.glob("*.safetensors"))}
        write_json(
            temporary / MANIFEST,
            {"schema": SCHEMA, "family": family, "kind": kind, "config": config, "tokenizer": tokenizer, **more, "sha256": files},
        )
    return path


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a bundle directory. InputError when it is missing, not JSON, or of a newer schema."""
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(
            f"{path} is not a bundle: it has no {MANIFEST}.",
            "Give a bundle made by arsp train or arsp distill, or a name from: arsp models ls",
        )
    try:
        manifest = json.loads(file.read_text())
        if manifest["schema"] > SCHEMA:
            raise InputError(f"{file} has schema {manifest['schema']}; this arsp reads up to {SCHEMA}.", "Upgrade arsp.")
        manifest["family"], manifest["kind"], manifest["config"], manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is not a valid bundle manifest ({type(error).__name__}: {error}).", "Make or copy the bundle again."
        ) from error
    fields = {"family": str, "kind": str, "config": dict, "sha256": dict, "tokenizer": dict | None}
    wrong = [name for name, kind in fields.items() if not isinstance(manifest.get(name), kind)]
    if wrong or manifest["kind"] not in KINDS:
        raise InputError(
            f"{file} is not a valid bundle manifest: '{(wrong or ['kind'])[0]}' has an unexpected value.", "Make or copy the bundle again."
        )
    return manifest


def load_weights(path: Path, name: str, manifest: dict[str, Any]) -> dict[str, Tensor]:
    """One weights file of a bundle, its SHA-256 checked against the manifest."""
    file = path / name
    if not file.is_file():
        raise InputError(f"{path}: {name} is missing.", "Make or copy the bundle again.")
    expected = manifest["sha256"].get(name)
    if expected != sha256_file(file):
        raise InputError(f"{file} is damaged or was changed: its SHA-256 is not the one in {MANIFEST}.", "Make or copy the bundle again.")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} is not a readable weights file: {error}", "Make or copy the bundle again.") from error


def mismatch(expected: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    """Which keys of ``weights`` are missing, unexpected, or of another shape than ``expected``; empty when none."""
    missing, foreign = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    shapes = [
        f"{k}: {tuple(weights[k].shape)} instead of {tuple(expected[k].shape)}"
        for k in sorted(expected.keys() & weights.keys())
        if expected[k].shape != weights[k].shape
    ]
    problems = (("missing", missing), ("unexpected", foreign), ("wrong shape", shapes))
    return "; ".join(f"{label} {len(keys)} ({', '.join(keys[:3])})" for label, keys in problems if keys)


def load_into(module: nn.Module, weights: dict[str, Tensor], where: str) -> nn.Module:
    """Strict loading with one readable message: :func:`mismatch`, or which tensor is not finite."""
    problems = mismatch(module.state_dict(), weights)
    if problems:
        raise InputError(f"{where}: the weights do not fit the model: {problems}.", "Is it another size or family? See: arsp models ls")
    bad = [key for key, value in weights.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise InputError(f"{where}: {bad[0]} holds NaN or infinite values.")
    module.load_state_dict(weights)
    return module


def _cast(weights: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    def one(value: Tensor) -> Tensor:
        value = value.detach().cpu()
        return (value.to(dtype) if dtype is not None and value.is_floating_point() else value).contiguous().clone()

    return {key: one(value) for key, value in weights.items()}
