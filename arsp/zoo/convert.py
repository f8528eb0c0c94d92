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
        raise InputError(f"{path} is not a plain weights file: {reason}", "Only tensors, containers and argparse.Namespace are read.") from error
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


def read_llamagen(path: Path, prefer_ema: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A GPT file: DDP (``model``), DeepSpeed (``module``), ``state_dict``, ``ema`` or FSDP (raw) layout."""
    order = ("ema", "model", "module", "state_dict") if prefer_ema else ("model", "module", "state_dict", "ema")
    weights = unwrap(read_tensors(path), _GPT_KEY, order, path)
    return weights, gpt_config(weights, path)


def read_llamagen_vq(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A tokenizer file; ``ema`` is preferred, a missing ``codebook_used`` queue is filled in."""
    weights = unwrap(read_tensors(path), _VQ_KEY, ("ema", "model", "state_dict"), path)
    weights.setdefault("quantize.codebook_used", torch.zeros(65536))
    return weights, vq_config(weights, path)


def gpt_config(weights: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Sizes from shapes; heads from the table of named sizes; the grid from a 256/384/512 in the file name."""
    _refuse_student(weights, path)
    vocab, dim = weights[_GPT_KEY].shape
    layers = 1 + max((int(m.group(1)) for m in (re.match(r"layers\.(\d+)\.", key) for key in weights) if m), default=-1)
    if (layers, dim) not in _HEADS:
        known = ", ".join(f"{n} layers x {d}" for n, d in sorted(_HEADS))
        raise InputError(f"{path}: {layers} layers of width {dim} is none of the named sizes ({known}).", "Convert it to a bundle with its configuration.")
    ffn = weights["layers.0.feed_forward.w1.weight"].shape[0]
    config = {"dim": dim, "n_layer": layers, "n_head": _HEADS[layers, dim], "vocab_size": vocab, "multiple_of": _multiple_of(dim, ffn)}
    found = re.search(r"(256|384|512)", path.name)
    if found:
        config["block_size"] = (int(found.group(1)) // 16) ** 2
    if "cls_embedding.uncond_embedding" in weights:
        prefix, width = weights["cls_embedding.uncond_embedding"].shape
        return {**config, "model_type": "t2i", "cls_token_num": prefix, "caption_dim": width}
    return {**config, "model_type": "c2i", "num_classes": weights["cls_embedding.embedding_table.weight"].shape[0] - 1}


def vq_config(weights: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Sizes of the autoencoder from its encoder's shapes."""
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
    clean = {}
    for key, value in weights.items():
        name = str(key)
        for prefix in ("module.", "_orig_mod."):
            name = name.removeprefix(prefix)
        if isinstance(value, Tensor) and not _IGNORED.search(name):
            clean[name] = value
    return clean


def _multiple_of(dim: int, ffn: int) -> int:
    """The largest power of two that rounds 8/3 dim up to the width found (256 in every released file)."""
    base = int(2 * (4 * dim) / 3)
    return next((m for m in (256, 128, 64, 32, 16, 8, 4, 2, 1) if math.ceil(base / m) * m == ffn), 256)


def _refuse_student(weights: dict[str, Tensor], path: Path) -> None:
    if "tok_embeddings.bias" in weights:
        raise InputError(f"{path} is a distilled student, not a teacher.", "Give it as --model of a sampling command, with its --tokenizer.")
