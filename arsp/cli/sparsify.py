"""``arsp sparsify``: attention windows and guidance sharing for a next-scale model, calibrated on its own samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer
from pydantic import Field

from arsp.cli.options import CommandContext, command, make_table
from arsp.config import StrictModel
from arsp.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from arsp.zoo.load import ModelSource


class SparsifyConfig(StrictModel):
    """How a profile is made."""

    model: str = Field("var", description="zoo name, bundle, or official file of a next-scale teacher")
    tokenizer: str | None = Field(None, description="tokenizer file of an official VAR file")
    policy: Literal["litevar"] = Field("litevar", description="litevar (arXiv 2411.17178)")
    windows: Literal["2d", "1d"] = Field(
        "2d", description="2d: squares in the key maps, skipped by a kernel; 1d: the official bands, masked"
    )
    mask: Literal["neginf", "official-logit0", "official-post"] = Field(
        "neginf", description="meaning of a window; the official two: masked"
    )
    tau: float = Field(0.95, gt=0, le=1, description="share of a block's attention mass that its window holds")
    cut: float = Field(0.003, ge=0, lt=1, description="map entries below it count nothing")
    share: Literal["none", "map", "output"] = Field("none", description="what the guidance halves share")
    max_share_error: float | None = Field(
        None, ge=0, description="share only where the halves differ by no more (relative; None: everywhere)"
    )
    num: int = Field(64, ge=1, description="calibration images")
    batch_size: int = Field(16, ge=1, description="images at a time")
    seed: int = Field(
        1_000_003, ge=0, description="of the calibration images; not the default of other commands, so they are not evaluated"
    )
    cfg: float | None = Field(None, ge=0, description="guidance while calibrating (default: the card's)")
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    random_weights: bool = Field(False, description="no checkpoint: the profile means nothing, the path is exercised")
    device: str = "auto"
    threads: int | None = Field(None, ge=1)


@command(
    examples=[
        "arsp sparsify --model var",
        "arsp sparsify --model var --share map --tau 0.9 --out runs/litevar-map",
        "arsp sparsify --model var --windows 1d --mask official-logit0",
    ],
    shared=("device", "threads", "kernels", "batch_size", "seed", "config", "out", "resume", "fail_if", "print_config"),
    schema=SparsifyConfig,
)
def sparsify(
    ctx: CommandContext,
    model: Annotated[Optional[str], typer.Option(help="Zoo name, bundle, or official file [default: var, embedded]")] = None,
    tokenizer: Annotated[Optional[str], typer.Option(help="Tokenizer file of an official VAR file")] = None,
    policy: Annotated[Optional[str], typer.Option(help="litevar (arXiv 2411.17178)")] = None,
    windows: Annotated[Optional[str], typer.Option(help="2d (default) or 1d, the official bands (masked only)")] = None,
    mask: Annotated[Optional[str], typer.Option(help="neginf (default), official-logit0 or official-post (masked only)")] = None,
    tau: Annotated[Optional[float], typer.Option(help="Share of a block's attention mass that its window holds [default: 0.95]")] = None,
    cut: Annotated[Optional[float], typer.Option(help="Map entries below it count nothing [default: 0.003]")] = None,
    share: Annotated[Optional[str], typer.Option(help="What the guidance halves share: none (default), map or output")] = None,
    max_share_error: Annotated[Optional[float], typer.Option(help="Share only where the halves differ by no more than this")] = None,
    num: Annotated[Optional[int], typer.Option(help="Calibration images [default: 64]")] = None,
    cfg: Annotated[Optional[float], typer.Option(help="Guidance while calibrating [default: the model's]")] = None,
    top_k: Annotated[Optional[int], typer.Option(help="While calibrating [default: the model's]")] = None,
    top_p: Annotated[Optional[float], typer.Option(help="While calibrating [default: the model's]")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="No checkpoint; the profile means nothing")] = False,
) -> None:
    """Choose attention windows of a VAR from its own samples and write them as a profile for --apply litevar=PROFILE."""
    named = dict(
        model=model, tokenizer=tokenizer, policy=policy, windows=windows, mask=mask, tau=tau, cut=cut, share=share, num=num, cfg=cfg,
        max_share_error=max_share_error, top_k=top_k, top_p=top_p, random_weights=random_weights or None,
    )  # fmt: skip
    config = ctx.resolve(SparsifyConfig, named)
    source, guidance, pipeline = check(config)
    ctx.plan(config)
    ctx.emit(*run_sparsify(ctx, config, source, guidance, pipeline))


def check(config: SparsifyConfig) -> tuple[ModelSource, Any, Any]:
    """Model, guidance and filters; ConfigError for anything but a next-scale teacher, before weights are read."""
    from arsp.stack import StackConfig, sampling_rule
    from arsp.zoo.load import resolve

    source = resolve(config.model, tokenizer=config.tokenizer)
    if source.kind != "teacher" or source.layout.is_raster:
        raise ConfigError(f"{config.model} is no next-scale teacher: LiteVAR windows are between scales.", "Use --model var.")
    rule = StackConfig(model=config.model, cfg=config.cfg, top_k=config.top_k, top_p=config.top_p)
    guidance, pipeline = sampling_rule(source, rule)
    if config.share != "none" and not guidance.active:
        raise UsageError("without guidance there are no halves to share", "drop --share, or give --cfg above 0")
    if config.max_share_error is not None and config.share == "none":
        raise UsageError("--max-share-error limits what is shared", "add --share map or --share output")
    return source, guidance, pipeline


def run_sparsify(ctx: CommandContext, config: SparsifyConfig, source: ModelSource, guidance: Any, pipeline: Any) -> tuple[dict, Any]:
    """Open the run, calibrate, complete the record: (record, table)."""
    from arsp import runs
    from arsp.sparse.profile import load_profile
    from arsp.zoo.load import load_model

    device = ctx.setup_torch()
    with (
        runs.Run.open("sparsify", f"{source.label}-litevar", config, ctx.opts.out, resume=ctx.opts.resume) as run,
        runs.stop_signals(),
    ):
        if not run.finished:
            loaded = load_model(source, device, random_weights=config.random_weights)
            if source.origin == "embedded":
                ctx.log(f"{source.name}: embedded tiny model ({source.card['about']})")
            calibrate(ctx, run, config, loaded, guidance, pipeline)
        return run.record, profile_table(run.record, load_profile(run.path))


def calibrate(ctx: CommandContext, run: Any, config: SparsifyConfig, model: Any, guidance: Any, pipeline: Any) -> None:
    """Sample, choose, write the bundle and its picture, fill the record."""
    from arsp.models.var import VARConfig
    from arsp.report.plots import theme, to_png
    from arsp.runs import atomic_file, check_stop
    from arsp.sparse.calibrate import attention_lines, make_profile, record_attention
    from arsp.sparse.picture import kept_figure
    from arsp.sparse.policy import LiteVARPolicy
    from arsp.sparse.profile import save_profile

    with ctx.progress(config.num, "calibration images") as advance:

        def tick(images: int) -> None:
            advance(images)
            check_stop()

        recorded = record_attention(
            model, guidance, pipeline, num=config.num, batch_size=config.batch_size, seed=config.seed, geometry=config.windows,
            cut=config.cut, callback=tick,
        )  # fmt: skip
    facts = {"num": config.num, "batch_size": config.batch_size, "seed": config.seed, "cfg": guidance.scale}
    profile = make_profile(
        model, recorded, mask=config.mask, tau=config.tau, share=config.share, max_share_error=config.max_share_error, **facts
    )
    bundle = save_profile(run.path / "bundle", profile)
    with theme(), atomic_file(run.path / "kept.png") as temporary:
        temporary.write_bytes(to_png(kept_figure(profile)))

    policy = LiteVARPolicy(profile)
    lines, executed = attention_lines(VARConfig.from_dict(model.source.config), policy, guidance=guidance.active)
    run.record["stack"] = {"name": f"{model.source.label}-litevar", "model": model.name, "kind": "profile"}
    run.record["parents"] = [f"{model.source.name}@{model.source.origin}"]
    run.record["attention"] = [{"name": part.name, "macs": part.macs, "formula": part.formula, "saved": saved} for part, saved in lines]
    run.record["dense_instead"] = [list(pair) for pair in policy.dense_instead]
    protocol = f"{config.windows} windows, tau {config.tau:g}, {config.num} images"
    run.add_metric("attention_kept", profile.kept_total(), n=config.num, protocol=protocol)
    run.add_metric("attention_executed", executed.shared / executed.dense, n=config.num, protocol=protocol)
    run.set_cost(simulated=policy.simulated)
    run.add_artifact(bundle, "profile")
    run.add_artifact(run.path / "kept.png", "picture")


def profile_table(record: dict[str, Any], profile: Any) -> Any:
    """Attention before and after, kept share by scale, where the profile lies."""
    from rich.console import Group
    from rich.text import Text

    note = " (simulated: windows are masked, nothing is skipped)" if record["cost"]["simulated"] else ""
    rows = [(line["name"], line["macs"] / 1e6, f"{100 * line['saved']:.1f} %", line["formula"]) for line in record["attention"]]
    kept = profile.kept()
    scales = [(s, side * side, f"{100 * kept[:, s].mean():.1f} %") for s, side in enumerate(profile.patch_nums)]
    return Group(
        make_table(f"Softmax attention of one image{note}", ("line", "M multiply-adds", "saved", "formula"), rows),
        make_table("Kept query-key pairs, mean over layers", ("scale", "positions", "kept"), scales),
        Text(f"profile: {record['run_dir']}/bundle    picture: {record['run_dir']}/kept.png"),
        Text(f"use it: --apply litevar={record['run_dir']}"),
    )
