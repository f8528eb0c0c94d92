"""``arsp speculate``: several codes a pass by guessing and checking, beside plain sampling of the same images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer
from pydantic import Field

from arsp.cli.options import CommandContext, command, make_table, number
from arsp.cli.sample import class_id, class_names, copy_grid
from arsp.config import StrictModel
from arsp.errors import ConfigError, InputError, UsageError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from arsp.bench.paired import Paired
    from arsp.runs import Run
    from arsp.stack import Stack, StackConfig
    from arsp.zoo.load import ModelSource

DECODED = 64  # images at a time that become pixels
SHADES = "░▒▓█"


class SpeculateConfig(StrictModel):
    """Configuration of ``arsp speculate``; the stack's own values are checked by arsp.stack.StackConfig."""

    stack: dict[str, Any] = {"sampler": "seeded"}
    """The pipeline: model, sampler (the mode), verify (its options: window, init, ...), cfg, top_p, ..."""
    num: int = Field(16, ge=1)
    """How many images."""
    batch_size: int = Field(1, ge=1)
    """Images at a time."""
    classes: list[int] = []
    """Class ids, used in turn; empty: uniform at random, keyed by (seed, image)."""
    grid_columns: int = Field(8, ge=1)
    """Columns of the grid pictures."""
    grid_images: int = Field(64, ge=1)
    """A grid shows at most this many images."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:INDEX."""
    dtype: str = "float32"
    """Computation type."""
    threads: int | None = Field(None, ge=1)
    """CPU threads."""
    kernels: Literal["auto", "reference", "cpu", "cuda"] = "auto"
    """Back end of the custom operators."""
    seed: int = 0
    """Image i depends on (seed, i) only."""


