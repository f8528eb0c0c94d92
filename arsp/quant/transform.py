"""From a recipe to integers: which layers, how their inputs are balanced, and their codes. The model itself is not changed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arsp.config import validate
from arsp.errors import ConfigError, InputError, nearest
from arsp.kernels.reference import rotate
from arsp.models.var import GELU, Block
from arsp.quant.balance import balance_scale, rotation_signs
from arsp.quant.calibrate import InputStatistics
from arsp.quant.install import QuantisedLayer, find, install, linear_layers, simulate, sites
from arsp.quant.linear import InputFormat, QuantLinear, SimulatedLinear
from arsp.quant.pack import packed_bytes
from arsp.quant.quantiser import CHANNEL, QuantisedWeight, fitting_group, quantise_weight
from arsp.quant.recipe import Recipe, matches, recipe_card
from arsp.quant.rounding import awq, gptq

SCALE_DTYPE = torch.float16  # of weights, in files
SIGNS_SEED = 0  # of the random signs of rotations


@dataclass(frozen=True)
class Format:
    """Bits of a layer's weight and how many inputs share a scale."""

    bits: int
    group_size: int = CHANNEL

    def fitting(self, layer: nn.Linear) -> Format:
        """With the group size that the layer's inputs divide into; 8 bits, and a group of all inputs, have one scale an output."""
        size = CHANNEL if self.bits == 8 else fitting_group(layer.in_features, self.group_size)
        return Format(self.bits, CHANNEL if size == layer.in_features else size)

    def bytes(self, layer: nn.Linear) -> int:
        """Of the packed weight with its scales."""
        return packed_bytes(layer.out_features, layer.in_features, self.bits, self.group_size, SCALE_DTYPE.itemsize)

    def __str__(self) -> str:
        return f"W{self.bits}" if self.group_size == CHANNEL else f"W{self.bits}g{self.group_size}"


@dataclass(frozen=True)
class Quantise:
    """A recipe as an :class:`arsp.protocols.Transform`: float32 weights in, integer layers (or simulated ones) out."""

    name: str
    recipe: Recipe
    statistics: InputStatistics | None = None

    def apply(self, model: nn.Module) -> nn.Module:
        """Changes ``model``. Errors as of :func:`choose_layers` and :func:`quantise_layers`."""
        formats = choose_layers(model, self.recipe)
        if self.recipe.simulate:
            return simulate(model, {name: format_.bits for name, format_ in formats.items()}, self.recipe.simulate)
        return install(model, quantise_layers(model, formats, self.recipe, self.statistics), torch.float32)


def data_free(name: str) -> Quantise:
    """The transform of a recipe that reads weights alone. ConfigError for one that runs the model first."""
    recipe = validate(Recipe, recipe_card(name))
    if recipe.needs_inputs or recipe.budget.size is not None:
        raise ConfigError(f"recipe {name} looks at the model's own samples first.", f"Make a bundle: arsp quantize --recipe {name}")
    return Quantise(name, recipe)


def choose_layers(module: nn.Module, recipe: Recipe) -> dict[str, Format]:
    """The layers that a recipe names with the format of each, before a budget mixes them. ConfigError when it names none."""
    config, layers = recipe.layers, linear_layers(module)
    if any(isinstance(part, (QuantLinear, SimulatedLinear)) for part in module.modules()):
        raise ConfigError("the model is quantised already.", "Quantise the model it was made from.")
    chosen = [name for name in layers if matches(name, config.only) and not matches(name, config.keep)]
    if not chosen:
        raise ConfigError(
            f"the recipe names no layer of this model: only {', '.join(config.only)}, keep {', '.join(config.keep)}.",
            nearest(config.only[0], layers) if layers else None,
        )
    default = (recipe.weights.bits, recipe.weights.group_size)
    formats = {}
    for name in chosen:
        rule = next((rule for pattern, rule in config.formats.items() if matches(name, [pattern])), default)
        formats[name] = Format(*rule).fitting(layers[name])
    return formats


