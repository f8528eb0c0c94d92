"""``arsp bench loop``: what the loop of the verify family costs outside the model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer
from pydantic import Field

from arsp.cli.options import CommandContext, command, make_table
from arsp.config import StrictModel
from arsp.errors import ConfigError


class LoopConfig(StrictModel):
    """What is timed."""

    model: str = Field("llamagen", description="zoo name, bundle, or official file of a raster teacher")
    modes: list[str] = Field(["seeded", "sjd", "mc"], min_length=1, description="modes with drafts of their own, without a draft model")
    window: int = Field(16, ge=1)
    accepted: dict[int, int] = Field(
        {0: 8, 1: 4, 2: 2, 4: 1, 8: 1}, min_length=1, description="drafts that stand -> in how many of the passes of a round"
    )
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    cfg: float | None = Field(None, ge=0)
    random_weights: bool = False
    passes: int = Field(40, ge=4, description="timed passes a mode")
    batch_size: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)
    device: str = "auto"
    dtype: str = "float32"
    threads: int | None = Field(None, ge=1)
    kernels: str = "auto"


@command(
    examples=[
        "arsp bench loop",
        "arsp bench loop --model llamagen-b-256 --random-weights --window 16 --threads 2",
        "arsp bench loop --mode seeded --accepted 0:1,3:1 --json --fail-if 'loop_share>0.1'",
    ],
    shared=("device", "dtype", "batch_size", "seed", "threads", "kernels", "config", "out", "fail_if", "print_config"),
    schema=LoopConfig,
)
def loop(
    ctx: CommandContext,
    model: Annotated[Optional[str], typer.Option(help="Zoo name, bundle, or official file (default: llamagen, embedded)")] = None,
    mode: Annotated[Optional[list[str]], typer.Option(help="May be repeated (default: seeded, sjd, mc)")] = None,
    window: Annotated[Optional[int], typer.Option(help="Drafts a pass (default: 16)")] = None,
    accepted: Annotated[
        Optional[str], typer.Option(help="Histogram of drafts that stand, N:TIMES,... (default: 0:8,1:4,2:2,4:1,8:1)")
    ] = None,
    cfg: Annotated[Optional[float], typer.Option(help="Guidance scale (default: the model's)")] = None,
    top_k: Annotated[Optional[int], typer.Option(help="0: off (default: the model's)")] = None,
    top_p: Annotated[Optional[float], typer.Option(help="1: off (default: the model's)")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Need no checkpoint")] = False,
    passes: Annotated[Optional[int], typer.Option(help="Timed passes a mode (default: 40)")] = None,
) -> None:
    """Time passes in which a given number of drafts stands: the share of a pass that is not the model's, and the state kept beside it."""
    named: dict[str, Any] = dict(
        model=model, modes=mode or None, window=window, accepted=parse_histogram(accepted), cfg=cfg, top_k=top_k, top_p=top_p,
        random_weights=random_weights or None, passes=passes,
    )  # fmt: skip
    config = ctx.resolve(LoopConfig, named)
    if max(config.accepted) > config.window:
        if config.accepted != LoopConfig.model_fields["accepted"].default:
            raise ConfigError(f"--accepted: {max(config.accepted)} drafts cannot stand in a window of {config.window}.")
        config = config.model_copy(update={"accepted": {drafts: n for drafts, n in config.accepted.items() if drafts <= config.window}})
    from arsp import stack as stack_module
    from arsp.decode.modes import MODES
    from arsp.runs import Run, stop_signals

    chains = [name for name, mode in MODES.items() if "init" in mode.options and name != "pac"]
    for name in config.modes:
        if name not in chains:
            raise ConfigError(
                f"--mode {name}: the cost of the loop is measured for Jacobi drafts only.", f"Use one of: {', '.join(chains)}."
            )
    recipes = [
        stack_module.StackConfig(
            model=config.model, sampler=mode, verify={"window": config.window}, random_weights=config.random_weights, cfg=config.cfg,
            top_k=config.top_k, top_p=config.top_p,
        )
        for mode in config.modes
    ]  # fmt: skip
    for recipe in recipes:
        stack_module.check(recipe)
    ctx.plan(config)
    device = ctx.setup_torch()
    with Run.open("bench-loop", config.model, config, ctx.opts.out, resume=False) as run, stop_signals():
        run.record["environment"]["device"] = str(device)
        run.record["metrics"] = []
        for recipe in recipes:
            run.record["metrics"].append(measure_mode(recipe, config, device, ctx.log))
        run.record["stack"] = {"name": config.model, "modes": config.modes}
    ctx.emit(run.record, loop_table(run.record["metrics"]))


def parse_histogram(text: str | None) -> dict[int, int] | None:
    """``0:8,2:1`` -> {0: 8, 2: 1}; ConfigError for anything else."""
    if text is None:
        return None
    try:
        found = {int(drafts): int(times) for drafts, times in (part.split(":") for part in text.split(","))}
    except ValueError:
        found = {}
    if not found or min(found) < 0 or min(found.values()) < 1:
        raise ConfigError(f"--accepted {text}: expected N:TIMES,... with N from 0 and TIMES from 1.", "For example --accepted 0:2,1:1,4:1")
    return found


def measure_mode(recipe: Any, config: LoopConfig, device: Any, log: Any) -> dict[str, Any]:
    """One entry of the record's ``metrics``."""
    import torch

    from arsp.bench.loop import measure_loop
    from arsp.stack import build, labels_for

    stack = build(recipe, device, getattr(torch, config.dtype), log)
    ids = torch.arange(config.batch_size)
    request = stack.request(ids, config.seed, labels_for(stack, config.batch_size, config.seed, None))
    rounds = [drafts for drafts, times in sorted(config.accepted.items()) for _ in range(times)]
    order = [rounds[(i * 7) % len(rounds)] for i in range(len(rounds))] if len(rounds) % 7 else rounds  # mixed, the same in every run
    cost = measure_loop(stack, request, order, config.passes)
    return {"name": "loop_share", "mode": recipe.sampler, "value": cost.share, "n": cost.passes, "protocol": "forced-acceptance",
            "comparable": True, "reference_sha256": None, **asdict(cost)}  # fmt: skip


def loop_table(rows: list[dict[str, Any]]) -> Any:
    """One line a mode."""
    columns = ("mode", "W", "tokens a pass", "pass ms", "model ms", "outside the model", "quartiles", "state MB an image", "(W+1) V 4 MB")
    cells = [
        (row["mode"], row["window"], row["tokens_per_pass"], row["pass_s"] * 1e3, row["forward_s"] * 1e3, f"{row['value']:.1%}",
         f"{row['share_low']:.1%} to {row['share_high']:.1%}", row["state_bytes"] / 1e6, row["state_bound"] / 1e6)
        for row in rows
    ]  # fmt: skip
    return make_table(None, columns, cells)
