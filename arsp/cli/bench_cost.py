"""``arsp bench cost``: what one image must compute and keep, counted from the model's sizes; no weights are needed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer
from pydantic import Field

from arsp.cli.options import CommandContext, command, make_table
from arsp.config import StrictModel
from arsp.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from arsp.bench.cost_var import Part, Savings
    from arsp.models.var import VARConfig
    from arsp.zoo.load import ModelSource


class CostConfig(StrictModel):
    """What is counted."""

    model: str = Field("var-d16", description="zoo name, bundle, or official file")
    windows: str | None = Field(None, description="2d:r=R, 1d:f=ROWS, or kept:SHARE of the query-key pairs")
    share: Literal["none", "map", "output"] | None = Field(None, description="what the guidance halves share")
    apply: str | None = Field(None, description="litevar or litevar=PROFILE, instead of windows and share")
    collab: str | None = Field(None, description="BIG:SMALL@N instead of the model")
    guidance: bool = Field(True, description="both halves of guidance are run")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float16", description="of the cache")


@command(
    examples=[
        "arsp bench cost --model var-d30 --windows kept:0.2966 --share map",
        "arsp bench cost --model var-d36-512 --windows 2d:r=2",
        "arsp bench cost --collab var-d30:var-d16@8 --json",
        "arsp bench cost --model llamagen-b-256",
    ],
    shared=("dtype", "config", "out", "fail_if", "print_config"),
    schema=CostConfig,
)
def cost(
    ctx: CommandContext,
    model: Annotated[Optional[str], typer.Option(help="Zoo name, bundle, or official file (default: var-d16)")] = None,
    windows: Annotated[Optional[str], typer.Option(help="2d:r=R, 1d:f=ROWS (of the key map), or kept:SHARE of the pairs")] = None,
    share: Annotated[Optional[str], typer.Option(help="What the guidance halves share: none, map or output (default: none)")] = None,
    apply: Annotated[Optional[str], typer.Option(help="litevar=PROFILE (without PROFILE: the packaged one)")] = None,
    collab: Annotated[
        Optional[str], typer.Option(help="BIG:SMALL@N: the big model makes the first N scales, the small one the rest")
    ] = None,
    guidance: Annotated[Optional[bool], typer.Option("--guidance/--no-guidance", help="Both halves, or the conditional one only")] = None,
) -> None:
    """Count multiply-adds and cache bytes of one image by part, each with its formula."""
    named = {"model": model, "windows": windows, "share": share, "apply": apply, "collab": collab, "guidance": guidance}
    config = ctx.resolve(CostConfig, named)
    if config.collab and (config.windows or config.share or config.apply or model):
        raise UsageError("--collab counts two dense models", "drop --model, --windows, --share and --apply")
    if config.apply and (config.windows or config.share):
        raise UsageError("--apply brings its own windows and sharing", "drop --windows and --share")
    if config.share not in (None, "none") and not config.guidance:
        raise UsageError("without guidance there are no halves to share", "drop --share or --no-guidance")
    from arsp.runs import Run

    found = collab_record(config) if config.collab else model_record(config)
    ctx.plan(config)
    with Run.open("bench-cost", config.collab or config.model, config, ctx.opts.out, resume=False) as run:
        run.record["stack"] = {"name": config.collab or config.model}
        run.record["counted"] = {key: found[key] for key in ("attention", "parts", "more") if key in found}
        run.set_cost(**found["cost"])
    ctx.emit(run.record, cost_table(run.record))


# ------------------------------------------------------------------------------------------------------------- counting


def model_record(config: CostConfig) -> dict[str, Any]:
    """The count of one model, whatever its family."""
    from arsp.zoo.load import resolve

    source = resolve(config.model)
    if source.family.name == "var":
        return var_record(source, config)
    if config.windows or config.share or config.apply:
        raise ConfigError(f"{config.model} is no VAR: windows and sharing belong to next-scale models.", "Use --model var-d16.")
    return llamagen_record(source, config)


def var_config(source: ModelSource) -> VARConfig:
    """Sizes of a VAR. ConfigError for another family."""
    from arsp.models.var import VARConfig

    if source.family.name != "var":
        raise ConfigError(f"{source.name} is no VAR.", "See: arsp models ls")
    return VARConfig.from_dict(source.config)


def var_record(source: ModelSource, config: CostConfig) -> dict[str, Any]:
    """Attention lines, parts and totals of one VAR image."""
    import torch

    from arsp.bench import cost_var

    sizes = var_config(source)
    if config.apply:
        savings, lines = applied(source, sizes, config)
    else:
        savings = parse_savings(sizes, config)
        lines = cost_var.attention_cost(sizes, savings, guidance=config.guidance).lines()
    attention = cost_var.attention_cost(sizes, guidance=config.guidance)
    transformer = cost_var.count_parts(sizes, savings, guidance=config.guidance)
    tokenizer = tokenizer_parts(source)
    total = cost_var.total_macs(transformer)
    dtype = getattr(torch, config.dtype)
    kv = cost_var.cache_bytes(sizes, savings, guidance=config.guidance, dtype=dtype)
    kv_all = cost_var.cache_bytes(sizes, guidance=config.guidance, last_scale=True, dtype=dtype)
    dense = cost_var.total_macs(cost_var.count_parts(sizes, guidance=config.guidance))
    return {
        "attention": [{**cost_var.describe([part])[0], "saved": saved} for part, saved in lines],
        "parts": cost_var.describe([*transformer, *tokenizer]),
        "more": {
            "query-key pairs of a head and layer": attention.pairs,
            "share of softmax attention in the transformer, dense": attention.dense / dense,
            "transformer against dense": total / dense,
            **tiled_share(sizes, config),
            f"cache bytes, {config.dtype}, every scale of both halves kept": kv_all,
            f"cache bytes, {config.dtype}, as arsp keeps them": kv,
            "cache against keeping everything": kv / kv_all,
        },
        "cost": {"macs": total + cost_var.total_macs(tokenizer), "transformer_macs": total, "kv_bytes": kv},
    }


def llamagen_record(source: ModelSource, config: CostConfig) -> dict[str, Any]:
    """Parts of one raster sequence (:mod:`arsp.bench.cost`)."""
    import torch

    from arsp.bench import cost as raster
    from arsp.bench.cost_var import Part, describe
    from arsp.models.llamagen import GPTConfig

    sizes, rows = GPTConfig.from_dict(source.config), 2 if config.guidance else 1
    n, prefix = sizes.block_size, sizes.cls_token_num
    positions = prefix + n - 1
    linear = rows * positions * sizes.n_layer * raster.layer_weights(sizes)
    head = rows * n * sizes.vocab_size * sizes.dim
    pairs = positions * (positions + 1) // 2
    total = raster.decode_macs(sizes, rows=rows)
    attention = rows * sizes.n_layer * 2 * sizes.dim * pairs
    parts = [
        Part("linear layers of the blocks", linear, "R T D (4 C^2 + 3 C F), T = prefix + L - 1 positions fed"),
        Part("attention", attention, f"2 R P C D, P = T (T + 1) / 2 = {pairs:,}"),
        Part("head", head, "R L C V"),
    ]
    if total > linear + head + attention:
        parts.append(Part("caption projection", total - linear - head - attention, "R prefix (C_text C + C^2)"))
    kv = raster.kv_bytes(sizes, positions, rows, getattr(torch, config.dtype))
    return {"parts": describe(parts), "more": {f"cache bytes, {config.dtype}": kv}, "cost": {"macs": total, "kv_bytes": kv}}


def collab_record(config: CostConfig) -> dict[str, Any]:
    """Two stages against the big model alone, transformer only."""
    from arsp.bench.cost_var import Part, collab_cost, describe
    from arsp.decode.schedule import parse_collab
    from arsp.zoo.load import resolve
    from arsp.zoo.steps import beside

    big_name = config.collab.partition(":")[0]
    main = resolve(big_name)
    big = var_config(main)
    _, small_name, draft_scales = parse_collab(config.collab, big.num_scales)
    small = resolve(small_name)
    sizes = var_config(small)
    beside(small, main)
    found = collab_cost(big, sizes, draft_scales, guidance=config.guidance)
    parts = [
        Part(f"{big_name}, scales 0-{draft_scales - 1}", found.draft, "its positions only"),
        Part(f"{small_name}, all scales", found.refine, f"positions of scales 0-{draft_scales - 1} without logits"),
    ]
    more = {f"{big_name} alone": found.alone, "times less than alone, without the tokenizer": found.ratio}
    return {"parts": describe(parts), "more": more, "cost": {"macs": found.draft + found.refine, "ratio": found.ratio}}


def tokenizer_parts(source: ModelSource) -> list[Part]:
    """The tokenizer's part of an image; none for a file that came without one."""
    from arsp.bench import cost_var
    from arsp.tokenizers.var_vqvae import VQVAEConfig
    from arsp.zoo.load import resolve_tokenizer

    spec = source.tokenizer
    plain = resolve_tokenizer(spec["bundle"]).config if "bundle" in spec else spec.get("config")
    if plain is None:
        return []
    return cost_var.tokenizer_parts(VQVAEConfig(**{key: tuple(x) if isinstance(x, list) else x for key, x in plain.items()}))


