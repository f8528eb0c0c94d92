"""Latency, throughput and memory of stacks, alone or interleaved: what ``arsp bench`` does once everything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from arsp.bench import cost, cost_var, official, official_var
from arsp.bench.parts import OFFICIAL, Entry, ours
from arsp.bench.timing import Timing, Work
from arsp.decode.schedule import plain_steps
from arsp.errors import ConfigError
from arsp.models.llamagen import GPT
from arsp.models.var import VAR
from arsp.runs import check_stop
from arsp.stack import Stack, labels_for, transform_of
from arsp.zoo.load import module_bytes

EAGER = "eager official-way loop"


@dataclass
class Contender:
    """One thing to time. ``work`` makes ``num`` images (or their codes), ``batch_size`` at a time; ``cost`` is known beforehand;
    ``parts``: the callables by which its time can be split, nothing where that is not known."""

    name: str
    work: Work
    num: int
    batch_size: int
    stack: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    stats: Callable[[], dict[str, Any]] = dict
    parts: Sequence[Entry] = ()

    def measured(self, timing: Timing) -> dict[str, Any]:
        """The ``cost`` block of a record. ``latency_ms`` is of one batch."""
        batches = -(-self.num // self.batch_size)
        latency = {key: value / batches for key, value in timing.latency_ms().items()}
        stats = self.stats()
        known = {key: stats.get(key) for key in ("passes", "tokens_per_pass")}
        rate = self.num / (timing.median_ms / 1e3)
        return {
            "simulated": bool(stats.get("simulated")),
            **{key: stats[key] for key in ("attention",) if key in stats},
            "kv_bytes": stats.get("kv_bytes"),
            **self.cost,
            **self.tail(stats),
            **known,
            "latency_ms": latency,
            "images_per_s": rate,
            "peak_mem_bytes": timing.peak_mem_bytes,
        }

    def tail(self, stats: dict[str, Any]) -> dict[str, Any]:
        """What the scales behind the last hand-over hold: weights of their model and its cache at its largest."""
        weights, cache = self.cost.get("last_weight_bytes"), stats.get("last_kv_bytes")
        return {} if weights is None else {"last_kv_bytes": cache, "last_bytes": weights + cache}


def stack_contender(name: str, stack: Stack, *, num: int, batch_size: int, seed: int, decode: bool) -> Contender:
    """Times ``stack``: its codes, and their images where ``decode`` is set."""
    labels = labels_for(stack, num, seed, None)
    stats: dict[str, Any] = {"simulated": stack.simulated}

    @torch.inference_mode()
    def work() -> None:
        for ids in torch.arange(num).split(batch_size):
            generation = stack.generator.generate(stack.request(ids, seed, None if labels is None else labels[ids]))
            stats.update(generation.stats)
            if reports := stack.attention_reports():
                stats["attention"] = reports
            if decode:
                stack.decode(generation)
            check_stop()

    known = known_cost(stack, min(num, batch_size), decode)
    parts = ours([step.policy for step in stack.steps]) if isinstance(stack.model.module, VAR) and stack.config.baseline is None else ()
    described = {**stack.describe(), "dtype": str(stack.model.dtype).removeprefix("torch.")}
    return Contender(name, work, num, batch_size, described, known, lambda: stats, parts)


def known_cost(stack: Stack, batch_size: int, decode: bool) -> dict[str, Any]:
    """Weight bytes, those of the last model of a schedule on their own; for an AR teacher also the MACs of an image (of a VAR by part,
    its tokenizer's decoder with ``decode``), and of a GPT the cache bytes of its last pass (exactly the valid slots)."""
    block: dict[str, Any] = {"weight_bytes": sum(module_bytes(module) for module in stack.modules())}
    module = stack.model.module
    if len({step.owner for step in stack.steps}) > 1:
        block["last_weight_bytes"] = module_bytes(stack.steps[-1].model)
    if stack.config.baseline is not None or stack.config.sampler != "ar":
        return block
    if isinstance(module, GPT):
        config, halves, dtype = module.config, 2 if stack.guidance.active else 1, module.dtype
        slots = config.cls_token_num + config.block_size - 1
        block["kv_bytes"] = cost.kv_bytes(config, slots, halves * batch_size, dtype)
        if halves == 1 or stack.guidance.interval <= -1:
            block["macs"] = cost.decode_macs(config, rows=halves)
            if "quantization" not in stack.model.source.card and transform_of(stack.config) is None:
                block["moved_bytes_per_batch"] = cost.decode_bytes(config, rows=halves * batch_size, dtype=dtype)
    elif isinstance(module, VAR):
        steps = stack.steps or plain_steps(module)
        block |= _var_macs(stack, decode, cost_var.count_steps(steps, guidance=stack.guidance.active))
    return block


def _var_macs(stack: Stack, decode: bool, parts: list[cost_var.Part]) -> dict[str, Any]:
    parts = parts + (cost_var.tokenizer_parts(stack.model.tokenizer.config) if decode else [])
    return {"macs": cost_var.total_macs(parts), "macs_by_part": cost_var.describe(parts)}


def eager_contender(stack: Stack, *, num: int, batch_size: int, seed: int, decode: bool = False) -> Contender:
    """The same weights and sampling rule, run the way the official code does it; images too where ``decode`` is set (VAR only, in
    float32 whatever the stack's precision). ConfigError where it does not apply."""
    module = stack.model.module
    if "quantization" in stack.model.source.card:
        raise ConfigError(
            f"--baseline eager: {stack.name} is quantised, the official loop takes floating-point weights.", "Use its base model."
        )
    if isinstance(module, VAR):
        return _eager_var(stack, num=num, batch_size=batch_size, seed=seed, decode=decode)
    if not isinstance(module, GPT) or module.config.model_type != "c2i":
        raise ConfigError(f"--baseline eager: {stack.name} is neither a class-conditional GPT nor a VAR.", "Use it with llamagen or var.")
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


def _eager_var(stack: Stack, *, num: int, batch_size: int, seed: int, decode: bool) -> Contender:
    rule = stack.pipeline
    if stack.config.baseline or stack.config.sampler != "ar" or stack.config.more_smooth or rule.temperature != 1 or rule.top_h:
        raise ConfigError(
            "--baseline eager: the official loop here draws by top-k and top-p at temperature 1.", "Use --baseline eager with var,cfg=1.5."
        )
    model, tokenizer = official_var.eager_copy(stack.model.module, stack.model.tokenizer)
    labels = labels_for(stack, num, seed, None).to(stack.device)
    generator = torch.Generator(stack.device).manual_seed(seed)
    top_p = 0.0 if rule.top_p == 1 else rule.top_p

    def work() -> None:
        for part in labels.split(batch_size):
            _, f_hat = official_var.sample_official(
                model, tokenizer.quantize, part, cfg=stack.guidance.scale, top_k=rule.top_k, top_p=top_p, generator=generator
            )
            if decode:
                official_var.to_pixels(tokenizer, f_hat)
            check_stop()

    known = {
        "weight_bytes": module_bytes(model),
        "kv_bytes": official_var.cache_bytes(model, min(num, batch_size)),
        **_var_macs(stack, decode, cost_var.count_parts(model.config, guidance=True, adaln_per_scale=True)),
    }
    described = {key: value for key, value in stack.describe().items() if key not in ("schedule", "parts", "decoder")}
    described |= {"name": EAGER, "sampler": "official-eager", "rng": "torch", "dtype": "float32"}
    passes = model.config.num_scales
    stats = {"passes": passes, "tokens_per_pass": model.config.num_tokens / passes}
    return Contender(EAGER, work, num, batch_size, described, known, lambda: stats, OFFICIAL)


def is_plain(stack: Stack) -> bool:
    """An AR teacher whose rule is temperature alone."""
    rule = stack.pipeline
    return stack.config.baseline is None and stack.config.sampler == "ar" and (rule.top_k, rule.top_p, rule.top_h) == (0, 1.0, 0.0)
