"""Shared by the architectures: the linear layer, the key-value cache outside the modules, and the dense attention policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arsp.kernels import MAX_ROWS, cached_attention, small_linear


class Linear(nn.Linear):
    """Linear layer; decoding few rows on the CPU reads every weight once (:func:`arsp.kernels.small_linear`)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)

    def forward(
        self, x: Tensor, gelu: bool = False, outputs: slice | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
        gain: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``outputs``: these alone, with ``bias`` in place of the layer's own. With a ``residual`` the result is residual + gain y."""
        weight, bias = (self.weight, self.bias) if outputs is None else (self.weight[outputs], bias)
        return add(linear(x, weight, bias, gelu=gelu), residual, gain)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """``x weight^T + bias``, with ``gelu`` its GELU (tanh form); few rows through the kernel, many through oneDNN where it is faster."""
    few = x.numel() <= MAX_ROWS * x.shape[-1]
    if not few and _onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *(("gelu", [], "tanh") if gelu else ("none", [], "")))
    if bias is None:
        out = small_linear(x, weight)
    else:
        out = small_linear(x, weight) + bias if few else F.linear(x, weight, bias)
    return F.gelu(out, approximate="tanh") if gelu else out


def add(y: Tensor, residual: Tensor | None, gain: Tensor | None = None) -> Tensor:
    """``residual + gain y``, or ``y`` where there is no residual."""
    if residual is None:
        return y
    return residual + y if gain is None else torch.addcmul(residual, gain, y)