def applied(source: ModelSource, sizes: VARConfig, config: CostConfig) -> tuple[Savings, list[tuple[Part, float]]]:
    """What is run with --apply litevar=PROFILE, and the lines of its attention."""
    from arsp.bench.cost_var import Savings
    from arsp.sparse.calibrate import attention_lines
    from arsp.zoo.steps import policy_of

    policy = policy_of(config.apply, source)
    savings = Savings(policy.executed_pairs(), policy.profile.share.astype(int))
    return savings, attention_lines(sizes, policy, guidance=config.guidance)[0]


def parse_savings(sizes: VARConfig, config: CostConfig) -> Savings:
    """What --windows and --share leave. ConfigError when they make no sense."""
    from arsp.bench.cost_var import dense_savings
    from arsp.sparse import window
    from arsp.sparse.profile import SHARES

    share = SHARES.index(config.share or "none")
    if config.windows is None:
        return dense_savings(sizes, share=share)
    found = re.fullmatch(r"2d:r=(\d+)|1d:f=(\d+)|kept:([\d.]+)", config.windows)
    try:
        radius, rows, kept = found.groups() if found else (None, None, None)
        kept = None if kept is None else float(kept)
    except ValueError:
        found = None
    if found is None or "0" in (radius, rows) or (kept is not None and not 0 < kept <= 1):
        raise ConfigError(f"--windows '{config.windows}' is not 2d:r=R, 1d:f=ROWS or kept:SHARE.", "For example 2d:r=2 or kept:0.2966")
    if kept is not None:
        return dense_savings(sizes, kept=kept, share=share)
    geometry = "2d" if radius else "1d"
    windows = window.uniform_2d(sizes.patch_nums, int(radius)) if radius else window.uniform_1d(sizes.patch_nums, int(rows))
    pairs = window.pairs_per_scale(windows, sizes.patch_nums, geometry)
    return dense_savings(sizes, kept=pairs / window.dense_pairs(sizes.patch_nums), share=share)


