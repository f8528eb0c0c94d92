"""LiteVAR as a :class:`arsp.protocols.ComputePolicy`: windows that skip work, sharing between the guidance halves, and the recorder
that calibration runs with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arsp.errors import ConfigError
from arsp.kernels import skips_windows, windowed_scale_attention
from arsp.models.attention import AttentionContext, by_scale, dense_attention, visible
from arsp.sparse.litevar import CUT, MassHistogram, masked_attention
from arsp.sparse.profile import Profile
from arsp.sparse.window import Geometry, dense_pairs, pairs_per_scale, scale_mask

DENSE_ABOVE = 0.4  # kept share of a layer's pairs at one scale above which dense attention is faster


@dataclass
class ScaleCount:
    """Query-key pairs of one scale, both products counted, over all layers, heads and rows so far."""

    dense: int = 0  # dense attention of both halves
    windowed: int = 0  # what the profile's windows keep of it
    executed: int = 0  # what was computed: sharing counted, masked-out pairs too where they are only masked


class LiteVARPolicy:
    """Attention with the windows and the sharing of a profile.

    2-D windows with the mask ``neginf`` skip what they leave out (:func:`arsp.kernels.windowed_scale_attention`). A (layer, scale) that
    would keep more than ``DENSE_ABOVE`` of its pairs is computed dense, without windows: ``dense_instead`` lists them. 1-D bands and the
    two official masks are dense attention with a mask: ``simulated`` is True. It becomes True as well when the kernel does not apply and
    its dense reference had to run. ``counts`` says what was run.
    """

    def __init__(self, profile: Profile):
        self.profile = profile
        self.sides = tuple(profile.patch_nums)
        kept = profile.kept()
        windowed = kept < 1.0
        self.masked = profile.geometry == "1d" or profile.mask != "neginf"
        self.simulated = self.masked and bool(windowed.any())
        replaced = windowed & (kept > DENSE_ABOVE) & (not self.masked)
        self.dense_instead = [(int(layer), int(s)) for layer, s in np.argwhere(replaced)]
        self.windowed = windowed & ~replaced
        self.counts = [ScaleCount() for _ in self.sides]
        self._pairs = pairs_per_scale(profile.win, self.sides, profile.geometry).sum(1)  # all heads, (layer, s)
        self._dense = [pairs * profile.heads for pairs in dense_pairs(self.sides)]
        self._on_device: dict[tuple[int, int, torch.device], Tensor] = {}

    def share(self, layer: int, scale: int) -> str:
        """What the two guidance halves share: ``none``, ``map`` or ``output``."""
        return self.profile.share_of(layer, scale)

    def attend(self, q_BHnD: Tensor, k_BHnD: Tensor, v_BHnD: Tensor, layer: int, ctx: AttentionContext) -> Tensor:
        if ctx.sides != self.sides:
            raise ConfigError(f"LiteVAR windows for scales {list(self.sides)} met a pass over {list(ctx.sides) or 'a raster sequence'}.")
        k_BHTD, v_BHTD = visible(k_BHnD, v_BHnD, layer, ctx)
        scale = q_BHnD.shape[-1] ** -0.5 if ctx.scale is None else ctx.scale
        shared_output = bool(ctx.shares) and ctx.shares[layer] == "output"
        return by_scale(q_BHnD, k_BHTD, v_BHTD, ctx, lambda s, q, k, v: self._attend(q, k, v, layer, s, scale, shared_output))

    def _attend(self, q_BHnD: Tensor, k_BHTD: Tensor, v_RHTD: Tensor, layer: int, s: int, scale: float, shared_output: bool) -> Tensor:
        windowed = bool(self.windowed[layer, s])
        skips = windowed and not self.masked and skips_windows(q_BHnD, k_BHTD, v_RHTD)
        self.simulated |= windowed and not skips
        self._count(layer, s, len(q_BHnD), len(v_RHTD), shared_output, skips)
        if not windowed:
            return dense_attention(q_BHnD, k_BHTD, v_RHTD, scale)
        q_BHnD = q_BHnD if scale == 1 else q_BHnD * scale
        if not self.masked:
            return windowed_scale_attention(q_BHnD, k_BHTD, v_RHTD, self._windows(layer, s, q_BHnD.device), self.sides, s)
        windows_Hu = self.profile.win[layer, :, s, : s + 1]
        kept_HnT = scale_mask(windows_Hu, self.sides, s, self.profile.geometry).to(q_BHnD.device)
        return masked_attention(q_BHnD, k_BHTD, v_RHTD, kept_HnT, self.profile.mask)

    def _windows(self, layer: int, s: int, device: torch.device) -> Tensor:
        key = (layer, s, device)
        if key not in self._on_device:
            self._on_device[key] = torch.from_numpy(self.profile.win[layer, :, s, : s + 1].astype(np.int32)).to(device)
        return self._on_device[key]

    def _count(self, layer: int, s: int, map_rows: int, value_rows: int, shared_output: bool, skips: bool) -> None:
        # where the halves share the output, the null rows do not get here; dense attention would have had them
        rows = 2 * value_rows if shared_output else value_rows
        count, pairs, dense = self.counts[s], int(self._pairs[layer, s]), self._dense[s]
        count.dense += 2 * rows * dense
        count.windowed += 2 * rows * pairs
        count.executed += (map_rows + value_rows) * (pairs if skips else dense)

    def executed_pairs(self) -> np.ndarray:
        """Query-key pairs per head that are computed, ``(layer, s)``, averaged over heads."""
        dense = np.broadcast_to(np.array(dense_pairs(self.sides)), self.windowed.shape)
        return np.where(self.windowed & (not self.masked), self._pairs / self.profile.heads, dense)

    def report(self) -> dict[str, Any]:
        """What was run so far, for a record. Pairs are query-key pairs per head, both products counted; times D they are MACs."""
        total = {name: sum(getattr(count, name) for count in self.counts) for name in ("dense", "windowed", "executed")}
        return {
            "policy": "litevar", "geometry": self.profile.geometry, "mask": self.profile.mask, "simulated": self.simulated,
            "pairs": total, "executed_share": total["executed"] / total["dense"] if total["dense"] else None,
            "dense_instead": [list(pair) for pair in self.dense_instead],
            "scales": [{"scale": s, **vars(count)} for s, count in enumerate(self.counts) if count.dense],
        }  # fmt: skip


class CalibrationPolicy:
    """Dense attention that keeps, per layer and scale, the mass histogram and how far the two guidance halves differ.

    The whole map of one layer and scale is made at a time and dropped; ``error`` needs passes with both halves.
    """

    simulated = False

    def __init__(self, sides: Sequence[int], heads: int, scales: Sequence[int], geometry: Geometry, cut: float = CUT):
        self.sides, self.heads, self.scales, self.geometry, self.cut = tuple(sides), heads, frozenset(scales), geometry, cut
        self.histograms: dict[tuple[int, int], MassHistogram] = {}
        self._squares: dict[tuple[int, int], np.ndarray] = {}  # sums of squares: map difference, map, output difference, output

    def share(self, layer: int, scale: int) -> str:
        return "none"

    def attend(self, q_BHnD: Tensor, k_BHnD: Tensor, v_BHnD: Tensor, layer: int, ctx: AttentionContext) -> Tensor:
        k_BHTD, v_BHTD = visible(k_BHnD, v_BHnD, layer, ctx)
        scale = q_BHnD.shape[-1] ** -0.5 if ctx.scale is None else ctx.scale
        return by_scale(q_BHnD, k_BHTD, v_BHTD, ctx, lambda s, q, k, v: self._attend(q * scale, k, v, layer, s, bool(ctx.shares)))

    def _attend(self, q_RHnD: Tensor, k_RHTD: Tensor, v_RHTD: Tensor, layer: int, s: int, two_halves: bool) -> Tensor:
        map_RHnT = (q_RHnD @ k_RHTD.mT).float().softmax(-1)
        if s in self.scales:
            if (layer, s) not in self.histograms:
                self.histograms[layer, s] = MassHistogram(self.heads, self.sides, s, self.geometry, self.cut)
            self.histograms[layer, s].add(map_RHnT)
        out_RHnD = map_RHnT.to(v_RHTD.dtype) @ v_RHTD
        if two_halves:
            squares = [float(x.double().square().sum()) for pair in (map_RHnT, out_RHnD) for x in _difference(pair)]
            self._squares[layer, s] = self._squares.get((layer, s), 0.0) + np.array(squares)
        return out_RHnD

    def errors(self, kind: str) -> np.ndarray:
        """Relative error ``(layer, s)`` of giving the null half the conditional half's ``map`` or ``output`` (Frobenius norm)."""
        at = {"map": 0, "output": 2}[kind]
        errors = np.zeros((1 + max(layer for layer, _ in self._squares), len(self.sides)))
        for (layer, s), squares in self._squares.items():
            errors[layer, s] = np.sqrt(squares[at] / squares[at + 1]) if squares[at + 1] > 0 else 0.0
        return errors


def _difference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Conditional minus null half, and the null half."""
    conditional, null = x.chunk(2)
    return conditional - null, null
