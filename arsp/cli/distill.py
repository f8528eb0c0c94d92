"""``arsp distill``: a few-step student from an autoregressive teacher, without any data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from arsp.cli.options import CommandContext, command

if TYPE_CHECKING:
    from arsp.distill.pipeline import Distilled
    from arsp.runs import Run


@command(
    examples=[
        "arsp distill --teacher llamagen",
        "arsp distill --teacher llamagen --student-steps 1 --steps 20000 --trajectories 200000",
        "arsp distill --teacher llamagen -c examples/distill-dd1.yaml --out runs/my-student",
        "arsp distill --teacher llamagen optim.lr=5e-4 trajectories.top_p=0.9",
    ],
    shared=("device", "threads", "kernels", "config", "out", "resume", "fail_if", "print_config"),
)
def distill(
    ctx: CommandContext,
    teacher: Annotated[
        Optional[str], typer.Option("--teacher", "--model", help="Zoo name, bundle, or official file [default: llamagen, embedded]")
    ] = None,
    tokenizer: Annotated[Optional[str], typer.Option(help="Tokenizer file of an official GPT file")] = None,
    method: Annotated[Optional[str], typer.Option(help="dd1 (arXiv 2412.17153)")] = None,
    student_steps: Annotated[Optional[int], typer.Option(help="1: one pass; 2: one student for one and two passes [default: 2]")] = None,
    steps: Annotated[Optional[int], typer.Option(help="Optimiser updates [default: about eight minutes on two CPU cores]")] = None,
    trajectories: Annotated[Optional[int], typer.Option(help="Trajectories to sample from the teacher [default: 24000]")] = None,
    lr: Annotated[Optional[float], typer.Option(help="Peak learning rate")] = None,
    batch_size: Annotated[Optional[int], typer.Option(help="Trajectories an update")] = None,
    seed: Annotated[Optional[int], typer.Option(help="Of initialisation and batches")] = None,
) -> None:
    """Distil a teacher into a student that needs one or two passes. The same command continues a stopped run."""
    from arsp.config import resolve_config
    from arsp.distill import pipeline as dd
    from arsp.registry import Registry
    from arsp.stack import sampling_rule
    from arsp.zoo.load import resolve

    named = {
        "teacher": teacher,
        "tokenizer": tokenizer,
        "method": method,
        "student_steps": student_steps,
        "optim.steps": steps,
        "trajectories.num": trajectories,
        "optim.lr": lr,
        "optim.batch_size": batch_size,
        "optim.seed": seed,
    }
    asked = resolve_config(dd.DistillConfig, files=ctx.opts.config, named=named, overrides=ctx.opts.overrides)
    source = resolve(asked.teacher, tokenizer=asked.tokenizer)
    config = ctx.resolve(dd.DistillConfig, named, card=source.card.get("distill"))
    run_method = Registry("methods").get(config.method)
    config = dd.check(config, source)
    rule = {**source.card.get("sampling", {}), **source.card.get("distillation", {})}
    guidance, pipeline = sampling_rule(source, config.trajectories, rule)
    ctx.plan(config)
    ctx.emit(run_distillation(ctx, config, source, guidance, pipeline, run_method))


def run_distillation(ctx: CommandContext, config: Any, source: Any, guidance: Any, pipeline: Any, run_method: Any) -> dict[str, Any]:
    """Open the run, distil, complete the record."""
    from arsp import runs
    from arsp.zoo.load import load_model

    device = ctx.setup_torch()
    with (
        runs.Run.open("distill", f"{config.teacher}-{config.method}", config.model_dump(), ctx.opts.out, resume=ctx.opts.resume) as run,
        runs.stop_signals(),
    ):
        if not run.finished:
            teacher = load_model(source, device)
            if source.origin == "embedded":
                ctx.log(f"{source.name}: embedded tiny model ({source.card['about']})")
            ctx.log(f"{config.optim.steps} updates on {config.trajectories.num} trajectories; more of both: --steps N --trajectories M")
            result = run_method(config, teacher, guidance, pipeline, run.path, device=device, stage=ctx.progress, log=ctx.log)
            complete(run, config, source, result)
        return run.record


def complete(run: Run, config: Any, source: Any, result: Distilled) -> None:
    """Figures, curves, artifacts and parents of a finished distillation."""
    record = run.record
    record["stack"] = {
        "name": f"{source.name}-{config.method} (fresh)",
        "model": str(result.bundle),
        "kind": "student",
        "dataset": source.card.get("dataset"),
    }
    record["parents"] = [f"{source.name}@{source.origin}"]
    for name, value in result.figures.items():
        if name.startswith("heldout"):
            run.add_metric(name, value, n=config.trajectories.held_out, protocol="held-out trajectories", comparable=False)
        elif name in ("fid", "class_accuracy"):
            run.add_metric(name, value, n=config.probe_images, protocol="training curve probe, 1 step", comparable=False)
    record["curves"] = result.curves
    run.add_artifact(result.bundle, "bundle", minutes=round(result.state["elapsed_s"] / 60, 2), steps=result.state["step"])
