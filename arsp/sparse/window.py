"""Windows of scale-wise attention: which earlier positions a query looks at, as integers; masks and exact counts follow from it.

A query of scale s (side ``sides[s]``) meets the keys of every scale u <= s as one block. One integer per block and head says what is
kept: ``DENSE`` (-1) everything, ``DROPPED`` (0) nothing, w >= 1 the window:

- ``1d``, the band of the official code (arXiv 2411.17178): raster query i and raster key j with |i n_u / n_s - j| < w;
- ``2d``, ours: query (y, x) maps to cy = (y + 0.5) pn_u / pn_s - 0.5, cx alike; keys with |row - cy| <= w and |col - cx| <= w.

Both are tests "reach <= w" on one integer per pair (:func:`reach`), computed without rounding. Letters: s = query scale, u = key scale,
n = number of positions of a scale, pn = its side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Geometry = Literal["1d", "2d"]
GEOMETRIES = ("1d", "2d")
DENSE, DROPPED = -1, 0
OFFICIAL_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # VAR at 256 px; the tables of the official code are for it


# ------------------------------------------------------------------------------------------------------- which blocks


def windowed_keys(s: int) -> tuple[int, ...]:
    """Key scales that the official code windows for query scale s, newest first; the others are always dense.

    Scales 0-2 are dense as queries; as keys the two oldest scales (5 tokens) stay dense for s = 3, 4 and the three oldest (14 tokens)
    from s = 5 on. The rule is by index, so it holds for any number of scales.
    """
    return () if s < 3 else tuple(range(s, 1 if s < 5 else 2, -1))


def first_windowed_scale(num_scales: int) -> int:
    """The first query scale with 2-D windows: 5 at the official sizes (10 scales), where the 55 tokens before are cheaper dense.
    Shorter layouts grow faster: the scale after the middle one, never below 3."""
    return max(3, min(5, num_scales // 2 + 1))


def windowed_blocks(num_scales: int, geometry: Geometry) -> list[tuple[int, int]]:
    """(s, u) of every block that may be windowed. ``2d``: from :func:`first_windowed_scale` on, and scales 0-2 stay dense as keys."""
    first = first_windowed_scale(num_scales) if geometry == "2d" else 3
    return [(s, u) for s in range(first, num_scales) for u in windowed_keys(s) if geometry == "1d" or u >= 3]


def empty_windows(num_scales: int, *leading: int) -> np.ndarray:
    """All dense: int16 ``(*leading, K, K)``; entries with u > s mean nothing and stay -1."""
    return np.full((*leading, num_scales, num_scales), DENSE, dtype=np.int16)


# -------------------------------------------------------------------------------------------------------------- counts


def spans(side_s: int, side_u: int, r: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last kept row (or column) of a side_u map for each row (or column) of a side_s map, 2-D windows; clipped to the map."""
    twice_centre = (2 * np.arange(side_s) + 1) * side_u - side_s  # cy * 2 side_s
    low = -((2 * side_s * r - twice_centre) // (2 * side_s))  # ceil(cy - r)
    high = (twice_centre + 2 * side_s * r) // (2 * side_s)
    return np.clip(low, 0, side_u), np.clip(high, -1, side_u - 1)


@cache
def kept_pairs(side_s: int, side_u: int, window: int, geometry: Geometry) -> int:
    """Query-key pairs of one block that a window keeps, exactly, without making the mask."""
    n_s, n_u = side_s**2, side_u**2
    if window == DENSE:
        return n_s * n_u
    if window == DROPPED:
        return 0
    if geometry == "2d":
        low, high = spans(side_s, side_u, window)
        return int(np.maximum(high - low + 1, 0).sum()) ** 2
    i = np.arange(n_s)
    low = np.maximum(i * n_u // n_s - window + 1, 0)
    high = np.minimum(-(-i * n_u // n_s) + window - 1, n_u - 1)
    return int(np.maximum(high - low + 1, 0).sum())


def tile_pairs(side_s: int, side_u: int, window: int, tile: int) -> int:
    """Pairs that a kernel computes for one block of 2-D windows when it takes ``tile x tile`` queries together and all keys of the
    bounding box of their windows."""
    if window <= 0:
        return kept_pairs(side_s, side_u, window, "2d")
    low, high = spans(side_s, side_u, window)
    first = np.arange(0, side_s, tile)
    last = np.minimum(first + tile, side_s) - 1
    return int(((last - first + 1) * np.maximum(high[last] - low[first] + 1, 0)).sum()) ** 2


def dense_pairs(sides: Sequence[int]) -> list[int]:
    """Query-key pairs per scale without windows, n_s (n_0 + .. + n_s): 286,434 in all for VAR at 256 px."""
    n = [side**2 for side in sides]
    return [n[s] * sum(n[: s + 1]) for s in range(len(n))]


def pairs_per_scale(windows: np.ndarray | Tensor, sides: Sequence[int], geometry: Geometry) -> np.ndarray:
    """Kept pairs, int64 ``(..., K)`` for windows ``(..., K, K)`` [s, u]."""
    windows = np.asarray(windows)
    counts = np.zeros(windows.shape[:-1], dtype=np.int64)
    for s in range(len(sides)):
        for u in range(s + 1):
            block = windows[..., s, u]
            for window in np.unique(block):
                counts[..., s] += np.where(block == window, kept_pairs(sides[s], sides[u], int(window), geometry), 0)
    return counts


# --------------------------------------------------------------------------------------------------------------- masks


@lru_cache(maxsize=64)
def reach(side_s: int, side_u: int, geometry: Geometry) -> Tensor:
    """The smallest window that keeps each pair of a block: int32 ``(n_s, n_u)``, >= 1. A window w keeps the pairs with reach <= w."""
    n_s, n_u = side_s**2, side_u**2
    if geometry == "1d":
        i_n1, j_1m = torch.arange(n_s)[:, None], torch.arange(n_u)[None]
        return ((i_n1 * n_u - j_1m * n_s).abs() // n_s + 1).int()
    centre_n1, row_1m = ((2 * torch.arange(side_s) + 1) * side_u - side_s)[:, None], torch.arange(side_u)[None]
    axis = -(-(2 * side_s * row_1m - centre_n1).abs() // (2 * side_s))  # ceil(|row - cy|), (side_s, side_u)
    both = torch.maximum(axis[:, None, :, None], axis[None, :, None, :])  # (y, x, row, col)
    return both.reshape(n_s, n_u).clamp_min(1).int()


def block_mask(side_s: int, side_u: int, window: int, geometry: Geometry) -> Tensor:
    """Boolean ``(n_s, n_u)``, True = kept."""
    if window <= 0:
        return torch.full((side_s**2, side_u**2), window == DENSE)
    return reach(side_s, side_u, geometry) <= window


def scale_mask(windows_Hu: np.ndarray | Tensor, sides: Sequence[int], s: int, geometry: Geometry) -> Tensor:
    """Boolean ``(H, n_s, n_0 + .. + n_s)`` of query scale s, keys in scale-major raster order; for reference computations."""
    rows = [[int(w) for w in row[: s + 1]] for row in np.asarray(windows_Hu)]
    made: dict[tuple[int, ...], Tensor] = {}
    for row in rows:
        key = tuple(row)
        if key not in made:
            made[key] = torch.cat([block_mask(sides[s], sides[u], w, geometry) for u, w in enumerate(row)], 1)
    return torch.stack([made[tuple(row)] for row in rows])


# ------------------------------------------------------------------------------------------------------------- presets


def uniform_2d(sides: Sequence[int], r: int) -> np.ndarray:
    """``(K, K)``: the same 2-D window at every key scale of every query scale."""
    return np.full((len(sides), len(sides)), r, dtype=np.int16)


def uniform_1d(sides: Sequence[int], rows: int) -> np.ndarray:
    """``(K, K)``: bands of half-width ``rows`` rows of the key map on every block that the official code windows."""
    windows = empty_windows(len(sides))
    for s, u in windowed_blocks(len(sides), "1d"):
        windows[s, u] = rows * sides[u]
    return windows
