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
from arsp.quant.install import SIMULATED_INPUTS, QuantisedLayer, find, fuse, simulate
from arsp.quant.linear import InputFormat, QuantLinear
from arsp.quant.pack import from_tensors, to_tensors
from arsp.quant.quantiser import CHANNEL

FORMAT_VERSION = 1
PARTS = (  # tensors of a layer
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "bias", "input_smooth", "rotation_sign", "input_scale",
)  # fmt: skip


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
    groups: dict[tuple[int, int, bool], list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault((layer.weight.bits, layer.weight.group_size, layer.input_format.static_S is None), []).append(name)
    formats = {"int-quantized" if bits == 8 else "pack-quantized" for bits, _, _ in groups}
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


def _group(bits: int, group_size: int, dynamic: bool, names: list[str]) -> dict[str, Any]:
    by_channel = {"strategy": "channel"} if group_size == CHANNEL else {"strategy": "group", "group_size": group_size}
    return {
        "targets": names,
        "format": "int-quantized" if bits == 8 else "pack-quantized",
        "weights": {"num_bits": bits, "type": "int", "symmetric": bits == 8, **by_channel},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": dynamic},
    }


def check(block: Any, where: str) -> dict[str, Any]:
    """The ``quantization`` block of a manifest. InputError when it is not one, or of a later format."""
    ours = block.get("arsp") if isinstance(block, dict) else None
    if not isinstance(ours, dict) or not isinstance(ours.get("format_version"), int):
        raise InputError(f"{where}: its 'quantization' is not of arsp.", "Make the bundle again: arsp quantize")
    if ours["format_version"] > FORMAT_VERSION:
        raise InputError(f"{where}: quantised format {ours['format_version']}; this arsp reads up to {FORMAT_VERSION}.", "Upgrade arsp.")
    if not _is_complete(block):
        raise InputError(f"{where}: its 'quantization' lacks which layers have which format.", "Make the bundle again: arsp quantize")
    return block


def _is_complete(block: dict[str, Any]) -> bool:
    try:
        if simulated := block["arsp"].get("simulated"):
            return simulated["kind"] in SIMULATED_INPUTS and all(type(bits) is int for bits in simulated["bits"].values())
        names = [*block["arsp"].get("shifted", []), *_targets(block)]
        return bool(_targets(block)) and all(isinstance(name, str) for name in names)
    except (AttributeError, KeyError, TypeError):
        return False


def _targets(block: Mapping[str, Any]) -> list[str]:
    """The quantised layers."""
    return [name for group in block["config_groups"].values() for name in group["targets"]]


def is_simulated(block: Mapping[str, Any] | None) -> bool:
    """Whether a model rounds in floating point only."""
    return bool(block and block["arsp"].get("simulated"))


def install_from(module: nn.Module, block: Mapping[str, Any], weights: dict[str, Tensor], dtype: torch.dtype, where: str) -> None:
    """Put the layers of a file into a model; their tensors are taken out of ``weights`` one layer after another, so that at no time
    both forms of all of them are held.

    InputError: a layer that the model does not have, tensors that are missing or of another shape.
    """
    shifted = set(block["arsp"].get("shifted", ()))
    for name in _targets(block):
        layer = _linear(module, name, where)
        own = {key: weights.pop(key).clone() for part in PARTS if (key := f"{name}.{part}") in weights}
        weight, expected = from_tensors(own, name), (layer.out_features, layer.in_features)
        if tuple(weight.codes_NK.shape) != expected:
            raise InputError(f"{where}: {name} is of shape {tuple(weight.codes_NK.shape)}, the model has {expected}.")
        if (layer.bias is None) == (f"{name}.bias" in own):
            raise InputError(f"{where}: {name} and its tensors do not agree on a bias.")
        found = []
        for part, (size, kind) in _vectors(module, layer).items():
            vector = own.get(f"{name}.{part}")
            if vector is not None and (tuple(vector.shape), vector.dtype) != ((size,), kind):
                raise InputError(f"{where}: {name}.{part} is {vector.dtype} {tuple(vector.shape)}, expected {kind} ({size},).")
            if vector is not None and not bool(vector.isfinite().all()):
                raise InputError(f"{where}: {name}.{part} holds NaN or infinite values.")
            found.append(vector)
        bias_N, smooth_K, signs_K, static_S = found
        module.set_submodule(name, QuantLinear(weight, bias_N, InputFormat(smooth_K, signs_K, name in shifted, static_S), dtype))
    fuse(module)


def simulate_from(module: nn.Module, block: Mapping[str, Any], where: str) -> None:
    """Round in floating point what a simulated bundle says. InputError: a layer that the model does not have."""
    simulated = block["arsp"]["simulated"]
    for name in simulated["bits"]:
        _linear(module, name, where)
    simulate(module, simulated["bits"], simulated["kind"])


def _linear(module: nn.Module, name: str, where: str) -> nn.Linear:
    layer = find(module, name)
    if not isinstance(layer, nn.Linear):
        raise InputError(f"{where}: the model has no linear layer {name}.", "Is it another size or family? See: arsp models info")
    return layer


def _vectors(module: nn.Module, layer: nn.Linear) -> dict[str, tuple[int, torch.dtype]]:
    """What a layer may have beside its weight: length and type."""
    num_scales = len(getattr(module.config, "patch_nums", ()))
    return {
        "bias": (layer.out_features, torch.float32), "input_smooth": (layer.in_features, torch.float32),
        "rotation_sign": (layer.in_features, torch.int8), "input_scale": (num_scales, torch.float32),
    }  # fmt: skip
