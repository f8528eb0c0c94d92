"""Layers that stand in for those of a model once its weights are integers.

:class:`QuantLinear` takes the place of a linear layer and computes on integers. Where what feeds it is a norm or a gate of the model, that
one is replaced too and hands over quantised rows: one pass over the values in place of two, and one quantisation for all its readers.
:class:`SimulatedLinear` rounds in floating point and is called ``simulated`` everywhere.

Shapes as in arsp/protocols.py; ``K`` inputs and ``N`` outputs of a linear layer, ``G`` groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arsp import kernels
from arsp.kernels.layouts import unpack_w4_cpu, unpack_w8_cpu
from arsp.kernels.reference import hadamard, rotation_block
from arsp.models.attention import Linear, add, linear
from arsp.models.llamagen import RMSNorm, SwiGLU
from arsp.models.var import GELU, Modulate
from arsp.quant.pack import pack_int4
from arsp.quant.quantiser import CHANNEL, GELU_SHIFT, QuantisedWeight, dequantise, quantise_shifted


@dataclass(frozen=True)
class QuantisedRows:
    """Activations in integers: ``x = codes scales + offsets``."""

    codes: Tensor  # int8 (..., K)
    scales: Tensor  # float32 (...)
    offsets: Tensor | None = None  # float32 (...), of the shifted format alone

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: slice) -> QuantisedRows:
        return QuantisedRows(self.codes[index], self.scales[index], None if self.offsets is None else self.offsets[index])


@dataclass(frozen=True)
class InputFormat:
    """How the inputs of a layer become integers: times ``smooth_K``, rotated with ``signs_K`` (:func:`arsp.kernels.reference.rotate`), then
    symmetric per token; or ``shifted``, with neither (:func:`arsp.quant.quantiser.quantise_shifted`, for what a GELU made). With
    ``static_S`` every scale of a next-scale model has a step of its own in place of one from each token (cf. arXiv 2503.07654)."""

    smooth_K: Tensor | None = None  # float32
    signs_K: Tensor | None = None  # int8
    shifted: bool = False
    static_S: Tensor | None = None  # float32

    def equals(self, other: InputFormat) -> bool:
        same = lambda a, b: a is b or (a is not None and b is not None and torch.equal(a, b))  # noqa: E731
        tensors = ("smooth_K", "signs_K", "static_S")
        return self.shifted == other.shifted and all(same(getattr(self, name), getattr(other, name)) for name in tensors)

    def to(self, device: torch.device) -> InputFormat:
        move = lambda tensor: None if tensor is None else tensor.to(device)  # noqa: E731
        return InputFormat(move(self.smooth_K), move(self.signs_K), self.shifted, move(self.static_S))

    def quantise(self, x: Tensor, clock: ScaleClock | None = None) -> QuantisedRows:
        """Rows of a tensor that no producer has quantised; ``clock``: which scale runs, where scales are static."""
        if self.static_S is not None:
            return QuantisedRows(*kernels.quantize_per_token(x, self.smooth_K, None, clock.steps(self.static_S, x)))
        if self.shifted:
            codes, scales = quantise_shifted(x)
            return QuantisedRows((codes.short() - 128).to(torch.int8), scales, 128 * scales - GELU_SHIFT)
        return QuantisedRows(*kernels.quantize_per_token(x, self.smooth_K, self.signs_K))


class ScaleClock:
    """Which scales of a next-scale model the pass at hand computes; blocks tell it (:meth:`watch` is a forward pre-hook)."""

    def __init__(self, sides: tuple[int, ...]):
        self.sides, self.scales = sides, None

    def watch(self, block: nn.Module, args: tuple) -> None:
        self.scales = args[3].scales

    def steps(self, static_S: Tensor, x: Tensor) -> Tensor:
        """The step of every row of ``x`` (R, n, K); one number where a single scale runs. Without a schedule the rows are all scales from
        the first on, those of the condition before it counted to it."""
        if self.scales is not None and self.scales[0] == self.scales[1]:
            return static_S[self.scales[0], None]
        first, last = self.scales or (0, len(self.sides) - 1)
        counts = torch.tensor([side * side for side in self.sides[first : last + 1]], device=x.device)
        steps_n = static_S[first : last + 1].repeat_interleave(counts)
        if self.scales is None:
            steps_n = torch.cat((steps_n[:1].expand(max(0, x.shape[1] - len(steps_n))), steps_n))
        return steps_n[: x.shape[1]].expand(x.shape[:2]).reshape(-1)


class QuantLinear(nn.Module):
    """A linear layer of 4-bit or 8-bit codes on 8-bit inputs. Takes floating point or :class:`QuantisedRows`, gives ``dtype``."""

    def __init__(self, weight: QuantisedWeight, bias_N: Tensor | None, input_format: InputFormat, dtype: torch.dtype):
        super().__init__()
        self.out_features, self.in_features = weight.codes_NK.shape
        self.bits, self.group_size, self.input_format, self.dtype = weight.bits, weight.group_size, input_format, dtype
        self.padding = -self.in_features % 8 if weight.bits == 4 else 0
        self.clock: ScaleClock | None = None
        codes_NK, zeros_NG = weight.codes_NK, weight.zeros_NG
        if weight.bits == 4 and zeros_NG is None:
            codes_NK, zeros_NG = codes_NK + 8, torch.full_like(weight.scales_NG, 8, dtype=torch.uint8)
        codes = kernels.pack_w4_cpu(pack_int4(codes_NK)) if weight.bits == 4 else kernels.pack_w8_cpu(codes_NK)
        by_column = lambda tensor: tensor.mT.contiguous().mT  # noqa: E731  what kernels read in place
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales_NG", by_column(weight.scales_NG), persistent=False)
        self.register_buffer("zeros_NG", None if zeros_NG is None else by_column(zeros_NG), persistent=False)
        self.register_buffer("bias", None if bias_N is None else bias_N.float(), persistent=False)
        sums_N = dequantise(weight).double().sum(1).float() if input_format.shifted else None
        self.register_buffer("sums_N", sums_N, persistent=False)

    def forward(
        self, x: Tensor | QuantisedRows, gelu: bool = False, outputs: slice | None = None, bias: Tensor | None = None,
        residual: Tensor | None = None, gain: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As :class:`arsp.models.attention.Linear`, rounded once: what follows the product is part of it."""
        x = x if isinstance(x, QuantisedRows) else self.quantise(x)
        if outputs is None:
            weight = (self.codes, self.scales_NG, self.zeros_NG, self.sums_N)
            return self._product(x, weight, self.bias, gelu, gain, residual)
        first = outputs.start // kernels.TILE * kernels.TILE  # rows of a tile are not parted
        part, tiles = slice(first, outputs.stop), slice(first // kernels.TILE, -(-outputs.stop // kernels.TILE))
        rows = (None if tensor is None else tensor[part] for tensor in (self.scales_NG, self.zeros_NG, self.sums_N))
        bias = bias if bias is None or first == outputs.start else F.pad(bias, (outputs.start - first, 0))
        return add(self._product(x, (self.codes[tiles], *rows), bias, gelu)[..., outputs.start - first :], residual, gain)

    def quantise(self, x: Tensor) -> QuantisedRows:
        return self.input_format.quantise(x, self.clock)

    def _product(
        self, x: QuantisedRows, weight: tuple[Tensor | None, ...], bias_N: Tensor | None, gelu: bool, gain: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """With these codes, scales, zero points and sums of rows."""
        codes, scales_NG, zeros_NG, sums_N = weight
        dtype = self.dtype if residual is None else torch.promote_types(self.dtype, residual.dtype)
        end = (bias_N, dtype, x.offsets, sums_N, gelu, gain, residual)
        if self.bits == 4:
            return kernels.w4a8_linear(self._padded(x), x.scales, codes, scales_NG, zeros_NG, self.group_size, *end)
        return kernels.w8a8_linear(x.codes, x.scales, codes, scales_NG[:, 0], *end)

    def _padded(self, x: QuantisedRows) -> Tensor:
        return F.pad(x.codes, (0, self.padding)) if self.padding else x.codes

    def gates(self, up: nn.Module) -> bool:
        """Whether :meth:`swiglu` can have these two layers. Reads nothing from their device."""
        if not isinstance(up, QuantLinear) or self.bias is not None or up.bias is not None or self.input_format.shifted:
            return False
        return all(getattr(self, name) == getattr(up, name) for name in ("bits", "group_size", "out_features", "in_features", "dtype"))

    def swiglu(self, up: QuantLinear, x: QuantisedRows) -> Tensor:
        """``silu(self(x)) up(x)`` of a layer that this one :meth:`gates`, rounded once."""
        if self.bits == 8:
            weights = (layer_part for layer in (self, up) for layer_part in (layer.codes, layer.scales_NG[:, 0]))
            return kernels.w8a8_swiglu(x.codes, x.scales, *weights, self.dtype)
        weights = (layer_part for layer in (self, up) for layer_part in (layer.codes, layer.scales_NG, layer.zeros_NG))
        return kernels.w4a8_swiglu(self._padded(x), x.scales, *weights, self.group_size, self.dtype)

    def floating(self) -> Linear:
        """The layer of float32 weights that the integers stand for, on inputs as they are."""
        N, K = self.out_features, self.in_features
        unpacked = unpack_w4_cpu(self.codes, N) if self.bits == 4 else unpack_w8_cpu(self.codes, N, K)
        weight = QuantisedWeight(unpacked[:, :K], self.scales_NG, self.zeros_NG, self.bits, self.group_size)
        w_NK, form = dequantise(weight).double(), self.input_format
        w_NK = w_NK if form.signs_K is None else hadamard(w_NK, rotation_block(K)) * form.signs_K
        w_NK = w_NK if form.smooth_K is None else w_NK * form.smooth_K
        layer = Linear(K, N, bias=self.bias is not None)
        layer.load_state_dict({"weight": w_NK} if self.bias is None else {"weight": w_NK, "bias": self.bias})
        return layer.to(self.codes.device).requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Moves follow the model; a new precision is that of the results, codes and scales keep theirs."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device))
        self.dtype, self.input_format = probe.dtype, self.input_format.to(probe.device)
        for name, tensor in self._buffers.items():
            self._buffers[name] = None if tensor is None else tensor.to(probe.device)
        return self

    def extra_repr(self) -> str:
        groups = "one scale a row" if self.group_size == CHANNEL else f"groups of {self.group_size}"
        return f"in_features={self.in_features}, out_features={self.out_features}, W{self.bits}A8, {groups}, {self.dtype}"


class SimulatedLinear(nn.Module):
    """A linear layer whose weight was rounded and whose inputs are rounded by ``fake_quantise``, both kept and multiplied in floating
    point: the numbers of a format that no kernel has, at no gain in time or memory."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, fake_quantise: Callable[[Tensor], Tensor]):
        super().__init__()
        self.out_features, self.in_features = weight_NK.shape
        self.weight = nn.Parameter(weight_NK, requires_grad=False)
        self.bias = None if bias_N is None else nn.Parameter(bias_N, requires_grad=False)
        self.fake_quantise = fake_quantise

    def forward(
        self, x: Tensor, gelu: bool = False, outputs: slice | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
        gain: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As :class:`arsp.models.attention.Linear`."""
        weight, bias = (self.weight, self.bias) if outputs is None else (self.weight[outputs], bias)
        return add(linear(self.fake_quantise(x), weight, bias, gelu=gelu), residual, gain)


class Producer(nn.Module):
    """A part of a model that hands over quantised rows."""

    def __init__(self, input_format: InputFormat):
        super().__init__()
        self.input_format = input_format

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Producer:
        self.input_format = self.input_format.to(fn(torch.empty(0)).device)
        return super()._apply(fn, recurse)


class QuantisedRMSNorm(Producer):
    """:class:`RMSNorm` whose result is quantised at once."""

    def __init__(self, norm: RMSNorm, input_format: InputFormat):
        super().__init__(input_format)
        self.eps, self.weight = norm.eps, norm.weight

    def forward(self, x: Tensor) -> QuantisedRows:
        return QuantisedRows(*kernels.rms_norm_quantize(x, self.weight, self.eps, self.input_format.smooth_K, self.input_format.signs_K))


class QuantisedModulate(Producer):
    """:class:`Modulate` whose result is quantised at once."""

    def __init__(self, norm: Modulate, input_format: InputFormat):
        super().__init__(input_format)
        self.eps = norm.eps

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> QuantisedRows:
        smooth_K, signs_K = self.input_format.smooth_K, self.input_format.signs_K
        return QuantisedRows(*kernels.modulate_quantize(x, scale, shift, self.eps, smooth_K, signs_K))


class QuantisedSwiGLU(Producer):
    """:class:`SwiGLU` whose result is quantised at once."""

    gated = ("cuda",)  # where both products and the gate are one operator; on the CPU that is no faster

    def __init__(self, gate: SwiGLU, input_format: InputFormat):
        super().__init__(input_format)

    def forward(self, gate: nn.Module, up: nn.Module, x: Tensor | QuantisedRows) -> QuantisedRows:
        smooth_K, signs_K = self.input_format.smooth_K, self.input_format.signs_K
        # rows in integers are in the format of all who read them
        if isinstance(x, QuantisedRows) and gate.codes.device.type in self.gated and gate.gates(up):
            return QuantisedRows(*kernels.quantize_per_token(gate.swiglu(up, x), smooth_K, signs_K))
        return QuantisedRows(*kernels.swiglu_quantize(gate(x), up(x), smooth_K, signs_K))


class QuantisedGELU(Producer):
    """:class:`GELU` whose result is quantised at once, in the shifted format."""

    def __init__(self, gelu: GELU, input_format: InputFormat):
        super().__init__(input_format)

    def forward(self, layer: nn.Module, x: Tensor | QuantisedRows) -> QuantisedRows:
        return QuantisedRows(*kernels.gelu_quantize(layer(x)))


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    RMSNorm: QuantisedRMSNorm, Modulate: QuantisedModulate, SwiGLU: QuantisedSwiGLU, GELU: QuantisedGELU,
}  # fmt: skip
