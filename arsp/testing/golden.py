"""Finds recorded official outputs ("golden cases") in a directory and loads them lazily.

A case is a directory with ``golden.json`` (source, configuration, meaning of every tensor, tolerances) and one or more
safetensors files. Tests ask for a *kind* and take every size and setting from ``golden.json``, so a further case of the same
kind needs no code: point ``ARSP_GOLDEN`` at a directory that holds it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from arsp.errors import InputError

COVERED = frozenset(  # kinds with a parity test
    {
        "ar_table",
        "code",
        "ct_pack",
        "flowmap",
        "gpt_c2i",
        "gpt_t2i",
        "gsd_group",
        "lantern",
        "litevar_mask",
        "litevar_quant",
        "litevar_windows",
        "llamagen_dd",
        "mixdq_ip",
        "mixdq_quant",
        "qserve_pack",
        "rotate_scale",
        "seeded_fixedpoint",
        "sjd_verify",
        "var",
        "var_dd",
        "viditq_act_dynamic",
        "viditq_balance",
        "viditq_weight",
        "vq",
        "vqvae",
    }
)


@dataclass(frozen=True)
class GoldenCase:
    """One recorded case: its directory and the content of ``golden.json``; tensors are read at first use."""

    path: Path
    meta: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.meta["kind"]

    @property
    def config(self) -> dict[str, Any]:
        return self.meta.get("config", {})

    @cached_property
    def io(self) -> dict[str, Tensor]:
        """Recorded inputs and outputs: ``io.safetensors`` joined with ``inputs.safetensors`` where a case has one."""
        inputs = self.load("inputs") if (self.path / "inputs.safetensors").exists() else {}
        return inputs | self.load("io")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The state dict under the official keys, made by :func:`recipe_weights` where the case has a recipe instead of a file."""
        recipe = self.meta.get("weights_recipe")
        return recipe_weights(self.meta["state_dict_shapes"], recipe["seed"]) if recipe else self.load("weights")

    def load(self, name: str) -> dict[str, Tensor]:
        """All tensors of ``<name>.safetensors``. InputError when the file is missing or damaged."""
        file = self.path / f"{name}.safetensors"
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise InputError(f"golden case {self.path.name}: cannot read {file.name} ({error}).") from error

    def __str__(self) -> str:
        return self.path.name


def recipe_weights(shapes: dict[str, list[int]], seed: int) -> dict[str, Tensor]:
    """Normal numbers that depend on key and seed only, as ``weights_recipe`` in ``golden.json`` spells them out."""
    weights = {}
    for key, shape in shapes.items():
        x = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32).standard_normal(shape).astype(np.float32)
        if "norm" in key and key.endswith("weight"):
            x = 1 + np.float32(0.1) * x
        elif key.endswith("bias"):
            x = np.float32(0.05) * x
        elif key == "quantize.ema_vocab_hit_SV":
            x = np.zeros_like(x)
        elif key != "quantize.embedding.weight":
            x = x / np.float64(np.sqrt(np.prod(shape[1:])))
        weights[key] = torch.from_numpy(np.asarray(x, dtype=np.float32))
    return weights


def golden_root() -> Path:
    """``$ARSP_GOLDEN``, else ``tests/golden`` of the checkout this package is in."""
    return Path(os.environ.get("ARSP_GOLDEN") or Path(__file__).parents[2] / "tests" / "golden")


def find_cases(root: Path | str | None = None, kind: str | None = None) -> list[GoldenCase]:
    """Cases below ``root`` (default :func:`golden_root`), sorted by path, of one kind or of all."""
    found = []
    for file in sorted(Path(root or golden_root()).rglob("golden.json")):
        try:
            meta = json.loads(file.read_text(encoding="utf-8"))
            if kind in (None, meta["kind"]):
                found.append(GoldenCase(file.parent, meta))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: not a golden case ({type(error).__name__}: {error}).") from error
    return found


def not_covered(root: Path | str | None = None, covered: Collection[str] = COVERED) -> list[str]:
    """Kinds that occur below ``root`` and have no parity test: reported, never a failure."""
    return sorted({case.kind for case in find_cases(root)} - set(covered))
