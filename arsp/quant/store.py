"""A quantised model in a bundle: compressed-tensors layouts in ``model.safetensors``, what they mean in the manifest.

The manifest's ``quantization`` block is a compressed-tensors configuration (``config_groups`` with exact names as targets) with additions
of ours under ``arsp``: the recipe, which inputs are shifted, the base model, whether it is ``simulated``. Beside the tensors of
:mod:`arsp.quant.pack` a layer P may have ``P.bias``, ``P.input_smooth`` float32 (K,), which its inputs are multiplied by,
``P.rotation_sign`` int8 (K,), and ``P.input_scale`` float32 (S,), the static step of every scale. Every other tensor keeps its key.
Layouts of kernels are made on load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from arsp.errors import InputError
from arsp.quant.install import QuantisedLayer, find, fuse
from arsp.quant.linear import InputFormat, QuantLinear
from arsp.quant.pack import from_tensors, to_tensors
from arsp.quant.quantiser import CHANNEL

FORMAT_VERSION = 1


def layer_tensors(layers: Mapping[str, QuantisedLayer]) -> dict[str, Tensor]:
    """The tensors of quantised layers in a file."""
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        found |= to_tensors(layer.weight, name)
        given = layer.input_format
        more = {"bias": layer.bias_N, "input_smooth": given.smooth_K, "rotation_sign": given.signs_K, "input_scale": given.static_S}
        found |= {f"{name}.{part}": tensor for part, tensor in more.items() if tensor is not None}
    return found


def describe(layers: Mapping[str, QuantisedLayer], kept: list[str], **more: Any) -> dict[str, Any]:
    """The ``quantization`` block of a manifest; ``kept``: linear layers that stay as they are."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault((layer.weight.bits, layer.weight.group_size), []).append(name)
    formats = {"int-quantized" if bits == 8 else "pack-quantized" for bits, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": _group(*key, names) for i, (key, names) in enumerate(sorted(groups.items()))},
        "ignore": kept,
        "arsp": {
            "format_version": FORMAT_VERSION,
            "shifted": [name for name, layer in layers.items() if layer.input_format.shifted],
            "simulated": None,
            **more,
        },
    }


def describe_simulated(kind: str, bits: Mapping[str, int], kept: list[str], **more: Any) -> dict[str, Any]:
    """The same for a model whose rounding is simulated: its file holds the weights as they were."""
    return {"ignore": kept, "arsp": {"format_version": FORMAT_VERSION, "simulated": {"kind": kind, "bits": dict(bits)}, **more}}


def _group(bits: int, group_size: int, names: list[str]) -> dict[str, Any]:
    by_channel = {"strategy": "channel"} if group_size == CHANNEL else {"strategy": "group", "group_size": group_size}
    return {
        "targets": names,
        "format": "int-quantized" if bits == 8 else "pack-quantized",
        "weights": {"num_bits": bits, "type": "int", "symmetric": bits == 8, **by_channel},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    }


def check(block: Any, where: str) -> dict[str, Any]:
    """The ``quantization`` block of a manifest. InputError when it is not one, or of a later format."""
    ours = block.get("arsp") if isinstance(block, dict) else None
    if not isinstance(ours, dict) or not isinstance(ours.get("format_version"), int):
        raise InputError(f"{where}: its 'quantization' is not of arsp.", "Make the bundle again: arsp quantize")
    if ours["format_version"] > FORMAT_VERSION:
        raise InputError(f"{where}: quantised format {ours['format_version']}; this arsp reads up to {FORMAT_VERSION}.", "Upgrade arsp.")
    return block


def is_simulated(block: Mapping[str, Any] | None) -> bool:
    """Whether a model rounds in floating point only."""
    return bool(block and block["arsp"].get("simulated"))


def install_from(module: nn.Module, block: Mapping[str, Any], weights: dict[str, Tensor], dtype: torch.dtype, where: str) -> None:
    """Put the layers of a file into a model; their tensors are taken out of ``weights`` one layer after another, so that at no time
    both forms of all of them are held.

    InputError: a layer that the model does not have, tensors that are missing or of another shape.
    """
    shifted = set(block["arsp"].get("shifted", ()))
    for name in [name for group in block["config_groups"].values() for name in group["targets"]]:
        layer = find(module, name)
        if layer is None:
            raise InputError(f"{where}: the model has no layer {name}.", "Is it another size or family? See: arsp models info")
        own = {key: weights.pop(key) for key in [key for key in weights if key.rpartition(".")[0] == name]}
        weight, expected = from_tensors(own, name), (layer.out_features, layer.in_features)
        if tuple(weight.codes_NK.shape) != expected:
            raise InputError(f"{where}: {name} is of shape {tuple(weight.codes_NK.shape)}, the model has {expected}.")
        if (layer.bias is None) == (f"{name}.bias" in own):
            raise InputError(f"{where}: {name} and its tensors do not agree on a bias.")
        balance = (own.get(f"{name}.{part}") for part in ("input_smooth", "rotation_sign"))
        extra = InputFormat(*balance, name in shifted, own.get(f"{name}.input_scale"))
        module.set_submodule(name, QuantLinear(weight, own.get(f"{name}.bias"), extra, dtype))
    fuse(module)