@command(
    examples=[
        "arsp speculate",
        "arsp speculate --mode mc --window 8 --num 64",
        "arsp speculate --mode draft-model --draft-model llamagen-small --batch-size 4",
        "arsp speculate --window auto --batch-size 16 --num 64",
        "arsp speculate --mode gsd --init repeat_above --temperature 0.9",
        "arsp speculate --fail-if 'identical<1' --fail-if 'speedup<1' --json",
    ],
    shared=("device", "dtype", "batch_size", "seed", "threads", "kernels", "config", "out", "fail_if", "print_config"),
    schema=SpeculateConfig,
)
def speculate(
    ctx: CommandContext,
    model: Annotated[Optional[str], typer.Option(help="Zoo name, bundle, or official file [default: llamagen, embedded]")] = None,
    tokenizer: Annotated[Optional[str], typer.Option(help="Tokenizer file of an official GPT file")] = None,
    mode: Annotated[
        Optional[str],
        typer.Option(
            help="Exact: seeded (default: the codes of arsp sample), sjd, mc, pac, vp, draft-model, kseq, rsd. "
            "Relaxed: gsd, lantern, lantern++, reuse, zipar"
        ),
    ] = None,
    window: Annotated[
        Optional[str], typer.Option(help="Drafts a pass, or auto: what measured times and acceptance favour [default: 16 in most modes]")
    ] = None,
    init: Annotated[
        Optional[str],
        typer.Option(help="First guesses: random_uniform (default), random_onehot, repeat_left, repeat_above, prior, left_law, ngram"),
    ] = None,
    draft_model: Annotated[Optional[str], typer.Option(help="Smaller model of the same tokenizer that makes the drafts")] = None,
    coupling: Annotated[Optional[str], typer.Option(help="Of redrawn drafts: maximal (default) or gumbel (mc)")] = None,
    width: Annotated[Optional[int], typer.Option(help="Siblings in the tree (pac) or independent drafts (kseq) [default: 3]")] = None,
    levels: Annotated[Optional[int], typer.Option(help="Levels of the tree (pac) [default: 3]")] = None,
    branches: Annotated[
        Optional[str], typer.Option(help="Drafts by depth, e.g. 3,2,1 (rsd; lantern with a draft model) [default: 3,2,1,1]")
    ] = None,
    gain: Annotated[Optional[float], typer.Option(help="Exponent of rising probabilities (vp) [default: 1]")] = None,
    tau: Annotated[Optional[float], typer.Option(help="Drafts of a ratio above it are kept (reuse) [default: 0.5]")] = None,
    delta: Annotated[
        Optional[float],
        typer.Option(help="Mass that a draft may borrow (lantern) [default: 0.1]; above 1 times its own (lantern++) [default: 2]"),
    ] = None,
    distance: Annotated[Optional[float], typer.Option(help="Squared embedding distance within a group (gsd) [default: 0.5]")] = None,
    near: Annotated[Optional[int], typer.Option(help="Codes that may lend (lantern, lantern++) [default: 1000, at most V/16]")] = None,
    num: Annotated[Optional[int], typer.Option(help="Images [default: 16]")] = None,
    classes: Annotated[Optional[list[str]], typer.Option("--class", help="Class id or name; may be repeated, used in turn")] = None,
    cfg: Annotated[Optional[float], typer.Option(help="Guidance scale; off: 1 or less")] = None,
    cfg_interval: Annotated[Optional[int], typer.Option(help="Guide only the first codes, official counting; -1: all")] = None,
    temperature: Annotated[Optional[float], typer.Option(help="0 is greedy")] = None,
    top_k: Annotated[Optional[int], typer.Option(help="0: off; ties are kept")] = None,
    top_p: Annotated[Optional[float], typer.Option(help="1: off")] = None,
    top_h: Annotated[Optional[float], typer.Option(help="Share of the entropy that is kept, e.g. 0.4; 0: off")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Need no checkpoint (cost only, no pictures)")] = False,
    grid: Annotated[Optional[Path], typer.Option(help="Write the grid picture here too")] = None,
) -> None:
    """Sample several codes a pass, and the same images code by code in turn: passes, tokens a pass, acceptance, speed-up.

    Every mode says whether its images follow the model's law (exact) or another one (bounded, lossy).
    """
    verify = dict(
        window=window_of(window), init=init, draft_model=draft_model, coupling=coupling, width=width, levels=levels, branches=branches,
        gain=gain, tau=tau, delta=delta, distance=distance, near=near,
    )  # fmt: skip
    stack = dict(
        model=model, tokenizer=tokenizer, sampler=mode, cfg=cfg, cfg_interval=cfg_interval, temperature=temperature, top_k=top_k,
        top_p=top_p, top_h=top_h, random_weights=random_weights or None, **{f"verify.{key}": value for key, value in verify.items()},
    )  # fmt: skip
    named = {"num": num, **{f"stack.{key}": value for key, value in stack.items()}}
    config = ctx.resolve(SpeculateConfig, named, card={"stack": {"sampler": "seeded"}})
    if not isinstance(config.stack.get("verify", {}), dict):
        raise ConfigError(f"stack.verify: expected the options of a mode, got {config.stack['verify']!r}.")

    from arsp import stack as stacks

    recipe = stacks.StackConfig(**config.stack)
    source = check(recipe, grid)
    names = class_names(source.card, source.config)
    if classes:
        config = config.model_copy(update={"classes": [class_id(text, names) for text in classes]})
    bad = [c for c in config.classes if not 0 <= c < len(names)]
    if bad:
        raise UsageError(f"--class {bad[0]}: {source.name} has classes 0..{len(names) - 1}.", "See: arsp sample --list-classes")
    ctx.plan(
        {
            "speculate": config.num, "batch_size": config.batch_size, "stack": recipe.model_dump(exclude_none=True),
            "verify": stacks.check_mode(recipe, source).model_dump(exclude_none=True), "classes": config.classes, "seed": config.seed,
            "beside": "plain sampling of the same images, batch by batch in turn",
        }
    )  # fmt: skip
    record = run_speculate(ctx, config, recipe, source, grid)
    ctx.emit(record, speculate_view(record))


def window_of(text: str | None) -> int | str | None:
    """``--window``: a number or auto. UsageError otherwise."""
    if text is None or text == "auto":
        return text
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise UsageError(f"--window {text}: expected a number or auto.")
    return int(text)


def check(recipe: StackConfig, grid: Path | None) -> ModelSource:
    """The model. ConfigError, InputError: whatever cannot be done, before weights are read."""
    from arsp import stack as stacks
    from arsp.decode.modes import MODES

    if recipe.sampler not in MODES:
        raise ConfigError(f"--mode {recipe.sampler}: unknown mode.", nearest(recipe.sampler, MODES))
    source = stacks.check(recipe)
    if "class" not in source.capabilities.conditions:
        raise ConfigError(
            f"{source.name} is text-conditional: it needs caption features, which this command cannot make.",
            "Use arsp as a library: arsp.decode.modes.build_mode over a RasterDecoder, with Request(captions_BPE=...).",
        )
    if grid is not None and recipe.random_weights:
        raise ConfigError("--grid: random weights draw noise, no picture is made of it.", "Drop one of the two.")
    if grid is not None and source.tokenizer_identity is None:
        raise InputError(f"--grid: {source.name} has no tokenizer to decode its codes.", "Give --tokenizer FILE.")
    return source


# ------------------------------------------------------------------------------------------------------------- the work


def run_speculate(
    ctx: CommandContext, config: SpeculateConfig, recipe: StackConfig, source: ModelSource, grid: Path | None
) -> dict[str, Any]:
    """Load, measure both, complete the record."""
    from arsp import stack as stacks
    from arsp.bench.paired import measure_pair, plain_stack
    from arsp.runs import Run, stop_signals

    device = ctx.setup_torch()
    stack = stacks.build(recipe, device, ctx.torch_dtype(), ctx.log)
    plain = plain_stack(stack)
    if source.origin == "embedded":
        ctx.log(f"{source.name}: embedded tiny model ({source.card['about']})")
    labels = stacks.labels_for(stack, config.num + min(config.num, config.batch_size), config.seed, config.classes)
    with Run.open("speculate", stack.name, config, ctx.opts.out, resume=False) as run, stop_signals():  # a timing is never reused
        run.record["environment"]["device"] = str(device)
        with ctx.progress(config.num, f"{stack.name}, and code by code") as advance:
            paired = measure_pair(
                stack, plain, labels, num=config.num, batch_size=config.batch_size, seed=config.seed, progress=advance
            )  # fmt: skip
        fill_record(run, config, stack, plain, paired)
        if recipe.random_weights or stack.decoder is None:
            ctx.log(f"{stack.name}: codes only, no pictures")
        else:
            write_pictures(run, config, stack, paired, labels[: config.num])
        draw(run)
        if differ := run.record.get("differing"):
            ctx.log(near_ties(len(differ), config.num), "warning")
        if grid is not None:
            copy_grid(run.path / "grid.png", grid)
    return run.record


def fill_record(run: Run, config: SpeculateConfig, stack: Stack, plain: Stack, paired: Paired) -> None:
    """Both stacks with their costs, the metrics, what the window planner found."""
    from arsp.bench.paired import MIN_BATCHES, cost_of

    record, cost = run.record, cost_of(stack, paired.timing)
    if paired.draft_passes is not None:
        cost["draft_passes_per_batch"] = paired.draft_passes
    record["stack"], record["seed"] = stack.describe(), config.seed
    run.set_cost(**cost)
    record["plain"] = {"stack": plain.describe(), "cost": cost_of(plain, paired.plain_timing)}
    record["seconds"] = {"mode": list(paired.timing.seconds), "plain": list(paired.plain_timing.seconds)}

    report, ratio = cost["verify"], paired.speedup
    interval = [ratio.low, ratio.high] if paired.batches >= MIN_BATCHES else None
    timed = f"codes only, batch {config.batch_size}, median of {paired.batches} batches"
    of_timing = {
        "speedup": (ratio.value, {"protocol": f"against plain sampling in turn, {timed}", "ci95": interval}),
        "latency_ms": (paired.timing.median_ms, {"protocol": timed}),
        "ar_latency_ms": (paired.plain_timing.median_ms, {"protocol": timed}),
    }
    run.add_metric("passes", report["passes_per_image"], n=config.num)
    for name in ("tokens_per_pass", "single_token_share", "acceptance"):
        run.add_metric(name, report[name], n=config.num)
    if stack.config.sampler == "seeded":
        record["differing"] = paired.differing
        run.add_metric("identical", 1 - len(paired.differing) / config.num, n=config.num)
    for name, (value, more) in of_timing.items():
        run.add_metric(name, value, n=config.num, **more)
    if (planner := getattr(stack.generator, "planner", None)) is not None:
        record["planner"] = {"decision": planner.decision(), "windows": planner.table()}


def write_pictures(run: Run, config: SpeculateConfig, stack: Stack, paired: Paired, labels: Tensor) -> None:
    """images/ and grid.png of the mode, images-ar/ and grid-ar.png of plain sampling, labels.json of both."""
    from arsp.data.images import image_files, load_images, make_grid, save_png, save_png_dir
    from arsp.protocols import Generation
    from arsp.runs import check_stop, write_json

    write_json(run.path / "labels.json", labels.tolist())
    for suffix, prefix, codes_NL in (("", "", paired.codes_NL), ("-ar", "plain-", paired.plain_codes_NL)):
        folder, grid = run.path / f"images{suffix}", run.path / f"grid{suffix}.png"
        for first, codes in enumerate(codes_NL.split(DECODED)):
            images = stack.decode(Generation(codes.to(stack.device)))
            save_png_dir(images, folder, range(first * DECODED, first * DECODED + len(codes)))
            check_stop()
        files = image_files(folder)
        shown = load_images(files[: config.grid_images])
        save_png(make_grid(shown, columns=min(config.grid_columns, len(shown))), grid)
        run.add_artifact(folder, f"{prefix}image-dir", num=len(files))
        run.add_artifact(grid, f"{prefix}grid", labels=labels[: len(shown)].tolist())


def draw(run: Run) -> None:
    """decoding.png: tokens a pass and acceptance over the image."""
    from arsp.report.plots import decoding, theme, to_png
    from arsp.report.tables import collect
    from arsp.runs import atomic_file

    with theme(), atomic_file(run.path / "decoding.png") as temporary:
        temporary.write_bytes(to_png(decoding(collect([run.record]))))
    run.add_artifact(run.path / "decoding.png", "picture")


def near_ties(count: int, num: int) -> str:
    """Why images of the seeded mode may differ from those of plain sampling."""
    return (
        f"{count} of {num} images have other codes than plain sampling: a pass over several codes rounds differently from a pass over one, "
        "and where two codes are nearly tied that decides. The law is the same."
    )


# ------------------------------------------------------------------------------------------------------------- the view


def speculate_view(record: dict[str, Any]) -> Any:
    """Exactness, both stacks side by side, tokens a pass, acceptance over the image, the planner's windows, where everything lies."""
    from rich.console import Group
    from rich.text import Text

    report, name = record["cost"]["verify"], record["stack"]["name"]
    parts: list[Any] = [Text(f"{name}: {MEANING[exactness_class(record)].format(record['stack']['verify']['exactness'])}"), facts(record)]
    parts.append(histogram(report["committed"]))
    if report["acceptance"] is not None:
        parts.append(heat_map(report["acceptance_map"]))
    if "planner" in record:
        parts += [planned(record["planner"]["windows"]), Text(record["planner"]["decision"])]
    parts += [Text(f"pictures and record: {record['run_dir']}"), Text(f"as a page: arsp report {record['run_dir']}")]
    return Group(*parts)


MEANING = {
    "exact": "{}, images follow the law of plain sampling",
    "bounded": "{}, the law that a code is tested against differs from the model's by no more than this; images follow another law",
    "lossy": "{}, images follow another law than the model's",
}


def exactness_class(record: dict[str, Any]) -> str:
    """exact, bounded or lossy."""
    return record["stack"]["verify"]["exactness"].partition("(")[0]


def facts(record: dict[str, Any]) -> Any:
    """What was measured of plain sampling and of the mode."""
    metrics = {metric["name"]: metric for metric in record["metrics"]}
    cost, plain, report = record["cost"], record["plain"]["cost"], record["cost"]["verify"]
    value = lambda name: metrics[name]["value"]  # noqa: E731
    percent = lambda x: "-" if x is None else f"{100 * x:.1f} %"  # noqa: E731
    rows = [
        ("passes an image", number(plain["passes"]), number(value("passes"))),
        ("tokens a pass", number(plain["tokens_per_pass"]), number(value("tokens_per_pass"))),
        ("passes with a single token", percent(1.0), percent(value("single_token_share"))),
        ("accepted drafts", "-", percent(value("acceptance"))),
        ("ms an image, codes only", number(value("ar_latency_ms")), number(value("latency_ms"))),
        ("speed-up [95 % interval]", "1", times(metrics["speedup"])),
        ("cache of a batch, kB", *(number(side["kv_bytes"] and side["kv_bytes"] / 1e3) for side in (plain, cost))),
        ("state of an image beside it, kB", "0", number(report["state_bytes_per_image"] / 1e3)),
    ]
    if "draft_passes_per_batch" in cost:
        rows.append(("passes of the draft model a batch", "-", number(cost["draft_passes_per_batch"])))
    if "identical" in metrics:
        num = metrics["identical"]["n"]
        rows.append(("images with the codes of plain sampling", "-", f"{num - len(record['differing'])} of {num}"))
    environment, config = record["environment"], record["config"]
    where = environment["cpu"] if environment["device"] == "cpu" else environment.get("gpu")
    title = f"{where}, {environment['threads']} threads, {config['dtype']}, batch {config['batch_size']}, {config['num']} images"
    return make_table(title, ("", "plain", record["stack"]["sampler"]), rows)


def times(metric: dict[str, Any]) -> str:
    """A speed-up with its interval, where there is one."""
    interval = metric["ci95"]
    return f"{metric['value']:.2f}x" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def histogram(committed: dict[str, int]) -> Any:
    """How many passes committed so many tokens."""
    total = sum(committed.values())
    rows = [(int(tokens), count, f"{100 * count / total:.1f} %", "█" * round(40 * count / total)) for tokens, count in committed.items()]
    return make_table("Tokens committed by a pass of an image", ("tokens", "passes", "share", ""), rows)


def planned(windows: list[dict[str, Any]]) -> Any:
    """What a planner expects of each window in each quarter of the image."""
    columns = {
        "quarter": "quarter of the image", "window": "window", "time_ratio": "time of a pass", "tokens_per_pass": "tokens a pass",
        "speedup": "speed-up",
    }  # fmt: skip
    rows = [[line[key] + 1 if key == "quarter" else line[key] for key in columns] for line in windows]
    return make_table("Windows, relative to a token a pass", list(columns.values()), rows)


def heat_map(rates: list[list[float | None]]) -> Any:
    """Share of accepted drafts over the image grid, in percent; four shades where numbers would not fit. A dot: never tested."""
    from rich.text import Text

    numbers = len(rates[0]) <= 16
    text = Text("Accepted drafts by place in the image" + (", %" if numbers else f", in quarters: {' '.join(SHADES)}") + "\n")
    for row in rates:
        for rate in row:
            if rate is None:
                text.append("   ·" if numbers else "··", style="dim")
                continue
            text.append(f"{100 * rate:4.0f}" if numbers else SHADES[min(3, int(4 * rate))] * 2, style=_colours(rate))
        text.append("\n")
    return text


def _colours(rate: float) -> str:
    """Dark blue for 0 to yellow for 1, with ink that can be read on it."""
    low, high = (0, 34, 78), (253, 231, 55)
    red, green, blue = (round(a + (b - a) * rate) for a, b in zip(low, high, strict=True))
    return f"{'black' if rate > 0.5 else 'white'} on rgb({red},{green},{blue})"
