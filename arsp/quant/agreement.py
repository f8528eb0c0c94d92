"""How far a quantised model is from the one it was made from, on the same samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arsp.quant.calibrate import Samples

MOST_BYTES = 1 << 30  # of reference logits that are kept


@dataclass(frozen=True)
class Agreement:
    """Means over ``positions`` of teacher-forced samples (of a student: of one pass)."""

    top1: float  # share of positions with the same most likely code
    kl: float  # nats, KL(model || quantised), guided law without filters
    sqnr_db: float  # of the logits
    kl_by_step: float  # the same divergence, every step of the layout counting the same (scales of a next-scale model)
    positions: int


class Judge:
    """Holds the logits of the unquantised model; of few samples only where there are many codes (1 GB at most)."""

    @torch.inference_mode()
    def __init__(self, samples: Samples):
        self.samples, self.logits = samples, []
        for logits_BLV in samples.logits(samples.model.module):
            self.logits.append(logits_BLV.clone())
            if sum(kept.numel() * kept.element_size() for kept in self.logits) > MOST_BYTES:
                break
        steps = torch.zeros(samples.model.source.layout.num_tokens, dtype=torch.float64)
        for block in samples.model.source.layout.blocks:
            steps[list(block)] = 1 / len(block)
        self.weights_L = steps / steps.sum()

    @torch.inference_mode()
    def __call__(self, module: nn.Module) -> Agreement:
        same = rows = 0
        signal = noise = 0.0
        kl_L = torch.zeros_like(self.weights_L)
        for given_BLV, found_BLV in zip(self.logits, self.samples.logits(module), strict=False):
            same += int((given_BLV.argmax(-1) == found_BLV.argmax(-1)).sum())
            rows += len(given_BLV)
            signal += float(given_BLV.square().sum(dtype=torch.float64))
            noise += float((given_BLV - found_BLV).square().sum(dtype=torch.float64))
            kl_L += divergence(given_BLV, found_BLV).sum(0).cpu()
        positions = rows * len(kl_L)
        sqnr_db = 10 * math.log10(signal / noise) if noise > 0 else math.inf
        return Agreement(same / positions, float(kl_L.mean()) / rows, sqnr_db, float(kl_L @ self.weights_L) / rows, positions)


def divergence(given_BLV: Tensor, found_BLV: Tensor) -> Tensor:
    """KL(softmax(given) || softmax(found)) of every position, nats, float64 ``(B, L)``."""
    log_p, log_q = given_BLV.double().log_softmax(-1), found_BLV.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
