"""Integer layers in the place of a model's own.

A *site* is a tensor that linear layers read: norms and gates of the models declare their readers (``feeds``), every other layer reads
one of its own. Readers of one site share its balancing, and the site's producer quantises once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arsp.models.attention import DensePolicy
from arsp.models.var import GELU, Block
from arsp.quant import litevar
from arsp.quant.linear import FUSED, InputFormat, QuantLinear, ScaleClock, SimulatedLinear
from arsp.quant.quantiser import TENSOR, Grid, QuantisedWeight, dequantise, quantise_weight


@dataclass
class QuantisedLayer:
    """A layer as it is stored: codes, bias, and how its inputs become integers."""

    weight: QuantisedWeight
    bias_N: Tensor | None
    input_format: InputFormat


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by its qualified name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def readers(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Producer -> the layers that read what it makes, as the models declare it."""
    found = {}
    for prefix, part in module.named_modules():
        join = lambda name, prefix=prefix: f"{prefix}.{name}" if prefix else name  # noqa: E731
        for producer, names in getattr(part, "feeds", {}).items():
            found[join(producer)] = tuple(join(name) for name in names)
    return found


def sites(module: nn.Module, layers: Mapping[str, object]) -> dict[str, list[str]]:
    """Site -> its readers among ``layers``. A site is named after its producer, or after its only reader."""
    found: dict[str, list[str]] = {}
    producer_of = {name: producer for producer, names in readers(module).items() for name in names}
    for name in layers:
        found.setdefault(producer_of.get(name, name), []).append(name)
    return found


def install(module: nn.Module, layers: Mapping[str, QuantisedLayer], dtype: torch.dtype) -> nn.Module:
    """Put integer layers in the place of these; producers then quantise for them. Changes ``module``."""
    for name, layer in layers.items():
        module.set_submodule(name, QuantLinear(layer.weight, layer.bias_N, layer.input_format, dtype))
    return fuse(module)


def fuse(module: nn.Module) -> nn.Module:
    """Let a producer quantise what it makes, where all its readers take integers of one format, dynamically. Changes ``module``."""
    static = [layer for layer in module.modules() if isinstance(layer, QuantLinear) and layer.input_format.static_S is not None]
    if static:
        clock = ScaleClock(module.config.patch_nums)
        for block in module.blocks:
            block.register_forward_pre_hook(clock.watch)
        for layer in static:
            layer.clock = clock
    for producer, names in readers(module).items():
        part, layers = find(module, producer), [find(module, name) for name in names]
        if type(part) not in FUSED or not all(isinstance(layer, QuantLinear) for layer in layers):
            continue
        first, *others = [layer.input_format for layer in layers]
        if first.static_S is None and isinstance(part, GELU) == first.shifted and all(first.equals(other) for other in others):
            module.set_submodule(producer, FUSED[type(part)](part, first))
    return module


def simulate(module: nn.Module, bits: Mapping[str, int], kind: str) -> nn.Module:
    """Round weights and inputs in floating point instead: ``litevar``, attention of a VAR included, or ``tensor`` (one scale a tensor).
    Changes ``module``."""
    for name, layer_bits in bits.items():
        layer = module.get_submodule(name)
        weight_NK, activation = simulated_weight(layer.weight.detach().float(), layer_bits, kind), SIMULATED_INPUTS[kind]
        module.set_submodule(name, SimulatedLinear(weight_NK.to(layer.weight.dtype), layer.bias, activation))
    if kind == "litevar":
        for block in module.modules():
            if isinstance(block, Block):
                block.register_forward_pre_hook(_quantise_attention)
    return module


def _quantise_attention(block: nn.Module, args: tuple) -> tuple:
    """Dense attention only: windows have rules of their own."""
    policy = litevar.QuantisedAttention() if type(args[4]) is DensePolicy else args[4]
    return (*args[:4], policy, *args[5:])


def simulated_weight(weight_NK: Tensor, bits: int, kind: str) -> Tensor:
    if kind == "litevar":
        return litevar.quantize_weight(weight_NK, bits)
    return dequantise(quantise_weight(weight_NK, bits, TENSOR))


SIMULATED_INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "litevar": lambda x: litevar.quantize_tokens(x, 8),
    "tensor": lambda x: Grid.of(x, tuple(range(x.dim())), 8, symmetric=False).fake_quantise(x),
}


def find(module: nn.Module, name: str) -> nn.Module | None:
    """A part by its qualified name, None where the model has none."""
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None
