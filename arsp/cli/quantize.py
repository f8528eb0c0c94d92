"""``arsp quantize``: integer weights and activations for a model, calibrated on its own samples."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from arsp.cli.options import CommandContext, command, make_table
from arsp.errors import UsageError

if TYPE_CHECKING:
    from arsp.quant.pipeline import Quantised
    from arsp.runs import Run


@command(
    examples=[
        "arsp quantize --model llamagen --out q",
        "arsp quantize --model var --recipe w8a8",
        "arsp quantize --model llamagen-dd1 --recipe w4a8-gptq weights.group_size=64",
        "arsp quantize --model llamagen --recipe mixdq --budget 0.35x",
    ],
    shared=("device", "threads", "kernels", "config", "out", "resume", "fail_if", "print_config"),
)
def quantize(
    ctx: CommandContext,
    model: Annotated[
        Optional[str], typer.Option("--model", "--teacher", help="Zoo name, bundle, or official file [default: llamagen, embedded]")
    ] = None,
    tokenizer: Annotated[Optional[str], typer.Option(help="Tokenizer file of an official GPT file")] = None,
    recipe: Annotated[
        Optional[str], typer.Option(help="w4a8 (default), w8a8, w4a8-gptq, w4a8-awq, vidit-q, mixdq, litevar (simulated)")
    ] = None,
    group: Annotated[Optional[int], typer.Option(help="Inputs that share a scale at 4 bits: 32, 64, 128, or -1 for all")] = None,
    budget: Annotated[
        Optional[str], typer.Option(help="Mix formats within 0.3x of the 16-bit bytes, 40MB, or with budget.of=latency 2ms")
    ] = None,
    num: Annotated[Optional[int], typer.Option(help="Calibration samples [default: 64]")] = None,
    calib_source: Annotated[Optional[str], typer.Option(help="Folder of images to calibrate on, not the model's own samples")] = None,
    seed: Annotated[Optional[int], typer.Option(help="Of the calibration samples")] = None,
    cfg: Annotated[Optional[float], typer.Option(help="Guidance of the samples [default: the model's]")] = None,
) -> None:
    """Quantise a teacher or a student; the bundle it writes is a --model like any other."""
    from arsp.config import resolve_config
    from arsp.quant import pipeline as quant
    from arsp.quant.recipe import recipe_card
    from arsp.stack import StackConfig, sampling_rule
    from arsp.zoo.load import resolve

    named = {
        "model": model, "tokenizer": tokenizer, "recipe": recipe, "weights.group_size": group, "budget.size": budget,
        "calibration.num": num, "calibration.source": calib_source, "calibration.seed": seed, "cfg": cfg,
    }  # fmt: skip
    asked = resolve_config(quant.QuantizeConfig, files=ctx.opts.config, named=named, overrides=ctx.opts.overrides)
    config = ctx.resolve(quant.QuantizeConfig, named, card=recipe_card(asked.recipe))
    source = resolve(config.model, tokenizer=config.tokenizer)
    formats = quant.check(config, source)
    if group is not None and (config.simulate or config.budget.size is not None or all(f.bits == 8 for f in formats.values())):
        raise UsageError(f"--group has no effect on recipe {config.recipe} here.", "With a budget, budget.choices has the group sizes.")
    if not (config.needs_inputs or config.budget.size) and (num is not None or calib_source):
        ctx.log(f"recipe {config.recipe} reads the weights alone: --num and --calib-source change nothing", "warning")
    rule = sampling_rule(source, StackConfig(model=config.model, cfg=config.cfg))
    ctx.plan({"formats": {name: str(format_) for name, format_ in formats.items()}, **config.model_dump(mode="json")})
    ctx.emit(*run_quantize(ctx, config, source, rule))


def run_quantize(ctx: CommandContext, config: Any, source: Any, rule: tuple[Any, Any]) -> tuple[dict[str, Any], Any]:
    """Open the run, quantise, complete the record: (record, table)."""
    from arsp import runs
    from arsp.quant import pipeline as quant
    from arsp.zoo.load import load_model

    device = ctx.setup_torch()
    model = load_model(source, device)  # before anything is written: a bad file leaves nothing behind

    @contextmanager
    def stage(total: int, text: str) -> Any:
        with ctx.progress(total, text) as advance:
            yield advance

    with (
        runs.Run.open(
            "quantize", f"{source.label}-{config.recipe}", config.model_dump(mode="json"), ctx.opts.out, resume=ctx.opts.resume
        ) as run,
        runs.stop_signals(),
    ):
        if not run.finished:
            if source.origin == "embedded":
                ctx.log(f"{source.name}: embedded tiny model ({source.card['about']})")
            complete(run, config, source, quant.run(config, model, *rule, run.path, stage=stage, log=ctx.log))
        return run.record, quantised_table(run.record)


def complete(run: Run, config: Any, source: Any, result: Quantised) -> None:
    """Figures, artifacts and parents of a finished quantisation."""
    run.record["stack"] = {"name": f"{source.label}-{config.recipe}", "model": source.name, "kind": source.kind}
    run.record["parents"] = [f"{source.name}@{source.origin}"]
    run.record["layers"] = result.layers
    found, protocol = result.agreement, f"{config.calibration.check} own samples, teacher-forced"
    for name, value in (("top1_agreement", found.top1), ("kl", found.kl), ("sqnr_db", found.sqnr_db)):
        run.add_metric(name, value, n=found.positions, protocol=protocol, comparable=False)
    run.add_metric(
        "compression", result.bytes["quantised_fp16"] / result.bytes["quantised"], protocol="quantised layers, 16 bits to packed"
    )
    run.set_cost(simulated=config.simulate is not None, quantised_bytes=result.bytes["quantised"])
    run.add_artifact(result.bundle, "bundle")
    if result.picture is not None:
        run.add_artifact(result.picture, "picture")


def quantised_table(record: dict[str, Any]) -> Any:
    """Layers by kind, the comparison with the base model, where the bundle lies."""
    from rich.console import Group
    from rich.text import Text

    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in record["layers"]:
        path = line["layer"].split(".")
        kinds.setdefault((".".join(part for part in path if not part.isdigit()), line["format"]), []).append(line)
    rows = []
    for (kind, format_), lines in kinds.items():
        known = [line["sqnr_db"] for line in lines if line["sqnr_db"] is not None]
        size, fp16 = (sum(line[key] for line in lines) for key in ("bytes", "fp16_bytes"))
        rows.append((kind, len(lines), format_, f"{size / 1e6:.3f}", f"{fp16 / size:.2f}x", f"{min(known):.1f}" if known else None))
    metrics = {metric["name"]: metric["value"] for metric in record["metrics"]}
    note = "simulated: rounded in floating point, nothing is smaller or faster" if record["cost"]["simulated"] else "packed integers"
    figures = [
        ("same most likely code", f"{100 * metrics['top1_agreement']:.2f} %"), ("KL to the base model", f"{metrics['kl']:.4g} nats"),
        ("signal to noise of the logits", "no difference" if metrics["sqnr_db"] is None else f"{metrics['sqnr_db']:.1f} dB"),
        ("quantised layers, 16 bits to packed", f"{metrics['compression']:.2f}x"),
    ]  # fmt: skip
    return Group(
        make_table(f"{record['stack']['name']} ({note})", ("layer", "number", "format", "MB", "smaller", "least SQNR dB"), rows),
        make_table("Beside the base model, on its own samples", ("figure", "value"), figures),
        Text(f"bundle: {record['run_dir']}/bundle    use it: --model {record['run_dir']}"),
    )
