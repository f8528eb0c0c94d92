"""``arsp sample``: images from any stack, as PNG files, a grid and optionally an ADM-style npz; interrupted runs continue."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from pydantic import Field

from arsp.cli.options import CommandContext, command, make_table
from arsp.config import StrictModel
from arsp.errors import ConfigError, LockedError, UsageError, nearest

if TYPE_CHECKING:
    from arsp.runs import Run
    from arsp.stack import Stack


class SampleConfig(StrictModel):
    """Configuration of ``arsp sample``; the stack's own values are checked by arsp.stack.StackConfig."""

    stack: dict[str, Any] = {}
    """The pipeline: model, cfg, top_p, student_steps, ... (see arsp sample --help)."""
    num: int = Field(8, ge=1)
    """How many images."""
    classes: list[int] = []
    """Class ids, used in turn; empty: uniform at random, keyed by (seed, image)."""
    grid_columns: int = Field(8, ge=1)
    """Columns of the grid picture."""
    grid_images: int = Field(64, ge=1)
    """The grid shows at most this many images."""
    npz: str | None = None
    """Also write all images into this ADM-style file."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:INDEX."""
    dtype: str = "float32"
    """Computation type."""
    batch_size: int = Field(64, ge=1)
    """Images at a time."""
    seed: int = 0
    """Image i depends on (seed, i) only."""


