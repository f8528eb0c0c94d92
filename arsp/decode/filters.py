"""From guided logits to the law that is sampled: temperature, top-k, top-p, top-h, in this order, in one object.

Every sampler, drafter and trajectory uses the same :class:`LogitsPipeline`, so that "the target distribution" has one meaning:
the distribution *after* the pipeline. Rules of top-k (ties kept) and top-p (the crossing entry stays) follow the LlamaGen
release (arXiv 2406.06525); top-h is the entropy-bounded truncation of arXiv 2509.02510.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from arsp.errors import ConfigError

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

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits ``(..., V)`` of any float type -> float32 log-probabilities, removed codes at -inf."""
        if self.temperature == 0:
            return _one_hot_log_probs(logits)
        return torch.log_softmax(self.masked_logits(logits), dim=-1)

    def masked_logits(self, logits: Tensor) -> Tensor:
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
    threshold = torch.topk(logits, k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, mass: float) -> Tensor:
    """Keep the best code and every code whose better codes together hold at most ``mass``."""
    ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    before = torch.softmax(ordered, dim=-1).cumsum(dim=-1).roll(1, dims=-1)
    removed = before > mass
    removed[..., 0] = False
    return logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)


def keep_top_h(logits: Tensor, alpha: float) -> Tensor:
    """Keep the longest descending prefix whose renormalised entropy is at most ``alpha`` times the entropy of all.

    With S_k the mass of the first k codes, the entropy of the renormalised prefix is ``log S_k - (1/S_k) sum p log p``. It
    never falls with k (a code no likelier than the others adds uncertainty), so the prefix is well defined. Float64.
    """
    ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    log_p = torch.log_softmax(ordered.double(), dim=-1)
    p = log_p.exp()
    mass = p.cumsum(dim=-1)
    entropy = mass.log() - torch.where(p > 0, p * log_p, 0.0).cumsum(dim=-1) / mass
    removed = entropy > alpha * entropy[..., -1:]
    removed[..., 0] = False
    return logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)


def _one_hot_log_probs(logits: Tensor) -> Tensor:
    best = logits.float().argmax(dim=-1, keepdim=True)  # the first of equal maxima
    return torch.full(logits.shape, -torch.inf, device=logits.device).scatter_(-1, best, 0.0)


def _check(name: str, value: float, valid: bool, expected: str) -> None:
    if not valid:
        raise ConfigError(f"{name}: {value!r} is not {expected}.", hint=f"for example --{name.replace('_', '-')} {_EXAMPLES[name]}")


_EXAMPLES = {"temperature": "1.0", "top_k": "2000", "top_p": "0.95", "top_h": "0.4"}
