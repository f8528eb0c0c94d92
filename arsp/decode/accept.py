"""Which drafts stand: rules that compare the law of a position with the law its draft came from.

The valid scheme for one draft (Leviathan et al., arXiv 2211.17192): accept y ~ q with probability min(1, p(y) / q(y)), else draw from
the residual max(0, p - q); the output has law p. The relaxed rules replace the ratio and say so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arsp.decode.drafts import Tape
from arsp.decode.law import Law
from arsp.errors import ConfigError, NumericalError
from arsp.kernels import draw_residual
from arsp.kernels.reference import RESIDUAL_FLOOR
from arsp.rng import Purpose
from arsp.tokenizers.geometry import CodebookGeometry


def residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """``max(0, p - q)`` normalised, shape ``(..., V)``; ``p`` where nothing is left."""
    rest = (p_V - q_V).clamp_min(0)
    mass = rest.sum(-1, keepdim=True)
    return torch.where(mass < RESIDUAL_FLOOR, p_V, rest / mass.clamp_min(RESIDUAL_FLOOR))


class ExactRule:
    """Accept with probability min(1, p(y) / q(y)): the output law is p."""

    exactness = "exact"

    def ratio(self, law: Law, log_p_Bm: Tensor, tape: Tape, positions_Bm: Tensor, drafts_Bm: Tensor) -> Tensor:
        """What the uniform number of each draft has to be below, ``(B, m)``."""
        return (log_p_Bm - tape.log_q(positions_Bm, drafts_Bm.unsqueeze(-1)).squeeze(-1)).exp().nan_to_num(0.0, posinf=torch.inf)


class GroupRule(ExactRule):
    """GSD (arXiv 2508.07747): the ratio of the masses of a group of codes near the draft.

    The group: ``half_window`` ranks below and as many (the draft included) above it by logit, whose probability differs by less than
    ``p_distance`` and whose squared embedding distance is below ``e_distance``; the plain ratio where the ranks run out below.
    """

    exactness = "lossy"

    def __init__(self, embedding_VC: Tensor, half_window: int = 7, p_distance: float = 0.15, e_distance: float = 0.5):
        self.geometry, self.half, self.p_distance, self.e_distance = CodebookGeometry(embedding_VC), half_window, p_distance, e_distance

    def ratio(self, law: Law, log_p_Bm: Tensor, tape: Tape, positions_Bm: Tensor, drafts_Bm: Tensor) -> Tensor:
        log_probs = law.log_probs()
        group, inside = self.group(log_probs, log_probs.exp(), drafts_Bm)
        q = tape.log_q(positions_Bm, group).exp()
        p = log_probs.gather(-1, group).exp()
        plain = super().ratio(law, log_p_Bm, tape, positions_Bm, drafts_Bm)
        return group_ratio(p, q, inside, plain)

    def group(self, order_by_BmV: Tensor, p_BmV: Tensor, drafts_Bm: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``(B, m, 2 half_window)`` around each draft and which of them are in its group (none where ranks run out below)."""
        ranked = order_by_BmV.sort(dim=-1, stable=True).indices
        rank = (ranked == drafts_Bm.unsqueeze(-1)).to(torch.int8).argmax(-1, keepdim=True)
        window = rank + torch.arange(-self.half, self.half, device=rank.device)
        inside = (rank >= self.half) & (window < ranked.shape[-1])
        group = ranked.gather(-1, window.clamp(0, ranked.shape[-1] - 1))
        near_p = (p_BmV.gather(-1, group) - p_BmV.gather(-1, drafts_Bm.unsqueeze(-1))).abs() < self.p_distance
        distance = self.geometry.squared_distance(group, drafts_Bm.unsqueeze(-1))
        return group, inside & near_p & (distance < self.e_distance)


def group_ratio(p_BmG: Tensor, q_BmG: Tensor, inside_BmG: Tensor, plain_Bm: Tensor) -> Tensor:
    """Mass of the group under p by that under q; ``plain`` where the group is empty, 0 where q has no mass."""
    p, q = (p_BmG * inside_BmG).sum(-1), (q_BmG * inside_BmG).sum(-1)
    return torch.where(inside_BmG.any(-1), torch.where(q > 0, p / q.clamp_min(1e-38), 0.0), plain_Bm)


class LanternRule(ExactRule):
    """LANTERN (arXiv 2410.03355, ``bound`` = delta in (0, 1]) and LANTERN++ (arXiv 2502.06352, ``bound`` = lambda > 1): the draft borrows
    the mass of its nearest codes, at most delta, or lambda - 1 times its own. That bounds the total variation of the relaxed target of
    one code, not of an image."""

    def __init__(self, nearest_VK: Tensor, bound: float):
        if not 0 < bound < float("inf"):
            raise ConfigError(f"lantern: the bound {bound} is not in (0, inf).", "Up to 1: delta (LANTERN); above 1: lambda (LANTERN++).")
        self.nearest, self.bound = nearest_VK, bound
        self.exactness = f"bounded({bound:g})" if bound <= 1 else f"bounded({bound - 1:g} p)"

    def ratio(self, law: Law, log_p_Bm: Tensor, tape: Tape, positions_Bm: Tensor, drafts_Bm: Tensor) -> Tensor:
        near = law.log_prob(self.nearest[drafts_Bm].long()).exp()
        added, _ = self.borrowed(log_p_Bm.exp(), near, tape)
        q = tape.log_q(positions_Bm, drafts_Bm.unsqueeze(-1)).squeeze(-1).exp()
        return ((log_p_Bm.exp() + added) / q).nan_to_num(0.0, posinf=torch.inf)

    def borrowed(self, p_Bm: Tensor, near_BmK: Tensor, tape: Tape | None = None) -> tuple[Tensor, Tensor]:
        """Mass added to each draft, and from how many of its neighbours: the longest prefix whose mass stays within the bound.

        NumericalError when the mass is beyond the bound: the promise of the rule. With a ``tape`` it is a claim of this pass.
        """
        limit = torch.full_like(p_Bm, self.bound) if self.bound <= 1 else (self.bound - 1) * p_Bm
        mass = near_BmK.cumsum(-1)
        count = (mass <= limit.unsqueeze(-1)).sum(-1)
        padded = torch.cat((torch.zeros_like(mass[..., :1]), mass), dim=-1)
        added = padded.gather(-1, count.unsqueeze(-1)).squeeze(-1)
        broken = NumericalError(f"lantern: more mass was moved than {self.exactness} allows: it is beyond the bound.")
        holds = ~(added > limit).any()
        if tape is not None:
            tape.claim(holds, broken)
        elif not bool(holds):
            raise broken
        return added, count


def resample(law: Law, tape: Tape, rows_r: Tensor, index_rm: Tensor, positions_rm: Tensor, purpose: Purpose, stream: int = 0) -> Tensor:
    """Codes ``(r, m)`` from the residual of the law at ``index`` against the law recorded for the draft at that position. Where the index
    is negative none is needed, and what is there means nothing."""
    at_rm = torch.where(index_rm < 0, -1, rows_r.unsqueeze(-1) * law.lse_Bm.shape[1] + index_rm)
    ids_rm = tape.ids_B[rows_r].unsqueeze(-1).expand(positions_rm.shape)
    return draw_residual(
        *law.arguments(), at_rm.flatten(), *tape.recorded(rows_r, positions_rm),
        tape.request.seed, ids_rm.flatten(), positions_rm.flatten(), purpose, stream,
    ).view(positions_rm.shape)  # fmt: skip
