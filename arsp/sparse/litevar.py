"""LiteVAR (arXiv 2411.17178): choosing windows from attention maps, and what the official code computes with them.

The official code (github.com/EkaterinaXie/LiteVAR, commit 176ee6a) multiplies masks onto dense attention. Its calibration and its two
inference rules are here as dense reference functions; windows that skip work go through
:class:`arsp.sparse.policy.LiteVARPolicy`. Shapes: map (R, H, n_s, T) with R rows (both guidance halves), T = n_0 + .. + n_s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from arsp.sparse.window import DENSE, DROPPED, OFFICIAL_SIDES, Geometry, empty_windows, reach, scale_mask, windowed_blocks, windowed_keys

MaskKind = Literal["neginf", "official-logit0", "official-post"]
MASK_KINDS = ("neginf", "official-logit0", "official-post")
TAU, CUT = 0.95, 0.003  # official defaults: share of a block's mass that its window holds, and the map entry below which nothing counts

# ------------------------------------------------------------------------------------------------------ official tables

# Share of a head's mass below which a block is dropped, for key scales s, s-1, ... ; and the extra condition at s = 9, d = 0:
# the two next blocks together must be light as well.
DROP_BELOW: dict[int, tuple[float, ...]] = {
    3: (0.1, 0.1), 4: (0.05,) * 3, 5: (0.05,) * 3, 6: (0.05, 0.05, 0.05, 0.03), 7: (0.05, 0.05, 0.05, 0.05, 0.03),
    8: (0.03, 0.03, 0.03, 0.03, 0.03, 0.02), 9: (0.2, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05),
}  # fmt: skip
LAST_SCALE, LAST_SCALE_NEXT_BELOW = 9, 0.2
GENERIC_DROP_BELOW = 0.05  # any other layout than the ten official scales


def _steps(first: int, last: int, step: int) -> list[int]:
    return list(range(first, last + 1, step))


_LAST_OLDER = [
    [5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 75, 100, 169], [*_steps(5, 50, 5), 60, 70, 85, 100], [*_steps(5, 50, 5), 64],
    _steps(5, 35, 2), _steps(5, 23, 2), _steps(5, 15, 2),
]  # fmt: skip
# heads -> query scale -> half-widths that are tried, for key scales s, s-1, ...
CANDIDATES: dict[int, dict[int, list[list[int]]]] = {
    16: {
        3: [[5, 6, 7, 8, 9, 10, 11, 12, 15], [4, 5, 6, 7, 9]],
        4: [[6, 7, 8, 9, 10, 11, 13, 15, 17, 20, 25], [6, 7, 8, 9, 10, 11, 13, 15], [4, 5, 6, 7, 9]],
        5: [[6, 7, 11, 12, 13, 18, 20, 25, 28, 30], [6, 7, 8, 9, 10, 13, 15, 17, 20, 25], [5, 6, 7, 8, 10, 12, 13]],
        6: [
            [8, 9, 11, 16, 18, 26, 30, 43, 51, 64], [8, 9, 10, 11, 12, 13, 17, 24, 30, 35],
            [6, 7, 8, 9, 10, 15, 20, 25], [6, 7, 9, 11, 13, 16],
        ],
        7: [
            [11, 20, 21, 22, 25, 30, 50, 64, 75, 85, 90, 100], [9, 10, 13, 18, 20, 31, 46, 51, 64], [7, 9, 10, 12, 20, 25, 30, 36],
            [7, 8, 9, 10, 11, 15, 18, 20, 25], [6, 7, 9, 11, 13, 16],
        ],
        8: [
            [14, 15, 28, 35, 39, 42, 50, 57, 64, 70, 85, 100, 125, 150, 169], [11, 12, 20, 23, 24, 30, 35, 45, 64, 70, 80, 90, 100],
            [9, 15, 17, 20, 32, 48, 51, 64], [6, 7, 9, 11, 13, 15, 19, 26, 30, 35], [6, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25],
            [5, 7, 9, 11, 13, 15],
        ],
        9: [[16, 17, 18, 20, 30, 34, 37, 45, 47, 48, 50, 64, 75, 100, 125, 150, 175, 200, 225, 256], *_LAST_OLDER],
    },
    30: {
        3: [[5, 6, 7, 8, 9, 10, 11, 12, 13, 16], [5, 6, 7, 8, 9]],
        4: [[6, *_steps(8, 20, 1), 25], [*_steps(6, 13, 1), 15, 16], [5, 6, 7, 8, 9]],
        5: [
            [6, 8, 10, 12, 13, 16, 18, 22, 24, 26, 28, 30, 35, 36], [6, 8, 10, 11, 12, 13, 14, 16, 17, 18, 20, 25],
            [*_steps(6, 13, 1), 15, 16],
        ],
        6: [
            [8, 9, 10, 13, 15, 16, 17, 20, 23, 24, 26, 40, 41, 42, 43, 44, 46, 48, 50, 64],
            [5, 9, 10, 11, 13, 14, 16, 17, 23, 24, 25, 26, 27, 29, 30, 35], [7, 8, 9, 11, 13, 14, 15, 16, 17, 18, 20, 25],
            [5, 7, 9, 11, 12, 13, 16],
        ],
        7: [
            [11, 20, 22, 25, 28, 30, 32, 35, 37, 40, 51, 56, 60, 64, 75, 85, 90, 100],
            [8, 10, 13, 15, 16, 18, 20, 22, 24, 25, 30, 32, 38, 40, 42, 43, 44, 46, 48, 49, 50, 51, 64],
            [6, 9, 10, 11, 13, 14, 17, 19, 21, 23, 25, 27, 28, 29, 35], [5, 6, 8, 11, 12, 14, 15, 17, 19, 20, 25],
            [5, 7, 9, 11, 12, 13, 16],
        ],
        8: [
            [16, 19, 24, 27, 29, 31, 37, 39, 40, 41, 50, 52, 54, 58, 63, 70, 85, 100, 125, 150, 169],
            [13, 19, 21, 23, 25, 27, 29, 31, 32, 33, 35, 36, 40, 42, 44, 54, 56, 57, 59, 60, 64, 70, 80, 90, 100],
            [8, 10, 13, 15, 17, 19, 21, 22, 23, 24, 26, 28, 31, 35, 38, 40, 42, 44, 46, 48, 50, 51, 60, 64],
            [6, 8, 10, 11, 13, 14, 16, 19, 21, 23, 25, 26, 27, 28, 29, 30, 35], [6, *_steps(7, 25, 2)], _steps(5, 15, 2),
        ],
        9: [[16, 17, 32, 33, 34, 37, 48, 49, 50, 52, 54, 60, 64, 75, 100, 125, 150, 175, 200, 225, 256], *_LAST_OLDER],
    },
}  # fmt: skip


def candidates(heads: int, sides: Sequence[int], s: int, u: int, geometry: Geometry = "1d") -> list[int]:
    """Windows that are tried for one block, ascending: the official list for bands of 16 or 30 heads on the ten official scales,
    otherwise every window."""
    if geometry == "1d" and heads in CANDIDATES and tuple(sides) == OFFICIAL_SIDES:
        return CANDIDATES[heads][s][s - u]
    return list(range(1, int(reach(sides[s], sides[u], geometry).max()) + 1))


def drop_below(sides: Sequence[int], s: int, u: int) -> float:
    """The share of mass below which a block is dropped."""
    return DROP_BELOW[s][s - u] if len(sides) == len(OFFICIAL_SIDES) else GENERIC_DROP_BELOW


# ---------------------------------------------------------------------------------------------------------- calibration


class MassHistogram:
    """Attention mass of one layer and query scale by distance, summed over rows, queries and batches.

    ``add`` takes softmax maps one batch at a time and keeps, per head and key scale, the mass at each :func:`arsp.sparse.window.reach`;
    that is all that the choice of windows needs, so maps are never stored.
    """

    def __init__(self, heads: int, sides: Sequence[int], s: int, geometry: Geometry, cut: float = CUT):
        self.sides, self.s, self.geometry, self.cut = tuple(sides), s, geometry, cut
        sizes = [int(reach(sides[s], sides[u], geometry).max()) + 1 for u in range(s + 1)]
        self.mass_u = [torch.zeros(heads, size, dtype=torch.float64) for size in sizes]
        self.rows = 0

    def add(self, map_RHnT: Tensor) -> None:
        """Softmax attention of R rows, ``(R, H, n_s, T)``; entries below ``cut`` count nothing."""
        mass_HnT = torch.where(map_RHnT < self.cut, 0, map_RHnT).sum(0, dtype=torch.float64).cpu()
        start = 0
        for u, histogram in enumerate(self.mass_u):
            index = reach(self.sides[self.s], self.sides[u], self.geometry).flatten().long()
            stop = start + self.sides[u] ** 2
            histogram.index_add_(1, index, mass_HnT[:, :, start:stop].flatten(1))
            start = stop
        self.rows += map_RHnT.shape[0]

    def choose(self, tau: float = TAU, blocks: Sequence[int] | None = None) -> np.ndarray:
        """Windows ``(H, s + 1)`` over key scales u: -1 dense, 0 dropped, else the smallest candidate that holds ``tau`` of its block.

        Newest key scale first, a block is dropped when its share of the head's remaining mass is below :func:`drop_below` (at the last
        of ten scales the newest one only if the two before it are light too); what a window cuts off leaves the total. ``blocks``: the
        key scales that may be windowed (default: the official ones). A head without any mass keeps everything.
        """
        blocks = windowed_keys(self.s) if blocks is None else blocks
        held_u = [histogram.cumsum(1).numpy() for histogram in self.mass_u]  # mass that the window w keeps
        mass = np.stack([held[:, -1] for held in held_u], 1)  # (H, s + 1), shrinks as windows are applied
        windows = np.full(mass.shape, DENSE, dtype=np.int16)
        for u in blocks:
            tried = np.array(candidates(len(mass), self.sides, self.s, u, self.geometry))
            for head in np.flatnonzero(mass.sum(1) > 0):
                if self._is_light(mass[head], u):
                    windows[head, u], mass[head, u] = DROPPED, 0.0
                    continue
                held = held_u[u][head, np.minimum(tried, held_u[u].shape[1] - 1)]
                enough = np.flatnonzero(held >= tau * mass[head, u])
                if len(enough):
                    windows[head, u], mass[head, u] = tried[enough[0]], held[enough[0]]
        return windows

    def _is_light(self, mass_u: np.ndarray, u: int) -> bool:
        share_u = mass_u / mass_u.sum()
        light = share_u[u] < drop_below(self.sides, self.s, u)
        if len(self.sides) == len(OFFICIAL_SIDES) and self.s == u == LAST_SCALE:
            return light and share_u[u - 2 : u].sum() < LAST_SCALE_NEXT_BELOW
        return light


def choose_windows(
    histograms: dict[tuple[int, int], MassHistogram], layers: int, heads: int, sides: Sequence[int], geometry: Geometry, tau: float = TAU
) -> np.ndarray:
    """``win[layer, head, s, u]`` int16 from the histograms of (layer, s); blocks that are never windowed stay dense."""
    windows = empty_windows(len(sides), layers, heads)
    blocks = windowed_blocks(len(sides), geometry)
    for (layer, s), histogram in histograms.items():
        windows[layer, :, s, : s + 1] = histogram.choose(tau, [u for scale, u in blocks if scale == s])
    return windows


# ------------------------------------------------------------------------------------------------- reference inference


def calibration_output(map_RHnT: Tensor, v_RHTD: Tensor, windows_Hu: np.ndarray, sides: Sequence[int], s: int, cut: float = CUT) -> Tensor:
    """What the official calibration hands to the next layer: entries below ``cut`` and outside the bands zeroed after the softmax, not
    renormalised, times v."""
    kept = scale_mask(windows_Hu, sides, s, "1d").to(map_RHnT.device)
    return torch.where(kept & (map_RHnT >= cut), map_RHnT, 0) @ v_RHTD


def masked_attention(q_BHnD: Tensor, k_BHTD: Tensor, v_RHTD: Tensor, kept_HnT: Tensor, kind: MaskKind = "neginf") -> Tensor:
    """Dense attention with windows as masks, softmax scale 1: ``(R, H, n, D)``.

    ``neginf``: what is not kept has weight zero, the rest is renormalised (the meaning of a window everywhere in arsp).
    ``official-logit0``: logits are multiplied by the mask, so what is not kept has weight exp(0). ``official-post``: the softmax is
    multiplied by it, rows sum to less than one. R may be a multiple of B: row b of q and k gives the map of value rows b, b + B, ...
    (sharing between the guidance halves, official mode 2).
    """
    logits = q_BHnD @ k_BHTD.transpose(-1, -2)
    if kind == "neginf":
        weights = logits.masked_fill(~kept_HnT, -torch.inf).softmax(-1)
    elif kind == "official-logit0":
        weights = (logits * kept_HnT).softmax(-1)
    else:
        weights = logits.softmax(-1) * kept_HnT
    return weights.repeat(v_RHTD.shape[0] // len(weights), 1, 1, 1) @ v_RHTD
