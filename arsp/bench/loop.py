"""What the loop of the verify family costs outside the model: passes in which a given number of drafts stands, whatever the weights say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arsp.bench.timing import synchronize
from arsp.decode.guidance import Logits, step_apart
from arsp.decode.jacobi import Chain, JacobiGenerator
from arsp.protocols import Decoder, Request
from arsp.stack import Stack


@dataclass(frozen=True)
class LoopCost:
    """Medians over passes, in seconds; ``share`` is the median over passes of outside / whole pass, with quartiles."""

    window: int
    passes: int
    tokens_per_pass: float
    pass_s: float
    forward_s: float
    share: float
    share_low: float
    share_high: float
    state_bytes: int  # of an image between two passes, beside codes and cache
    state_bound: int  # (W + 1) V 4


class ForcedChain(Chain):
    """A chain in which ``accepted`` drafts stand, in turn; everything else is computed as always."""

    def __init__(self, chain: Chain, accepted: Sequence[int]):
        super().__init__(chain.pipeline, chain.drafter, chain.rule, chain.redraw, chain.prior)
        self.accepted, self.turn = accepted, 0

    def _stood(self, m: int, ahead_B: Tensor, *drafts: Tensor | None) -> Tensor:
        super()._stood(m, ahead_B, *drafts)
        self.turn += 1
        return (ahead_B + self.accepted[self.turn % len(self.accepted)]).clamp_max(m)


class ClockedDecoder:
    """A decoder whose passes are timed, the device synchronised around each."""

    def __init__(self, decoder: Decoder, device: torch.device):
        self.decoder, self.device, self.seconds = decoder, device, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def step(self, *args: Any) -> Tensor:
        return self.step_apart(*args).float()

    def step_apart(self, *args: Any) -> Logits:
        synchronize(self.device)
        started = time.perf_counter()
        logits = step_apart(self.decoder, *args)
        synchronize(self.device)
        self.seconds += time.perf_counter() - started
        return logits


class _Enough(Exception):
    pass


def measure_loop(stack: Stack, request: Request, accepted: Sequence[int], passes: int, warmup: int = 3) -> LoopCost:
    """Time ``passes`` passes of a mode whose drafts are a chain of its own; ``accepted``: drafts that stand, pass after pass, in turn.

    Each image's first pass, which fills the cache with the condition, is left out.
    """
    generator = stack.generator
    clocked = ClockedDecoder(generator.decoder, stack.device)
    forced = JacobiGenerator(clocked, ForcedChain(generator.method, accepted), generator.window)
    whole: list[float] = []
    inside: list[float] = []
    last = [0.0, 0.0, True]

    def tick(_: int) -> None:
        synchronize(stack.device)
        now = time.perf_counter()
        if not last[2]:
            whole.append(now - last[0])
            inside.append(clocked.seconds - last[1])
        last[:] = now, clocked.seconds, False
        if len(whole) >= passes + warmup:
            raise _Enough

    while len(whole) < passes + warmup:
        last[2] = True
        try:
            forced.generate(request, tick)
        except _Enough:
            break
    total, forward = np.array(whole[warmup:]), np.array(inside[warmup:])
    share = (total - forward) / total
    report = forced.statistics.report(clocked.layout.grid)
    low, middle, high = (float(x) for x in np.percentile(share, [25, 50, 75]))
    return LoopCost(
        generator.window, len(total), report["tokens_per_pass"], float(np.median(total)), float(np.median(forward)), middle, low, high,
        report["state_bytes_per_image"], (generator.window + 1) * clocked.vocab_size * 4,
    )  # fmt: skip
