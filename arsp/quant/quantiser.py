"""Uniform quantisers of weights and activations.

A weight is whole numbers with a scale, and a zero point if asymmetric, per output, per group of inputs, or for all; a token is 8-bit
integers with one scale. What their product is to the last bit stands in :func:`arsp.kernels.reference.integer_linear`.

Rounding is half to even. Ranges always contain zero, so zero is exact (ViDiT-Q, arXiv 2406.02540; MixDQ, arXiv 2405.17873). A group of
nothing but zeros gets scale 1 and codes that mean zero; the official code gives the whole tensor a scale of 1e-6 there.

Shapes as in arsp/protocols.py, and of a linear layer: ``M`` rows, ``K`` inputs, ``N`` outputs, ``G`` groups of ``g`` inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arsp import kernels
from arsp.errors import ConfigError, InputError
from arsp.kernels import reference

CHANNEL = -1  # group size: one scale per output
TENSOR = 0  # group size: one scale for everything
GROUP_SIZES = (128, 64, 32)
MSE_FACTORS = tuple(1 - step / 50 for step in range(16))  # 1.00, 0.98, ... 0.70 of the range
GELU_SHIFT = 0.17  # GELU is never below -0.17: what the shifted format adds before it quantises

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grid:
    """The values ``(q - zero) scale`` with whole q in ``first..last``. Scale and zero broadcast to what is quantised."""

    scale: Tensor
    zero: Tensor
    first: int
    last: int

    @classmethod
    def of_range(cls, low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype | None = None) -> Grid:
        """The grid that covers ``low..high`` and zero; symmetric: ``scale = max |x| / (2^(bits-1) - 1)``, zero point 0. With ``dtype``
        scales are numbers of that type, unless one of them is out of its normal range."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        last = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
        scale = (torch.maximum(-low, high) if symmetric else high - low) / last
        scale = scale.masked_fill(scale < torch.finfo(scale.dtype).tiny, 1.0)
        if dtype is not None and bool(((scale >= torch.finfo(dtype).tiny) & (scale <= torch.finfo(dtype).max)).all()):
            scale = scale.to(dtype).to(scale.dtype)
        zero = torch.zeros_like(scale) if symmetric else (-low / scale).round()
        return cls(scale, zero, -last - 1 if symmetric else 0, last)

    @classmethod
    def of(cls, x: Tensor, dims: int | Sequence[int], bits: int, symmetric: bool) -> Grid:
        """One range over ``dims``: 1 for the rows of a weight, -1 for tokens. Over ``(0, 2)`` of ``(B, T, K)`` a token position shares
        its scale with the whole batch, as the official ViDiT-Q code does; equal to tokens for a batch of one."""
        return cls.of_range(x.amin(dims, keepdim=True), x.amax(dims, keepdim=True), bits, symmetric)

    def encode(self, x: Tensor) -> Tensor:
        """Codes, whole numbers in the dtype of ``x``."""
        return ((x / self.scale).round() + self.zero).clamp(self.first, self.last)

    def decode(self, codes: Tensor) -> Tensor:
        return (codes - self.zero) * self.scale

    def fake_quantise(self, x: Tensor) -> Tensor:
        """The nearest values of the grid: quantised and given back in floating point."""
        return self.decode(self.encode(x))


@dataclass(frozen=True)
class QuantisedWeight:
    """A linear layer's weight in integers. Symmetric: int8 codes and no zero points. Asymmetric: uint8 codes in 0..2^bits - 1."""

    codes_NK: Tensor
    scales_NG: Tensor  # float32
    zeros_NG: Tensor | None  # uint8
    bits: int
    group_size: int  # inputs that share a scale, CHANNEL when all of them do

    @property
    def symmetric(self) -> bool:
        return self.zeros_NG is None

    @classmethod
    def of(cls, codes_NGg: Tensor, grid: Grid, bits: int) -> QuantisedWeight:
        """Codes on a grid that broadcasts to (N, G, 1)."""
        symmetric, (num_rows, num_groups, size) = grid.first < 0, codes_NGg.shape
        codes_NK = codes_NGg.flatten(1).to(torch.int8 if symmetric else torch.uint8)
        scales_NG, zeros_NG = (part.expand(num_rows, num_groups, 1)[..., 0].contiguous() for part in (grid.scale, grid.zero))
        zeros_NG = None if symmetric else zeros_NG.to(torch.uint8)
        return cls(codes_NK, scales_NG.float(), zeros_NG, bits, CHANNEL if num_groups == 1 else size)