@command(
    examples=[
        "arsp sample --num 8",
        "arsp sample --model llamagen-dd1 --num 64 --class star --grid stars.png",
        "arsp sample --model llamagen-dd1 --student-steps 2 --num 5000 --out samples.npz --json",
        "arsp sample --model llamagen --baseline mode --num 8",
        "arsp sample --model var --collab var:var-small@4 --apply litevar --num 8",
    ],
    shared=("device", "dtype", "batch_size", "seed", "threads", "kernels", "config", "out", "resume", "fail_if", "print_config"),
    schema=SampleConfig,
)
def sample(
    ctx: CommandContext,
    model: Annotated[Optional[str], typer.Option(help="Zoo name, bundle, or official file [default: llamagen, embedded]")] = None,
    tokenizer: Annotated[Optional[str], typer.Option(help="Tokenizer file of an official GPT file")] = None,
    num: Annotated[Optional[int], typer.Option(help="Images [default: 8]")] = None,
    classes: Annotated[Optional[list[str]], typer.Option("--class", help="Class id or name; may be repeated, used in turn")] = None,
    list_classes: Annotated[bool, typer.Option("--list-classes", help="Print the classes of the model and stop")] = False,
    sampler: Annotated[Optional[str], typer.Option(help="How a teacher draws codes: ar (default), or a mode of arsp speculate")] = None,
    rng: Annotated[Optional[str], typer.Option(help="keyed (default) or torch (the official multinomial stream)")] = None,
    cfg: Annotated[Optional[float], typer.Option(help="Guidance scale; off: 1 or less, of a next-scale model 0")] = None,
    cfg_interval: Annotated[Optional[int], typer.Option(help="Guide only the first codes, official counting; -1: all")] = None,
    temperature: Annotated[Optional[float], typer.Option(help="0 is greedy")] = None,
    top_k: Annotated[Optional[int], typer.Option(help="0: off; ties are kept")] = None,
    top_p: Annotated[Optional[float], typer.Option(help="1: off")] = None,
    top_h: Annotated[Optional[float], typer.Option(help="Share of the entropy that is kept, e.g. 0.4; 0: off")] = None,
    student_steps: Annotated[Optional[int], typer.Option(help="Passes of a distilled student: 1 or 2")] = None,
    split: Annotated[
        Optional[int], typer.Option(help="Codes before it from the logits head, vectors behind it from the other; -1: all codes")
    ] = None,
    teacher_range: Annotated[
        Optional[str], typer.Option(help="N-M: the teacher regenerates codes N..M-1 between two student passes")
    ] = None,
    compat_official_prefix: Annotated[
        bool, typer.Option("--compat-official-prefix", help="A VAR teacher reads the prefix of --teacher-range without mask, as released")
    ] = False,
    baseline: Annotated[Optional[str], typer.Option(help="Control instead of the sampler: naive, mode or skip-N")] = None,
    image_size: Annotated[Optional[int], typer.Option(help="Bicubic resize before uint8 (384 px models are evaluated at 256)")] = None,
    decoder_dtype: Annotated[
        Optional[str], typer.Option(help="Precision of the tokenizer's decoder: float32 (default), bfloat16 or float16")
    ] = None,
    decoder_channels_last: Annotated[
        Optional[bool], typer.Option("--decoder-channels-last/--decoder-contiguous", help="Its memory layout [default: the faster one]")
    ] = None,
    decoder_chunk: Annotated[Optional[int], typer.Option(help="Images it decodes at a time [default: half a million pixels]")] = None,
    decoder_compile: Annotated[bool, typer.Option("--decoder-compile", help="Run it through torch.compile")] = False,
    collab: Annotated[
        Optional[str], typer.Option(help="BIG:SMALL@N: the big model makes the first N scales, the small one the rest (next-scale models)")
    ] = None,
    schedule: Annotated[
        Optional[str], typer.Option(help="YAML file, one row a scale: model, depth, attention, cfg (full, shared, off), precision")
    ] = None,
    apply: Annotated[
        Optional[list[str]],
        typer.Option(help="litevar=PROFILE: a profile of arsp sparsify; w4a8, w8a8: integer layers (arsp quantize); may be repeated"),
    ] = None,
    share: Annotated[Optional[str], typer.Option(help="map: the guidance halves share the attention maps at every scale")] = None,
    more_smooth: Annotated[
        bool, typer.Option("--more-smooth", help="Gumbel-smoothed vectors instead of codes (VAR pictures, never metrics)")
    ] = False,
    grid: Annotated[Optional[Path], typer.Option(help="Write the grid picture here too")] = None,
) -> None:
    """Sample images from a teacher, a student or a control. Image i depends on (seed, i) only; the same command continues a stopped run."""
    named_stack = dict(
        model=model,
        tokenizer=tokenizer,
        sampler=sampler,
        rng=rng,
        cfg=cfg,
        cfg_interval=cfg_interval,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        top_h=top_h,
        student_steps=student_steps,
        split=split,
        teacher_range=teacher_range,
        compat_official_prefix=compat_official_prefix or None,
        baseline=baseline,
        image_size=image_size,
        decoder_dtype=decoder_dtype,
        decoder_channels_last=decoder_channels_last,
        decoder_chunk=decoder_chunk,
        decoder_compile=decoder_compile or None,
        collab=collab,
        schedule=schedule,
        apply=apply or None,
        share=share,
        more_smooth=more_smooth or None,
    )
    out, npz = ctx.opts.out, None
    if out is not None and out.suffix == ".npz":
        out, npz = None, str(out.resolve())
    elif out is not None and out.suffix:
        raise UsageError(f"--out {out}: expected a directory or a .npz file.", "Write a picture with --grid FILE.png")
    named = {f"stack.{key}": value for key, value in named_stack.items()} | {"num": num, "npz": npz}
    config = ctx.resolve(SampleConfig, named)

    from arsp import stack as stacks

    recipe = stacks.StackConfig(**config.stack)
    source = stacks.check(recipe)
    names = class_names(source.card, source.config)
    if list_classes:
        rows = [(i, name) for i, name in enumerate(names)]
        ctx.emit({"model": source.name, "classes": names}, make_table(None, ("id", "class"), rows))
        return
    if classes:
        config = config.model_copy(update={"classes": [class_id(text, names) for text in classes]})
    bad = [c for c in config.classes if not 0 <= c < len(names)]
    if bad:
        raise UsageError(f"--class {bad[0]}: {source.name} has classes 0..{len(names) - 1}.", "See: arsp sample --list-classes")
    if "class" not in source.capabilities.conditions:
        raise ConfigError(
            f"{source.name} is text-conditional: it needs caption features, which this command cannot make.",
            "Use arsp as a library: arsp.decode.decoder.RasterDecoder with Request(captions_BPE=...).",
        )
    plan = {"sample": config.num, "stack": recipe.model_dump(exclude_none=True), "classes": config.classes, "seed": config.seed}
    ctx.plan(plan | stacks.schedule_plan(recipe, source, config.dtype))
    ctx.emit(run_sample(ctx, config, recipe, source, out, grid))