def tiled_share(sizes: VARConfig, config: CostConfig) -> dict[str, float]:
    """For 2-D windows: what a kernel that takes 4x4 queries together computes, as a share of the dense pairs."""
    from arsp.sparse.window import dense_pairs, tile_pairs

    if not (config.windows or "").startswith("2d"):
        return {}
    r, sides = int(config.windows.partition("=")[2]), sizes.patch_nums
    tiled = sum(tile_pairs(sides[s], sides[u], r, 4) for s in range(len(sides)) for u in range(s + 1))
    return {"pairs that 4x4 query tiles compute, against dense": tiled / sum(dense_pairs(sides))}


def cost_table(record: dict[str, Any]) -> Any:
    """Attention lines, the parts with their shares, and what else is known."""
    from rich.console import Group

    counted, tables = record["counted"], []
    if "attention" in counted:
        rows = [(line["name"], line["macs"] / 1e9, f"{100 * line['saved']:.1f} %", line["formula"]) for line in counted["attention"]]
        tables.append(make_table("Softmax attention", ("line", "G multiply-adds", "saved", "formula"), rows))
    total = sum(part["macs"] for part in counted["parts"])
    rows = [(part["name"], part["macs"] / 1e9, f"{100 * part['macs'] / total:.1f} %", part["formula"]) for part in counted["parts"]]
    rows.append(("total", total / 1e9, "", ""))
    tables.append(make_table(f"One image of {record['stack']['name']}", ("part", "G multiply-adds", "share", "formula"), rows))
    tables.append(make_table(None, ("", "value"), list(counted["more"].items())))
    return Group(*tables)
