"""The law of a code without its dense form: guided logits, their log-sum, and where the filters cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arsp.decode.guidance import Guided, Logits


@dataclass(frozen=True)
class Law:
    """Laws of m positions a row, as :class:`arsp.decode.filters.LogitsPipeline` leaves them.

    ``log p(x) = logits[x] / temperature - lse`` for the codes that were kept, -inf for the others. Kept are the codes with
    ``logits[x] / temperature`` above ``threshold``, and of those equal to it the ones with an id up to ``last``. A greedy law keeps one
    code. ``logits`` may be the decoder's own output, the halves of guidance apart: nothing of size V is made to describe a law.
    """

    logits_BmV: Logits  # before temperature
    lse_Bm: Tensor  # float32
    threshold_Bm: Tensor  # float32
    last_Bm: Tensor  # int64
    temperature: float = 1.0

    def log_probs(self) -> Tensor:
        """Dense float32 log-probabilities ``(B, m, V)``."""
        scaled, threshold = self.logits_BmV.float() / self.temperature, self.threshold_Bm.unsqueeze(-1)
        ids = torch.arange(scaled.shape[-1], device=scaled.device)
        kept = (scaled > threshold) | ((scaled == threshold) & (ids <= self.last_Bm.unsqueeze(-1)))
        return (scaled - self.lse_Bm.unsqueeze(-1)).masked_fill_(~kept, -torch.inf)

    def log_prob(self, codes_BnK: Tensor, index_Bn: Tensor | None = None) -> Tensor:
        """Log-probabilities ``(B, n, K)`` of K codes under the n laws of each row (those at ``index_Bn`` where given)."""
        rows = torch.arange(len(codes_BnK), device=codes_BnK.device)[:, None]
        index = torch.arange(codes_BnK.shape[1], device=rows.device)[None] if index_Bn is None else index_Bn
        scaled = self.logits_BmV[rows.unsqueeze(-1), index.unsqueeze(-1), codes_BnK].float() / self.temperature
        threshold = self.threshold_Bm[rows, index].unsqueeze(-1)
        kept = (scaled > threshold) | ((scaled == threshold) & (codes_BnK <= self.last_Bm[rows, index].unsqueeze(-1)))
        return (scaled - self.lse_Bm[rows, index].unsqueeze(-1)).masked_fill(~kept, -torch.inf)

    def at(self, rows_r: Tensor, index_rn: Tensor) -> Law:
        """The laws at positions ``index_rn[i]`` of row ``rows_r[i]``: r rows of n positions."""
        return self._each(lambda x: x[rows_r.unsqueeze(-1), index_rn])

    def behind_first(self) -> Law:
        """The laws without those of the first position, in memory of their own."""
        return self._each(lambda x: x[:, 1:]).clone()

    def clone(self) -> Law:
        """The same in memory of its own."""
        return self._each(lambda x: x.clone())

    def select(self, rows: Tensor) -> Law:
        """The laws of some rows of the batch."""
        return self._each(lambda x: x[rows])

    def _each(self, of: Callable[[Any], Any]) -> Law:
        return Law(of(self.logits_BmV), of(self.lse_Bm), of(self.threshold_Bm), of(self.last_Bm), self.temperature)

    def arguments(self) -> tuple[list[Tensor | None], list[float]]:
        """The laws of all rows, position after position, as :func:`arsp.kernels.draw_residual` takes them."""
        logits, uncond, how, guided = self.logits_BmV, None, (1.0, False), None
        if isinstance(logits, Guided):
            (uncond, *how, guided), logits = logits.arguments(), logits.cond_BmV
        numbers = [x.flatten() for x in (self.lse_Bm, self.threshold_Bm, self.last_Bm)]
        return [logits.flatten(0, 1), uncond, guided, *numbers], [*map(float, how), self.temperature]

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (self.logits_BmV, self.lse_Bm, self.threshold_Bm, self.last_Bm))

    @staticmethod
    def stack(parts: list[Law]) -> Law:
        """Laws of consecutive positions as one."""
        join = lambda name: torch.cat([getattr(part, name) for part in parts], dim=1)  # noqa: E731
        logits = [part.logits_BmV for part in parts]
        apart = all(isinstance(some, Guided) for some in logits)  # not where guidance ends inside the window
        logits_BmV = Guided.cat(logits) if apart else torch.cat([some.float() for some in logits], dim=1)
        return Law(logits_BmV, join("lse_Bm"), join("threshold_Bm"), join("last_Bm"), parts[0].temperature)

    @staticmethod
    def of_weights(log_w_BmV: Tensor) -> Law:
        """Laws from unnormalised log-weights."""
        flat = log_w_BmV.new_full(log_w_BmV.shape[:2], -torch.inf)
        return Law(log_w_BmV, log_w_BmV.logsumexp(-1), flat, torch.full_like(flat, -1, dtype=torch.int64))
