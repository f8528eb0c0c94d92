"""Shared by the architectures: the bias-free linear layer, the key-value cache outside the modules, and the dense attention policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arsp.kernels import small_linear


class Linear(nn.Linear):
    """Bias-free linear layer; decoding few rows on the CPU reads every weight once (:func:`arsp.kernels.small_linear`)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return small_linear(x, self.weight)


class KVCache:
    """Keys (after rotation) and values of all layers, ``(B, H, capacity, D)`` each; allocated once, read up to the valid length."""

    def __init__(
        self, num_layers: int, batch: int, num_heads: int, capacity: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
    ):
        shape = (num_layers, batch, num_heads, capacity, head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    @property
    def capacity(self) -> int:
        return self.k.shape[3]

    def store(self, layer: int, k_BHnD: Tensor, v_BHnD: Tensor, start: int | None, positions_Bn: Tensor | None) -> None:
        """Write n new slots per row: at ``start`` for all rows, or at ``positions_Bn`` where rows stand at different lengths."""
        rows, n = k_BHnD.shape[0], k_BHnD.shape[2]
        if start is not None:
            self.k[layer, :rows, :, start : start + n] = k_BHnD
            self.v[layer, :rows, :, start : start + n] = v_BHnD
        else:
            row_B1 = torch.arange(rows, device=k_BHnD.device)[:, None]
            self.k[layer, :rows][row_B1, :, positions_Bn] = k_BHnD.transpose(1, 2)
            self.v[layer, :rows][row_B1, :, positions_Bn] = v_BHnD.transpose(1, 2)

    def select(self, rows: Tensor) -> KVCache:
        """A cache holding only these batch rows."""
        kept = object.__new__(KVCache)
        kept.k, kept.v = self.k[:, rows], self.v[:, rows]
        return kept

    def bytes(self, length: int) -> int:
        """Bytes of ``length`` valid slots of every row, keys and values."""
        layers, batch, heads, _, width = self.k.shape
        return 2 * layers * batch * heads * length * width * self.k.element_size()


@dataclass
class AttentionContext:
    """One pass: where new keys go, how many slots are visible, and which of them each query may see.

    ``mask`` is boolean, True = may see, ``(B | 1, 1, n, total)``; None with ``is_causal`` False means everything is visible.
    """

    total: int
    mask: Tensor | None = None
    is_causal: bool = False
    cache: KVCache | None = None
    start: int | None = None
    positions_Bn: Tensor | None = None


class DensePolicy:
    """Scaled dot product attention over every visible slot (the default :class:`arsp.protocols.ComputePolicy`)."""

    simulated = False

    def attend(self, q_BHnD: Tensor, k_BHnD: Tensor, v_BHnD: Tensor, layer: int, ctx: AttentionContext) -> Tensor:
        if ctx.cache is not None:
            ctx.cache.store(layer, k_BHnD, v_BHnD, ctx.start, ctx.positions_Bn)
            rows = q_BHnD.shape[0]
            k_BHnD, v_BHnD = ctx.cache.k[layer, :rows, :, : ctx.total], ctx.cache.v[layer, :rows, :, : ctx.total]
        return F.scaled_dot_product_attention(q_BHnD, k_BHnD, v_BHnD, attn_mask=ctx.mask, is_causal=ctx.is_causal)
