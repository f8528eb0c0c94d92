"""``arsp train``: the feature network, a tokenizer, or a teacher, from the embedded set or a folder of images, into a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from arsp.cli.options import CommandContext, command
from arsp.errors import ConfigError

if TYPE_CHECKING:
    from arsp.runs import Run

WHAT = ("tokenizer", "teacher", "features")


@command(
    examples=[
        "arsp train tokenizer -c examples/train-tokenizer.yaml",
        "arsp train teacher -c examples/train-teacher.yaml --tokenizer runs/train-tokenizer-1a2b3c4d",
        "arsp train teacher --data PHOTOS --tokenizer TOKENIZER --steps 20000 gpt.dim=256",
        "arsp train teacher --family var --init var-small --scales 4-5 --steps 500",
        "arsp train features -c examples/train-features.yaml",
    ],
    shared=("device", "threads", "config", "out", "resume", "fail_if", "print_config"),
)
def train(
    ctx: CommandContext,
    what: Annotated[str, typer.Argument(help="tokenizer, teacher or features")],
    data: Annotated[
        Optional[str], typer.Option(help="shapes32, shapes32-coarse, or a folder with one sub-folder a class [default: shapes32-coarse]")
    ] = None,
    tokenizer: Annotated[
        Optional[str], typer.Option(help="Tokenizer of a teacher: bundle, run directory or embedded name [default: shapes-vq16]")
    ] = None,
    family: Annotated[
        Optional[str], typer.Option(help="llamagen or var; a teacher follows its tokenizer or --init [default: llamagen]")
    ] = None,
    init: Annotated[Optional[str], typer.Option(help="Start from this teacher (var)")] = None,
    scales: Annotated[Optional[str], typer.Option(help="a-b: train these scales only: a drafter or refiner (var)")] = None,
    steps: Annotated[Optional[int], typer.Option(help="Optimiser updates")] = None,
    lr: Annotated[Optional[float], typer.Option(help="Peak learning rate")] = None,
    batch_size: Annotated[Optional[int], typer.Option(help="Images or sequences an update")] = None,
    seed: Annotated[Optional[int], typer.Option(help="Of initialisation and batches")] = None,
) -> None:
    """Train a model into a bundle that every other command takes. The same command continues a stopped run."""
    if what not in WHAT:
        from arsp.errors import nearest

        raise ConfigError(f"unknown thing to train '{what}'.", nearest(what, WHAT))
    named = {
        "data": data, "tokenizer": tokenizer, "init": init, "scales": scales, "optim.steps": steps, "optim.lr": lr,
        "optim.batch_size": batch_size, "optim.seed": seed,
    }  # fmt: skip
    if what == "teacher" and family is None and (tokenizer or init):
        from arsp.zoo.load import resolve_tokenizer

        family = resolve_tokenizer(tokenizer or init).family.name
    schema = schema_of(what, family)
    for key in ("tokenizer", "init", "scales"):
        if named[key] is not None and key not in schema.model_fields:
            raise ConfigError(f"--{key} has no use for a {what} of the family {family or 'llamagen'}.")
    config = ctx.resolve(schema, {k: v for k, v in named.items() if k.split(".")[0] in schema.model_fields})
    ctx.plan(config)
    ctx.emit(run_training(ctx, what, config))


def schema_of(what: str, family: str | None) -> Any:
    """The configuration of one kind of training. ConfigError where the family has no such thing."""
    from arsp.errors import nearest
    from arsp.train.pipeline import SCHEMAS

    families = [known for kind, known in SCHEMAS if kind == what]
    if family is not None and family not in families:
        raise ConfigError(f"--family {family}: there is no {what} of it to train.", nearest(family, families))
    return SCHEMAS[what, family or "llamagen"]


def run_training(ctx: CommandContext, what: str, config: Any) -> dict[str, Any]:
    """Open the run, train, export the bundle, complete the record."""
    from arsp import runs
    from arsp.train import pipeline
    from arsp.train.loop import fit

    device = ctx.setup_torch()
    with runs.Run.open("train", what, config.model_dump(), ctx.opts.out, resume=ctx.opts.resume) as run, runs.stop_signals():
        if not run.finished:
            job = pipeline.prepare(config, ctx.progress, ctx.log)
            with ctx.progress(config.optim.steps, f"train {what}") as advance:
                state = fit(job.task, config.optim, run.path, device=device, progress=advance, log=ctx.log)
            path = run.path / "bundle"
            if not path.exists():
                job.export(path, state)
            complete(run, path, config, state)
        return run.record


def complete(run: Run, path: Any, config: Any, state: dict[str, Any]) -> None:
    """Final figures as metrics, the history as curves, the bundle as artifact."""
    history = state["history"]
    for name, value in (history[-1] if history else {}).items():
        if name not in ("step", "minutes"):
            run.add_metric(name, value, protocol="end of training", comparable=False)
    keys = sorted({key for point in history for key in point} - {"step", "minutes"})
    run.record["curves"] = {key: [{"x": point["minutes"], "y": point[key]} for point in history if key in point] for key in keys}
    run.add_artifact(path, "bundle", minutes=round(state["elapsed_s"] / 60, 2), steps=state["step"])
