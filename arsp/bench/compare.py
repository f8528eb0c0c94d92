"""Latency, throughput and memory of stacks, alone or interleaved: what ``arsp bench`` does once everything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from arsp.bench import cost, official
from arsp.bench.timing import Timing, Work
from arsp.errors import ConfigError
from arsp.models.llamagen import GPT
from arsp.runs import check_stop
from arsp.stack import Stack, labels_for

EAGER = "eager official-way loop"


@dataclass
class Contender:
    """One thing to time. ``work`` makes ``num`` images (or their codes), ``batch_size`` at a time; ``cost`` is known beforehand."""

    name: str
    work: Work
    num: int
    batch_size: int
    stack: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    stats: Callable[[], dict[str, float]] = dict

    def measured(self, timing: Timing) -> dict[str, Any]:
        """The ``cost`` block of a record. ``latency_ms`` is of one batch."""
        batches = -(-self.num // self.batch_size)
        latency = {key: value / batches for key, value in timing.latency_ms().items()}
        known = {key: self.stats().get(key) for key in ("passes", "tokens_per_pass")}
        rate = self.num / (timing.median_ms / 1e3)
        return {
            "simulated": False,
            **self.cost,
            **known,
            "latency_ms": latency,
            "images_per_s": rate,
            "peak_mem_bytes": timing.peak_mem_bytes,
        }


def stack_contender(name: str, stack: Stack, *, num: int, batch_size: int, seed: int, decode: bool) -> Contender:
    """Times ``stack``: its codes, and their images where ``decode`` is set."""
    labels = labels_for(stack, num, seed, None)
    stats: dict[str, float] = {}

    @torch.inference_mode()
    def work() -> None:
        for ids in torch.arange(num).split(batch_size):
            generation = stack.generator.generate(stack.request(ids, seed, None if labels is None else labels[ids]))
            stats.update(generation.stats)
            if decode:
                stack.decode(generation)
            check_stop()

    return Contender(name, work, num, batch_size, stack.describe(), known_cost(stack, min(num, batch_size)), lambda: stats)


def known_cost(stack: Stack, batch_size: int) -> dict[str, Any]:
    """Weight bytes; for a plain AR teacher also the cache bytes of its last pass (exactly the valid slots) and the MACs of an image."""
    block: dict[str, Any] = {"weight_bytes": stack.model.weight_bytes()}
    module = stack.model.module
    plain = isinstance(module, GPT) and stack.config.baseline is None and stack.config.sampler == "ar"
    if plain:
        config, halves, dtype = module.config, 2 if stack.guidance.active else 1, module.output.weight.dtype
        slots = config.cls_token_num + config.block_size - 1
        block["kv_bytes"] = cost.kv_bytes(config, slots, halves * batch_size, dtype)
        if halves == 1 or stack.guidance.interval <= -1:
            block["macs"] = cost.decode_macs(config, rows=halves)
            block["moved_bytes_per_batch"] = cost.decode_bytes(config, rows=halves * batch_size, dtype=dtype)
    return block


def eager_contender(stack: Stack, *, num: int, batch_size: int, seed: int) -> Contender:
    """The same weights, guidance scale and temperature, sampled the way the official code does it. ConfigError where it does not apply."""
    module = stack.model.module
    if not isinstance(module, GPT) or module.config.model_type != "c2i":
        raise ConfigError(f"--baseline eager: {stack.name} is not a class-conditional GPT.", "Use it with llamagen or llamagen-b-256.")
    if not stack.guidance.active or stack.guidance.interval > -1 or not is_plain(stack):
        raise ConfigError(
            "--baseline eager: the official loop here is guided at every step, without top-k, top-p or top-h.", "Use cfg=2,top_p=1."
        )
    labels = labels_for(stack, num, seed, None).to(stack.device)
    generator = torch.Generator(stack.device).manual_seed(seed)

    def work() -> None:
        for part in labels.split(batch_size):
            official.sample_official(
                module, part, cfg_scale=stack.guidance.scale, temperature=stack.pipeline.temperature, generator=generator
            )
            check_stop()

    known = {"weight_bytes": stack.model.weight_bytes(), "kv_bytes": official.cache_bytes(module, min(num, batch_size))}
    described = {**stack.describe(), "name": EAGER, "sampler": "official-eager", "rng": "torch"}
    return Contender(EAGER, work, num, batch_size, described, known, lambda: {"passes": module.config.block_size, "tokens_per_pass": 1.0})


def is_plain(stack: Stack) -> bool:
    """An AR teacher whose rule is temperature alone."""
    rule = stack.pipeline
    return stack.config.baseline is None and stack.config.sampler == "ar" and (rule.top_k, rule.top_p, rule.top_h) == (0, 1.0, 0.0)
