"""Official checkpoint files -> (clean state dict, configuration read from the shapes). Strict about everything it does not know.

Pickled files are opened with ``weights_only=True`` and one allow-listed class, ``argparse.Namespace``, which the official trainers
store next to the weights.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arsp.errors import InputError

_GPT_KEY, _VQ_KEY = "tok_embeddings.weight", "quantize.embedding.weight"
_STUDENT_KEY = "tok_embeddings.bias"  # a distilled student projects continuous vectors instead of looking codes up
_PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")
_IGNORED = re.compile(r"(^|\.)(freqs_cis|kv_cache\..*)$")
# heads cannot be read from shapes: (layers, width) -> heads, for the named sizes
_HEADS = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1536): 24, (48, 2560): 40, (22, 2048): 32, (24, 3200): 32, (32, 4096): 32}


def read_tensors(path: Path) -> Any:
    """The object in a .safetensors or .pt/.pth file. InputError when missing, truncated, or in need of arbitrary code to load."""
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} is not a plain weights file: {reason}", "Only tensors, containers and argparse.Namespace are read."
        ) from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as a checkpoint: {reason}", "Download it again; it may be truncated.") from error


def unwrap(obj: Any, marker: str, order: tuple[str, ...], path: Path) -> dict[str, Tensor]:
    """The state dict that holds ``marker``: the object itself, or the first of its entries ``order`` that does."""
    for candidate in (obj, *(obj.get(name) for name in order if isinstance(obj, dict))):
        if isinstance(candidate, dict):
            cleaned = _strip(candidate)
            if marker in cleaned:
                return cleaned
    top = sorted(map(str, obj))[:8] if isinstance(obj, dict) else type(obj).__name__
    raise InputError(f"{path}: no LlamaGen weights found ('{marker}' is missing; the file holds {top}).")


def read_llamagen(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A GPT file: DDP (``model``), DeepSpeed (``module``), ``state_dict``, ``ema`` or FSDP (raw) layout.

    A distilled student (arXiv 2412.17153) is told by its keys: its averaged weights are preferred, as its authors sample them,
    and its configuration holds ``code_dim``.
    """
    obj = read_tensors(path)
    weights = unwrap(obj, _GPT_KEY, ("model", "module", "state_dict", "ema"), path)
    if _STUDENT_KEY in weights:
        weights = unwrap(obj, _STUDENT_KEY, ("ema", "model", "module", "state_dict"), path)
    return weights, gpt_config(weights, path)


def read_llamagen_vq(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A tokenizer file; ``ema`` is preferred, a missing ``codebook_used`` queue is filled in."""
    weights = unwrap(read_tensors(path), _VQ_KEY, ("ema", "model", "state_dict"), path)
    weights.setdefault("quantize.codebook_used", torch.zeros(65536))
    return weights, vq_config(weights, path)


def gpt_config(weights: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Sizes from shapes; heads from the table of named sizes; the grid from a 256/384/512 in the file name."""
    student, text = _STUDENT_KEY in weights, "cls_embedding.uncond_embedding" in weights
    condition = "cls_embedding.uncond_embedding" if text else "cls_embedding.embedding_table.weight"
    _require(weights, (_GPT_KEY, "output.weight", condition, "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight"), path)
    vocab, dim = weights["output.weight"].shape
    layers = 1 + max(int(m.group(1)) for m in (re.match(r"layers\.(\d+)\.", key) for key in weights) if m)
    if (layers, dim) not in _HEADS:
        known = ", ".join(f"{n} layers x {d}" for n, d in sorted(_HEADS))
        raise InputError(
            f"{path}: {layers} layers of width {dim} is none of the named sizes ({known}).",
            "The number of heads is not in the shapes: save it as a bundle with arsp.zoo.bundle.save_bundle.",
        )
    ffn = weights["layers.0.feed_forward.w1.weight"].shape[0]
    config = {"dim": dim, "n_layer": layers, "n_head": _HEADS[layers, dim], "vocab_size": vocab, "multiple_of": _multiple_of(dim, ffn)}
    found = re.search(r"(256|384|512)", path.name)
    if found:
        config["block_size"] = (int(found.group(1)) // 16) ** 2
    elif student:
        config["block_size"] = 256  # all released students
    if student:
        config["code_dim"] = weights[_GPT_KEY].shape[1]
    if text:
        prefix, width = weights[condition].shape
        return {**config, "model_type": "t2i", "cls_token_num": prefix, "caption_dim": width}
    return {**config, "model_type": "c2i", "num_classes": weights[condition].shape[0] - 1}


def vq_config(weights: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Sizes of the autoencoder from its encoder's shapes."""
    first = "encoder.conv_blocks.0.res.0.conv1.weight"
    _require(weights, (_VQ_KEY, "encoder.conv_in.weight", "encoder.conv_out.weight", first), path)
    ch = weights["encoder.conv_in.weight"].shape[0]
    mult, blocks, level = [], 0, 0
    while f"encoder.conv_blocks.{level}.res.0.conv1.weight" in weights:
        width = weights[f"encoder.conv_blocks.{level}.res.0.conv1.weight"].shape[0]
        mult.append(width // ch)
        level += 1
    while f"encoder.conv_blocks.0.res.{blocks}.conv1.weight" in weights:
        blocks += 1
    size, width = weights[_VQ_KEY].shape
    z = weights["encoder.conv_out.weight"].shape[0]
    return {"ch": ch, "ch_mult": mult, "num_res_blocks": blocks, "z_channels": z, "codebook_size": size, "codebook_embed_dim": width}


def _strip(weights: dict[str, Any]) -> dict[str, Tensor]:
    names = ((_PREFIXES.sub("", str(key)), value) for key, value in weights.items())
    return {name: value for name, value in names if isinstance(value, Tensor) and not _IGNORED.search(name)}


def _require(weights: dict[str, Tensor], keys: tuple[str, ...], path: Path) -> None:
    """InputError unless all ``keys`` are matrices or kernels of ``weights``: similar names in foreign files end here."""
    missing = [key for key in keys if key not in weights or weights[key].ndim < 2]
    if missing:
        raise InputError(f"{path}: this is no LlamaGen file: {missing[0]} is missing or of another shape.", "See: arsp models ls")


def _multiple_of(dim: int, ffn: int) -> int:
    """The largest power of two that rounds 8/3 dim up to the width found (256 in every released file)."""
    base = int(2 * (4 * dim) / 3)
    return next((m for m in (256, 128, 64, 32, 16, 8, 4, 2, 1) if math.ceil(base / m) * m == ffn), 256)
