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