def class_names(card: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Names of the model's classes; ids as text where the card names none."""
    if isinstance(card.get("classes"), list):
        return card["classes"]
    if card.get("classes") == "shapes":
        from arsp.data.shapes import CLASSES

        return list(CLASSES)
    return [str(i) for i in range(config.get("num_classes", 0))] if config.get("model_type") != "t2i" else []


def class_id(text: str, names: list[str]) -> int:
    """A class given by id or by name. UsageError with the nearest names."""
    if re.fullmatch(r"-?[0-9]+", text):
        return int(text)
    if text not in names:
        raise UsageError(f"--class '{text}': no such class.", nearest(text, names))
    return names.index(text)


def run_sample(ctx: CommandContext, config: SampleConfig, recipe: Any, source: Any, out: Path | None, grid: Path | None) -> dict[str, Any]:
    """Make the missing images of the run and complete its record."""
    from arsp import runs
    from arsp import stack as stacks
    from arsp.zoo.load import stored_sha256

    device = ctx.setup_torch()
    with runs.Run.open("sample", recipe.model, config.model_dump(), out, resume=ctx.opts.resume) as run, runs.stop_signals():
        before = {source.name: run.record["stack"].get("weights_sha256"), **run.record["stack"].get("parts", {})}
        for name, weights in {source.name: stored_sha256(source), **stacks.schedule_parts(recipe, source)}.items():
            if before.get(name) and weights and before[name] != weights:
                raise LockedError(
                    f"{run.path} holds images of other weights of {name}.", "Choose another --out, or add --no-resume to make them anew."
                )
        if not run.finished:
            stack = stacks.build(recipe, device, ctx.torch_dtype(), ctx.log)
            run.record["stack"] = stack.describe()
            run.save()
            if stack.model.source.origin == "embedded":
                ctx.log(f"{stack.model.name}: embedded tiny model ({stack.model.source.card['about']})")
            stack.require_decoder()
            make_images(ctx, config, stack, run)
            complete(config, stack, run)
        elif config.npz is not None and not Path(config.npz).exists():
            write_npz(config, run)
        if grid is not None:
            copy_grid(run.path / "grid.png", grid)
        return run.record


def make_images(ctx: CommandContext, config: SampleConfig, stack: Stack, run: Run) -> None:
    """Write images/NNNNNN.png batch by batch; whole batches that exist already are kept (keyed streams only)."""
    from arsp import runs
    from arsp.data.images import save_png
    from arsp.stack import labels_for

    folder = run.path / "images"
    folder.mkdir(exist_ok=True)
    name = lambda i: folder / f"{i:06d}.png"  # noqa: E731
    labels = labels_for(stack, config.num, config.seed, config.classes)
    runs.write_json(run.path / "labels.json", labels.tolist())
    first = 0
    while (
        stack.config.rng == "keyed"
        and first < config.num
        and all(name(i).exists() for i in range(first, min(first + config.batch_size, config.num)))
    ):
        first += config.batch_size
    with ctx.progress(config.num, f"sample {stack.name}") as advance:
        advance(min(first, config.num))
        for ids, images in stack.batches(config.num, config.seed, labels, config.batch_size, min(first, config.num)):
            for i, image in zip(ids.tolist(), images, strict=True):
                save_png(image.permute(1, 2, 0), name(i))
            advance(len(ids))
            runs.check_stop()


def complete(config: SampleConfig, stack: Stack, run: Run) -> None:
    """Grid, npz, cost and artifacts of a run whose images are all there."""
    from arsp.data.images import image_files, load_images, make_grid, save_png

    files = image_files(run.path / "images")
    labels = json.loads((run.path / "labels.json").read_text())
    shown = load_images(files[: config.grid_images])
    save_png(make_grid(shown, columns=min(config.grid_columns, len(shown))), run.path / "grid.png")
    run.record["seed"] = config.seed
    if stack.model.source.card.get("curves"):
        run.record["curves"] = stack.model.source.card["curves"]
    run.record["environment"]["device"] = str(stack.device)
    run.set_cost(**stack.cost())
    run.add_artifact(run.path / "images", "image-dir", num=len(files))
    run.add_artifact(run.path / "grid.png", "grid", labels=labels[: len(shown)])
    if config.npz is not None:
        write_npz(config, run)


def write_npz(config: SampleConfig, run: Run) -> None:
    """All images and labels of a run in the ADM layout, and its artifact entry."""
    from arsp.data.images import load_images, save_npz

    images, labels = load_images(run.path / "images"), json.loads((run.path / "labels.json").read_text())
    run.add_artifact(save_npz(images, Path(config.npz), labels), "npz", num=len(images))


def copy_grid(source: Path, target: Path) -> None:
    from arsp.runs import atomic_file

    with atomic_file(target) as temporary:
        temporary.write_bytes(source.read_bytes())
