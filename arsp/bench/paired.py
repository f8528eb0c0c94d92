"""A mode of the verify family beside plain sampling of the same model: the same sample ids, labels and batches, in turn in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from arsp.bench.timing import Ratio, Timing, measure, speedup
from arsp.decode.jacobi import Statistics
from arsp.decode.modes import VerifyConfig
from arsp.protocols import Generation, Request
from arsp.runs import check_stop
from arsp.stack import SAMPLERS, Stack, mode_label

MIN_BATCHES = 3  # an interval over fewer says nothing


@dataclass(frozen=True)
class Paired:
    """Codes ``(N, L)`` of both stacks for the same ids, and seconds an image, one round a batch."""

    codes_NL: Tensor
    plain_codes_NL: Tensor
    timing: Timing
    plain_timing: Timing
    draft_passes: float | None  # of the draft model a batch, None where there is none

    @property
    def differing(self) -> list[int]:
        """Ids of the images that have other codes than plain sampling gives them."""
        return (self.codes_NL != self.plain_codes_NL).any(1).nonzero().squeeze(1).tolist()

    @property
    def speedup(self) -> Ratio:
        """How many times faster than plain sampling: median over batches of the ratio within a batch."""
        return speedup(self.timing, self.plain_timing)

    @property
    def batches(self) -> int:
        return len(self.timing.seconds)


def plain_stack(stack: Stack) -> Stack:
    """The same loaded model under the same guidance and filters, drawn code by code."""
    config = stack.config.model_copy(update={"sampler": "ar", "verify": VerifyConfig()})
    generator = SAMPLERS.get("ar")(stack.generator.decoder, stack.pipeline, "keyed")
    name = stack.name.replace(mode_label(stack.config, stack.model.source), "", 1)
    return replace(stack, config=config, name=name, generator=generator, stats={}, batch_seconds=[])


def draft_of(stack: Stack) -> Any:
    """What drafts with a model of its own (it has a ``decoder`` and counts its passes), None where nothing does."""
    method = getattr(stack.generator, "method", None)
    if hasattr(method, "draft_passes"):
        return method
    drafter = getattr(method, "drafter", None)
    return drafter if hasattr(drafter, "passes") else None


def draft_passes(stack: Stack) -> int | None:
    draft = draft_of(stack)
    return None if draft is None else draft.draft_passes if hasattr(draft, "draft_passes") else draft.passes


def measure_pair(
    stack: Stack, plain: Stack, labels: Tensor, *, num: int, batch_size: int, seed: int, progress: Callable[[int], None]
) -> Paired:
    """Codes of images ``0 .. num`` by both stacks, which take turns at going first; counters and times are left in the stacks.

    ``labels``: of ``num`` images and of the warm-up behind them, one batch of other images, so that what a window planner learned from it
    is independent of those that follow.
    """
    stacks = {"plain": plain, "mode": stack}
    made: dict[str, Generation] = {}
    codes: dict[str, list[Tensor]] = {"plain": [], "mode": []}
    seconds: dict[str, list[float]] = {"plain": [], "mode": []}

    def work(name: str, request: Request) -> Callable[[], None]:
        return lambda: made.update({name: stacks[name].generator.generate(request)})

    for name in stacks:
        work(name, stack.request(torch.arange(num, len(labels)), seed, labels[num:]))()
    stack.generator.statistics = Statistics()
    drafted = draft_passes(stack)
    for turn, ids in enumerate(torch.arange(num).split(batch_size)):
        request = stack.request(ids, seed, labels[ids])
        order = ("plain", "mode") if turn % 2 == 0 else ("mode", "plain")
        took = measure({name: work(name, request) for name in order}, repeats=1, warmup=0, device=stack.device, memory=False)
        for name, each in stacks.items():
            (elapsed,) = took[name].seconds
            seconds[name].append(elapsed / len(ids))
            codes[name].append(made[name].codes_BL.cpu())
            each.batch_seconds.append((len(ids), elapsed))
            kv_bytes = [stats["kv_bytes"] for stats in (each.stats, made[name].stats) if "kv_bytes" in stats]
            each.stats = made[name].stats | ({"kv_bytes": max(kv_bytes)} if kv_bytes else {})
        progress(len(ids))
        check_stop()
    batches = len(seconds["plain"])
    return Paired(
        torch.cat(codes["mode"]),
        torch.cat(codes["plain"]),
        Timing(stack.name, tuple(seconds["mode"])),
        Timing(plain.name, tuple(seconds["plain"])),
        None if drafted is None else (draft_passes(stack) - drafted) / batches,
    )


def cost_of(stack: Stack, timing: Timing) -> dict[str, Any]:
    """The ``cost`` block of a record, codes only: medians over batches for time, means over images for passes."""
    cost = stack.cost() | {"latency_ms": timing.latency_ms(), "images_per_s": 1e3 / timing.median_ms}
    if "verify" in cost:
        cost |= {"passes": cost["verify"]["passes_per_image"], "tokens_per_pass": cost["verify"]["tokens_per_pass"]}
    if (draft := draft_of(stack)) is not None:
        parameters = draft.decoder.model.parameters()
        cost["draft_weight_bytes"] = sum(p.numel() * p.element_size() for p in parameters)
    return cost
