"""From guided logits to the law that is sampled: temperature, top-k, top-p, top-h, in this order, in one object.

Every sampler, drafter and trajectory uses the same :class:`LogitsPipeline`, so that "the target distribution" has one meaning:
the distribution *after* the pipeline. Rules of top-k (ties kept) and top-p (the crossing entry stays) follow the LlamaGen
release (arXiv 2406.06525); top-h is the entropy-bounded truncation of arXiv 2509.02510.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from arsp import kernels
from arsp.decode.guidance import Guided, Logits
from arsp.decode.law import Law
from arsp.errors import ConfigError, NumericalError
from arsp.rng import Purpose

MIN_TEMPERATURE = 1e-5  # the LlamaGen release divides by max(temperature, 1e-5)


@dataclass(frozen=True)
class LogitsPipeline:
    """Temperature -> top-k -> top-p -> top-h -> log-softmax, identical for targets and drafts.

    ``temperature``: logits are divided by it; 0 is greedy (one-hot on the best code, the smallest id on ties). The official
    rule divides by ``max(temperature, 1e-5)`` instead; the two agree unless logits tie within about 1e-4, where the official
    rule spreads the mass over the near-ties.
    ``top_k``: keep codes not below the k-th largest logit (all ties stay); 0 or >= V keeps everything.
    ``top_p``: keep the shortest prefix by descending probability whose mass exceeds it; 1 keeps everything, 0 the best code.
    ``top_h``: keep the longest prefix by descending probability whose renormalised entropy is at most ``top_h`` times the
    entropy of the whole; 0 disables it. At least one code always stays.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    top_h: float = 0.0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, self.temperature >= 0 and math.isfinite(self.temperature), "a finite number >= 0")
        _check("top_k", self.top_k, self.top_k >= 0 and self.top_k == int(self.top_k), "an integer >= 0 (0 disables it)")
        _check("top_p", self.top_p, 0 <= self.top_p <= 1, "a number in [0, 1] (1 disables it)")
        _check("top_h", self.top_h, 0 <= self.top_h <= 1, "a number in [0, 1] (0 disables it)")

    def __call__(self, logits: Logits) -> Tensor:
        """Logits ``(..., V)`` of any float type -> float32 log-probabilities, removed codes at -inf."""
        if self.temperature == 0:
            return _one_hot_log_probs(logits.float())
        return torch.log_softmax(self.masked_logits(logits), dim=-1)

    def law(self, logits_BmV: Logits) -> Law:
        """The laws of m positions a row."""
        ids = torch.zeros(len(logits_BmV), dtype=torch.int64, device=logits_BmV.device)
        none = ids.new_full(logits_BmV.shape[:2], -1)
        return self.verify(logits_BmV, none, 0, ids, none, Purpose.DRAFT)[0]

    def verify(
        self, logits_BmV: Logits, drafts_Bm: Tensor, seed: int, sample_ids_B: Tensor, positions_Bm: Tensor, purpose: Purpose,
        stream: int = 0,
    ) -> tuple[Law, Tensor, Tensor]:  # fmt: skip
        """One look at the logits: the law, a keyed draw from it ``codes_Bm`` (as ``arsp.decode.ar.draw_codes``), and the log-probability
        ``(B, m)`` of ``drafts_Bm``. A law without a possible code, or with a NaN, gives the code -1: nobody waits to be told."""
        shape = logits_BmV.shape[:2]
        if self.top_h > 0:  # the kernel has no entropy-bounded cut: filter first, then nothing is left to cut
            logits_BmV, rule = self.masked_logits(logits_BmV), (1.0, 0, 1.0)
        else:
            rule = (self.temperature, int(self.top_k), self.top_p)
        apart = isinstance(logits_BmV, Guided)
        drawn, log_p, *law = kernels.verify(
            (logits_BmV.cond_BmV if apart else logits_BmV).flatten(0, 1), drafts_Bm.flatten(), *rule,
            seed, sample_ids_B[:, None].expand(shape).flatten(), positions_Bm.flatten(), int(purpose), stream,
            *(logits_BmV.arguments() if apart else ()),
        )  # fmt: skip
        scale = 1.0 if rule[0] == 0 else max(rule[0], MIN_TEMPERATURE)
        return Law(logits_BmV, *(x.view(shape) for x in law), scale), drawn.view(shape), log_p.view(shape)

    def masked_logits(self, logits: Logits) -> Tensor:
        """Float32 logits ``(..., V)`` after the official division by ``max(temperature, 1e-5)``, removed codes at -inf."""
        logits = logits.float() / max(self.temperature, MIN_TEMPERATURE)
        if 0 < self.top_k < logits.shape[-1]:
            logits = keep_top_k(logits, int(self.top_k))
        if self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        if self.top_h > 0:
            logits = keep_top_h(logits, self.top_h)
        return logits


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set everything strictly below the k-th largest logit to -inf; ties with it stay."""
    if logits.device.type == "cpu":  # numpy's partial sort is far faster than topk for the k of thousands in use here
        place = logits.shape[-1] - k
        threshold = torch.from_numpy(np.partition(logits.detach().numpy(), place, axis=-1)[..., place : place + 1])
    else:
        threshold = torch.topk(logits, k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, mass: float) -> Tensor:
    """Keep the best code and every code whose better codes together hold at most ``mass``."""
    ordered = _sort_descending(logits)
    before = torch.softmax(ordered.double(), dim=-1).cumsum(dim=-1)[..., :-1]
    return _keep_best(logits, ordered, 1 + (before <= mass).sum(dim=-1, keepdim=True))


def keep_top_h(logits: Tensor, alpha: float) -> Tensor:
    """Keep the longest descending prefix whose renormalised entropy is at most ``alpha`` times the entropy of all.

    With S_k the mass of the first k codes, the entropy of the renormalised prefix is ``log S_k - (1/S_k) sum p log p``. It
    never falls with k (a code no likelier than the others adds uncertainty), so the prefix is well defined. Float64.
    """
    ordered = _sort_descending(logits)
    log_p = torch.log_softmax(ordered.double(), dim=-1)
    p = log_p.exp()
    mass = p.cumsum(dim=-1)
    entropy = mass.log() - torch.where(p > 0, p * log_p, 0.0).cumsum(dim=-1) / mass
    within = entropy[..., 1:] <= alpha * entropy[..., -1:]
    return _keep_best(logits, ordered, 1 + within.sum(dim=-1, keepdim=True))


def _sort_descending(logits: Tensor) -> Tensor:
    if logits.device.type == "cpu":  # numpy sorts float32 with vector instructions
        return torch.from_numpy(np.sort(logits.detach().numpy(), axis=-1)).flip(-1)
    return torch.sort(logits, dim=-1, descending=True).values


def _keep_best(logits: Tensor, ordered: Tensor, count: Tensor) -> Tensor:
    """Keep the ``count`` (..., 1) best codes of each row, smaller ids first among equal logits."""
    threshold = ordered.gather(-1, count - 1)
    kept = logits >= threshold
    if (kept.sum(dim=-1, keepdim=True) > count).any():  # equal logits on both sides of the cut
        above, equal = logits > threshold, logits == threshold
        kept = above | (equal & (equal.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True)))
    return logits.masked_fill(~kept, -torch.inf)


def _one_hot_log_probs(logits: Tensor) -> Tensor:
    best = logits.argmax(dim=-1, keepdim=True)  # the first of equal maxima
    return torch.full(logits.shape, -torch.inf, device=logits.device).scatter_(-1, best, 0.0)


def check_possible(drawn: Tensor) -> None:
    if not drawn.all():
        raise impossible()


def impossible() -> NumericalError:
    return NumericalError(
        "sampling: a row of log-probabilities has no finite maximum (NaN logits, or every code removed).",
        hint="check the model's weights and dtype; float16 activations may overflow",
    )


def _check(name: str, value: float, valid: bool, expected: str) -> None:
    if not valid:
        raise ConfigError(f"{name}: {value!r} is not {expected}.", hint=f"for example --{name.replace('_', '-')} {_EXAMPLES[name]}")


_EXAMPLES = {"temperature": "1.0", "top_k": "2000", "top_p": "0.95", "top_h": "0.4"}