def _onednn(x: Tensor, weight: Tensor) -> bool:
    """Large layers on the CPU without gradient. note: torch multiplies float32 matrices with MKL, which is slower here, and makes a
    pass of its own of the GELU behind any product; the operator that its compiler calls instead has no public name."""
    if not (weight.is_cpu and weight.numel() >= 1 << 19 and x.dtype == weight.dtype and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class KVCache:
    """Keys (after rotation or normalisation) and values of all layers, ``(rows, H, capacity, D)`` each; allocated once, read up to the
    valid length. ``key_rows`` and ``value_rows`` (per layer) are smaller than the batch where guidance halves share them."""

    def __init__(
        self, num_layers: int, batch: int, num_heads: int, capacity: int, head_dim: int, *, dtype: torch.dtype, device: torch.device,
        key_rows: Sequence[int] | None = None, value_rows: Sequence[int] | None = None,
    ):  # fmt: skip
        def make(rows: Sequence[int] | None) -> list[Tensor]:
            each = rows or [batch] * num_layers
            return [torch.zeros(num, num_heads, capacity, head_dim, dtype=dtype, device=device) for num in each]

        self.k, self.v = make(key_rows), make(value_rows)

    @property
    def capacity(self) -> int:
        return self.k[0].shape[2]

    def store(self, layer: int, k_BHnD: Tensor, v_BHnD: Tensor, start: int | None, positions_Bn: Tensor | None) -> None:
        """Write n new slots per row: at ``start`` for all rows, or at slots ``positions_Bn`` where rows differ."""
        n = k_BHnD.shape[2]
        for cache, new in ((self.k[layer], k_BHnD), (self.v[layer], v_BHnD)):
            rows = new.shape[0]
            if start is not None:
                cache[:rows, :, start : start + n] = new
            else:
                row_B1 = torch.arange(rows, device=new.device)[:, None]
                cache[:rows][row_B1, :, positions_Bn[:rows]] = new.transpose(1, 2)

    def move(self, source_Bk: Tensor, target_Bk: Tensor) -> None:
        """Copy slots ``source_Bk[b]`` to ``target_Bk[b]``, of both guidance halves where there are two."""
        for cache in (*self.k, *self.v):
            halves = len(cache) // len(source_Bk)
            rows, source, target = (
                torch.arange(len(cache), device=cache.device)[:, None], source_Bk.repeat(halves, 1), target_Bk.repeat(halves, 1)
            )  # fmt: skip
            cache[rows, :, target] = cache[rows, :, source]

    def select(self, rows: Tensor, batch: int) -> KVCache:
        """A cache of these rows of a batch: of both guidance halves where a tensor holds two times ``batch`` rows."""
        kept = object.__new__(KVCache)
        pick = lambda x: x[torch.cat((rows, rows + batch)) if len(x) == 2 * batch else rows]  # noqa: E731
        kept.k, kept.v = [pick(x) for x in self.k], [pick(x) for x in self.v]
        return kept

    def to(self, dtype: torch.dtype) -> KVCache:
        """The same cache in another precision."""
        cast = object.__new__(KVCache)
        cast.k, cast.v = [x.to(dtype) for x in self.k], [x.to(dtype) for x in self.v]
        return cast

    def bytes(self, length: int) -> int:
        """Bytes of ``length`` valid slots of every row, keys and values."""
        return sum(x.shape[0] * x.shape[1] * length * x.shape[3] * x.element_size() for x in (*self.k, *self.v))


@dataclass
class AttentionContext:
    """One pass: where new keys go, how many slots are visible, and which of them each query may see.

    ``mask`` is boolean, True = may see, ``(B | 1, 1, n, total)``; None with ``is_causal`` False means everything is visible.
    With ``by_length`` there is no mask and every query sees the slots of its row up to its own: new keys have n slots from ``start`` or
    ``positions_Bn[:, 0]`` on (raster models, where :func:`arsp.kernels.reads_lengths` says so).
    ``scale`` multiplies the logits (None: D^-0.5). With ``scales`` (next-scale models: first and last scale of the pass, and the
    sides of all scales) the queries of each scale see the scales up to their own; ``keep`` False: the new keys are not stored;
    ``shares`` (one a layer; empty: none) says what the null half of the rows takes over from the conditional half: ``none``, ``map``
    (the attention weights) or ``output``.
    """

    total: int
    mask: Tensor | None = None
    is_causal: bool = False
    cache: KVCache | None = None
    start: int | None = None
    positions_Bn: Tensor | None = None
    by_length: bool = False
    scale: float | None = None
    scales: tuple[int, int] | None = None
    sides: tuple[int, ...] = ()
    keep: bool = True
    shares: Sequence[str] = ()

    def scale_ends(self) -> list[tuple[int, int, int]]:
        """(scale, number of its queries, slots they see) for every scale of the pass."""
        first, last = self.scales
        ends, seen = [], sum(side * side for side in self.sides[:first])
        for k in range(first, last + 1):
            seen += self.sides[k] ** 2
            ends.append((k, self.sides[k] ** 2, seen))
        return ends


class DensePolicy:
    """Scaled dot product attention over every visible slot (the default :class:`arsp.protocols.ComputePolicy`)."""

    simulated = False

    def share(self, layer: int, scale: int) -> str:
        """What the two guidance halves share at this layer and scale: ``none``, ``map`` or ``output``."""
        return "none"

    def attend(self, q_BHnD: Tensor, k_BHnD: Tensor, v_BHnD: Tensor, layer: int, ctx: AttentionContext) -> Tensor:
        few = q_BHnD.shape[2] <= MAX_ROWS and ctx.start is not None and ctx.cache is not None and ctx.scales is None
        if ctx.by_length or few:  # raster: without a mask every query sees what is before it
            keys, values, start = ctx.cache.k[layer], ctx.cache.v[layer], ctx.positions_Bn[:, 0] if ctx.start is None else ctx.start
            return cached_attention(q_BHnD, k_BHnD, v_BHnD, keys, values, start, ctx.mask, ctx.scale)
        k_BHnD, v_BHnD = visible(k_BHnD, v_BHnD, layer, ctx)
        if ctx.scales is None and ctx.mask is not None and q_BHnD.requires_grad and q_BHnD.device.type == "cpu":
            # note: torch's masked attention on the CPU takes 2.7 times as long backward in bfloat16 as in float32
            with torch.autocast("cpu", enabled=False):
                q, k, v = q_BHnD.float(), k_BHnD.float(), v_BHnD.float()
                return F.scaled_dot_product_attention(q, k, v, attn_mask=ctx.mask, scale=ctx.scale).type_as(v_BHnD)
        if ctx.scales is None:
            return F.scaled_dot_product_attention(
                q_BHnD, k_BHnD, v_BHnD, attn_mask=ctx.mask, is_causal=ctx.is_causal, scale=ctx.scale
            )  # fmt: skip
        return by_scale(q_BHnD, k_BHnD, v_BHnD, ctx, lambda scale, q, k, v: dense_attention(q, k, v, ctx.scale))


def call(policy: DensePolicy, *arguments: Any) -> Tensor:
    return policy.attend(*arguments)


outside = call  # of compiled code: compile_blocks says how


def attend(policy: DensePolicy, *arguments: Any) -> Tensor:
    """``policy.attend(...)``; no part of what is compiled (:mod:`arsp.models.compiled`)."""
    return outside(policy, *arguments) if torch.compiler.is_compiling() else policy.attend(*arguments)


def visible(k_BHnD: Tensor, v_BHnD: Tensor, layer: int, ctx: AttentionContext) -> tuple[Tensor, Tensor]:
    """The keys and values that the pass may see, the new ones included, which are stored where ``ctx`` says so.

    Where both halves share a map, keys have the conditional rows only, whatever the cache holds.
    """
    if ctx.cache is None:
        return k_BHnD, v_BHnD
    if ctx.keep:
        ctx.cache.store(layer, k_BHnD, v_BHnD, ctx.start, ctx.positions_Bn)
        return ctx.cache.k[layer][: len(k_BHnD), :, : ctx.total], ctx.cache.v[layer][: len(v_BHnD), :, : ctx.total]
    return tuple(
        torch.cat((cache[layer][: len(new), :, : ctx.start], new), dim=2) for cache, new in ((ctx.cache.k, k_BHnD), (ctx.cache.v, v_BHnD))
    )


def by_scale(q_BHnD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, ctx: AttentionContext, attend: Callable[..., Tensor]) -> Tensor:
    """``attend(scale, q, k, v)`` for the queries of each scale of the pass over the slots they see: block-causal without a mask."""
    ends = ctx.scale_ends()
    if len(ends) == 1:
        return attend(ends[0][0], q_BHnD, k_BHTD, v_BHTD)
    parts = zip(ends, q_BHnD.split([num for _, num, _ in ends], dim=2), strict=True)
    return torch.cat([attend(scale, q, k_BHTD[:, :, :seen], v_BHTD[:, :, :seen]) for (scale, _, seen), q in parts], dim=2)


def dense_attention(q_BHnD: Tensor, k_BHTD: Tensor, v_RHTD: Tensor, scale: float | None) -> Tensor:
    """Attention over all slots. With R = 2B value rows, the map of row b serves the values of rows b and B + b."""
    if len(v_RHTD) == len(q_BHnD):
        return F.scaled_dot_product_attention(q_BHnD, k_BHTD, v_RHTD, scale=scale)
    both = F.scaled_dot_product_attention(q_BHnD, k_BHTD, torch.cat(v_RHTD.chunk(2), dim=-1), scale=scale)
    return torch.cat(both.chunk(2, dim=-1))
