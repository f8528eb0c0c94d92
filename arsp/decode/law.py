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

    def log_prob(self, codes_BnK: Tensor, index_Bn: Tensor | None = None) -> Tensor:
        """Log-probabilities ``(B, n, K)`` of K codes under the n laws of each row (those at ``index_Bn`` where given)."""
        rows = torch.arange(len(codes_BnK), device=codes_BnK.device)[:, None]
        index = torch.arange(codes_BnK.shape[1], device=rows.device)[None] if index_Bn is None else index_Bn
        scaled = self.logits_BmV[rows.unsqueeze(-1), index.unsqueeze(-1), codes_BnK] / self.temperature
        threshold = self.threshold_Bm[rows, index].unsqueeze(-1)
        kept = (scaled > threshold) | ((scaled == threshold) & (codes_BnK <= self.last_Bm[rows, index].unsqueeze(-1)))
        return (scaled - self.lse_Bm[rows, index].unsqueeze(-1)).masked_fill(~kept, -torch.inf)

    def at(self, rows_r: Tensor, index_rn: Tensor) -> Law:
        """The laws at positions ``index_rn[i]`` of row ``rows_r[i]``: r rows of n positions."""
        pick = lambda x: x[rows_r.unsqueeze(-1), index_rn]  # noqa: E731
        return Law(pick(self.logits_BmV), pick(self.lse_Bm), pick(self.threshold_Bm), pick(self.last_Bm), self.temperature)

    def behind_first(self) -> Law:
        """The laws without those of the first position, in memory of their own."""
        cut = lambda x: x[:, 1:].contiguous()  # noqa: E731
        return Law(cut(self.logits_BmV), cut(self.lse_Bm), cut(self.threshold_Bm), cut(self.last_Bm), self.temperature)

    def select(self, rows: Tensor) -> Law:
        """The laws of some rows of the batch."""
        return Law(self.logits_BmV[rows], self.lse_Bm[rows], self.threshold_Bm[rows], self.last_Bm[rows], self.temperature)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.logits_BmV, self.lse_Bm, self.threshold_Bm, self.last_Bm))

    @staticmethod
    def stack(parts: list[Law]) -> Law:
        """Laws of consecutive positions as one."""
        join = lambda name: torch.cat([getattr(part, name) for part in parts], dim=1)  # noqa: E731
        return Law(join("logits_BmV"), join("lse_Bm"), join("threshold_Bm"), join("last_Bm"), parts[0].temperature)

    @staticmethod
    def of_weights(log_w_BmV: Tensor) -> Law:
        """Laws from unnormalised log-weights."""
        flat = log_w_BmV.new_full(log_w_BmV.shape[:2], -torch.inf)
        return Law(log_w_BmV, log_w_BmV.logsumexp(-1), flat, torch.full_like(flat, -1, dtype=torch.int64))
