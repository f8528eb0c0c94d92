"""Classifier-free guidance, below the sampler: whatever is drawn or verified is the guided distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arsp.errors import ConfigError


@dataclass(frozen=True)
class Guidance:
    """``logits = u + scale * (c - u)`` on raw float32 logits.

    note: official LlamaGen semantics. ``scale <= 1`` switches guidance off (it does not interpolate). ``interval`` m >= 0 guides
    tokens 0..m+1 only: the prefill is always guided and decode step i, which yields token i + 1, is guided while i <= m.
    """

    scale: float = 1.0
    interval: int = -1

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise ConfigError(f"guidance scale {self.scale}: expected a number >= 0.")

    @property
    def active(self) -> bool:
        return self.scale > 1.0

    @property
    def last_guided(self) -> float:
        """Largest token index that is guided (-1: none, inf: all)."""
        if not self.active:
            return -1
        return float("inf") if self.interval <= -1 else self.interval + 1

    def combine(self, cond: Tensor, uncond: Tensor, tokens_m: Tensor) -> Tensor:
        """Guided logits ``(B, m, V)``; ``tokens_m`` = indices of the predicted tokens, ``(m,)`` or ``(B, m)``."""
        guided = uncond + self.scale * (cond - uncond)
        if self.last_guided == float("inf"):
            return guided
        return torch.where((tokens_m <= self.last_guided).unsqueeze(-1), guided, cond)


@dataclass(frozen=True)
class RampGuidance:
    """Guidance of VAR (arXiv 2404.02905): ``logits = (1 + t) c - t u`` with ``t = scale * k / (K - 1)`` at scale k of K.

    note: another meaning of the number than LlamaGen's: 0 is off, 1.5 ends at 2.5 c - 1.5 u, and the first scale is never guided.
    """

    scale: float
    num_scales: int
    interval: int = -1

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise ConfigError(f"guidance scale {self.scale}: expected a number >= 0.")
        if self.interval != -1:
            raise ConfigError("--cfg-interval: the guidance of VAR is a ramp over scales.", "Drop it, or give a schedule with cfg off.")

    @property
    def active(self) -> bool:
        return self.scale > 0

    def combine(self, cond: Tensor, uncond: Tensor, k: int) -> Tensor:
        """Guided logits of scale k."""
        t = self.scale * k / (self.num_scales - 1)
        return (1 + t) * cond - t * uncond