def fitting_group(num_inputs: int, group_size: int) -> int:
    """``group_size`` where it divides the inputs, else the largest of 128, 64, 32 that does, else CHANNEL.

    ConfigError for a size that is none of these, CHANNEL or TENSOR.
    """
    if group_size in (CHANNEL, TENSOR):
        return group_size
    if group_size not in GROUP_SIZES:
        raise ConfigError(f"group size {group_size} is not supported.", hint="Use 32, 64, 128, or -1 for one scale per output.")
    return next((size for size in (group_size, *GROUP_SIZES) if num_inputs % size == 0), CHANNEL)


def quantise_weight(
    weight_NK: Tensor,
    bits: int,
    group_size: int = CHANNEL,
    *,
    symmetric: bool | None = None,
    search: str = "min_max",
    gram_KK: Tensor | None = None,
    scale_dtype: torch.dtype | None = None,
    name: str = "weight",
) -> QuantisedWeight:
    """Round to nearest. ``symmetric`` is by default what kernels take: 8 bits symmetric, fewer asymmetric.

    ``search="mse"`` shrinks the range of every group by the factor of MSE_FACTORS that has the least squared error of the weights or,
    given the Gram matrix ``gram_KK = X^T X`` of the inputs, of the group's part of the outputs.
    Scales are of ``scale_dtype`` where their size allows it, so that files may store them so.
    InputError, naming ``name``, for NaN and infinity. ConfigError for bits outside 2..8 and as in :func:`fitting_group`.
    """
    symmetric = bits == 8 if symmetric is None else symmetric
    w_NGg = grouped(weight_NK, bits, group_size, name)
    dims = (0, 1, 2) if group_size == TENSOR else 2
    grid = weight_grid(w_NGg, dims, bits, symmetric, search, gram_KK, scale_dtype)
    return QuantisedWeight.of(grid.encode(w_NGg), grid, bits)


def grouped(weight_NK: Tensor, bits: int, group_size: int, name: str = "weight") -> Tensor:
    """The weight in float32, (N, G, g), after the checks of :func:`quantise_weight`; a fallback of the group size is logged."""
    if not 2 <= bits <= 8:
        raise ConfigError(f"{name}: {bits} bits are not supported.", hint="Use 2 to 8 bits; kernels take 4 and 8.")
    if weight_NK.dim() != 2 or weight_NK.numel() == 0 or not weight_NK.is_floating_point():
        raise InputError(f"{name}: a floating-point matrix is expected, not {weight_NK.dtype} of shape {tuple(weight_NK.shape)}.")
    if not bool(weight_NK.isfinite().all()):
        raise InputError(f"{name}: contains NaN or infinity.", hint="Check the weights with `arsp models verify`.")
    size = fitting_group(weight_NK.shape[1], group_size)
    if size != group_size:
        used = "one scale per output" if size == CHANNEL else f"groups of {size}"
        log.warning("%s: %d inputs do not divide into groups of %d, using %s", name, weight_NK.shape[1], group_size, used)
    return weight_NK.float().unflatten(1, (-1, size if size > 0 else weight_NK.shape[1]))


def weight_grid(
    w_NGg: Tensor, dims: int | Sequence[int], bits: int, symmetric: bool, search: str = "min_max", gram_KK: Tensor | None = None,
    scale_dtype: torch.dtype | None = None,
) -> Grid:  # fmt: skip
    """The grid of grouped weights, one range over ``dims``; ``search``, ``gram_KK``, ``scale_dtype`` as in :func:`quantise_weight`."""
    low, high = w_NGg.amin(dims, keepdim=True), w_NGg.amax(dims, keepdim=True)
    best = Grid.of_range(low, high, bits, symmetric, scale_dtype)
    if search == "min_max":
        return best
    if search != "mse":
        raise ConfigError(f"scale search '{search}' is not known.", hint="Use min_max or mse.")
    gram_Ggg = None
    if gram_KK is not None:
        size = w_NGg.shape[2]
        gram_Ggg = torch.stack([gram_KK[k : k + size, k : k + size] for k in range(0, len(gram_KK), size)]).to(w_NGg.dtype)

    def error(grid: Grid) -> Tensor:
        d_NGg = grid.fake_quantise(w_NGg) - w_NGg
        other = d_NGg if gram_Ggg is None else torch.einsum("ngk,gkj->ngj", d_NGg, gram_Ggg)
        return (d_NGg * other).sum(dims, keepdim=True)

    least = error(best)
    for factor in MSE_FACTORS[1:]:
        grid = Grid.of_range(low * factor, high * factor, bits, symmetric, scale_dtype)
        found = error(grid)
        better = found < least
        best = Grid(torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero), grid.first, grid.last)
        least = torch.minimum(found, least)
    return best


