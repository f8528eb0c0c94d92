"""The readable definition of every op, in plain torch: what a kernel must compute, and what runs where there is no kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def small_linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """``y = x weight^T``, shape (M, N), dtype of ``x``. Operands of two dtypes are multiplied in float32."""
    if x_MK.dtype == weight_NK.dtype:
        return F.linear(x_MK, weight_NK)
    return F.linear(x_MK.float(), weight_NK.float()).to(x_MK.dtype)


def windowed_scale_attention(
    q_BHnD: Tensor, k_BHTD: Tensor, v_GHTD: Tensor, windows_Hs: Tensor, sides: Sequence[int], scale_index: int
) -> Tensor:
    """``softmax(q k^T) v`` over the keys that ``windows_Hs`` keeps; rows b and B + b of ``v`` use the map of row b."""
    mask_HnT = window_mask(windows_Hs, sides, scale_index)
    logits_BHnT = (q_BHnD @ k_BHTD.mT).masked_fill(~mask_HnT, float("-inf"))
    weights_BHnT = logits_BHnT.softmax(-1)
    return weights_BHnT.repeat(v_GHTD.shape[0] // q_BHnD.shape[0], 1, 1, 1) @ v_GHTD


def window_mask(windows_Hs: Tensor, sides: Sequence[int], scale_index: int) -> Tensor:
    """Boolean (H, n, T), True = kept. Windows: -1 everything, 0 nothing, r >= 1 the keys of map u with |row - cy| <= r and
    |column - cx| <= r, where query (y, x) has its centre at cy = (y + 0.5) pn_u / pn_s - 0.5, cx alike."""
    blocks = []
    for u, side in enumerate(sides[: scale_index + 1]):
        distance_nu = _distance(sides[scale_index], side, windows_Hs.device)
        radius_H11 = windows_Hs[:, u, None, None]
        # distances are in units of 1 / (2 pn_s) key cells
        blocks.append((radius_H11 < 0) | ((radius_H11 > 0) & (distance_nu <= 2 * sides[scale_index] * radius_H11)))
    return torch.cat(blocks, -1)


def _distance(queries: int, keys: int, device: torch.device) -> Tensor:
    """Chebyshev distance (n, n_u) of keys to the centres of queries, times 2 ``queries``: whole numbers, so ties are exact."""
    y_n1, row_1u = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    along = (2 * queries * row_1u - ((2 * y_n1 + 1) * keys - queries)).abs()
    both = torch.maximum(along[:, None, :, None], along[None, :, None, :])  # (y, x, row, column)
    return both.reshape(queries**2, keys**2)
