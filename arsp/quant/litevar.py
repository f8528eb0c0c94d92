"""The fake quantisers of LiteVAR (arXiv 2411.17178; official code, commit 176ee6a): values are rounded and given back in floating point.

Nothing gets faster or smaller here: results obtained with them are ``simulated``. All are asymmetric with N = 2^bits steps over the
range *divided by N, not N - 1*, so the largest value of a group always falls one step short; the zero point is not rounded; rounding
is half to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arsp.models.attention import AttentionContext, DensePolicy, by_scale, visible


def fake_quantize(x: Tensor, bits: int, dim: int) -> Tensor:
    """Quantise with the range of every group along ``dim`` (one group = all entries along it): scale = (max - min) / 2^bits,
    q = clamp(round(x / scale - min / scale), 0, 2^bits - 1), back as (q + min / scale) scale. A constant group uses scale 1e-4."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = (high - low) / 2**bits
    scale = scale.masked_fill(scale == 0, 1e-4)
    zero = low / scale
    return ((x / scale - zero).round().clamp(0, 2**bits - 1) + zero) * scale


def quantize_weight(weight_NK: Tensor, bits: int) -> Tensor:
    """A linear layer's weight, one range per output channel."""
    return fake_quantize(weight_NK, bits, 1)


def quantize_tokens(x: Tensor, bits: int) -> Tensor:
    """The input of a linear layer, one range per token; also queries and keys, ``(B, H, n, D)``, one range per head vector."""
    return fake_quantize(x, bits, -1)


def quantize_values(v_BHTD: Tensor, bits: int = 8) -> Tensor:
    """Attention values, one range per channel and head over the tokens; a single token is left alone."""
    return v_BHTD if v_BHTD.shape[2] == 1 else fake_quantize(v_BHTD, bits, 2)


def quantize_map(map_BHnT: Tensor, bits: int = 8) -> Tensor:
    """A softmax map in steps of 2^-bits, at most 1 - 2^-bits; a single key is left alone."""
    if map_BHnT.shape[-1] == 1:
        return map_BHnT
    return (map_BHnT * 2**bits).round().clamp(0, 2**bits - 1) / 2**bits


class QuantisedAttention(DensePolicy):
    """Dense attention of a VAR with queries, keys, values and map in 8 bits, as the official model runs it in all its modes but one."""

    simulated = True

    def attend(self, q_BHnD: Tensor, k_BHnD: Tensor, v_BHnD: Tensor, layer: int, ctx: AttentionContext) -> Tensor:
        if ctx.scales is None:  # in training and of a student, with a mask over all scales at once
            return super().attend(quantize_tokens(q_BHnD, 8), quantize_tokens(k_BHnD, 8), quantize_values(v_BHnD), layer, ctx)
        k_BHTD, v_RHTD = visible(k_BHnD, v_BHnD, layer, ctx)
        return by_scale(q_BHnD, k_BHTD, v_RHTD, ctx, lambda scale, q, k, v: quantized_attention(q, k, v, ctx.scale))


def quantized_attention(q_BHnD: Tensor, k_BHTD: Tensor, v_RHTD: Tensor, scale: float | None) -> Tensor:
    """Attention over all slots; where there are twice as many value rows as query rows, the halves of guidance share the map."""
    if k_BHTD.shape[2] > 1:
        q_BHnD, k_BHTD = quantize_tokens(q_BHnD, 8), quantize_tokens(k_BHTD, 8)
    scale = q_BHnD.shape[-1] ** -0.5 if scale is None else scale
    map_BHnT = quantize_map(torch.softmax(q_BHnD @ k_BHTD.mT * scale, -1))
    return map_BHnT.repeat(len(v_RHTD) // len(map_BHnT), 1, 1, 1) @ quantize_values(v_RHTD)