def dequantise(weight: QuantisedWeight) -> Tensor:
    """The float32 weight (N, K) that the integers stand for."""
    q_NGg = weight.codes_NK.unflatten(1, (weight.scales_NG.shape[1], -1)).float()
    zeros_NG1 = 0 if weight.zeros_NG is None else weight.zeros_NG[..., None].float()
    return ((q_NGg - zeros_NG1) * weight.scales_NG[..., None]).flatten(1)


class MovingRange:
    """Range of a tensor over calibration batches: the first one as it is, then moving averages (MixDQ)."""

    def __init__(self, momentum: float = 0.95):
        self.momentum = momentum
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        low, high = x.float().amin(), x.float().amax()
        if self.low is not None and self.high is not None:
            low, high = (self.momentum * old + (1 - self.momentum) * new for old, new in ((self.low, low), (self.high, high)))
        self.low, self.high = low, high

    def grid(self, bits: int = 8, symmetric: bool = True) -> Grid:
        """InputError before the first batch."""
        if self.low is None or self.high is None:
            raise InputError("no calibration batch was seen: a static scale is not known.")
        return Grid.of_range(self.low, self.high, bits, symmetric)


def quantise_activation(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric 8 bits: int8 of the shape of ``x`` and float32 scales of the shape without the last dimension.

    Dynamic, ``scale = max |x| / 127`` per token; or static with a given ``scale`` that broadcasts to tokens (one number, one a position):
    what does not fit then saturates.
    """
    if scale is None:
        xq_MK, sx_M = kernels.quantize_per_token(x.reshape(-1, x.shape[-1]))
        return xq_MK.view(x.shape), sx_M.view(x.shape[:-1])
    grid = Grid(scale[..., None].float(), torch.zeros((), device=x.device), -128, 127)
    return _integers(x.float(), grid, torch.int8)


def quantise_shifted(x: Tensor, shift: float = GELU_SHIFT) -> tuple[Tensor, Tensor]:
    """``x >= -shift`` in unsigned 8 bits: uint8 and float32 scales ``(max x + shift) / 255`` per token, ``x = xq scale - shift``.

    For inputs after a GELU, where a symmetric grid wastes half of its codes. :func:`fold_shift` puts ``-shift`` into the bias.
    """
    x = x.float() + shift
    grid = Grid.of_range(torch.zeros_like(x[..., :1]), x.amax(-1, keepdim=True), 8, symmetric=False)
    return _integers(x, grid, torch.uint8)


def _integers(x: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of tokens; one that is not finite gets the scale NaN, so that products with it are NaN."""
    is_finite = x.isfinite().all(-1)
    codes = grid.encode(x).where(is_finite[..., None], 0)
    return codes.to(dtype), grid.scale[..., 0].where(is_finite, float("nan"))


def fold_shift(weight: QuantisedWeight, bias_N: Tensor | None, shift: float = GELU_SHIFT) -> Tensor:
    """The float32 bias that undoes the shift of the inputs: ``bias - shift sum_k weight[n, k]`` of the dequantised weight."""
    correction_N = -shift * dequantise(weight).double().sum(1)
    return (correction_N if bias_N is None else bias_N.double() + correction_N).float()


def integer_linear(
    xq_MK: Tensor, sx_M: Tensor, weight: QuantisedWeight, bias_N: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """:func:`arsp.kernels.reference.integer_linear`, (M, N). ``xq_MK`` is int8, or uint8 of shifted inputs with their folded bias."""
    return reference.integer_linear(xq_MK, sx_M, weight.codes_NK, weight.scales_NG, weight.zeros_NG, bias_N, dtype)