def quantise_layers(
    module: nn.Module,
    formats: Mapping[str, Format],
    recipe: Recipe,
    statistics: InputStatistics | None = None,
    callback: Callable[[str], None] = lambda name: None,
) -> dict[str, QuantisedLayer]:
    """Codes of every layer in ``formats``, the model left as it is. ``callback`` is told each layer that is done.

    InputError: a weight that is not finite. NumericalError: second moments that are not positive definite.
    """
    done = {}
    for site, names in sites(module, formats).items():
        layers = [module.get_submodule(name) for name in names]
        weights = [layer.weight.detach().float() for layer in layers]
        for name, weight_NK in zip(names, weights, strict=True):
            if not bool(weight_NK.isfinite().all()):
                raise InputError(f"{name}: the weight contains NaN or infinity.", "Check the weights with `arsp models verify`.")
        seen = None if statistics is None else statistics[site]
        balanced = matches(names[0], recipe.balance.layers)
        scale_K, signs_K = None, None
        if balanced and recipe.balance.alpha is not None:
            scale_K = balance_scale(seen.largest_K(), torch.cat(weights), recipe.balance.alpha)
        if balanced and recipe.balance.rotate:
            signs_K = rotation_signs(layers[0].in_features, SIGNS_SEED)
        format_ = formats[names[0]]
        if recipe.weights.rounding == "awq" and format_.bits == 4:
            every = torch.cat(weights)
            scale_K, _ = awq(every, seen.moments, format_.bits, format_.group_size, clip=False, name=names[0])
        shifted = recipe.activations.shift_gelu and scale_K is None and signs_K is None and isinstance(find(module, site), GELU)
        smooth_K = None if scale_K is None else 1 / scale_K
        static_S = None
        if recipe.activations.scales == "static" and not shifted and in_blocks(module, names[0]) and bool(seen.peaks_SK.any(1).all()):
            static_S = (seen.peaks_SK if smooth_K is None else seen.peaks_SK * smooth_K).amax(1) / 127
        input_format = InputFormat(smooth_K, signs_K, shifted, static_S)
        gram_KK = None if seen is None or recipe.weights.rounding == "nearest" else transformed_gram(seen.moments.gram_KK, input_format)
        for name, layer, weight_NK in zip(names, layers, weights, strict=True):
            codes = _round(balanced_weight(weight_NK, input_format), formats[name], recipe, gram_KK, name)
            done[name] = QuantisedLayer(codes, None if layer.bias is None else layer.bias.detach().float(), input_format)
            callback(name)
    return done


def in_blocks(module: nn.Module, name: str) -> bool:
    """Whether a layer is part of a VAR block: these are told which scale runs."""
    return any(isinstance(find(module, name.rsplit(".", depth)[0]), Block) for depth in range(1, name.count(".") + 1))


def balanced_weight(weight_NK: Tensor, input_format: InputFormat) -> Tensor:
    """The weight that belongs to inputs in this format, in float32: scaled and rotated in float64, so that the product stays."""
    w_NK = weight_NK.double()
    w_NK = w_NK if input_format.smooth_K is None else w_NK / input_format.smooth_K.double()
    return (w_NK if input_format.signs_K is None else rotate(w_NK, input_format.signs_K)).float()


def transformed_gram(gram_KK: Tensor, input_format: InputFormat) -> Tensor:
    """``X^T X`` of inputs in this format, from that of the given ones."""
    if input_format.smooth_K is not None:
        smooth_K = input_format.smooth_K.double()
        gram_KK = gram_KK * torch.outer(smooth_K, smooth_K)
    if input_format.signs_K is not None:
        gram_KK = rotate(rotate(gram_KK, input_format.signs_K).mT, input_format.signs_K).mT
    return gram_KK


def _round(weight_NK: Tensor, format_: Format, recipe: Recipe, gram_KK: Tensor | None, name: str) -> QuantisedWeight:
    rule, bits, size = recipe.weights, format_.bits, format_.group_size
    if rule.rounding == "gptq":
        return gptq(
            weight_NK, gram_KK, bits, size, search=rule.search, damp=rule.damp, act_order=rule.act_order, scale_dtype=SCALE_DTYPE, name=name
        )
    if rule.rounding == "awq" and bits == 4:
        return quantise_weight(weight_NK, bits, size, search="mse", gram_KK=gram_KK.float(), scale_dtype=SCALE_DTYPE, name=name)
    return quantise_weight(weight_NK, bits, size, search=rule.search, scale_dtype=SCALE_DTYPE, name=name)
