"""The one training loop: tokenizer, feature network, teacher and student all go through :func:`fit`.

A run is a function of its configuration: every step draws from generators seeded with (seed, step), so a killed run that is
started again continues to the same weights, bit for bit on the CPU with the same number of threads.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from arsp.config import StrictModel
from arsp.errors import NumericalError
from arsp.runs import check_stop
from arsp.train import checkpoint


class OptimConfig(StrictModel):
    """Optimiser and horizon of one training run."""

    steps: int = Field(1000, ge=0, description="optimiser updates")
    batch_size: int = Field(64, ge=1, description="images or sequences per update")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    warmup: int = Field(100, ge=0, description="updates of linear warm-up")
    schedule: Literal["cosine", "flat-linear"] = Field("cosine", description="after warm-up: cosine, or flat to 60 % then linear")
    final_lr: float = Field(0.02, ge=0, le=1, description="last learning rate as a share of the peak")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW moments")
    weight_decay: float = Field(0.05, ge=0, description="on matrices only")
    clip: float = Field(1.0, gt=0, description="gradient norm")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the exported moving average (0 = export the raw weights)")
    autocast: Literal["bf16", "off"] = Field("bf16", description="mixed precision of the forward pass")
    seed: int = Field(0, ge=0, lt=1 << 64, description="of initialisation, batches and dropout")
    eval_every: int = Field(500, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    keep: int = Field(2, ge=1, description="newest checkpoints kept")


class Task(nn.Module):
    """What is trained. Registered sub-modules and buffers are checkpointed; frozen helpers are kept out of registration."""

    trained: nn.Module  # the module that is optimised, averaged and exported
    no_decay: tuple[str, ...] = ()  # parameters with one of these parts in their name are not decayed, whatever their shape

    @property
    def optimised(self) -> nn.Module:
        """What the optimiser updates: ``trained`` and any helper that is not exported."""
        return self.trained

    def loss(self, step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalars of one batch; the entry "loss" is minimised, the others are logged."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Held-out figures of ``module`` (the averaged weights where there are some)."""
        return {}


def fit(
    task: Task,
    config: OptimConfig,
    directory: Path,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda n: None,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train to ``config.steps``, resuming from the newest complete checkpoint under ``directory/checkpoints``.

    Leaves the final weights (averaged if ``ema``) in ``task.trained`` and returns the state: ``step``, ``elapsed_s`` and
    ``history`` (a list of {step, minutes, figure: value}). Raises NumericalError on a non-finite loss or gradient and
    Interrupted after a checkpoint when a stop was asked for.
    """
    task.to(device).train()
    optimizer = torch.optim.AdamW(_groups(task.optimised, config.weight_decay, task.no_decay), lr=config.lr, betas=config.betas)
    average = {k: v.detach().clone() for k, v in task.trained.state_dict().items()} if config.ema else None
    state = {"step": 0, "elapsed_s": 0.0, "history": [], "sums": {}, "summed": 0}  # sums: training losses since the last evaluation
    folder = directory / "checkpoints"
    if checkpoint.restore_latest(folder, task, optimizer, average, state):
        log(f"resumed at step {state['step']} of {config.steps}")
        progress(state["step"])
    clock = time.monotonic()
    while True:
        step = state["step"]
        done = step >= config.steps
        interrupted = _stop_requested()
        if step and (done or step % config.eval_every == 0) and (not state["history"] or state["history"][-1]["step"] != step):
            state["elapsed_s"] += time.monotonic() - clock
            figures = _evaluate(task, average) | {k: v / state["summed"] for k, v in state["sums"].items()}
            state["history"].append(
                {"step": step, "minutes": round(state["elapsed_s"] / 60, 3), **{k: round(float(v), 6) for k, v in figures.items()}}
            )
            log(f"step {step}/{config.steps}  " + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()))
            clock, state["sums"], state["summed"] = time.monotonic(), {}, 0
        if done or interrupted or (step and step % config.checkpoint_every == 0):
            state["elapsed_s"], clock = state["elapsed_s"] + time.monotonic() - clock, time.monotonic()
            checkpoint.save(folder, task, optimizer, average, state, keep=config.keep)
        if done:
            break
        if interrupted:
            check_stop()
        losses = _update(task, optimizer, config, step, device)
        if average is not None:
            _average(average, task.trained, min(config.ema, (step + 1) / (step + 10)))
        for key, value in losses.items():
            state["sums"][key] = state["sums"].get(key, 0.0) + value
        state["summed"] += 1
        state["step"] = step + 1
        progress(1)
    if average is not None:
        task.trained.load_state_dict(average)
    task.eval()
    return state


def learning_rate(config: OptimConfig, step: int) -> float:
    """Learning rate of update ``step`` (0-based)."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    part = (step - config.warmup) / max(1, config.steps - config.warmup)
    if config.schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * min(part, 1.0)))
    else:
        shape = min(1.0, (1 - part) / 0.4)
    return config.lr * (config.final_lr + (1 - config.final_lr) * shape)


def _update(task: Task, optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, device: torch.device | str) -> dict[str, float]:
    mixed = (config.seed * 1_000_003 + step) % (1 << 62)
    generator = torch.Generator().manual_seed(mixed)
    torch.manual_seed(mixed)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    kind = torch.device(device).type
    context = torch.autocast(kind, torch.bfloat16) if config.autocast == "bf16" else contextlib.nullcontext()
    with context:
        losses = task.loss(step, config.batch_size, generator)
    optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    norm = nn.utils.clip_grad_norm_(task.optimised.parameters(), config.clip)
    if not (torch.isfinite(losses["loss"]) and torch.isfinite(norm)):
        raise NumericalError(
            f"step {step}: loss {float(losses['loss'].detach()):.4g}, gradient norm {float(norm):.4g}: diverged before this update.",
            "Lower optim.lr, or set optim.autocast=off; the last checkpoint is kept.",
        )
    optimizer.step()
    return {key: float(value.detach()) for key, value in losses.items()}


@torch.no_grad()
def _average(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            average[key].lerp_(value, 1 - decay)
        else:
            average[key].copy_(value)


@torch.no_grad()
def _evaluate(task: Task, average: dict[str, Tensor] | None) -> dict[str, float]:
    """Figures of the averaged weights, swapped in for the moment."""
    raw = None
    if average is not None:
        raw = {k: v.clone() for k, v in task.trained.state_dict().items()}
        task.trained.load_state_dict(average)
    task.eval()
    try:
        return task.evaluate(task.trained)
    finally:
        task.train()
        if raw is not None:
            task.trained.load_state_dict(raw)


def _groups(module: nn.Module, decay: float, no_decay: tuple[str, ...]) -> list[dict[str, Any]]:
    matrices, rest = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or any(part in name for part in no_decay)
            (rest if plain else matrices).append(parameter)
    return [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


def _stop_requested() -> bool:
    from arsp import runs

    return runs.stop_requested()
