"""The law of a code without its dense form: guided logits, their log-sum, and where the filters cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Law:
    """Laws of m positions a row, as :class:`arsp.decode.filters.LogitsPipeline` leaves them.

    ``log p(x) = logits[x] / temperature - lse`` for the codes that were kept, -inf for the others. Kept are the codes with
    ``logits[x] / temperature`` above ``threshold``, and of those equal to it the ones with an id up to ``last``. A greedy law keeps one
    code. ``logits`` may be the decoder's own output: nothing of size V is made to describe a law.
    """

    logits_BmV: Tensor  # float32, before temperature
    lse_Bm: Tensor  # float32
    threshold_Bm: Tensor  # float32
    last_Bm: Tensor  # int64
    temperature: float = 1.0

    def log_probs(self) -> Tensor:
        """Dense float32 log-probabilities ``(B, m, V)``."""
        scaled, threshold = self.logits_BmV / self.temperature, self.threshold_Bm.unsqueeze(-1)
        ids = torch.arange(scaled.shape[-1], device=scaled.device)
        kept = (scaled > threshold) | ((scaled == threshold) & (ids <= self.last_Bm.unsqueeze(-1)))
        return (scaled - self.lse_Bm.unsqueeze(-1)).masked_fill_(~kept, -torch.inf)

    def log_prob(self, codes_Bm: Tensor) -> Tensor:
        """Log-probability ``(B, m)`` of one code a position."""
        scaled = self.logits_BmV.gather(-1, codes_Bm.unsqueeze(-1)).squeeze(-1) / self.temperature
        kept = (scaled > self.threshold_Bm) | ((scaled == self.threshold_Bm) & (codes_Bm <= self.last_Bm))
        return (scaled - self.lse_Bm).masked_fill(~kept, -torch.inf)

    def at(self, rows: Tensor, index: Tensor) -> Law:
        """The laws of position ``index[i, j]`` of row ``rows[i]``: index ``(r, k)`` -> r rows of k positions."""
        pick = lambda x: x[rows.unsqueeze(-1), index]  # noqa: E731
        return Law(pick(self.logits_BmV), pick(self.lse_Bm), pick(self.threshold_Bm), pick(self.last_Bm), self.temperature)

    def rows(self, rows: Tensor) -> Law:
        """The laws of some rows of the batch."""
        return Law(self.logits_BmV[rows], self.lse_Bm[rows], self.threshold_Bm[rows], self.last_Bm[rows], self.temperature)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.logits_BmV, self.lse_Bm, self.threshold_Bm, self.last_Bm))
