"""Official checkpoint files -> (clean state dict, configuration read from the shapes). Strict about everything it does not know.

Here: opening a file, finding the state dict in it, and LlamaGen; VAR is in convert_var.py. Pickled files are opened with
``weights_only=True`` and one allow-listed class, ``argparse.Namespace``, which the official trainers store next to the weights.
Their tensors are mapped, not read: looking at the shapes of a large file is cheap, however often.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import zipfile
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arsp.errors import InputError

_GPT_KEY, _VQ_KEY = "tok_embeddings.weight", "quantize.embedding.weight"
_STUDENT_KEY = "tok_embeddings.bias"  # a distilled student projects continuous vectors instead of looking codes up
_PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")
_IGNORED = re.compile(r"(^|\.)(freqs_cis|kv_cache\..*)$")
# (family, what, start of a key that only such a file has)
_MARKERS = (
    ("llamagen", "a LlamaGen model", "tok_embeddings.weight"),
    ("llamagen", "a LlamaGen tokenizer", "encoder.conv_blocks."),
    ("var", "a VAR model", "pos_1LC"),
    ("var", "a VAR tokenizer", "quantize.quant_resi."),
)
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
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} is not a plain weights file: {reason}", "Only tensors, containers and argparse.Namespace are read."
        ) from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as a checkpoint: {reason}", "Download it again; it may be truncated.") from error


def detect_family(source: Path | dict[str, Any]) -> str | None:
    """Whose keys a file (or what was read from it) has, models and tokenizers alike: "llamagen", "var", or None."""
    found = _recognise(read_tensors(source) if isinstance(source, Path) else source)
    return found and found[0]


def unwrap(obj: Any, marker: str, order: tuple[str, ...], path: Path, family: str = "LlamaGen") -> dict[str, Tensor]:
    """The state dict that holds ``marker``: the object itself, or the first of its entries ``order`` ("a.b": b inside a) that does."""
    for candidate in (obj, *(_entry(obj, name) for name in order)):
        if isinstance(candidate, dict):
            cleaned = _strip(candidate)
            if marker in cleaned:
                return cleaned
    top = sorted(map(str, obj))[:8] if isinstance(obj, dict) else type(obj).__name__
    raise InputError(f"{path}: no {family} weights found ('{marker}' is missing; the file holds {top}).", _looks_like(_recognise(obj)))


def require(weights: dict[str, Tensor], keys: tuple[str, ...], path: Path, family: str = "LlamaGen") -> None:
    """InputError unless all ``keys`` are matrices or kernels of ``weights``: similar names in foreign files end here."""
    missing = [key for key in keys if key not in weights or weights[key].ndim < 2 or not weights[key].numel()]
    if missing:
        found = _recognise(weights)
        hint = _looks_like(None if found and found[0] == family.lower() else found)
        raise InputError(f"{path}: this is no {family} file: {missing[0]} is missing or of another shape.", hint)


def read_llamagen(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A GPT file: DDP (``model``), DeepSpeed (``module``), ``state_dict``, ``ema`` or FSDP (raw) layout.

    A distilled student (arXiv 2412.17153) is told by its keys: its averaged weights are preferred, as its authors sample them,
    and its configuration holds ``student`` and ``code_dim``.
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
    require(weights, (_GPT_KEY, "output.weight", condition, "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight"), path)
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
        config |= {"student": True, "code_dim": weights[_GPT_KEY].shape[1]}
    if text:
        prefix, width = weights[condition].shape
        return {**config, "model_type": "t2i", "cls_token_num": prefix, "caption_dim": width}
    return {**config, "model_type": "c2i", "num_classes": weights[condition].shape[0] - 1}


def vq_config(weights: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Sizes of the autoencoder from its encoder's shapes."""
    first = "encoder.conv_blocks.0.res.0.conv1.weight"
    require(weights, (_VQ_KEY, "encoder.conv_in.weight", "encoder.conv_out.weight", first), path)
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


def _entry(obj: Any, name: str) -> Any:
    return reduce(lambda inner, part: inner.get(part) if isinstance(inner, dict) else None, name.split("."), obj)


def _recognise(obj: Any, depth: int = 2) -> tuple[str, str] | None:
    """(family, what) of the first known state dict in ``obj`` or in the dictionaries it holds."""
    if not isinstance(obj, dict):
        return None
    keys = [_PREFIXES.sub("", str(key)) for key in obj]
    found = next(((family, what) for family, what, start in _MARKERS if any(key.startswith(start) for key in keys)), None)
    return found or (next(filter(None, (_recognise(value, depth - 1) for value in obj.values())), None) if depth else None)


def _looks_like(found: tuple[str, str] | None) -> str:
    return f"It looks like {found[1]}." if found else "See: arsp models ls"


def _multiple_of(dim: int, ffn: int) -> int:
    """The largest power of two that rounds 8/3 dim up to the width found (256 in every released file)."""
    base = int(2 * (4 * dim) / 3)
    return next((m for m in (256, 128, 64, 32, 16, 8, 4, 2, 1) if math.ceil(base / m) * m == ffn), 256)
