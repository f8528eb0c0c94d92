"""``arsp evaluate``: images, a run, a piped record or a model in; metrics with their protocol, sample count and reference hash out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from pydantic import Field

from arsp.cli.options import CommandContext, command
from arsp.config import StrictModel
from arsp.errors import ConfigError, InputError, UsageError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from arsp.metrics.fidelity import FeatureSource, FidelityOptions
    from arsp.metrics.reference import Reference
    from arsp.runs import Run
    from arsp.stack import StackConfig
    from arsp.zoo.load import ModelSource

METRICS = ("fid", "kid", "is", "prc", "acc")
DEFAULT_MODEL, DEFAULT_MODEL_IMAGES = "llamagen", 1000
DEFAULT_DATASET = "shapes32"
GRID_IMAGES, GRID_COLUMNS = 64, 8
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


class EvaluateConfig(StrictModel):
    """Configuration of ``arsp evaluate``."""

    target: str | None = None
    """What to evaluate: '-' (a record on stdin), a run directory, a run.json, a folder, an npz, a model name or a bundle."""
    metric: list[str] = ["fid"]
    """Any of fid, kid, is, prc, acc."""
    num: int | None = Field(None, ge=1)
    """Images to evaluate: a keyed subset of those given, or how many to sample from a model (1000)."""
    reference: str | None = None
    """An embedded set by name, a folder of images, or an ADM npz; default: the set that the model was trained on."""
    features: str = "auto"
    """auto, shapes-cnn-v1 (embedded set, never comparable) or inception."""
    inception_weights: str | None = None
    """File with the Inception weights; without it torch hub's cache is looked into. Nothing is downloaded."""
    comparable_min_images: int = Field(10_000, ge=2)
    """With fewer images than this no value is marked comparable."""
    kid_subsets: int = Field(100, ge=1)
    """Random subsets that KID is averaged over."""
    kid_subset_size: int = Field(1000, ge=2)
    """Images in a KID subset; fewer when there are fewer images."""
    prc_neighborhood: int = Field(3, ge=1)
    """The k of the k nearest neighbours of precision and recall."""
    bootstrap: int = Field(200, ge=0)
    """Resamples for the 95 % interval of fid on the embedded features; 0 = no interval."""
    stack: dict[str, Any] = {}
    """When a model is sampled: its pipeline as in arsp sample (cfg, top_p, student_steps, ...); default: the model's own rule."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:INDEX."""
    dtype: str = "float32"
    """Computation type of a model that is sampled; features are always computed in float32."""
    batch_size: int | None = Field(None, ge=1)
    """Images at a time."""
    seed: int = 0
    """Seed of sampling, of the order of images, of subsets and of the bootstrap."""


@dataclass
class Subject:
    """What is evaluated, found before anything heavy is loaded: files with their labels, or the name of a model to sample."""

    name: str
    images: Path | None = None
    recipe: StackConfig | None = None
    source: ModelSource | None = None
    labels_file: Path | None = None
    parent: dict[str, Any] | None = None
    parent_dir: Path | None = None

    @property
    def dataset(self) -> str | None:
        """The set that the model was trained on, where the record or the card says so."""
        return self.source.card.get("dataset") if self.source else (self.parent or {}).get("stack", {}).get("dataset")


@dataclass
class Samples:
    """Loaded or sampled images (uint8 NCHW), their class ids if known, and where they come from."""

    images_N3HW: Tensor
    labels: list[int] | None
    stack: dict[str, Any]
    cost: dict[str, Any] = field(default_factory=dict)


@command(
    examples=[
        "arsp eval --metric fid",
        "arsp sample --model llamagen --num 1000 --json | arsp eval - --metric fid,acc",
        "arsp eval --images DIR --reference VIRTUAL_imagenet256_labeled.npz --inception-weights FILE --metric fid,is,prc",
    ],
    shared=("device", "dtype", "batch_size", "seed", "threads", "config", "out", "fail_if", "print_config"),
    schema=EvaluateConfig,
)
def evaluate(
    ctx: CommandContext,
    target: Annotated[
        Optional[str],
        typer.Argument(
            help="'-' (a record on stdin), run directory, run.json, folder, npz, model or bundle (default: newest run, else llamagen)"
        ),
    ] = None,
    metric: Annotated[Optional[str], typer.Option(help=f"Comma-separated: {', '.join(METRICS)} (default: fid)")] = None,
    num: Annotated[Optional[int], typer.Option(help="Images to evaluate, or to sample from a model (default: all, or 1000)")] = None,
    reference: Annotated[Optional[str], typer.Option(help="shapes32, shapes32-coarse, a folder, or an ADM npz")] = None,
    images: Annotated[Optional[str], typer.Option(help="Folder of images or npz; the same as TARGET")] = None,
    features: Annotated[Optional[str], typer.Option(help="auto, shapes-cnn-v1 or inception")] = None,
    inception_weights: Annotated[Optional[str], typer.Option(help="File with the Inception weights (never downloaded)")] = None,
    model: Annotated[Optional[str], typer.Option(help="Model to sample; the same as TARGET")] = None,
    cfg: Annotated[Optional[float], typer.Option(help="Guidance scale, when a model is sampled")] = None,
    temperature: Annotated[Optional[float], typer.Option(help="Temperature, when a model is sampled")] = None,
    top_k: Annotated[Optional[int], typer.Option(help="Top-k, when a model is sampled")] = None,
    top_p: Annotated[Optional[float], typer.Option(help="Top-p, when a model is sampled")] = None,
    student_steps: Annotated[Optional[int], typer.Option(help="Passes of a distilled student that is sampled: 1 or 2")] = None,
    baseline: Annotated[Optional[str], typer.Option(help="Control made from the model: naive, mode or skip-N")] = None,
    decoder_dtype: Annotated[Optional[str], typer.Option(help="Precision of the tokenizer's decoder, when a model is sampled")] = None,
) -> None:
    """Measure images against a reference: fid, kid, is, precision/recall, attribute accuracy (docs/evaluation.md)."""
    targets = [t for t in (target, images, model) if t is not None]
    if len(targets) > 1:
        raise UsageError("TARGET, --images and --model each name what to evaluate; give one of them.")
    pipeline = {
        "cfg": cfg,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "student_steps": student_steps,
        "baseline": baseline,
        "decoder_dtype": decoder_dtype,
    }
    named = {f"stack.{key}": value for key, value in pipeline.items()} | {
        "target": targets[0] if targets else None,
        "metric": None if metric is None else list(dict.fromkeys(name.strip() for name in metric.split(","))),
        "num": num,
        "reference": reference,
        "features": features,
        "inception_weights": inception_weights,
    }
    config = ctx.resolve(EvaluateConfig, named)
    check_names(config)
    subject = find_subject(config, ctx)
    if config.stack and subject.recipe is None:
        raise UsageError(f"{', '.join(config.stack)}: {subject.name} is not sampled here, its images exist.", "Give a model as TARGET.")
    ctx.plan({"evaluate": subject.name, "parents": [subject.parent["id"]] if subject.parent else [], **config.model_dump()})
    ctx.emit(run_evaluation(ctx, config, subject))


def check_names(config: EvaluateConfig) -> None:
    """ConfigError for an unknown metric or feature name."""
    for kind, names, known in (("metric", config.metric, METRICS), ("features", [config.features], ("auto", "shapes-cnn-v1", "inception"))):
        for name in names:
            if name not in known:
                raise ConfigError(f"unknown {kind} '{name}'.", nearest(name, known))
    if not config.metric:
        raise ConfigError("no metric given.", f"Available: {', '.join(METRICS)}.")


# ---- what is evaluated --------------------------------------------------------------------------------------------------------


def find_subject(config: EvaluateConfig, ctx: CommandContext) -> Subject:
    """The subject that ``config.target`` names; the newest run with samples, else the embedded teacher, when it names none."""
    from arsp.runs import latest_run, read_record

    target = config.target
    if target is None:
        record = latest_run(has_samples)
        if record is None:
            ctx.log(f"no run with samples yet: evaluating the embedded teacher '{DEFAULT_MODEL}'")
            return _from_model(DEFAULT_MODEL, config)
        ctx.log(f"evaluating the newest run with samples, {record['run_dir']}")
        return _from_record(record, Path(record["run_dir"]), config)
    path = Path(target)
    if target == "-":
        record = read_record(target)
        return _from_record(record, Path(record.get("run_dir") or "."), config)
    if path.suffix == ".json" or (path / "run.json").is_file():
        return _from_record(read_record(path), path if path.is_dir() else path.parent, config)
    if (path / "arsp.json").is_file() or path.suffix.lower() in WEIGHT_SUFFIXES:
        return _from_model(target, config)
    if path.exists():
        return Subject(str(path), images=path, labels_file=_labels_near(path))
    if path.suffix.lower() == ".npz" or len(path.parts) > 1:
        raise InputError(f"{target} does not exist.", "Give a run, a folder of images, an npz, or a model name (arsp models ls).")
    return _from_model(target, config)


def _from_model(model: str, config: EvaluateConfig) -> Subject:
    """A model to sample; its stack is refused here if it cannot work, before any weight is read."""
    from arsp import stack as stacks

    recipe = stacks.StackConfig(**{**config.stack, "model": model})
    source = stacks.check(recipe)
    if "class" not in source.capabilities.conditions:
        raise ConfigError(
            f"{source.name} is not class-conditional: this command cannot give it captions.", "Sample it yourself, then: arsp eval DIR"
        )
    return Subject(model, recipe=recipe, source=source)


def has_samples(record: dict[str, Any]) -> bool:
    """Whether this is a finished run, other than an evaluation, whose images are still there."""
    artifact = image_artifact(record)
    made_images = record["command"] != "evaluate" and record.get("status") == "ok" and artifact is not None
    return made_images and (Path(record.get("run_dir") or ".") / artifact["path"]).exists()


def image_artifact(record: dict[str, Any]) -> dict[str, Any] | None:
    """The artifact of a record that holds its images: the folder, else the npz."""
    found = {a.get("kind"): a for a in reversed(record.get("artifacts") or [])}
    return found.get("image-dir") or found.get("npz")


def _from_record(record: dict[str, Any], folder: Path, config: EvaluateConfig) -> Subject:
    """The images of a run, or the model that it made."""
    if record.get("status") != "ok":
        raise InputError(
            f"The {record['command']} run in {folder} is not finished (status {record.get('status')}).", "Run its command again."
        )
    artifact = image_artifact(record)
    if artifact is None and (folder / "bundle" / "arsp.json").is_file():
        return _from_model(str(folder), config)
    if artifact is None:
        raise InputError(
            f"The {record['command']} record {record.get('id')} has no images.", "Evaluate the record of: arsp sample ... --json"
        )
    path = folder / artifact["path"]
    if not path.exists():
        raise InputError(f"{path}, which the record names, does not exist.", "Sample again, or give the folder with --images.")
    name = (record.get("stack") or {}).get("name") or str(path)
    return Subject(name, images=path, labels_file=_labels_near(path), parent=record, parent_dir=folder)


def _labels_near(path: Path) -> Path | None:
    """``labels.json`` in the folder of images, or beside it (or beside the npz)."""
    places = [path / "labels.json", path.parent / "labels.json"] if path.is_dir() else [path.parent / "labels.json"]
    return next((place for place in places if place.is_file()), None)


# ---- the work -----------------------------------------------------------------------------------------------------------------


def run_evaluation(ctx: CommandContext, config: EvaluateConfig, subject: Subject) -> dict[str, Any]:
    """Load and check everything that can be wrong, then open the run, sample if need be, measure, and return the record."""
    from arsp.metrics.features import load_featnet
    from arsp.metrics.reference import load_reference
    from arsp.runs import Run

    device = ctx.setup_torch()
    featnet = load_featnet() if "acc" in config.metric else None
    reference = load_reference(config.reference or subject.dataset or DEFAULT_DATASET)
    samples = load_samples(config, subject) if subject.images is not None else None
    images_N3HW = samples.images_N3HW if samples is not None else expected_images(config, subject)
    source = choose_features(config, images_N3HW)
    check(config, images_N3HW, reference, source)
    with Run.open("evaluate", Path(subject.name).name, identity(config, subject, samples), ctx.opts.out, resume=False) as run:
        run.record["environment"]["device"] = str(device)
        if samples is None:
            samples = sample_model(ctx, config, subject, device)
            check(config, samples.images_N3HW, reference, source)
        describe(run, subject, samples)
        for entry in measured(ctx, config, samples, reference, source, featnet, device):
            run.add_metric(**entry)
        run.finish()
        return run.record


def expected_images(config: EvaluateConfig, subject: Subject) -> Tensor:
    """A stand-in with the number and size of the images that will be sampled, so that everything is checked before."""
    import torch

    size = subject.recipe.image_size or subject.source.card.get("image_size") or 32
    return torch.zeros((), dtype=torch.uint8).expand(config.num or DEFAULT_MODEL_IMAGES, 3, size, size)


def choose_features(config: EvaluateConfig, images_N3HW: Tensor) -> FeatureSource | None:
    """The feature extractor for these images, its weights checked; None if only attributes are measured."""
    from arsp.metrics.fidelity import resolve_features

    if set(config.metric) == {"acc"}:
        return None
    return resolve_features(config.features, tuple(images_N3HW.shape[2:]), config.inception_weights)


def fidelity_options(config: EvaluateConfig) -> FidelityOptions:
    from arsp.metrics.fidelity import FidelityOptions

    keys = ("seed", "kid_subsets", "kid_subset_size", "prc_neighborhood", "bootstrap", "comparable_min_images")
    return FidelityOptions(**{key: getattr(config, key) for key in keys})


def check(config: EvaluateConfig, images_N3HW: Tensor, reference: Reference, source: FeatureSource | None) -> None:
    """InputError if the chosen metrics cannot be computed on these images."""
    from arsp.metrics.attributes import check_size
    from arsp.metrics.fidelity import check_count, check_measurable, check_sizes

    check_count(len(images_N3HW))
    if "acc" in config.metric:
        check_size(images_N3HW)
    if source is not None:
        metrics = [m for m in config.metric if m != "acc"]
        check_measurable(metrics, len(images_N3HW), reference, source, fidelity_options(config))
        if set(metrics) != {"is"}:
            check_sizes(images_N3HW, reference)


def identity(config: EvaluateConfig, subject: Subject, samples: Samples | None) -> dict[str, Any]:
    """The run's configuration together with what was evaluated, so that other images never share its directory."""
    from arsp.metrics.reference import images_sha256

    parent = subject.parent["id"] if subject.parent else None
    digest = images_sha256(samples.images_N3HW) if samples is not None else None
    return config.model_dump() | {"parent": parent, "images_sha256": digest}


def load_samples(config: EvaluateConfig, subject: Subject) -> Samples:
    """The subject's images, the labels that belong to them, and with ``num`` a keyed subset of both."""
    from arsp.data.images import load_images
    from arsp.metrics.fidelity import keyed_permutation

    images_N3HW = load_images(subject.images)
    labels = load_labels(subject, len(images_N3HW))
    if config.num is not None:
        if config.num > len(images_N3HW):
            raise InputError(f"--num {config.num}: {subject.images} holds {len(images_N3HW)} images.", "Sample more, or lower --num.")
        chosen = keyed_permutation(len(images_N3HW), config.seed)[: config.num].sort().values
        images_N3HW = images_N3HW[chosen]
        labels = None if labels is None else [labels[i] for i in chosen.tolist()]
    parent = subject.parent or {}
    return Samples(images_N3HW, labels, dict(parent.get("stack") or {"name": subject.name}), parent_cost(parent))


def parent_cost(parent: dict[str, Any]) -> dict[str, Any]:
    """The costs of the run that made the images, with the batch size they were measured at (this command's own is another)."""
    cost, batch_size = dict(parent.get("cost") or {}), (parent.get("config") or {}).get("batch_size")
    return {"batch_size": batch_size} | cost if cost and batch_size else cost


def load_labels(subject: Subject, num_images: int) -> list[int] | None:
    """Class ids in the order of the images: by the number in the file name, or by order when there are as many; else None."""
    from arsp.data.images import image_files, read_npz

    path = subject.images
    if path.is_file() and path.suffix.lower() == ".npz":
        stored = read_npz(path).get("arr_1")
        if stored is not None and stored.ndim == 1 and stored.dtype.kind in "iu" and len(stored) == num_images:
            return stored.tolist()
    if subject.labels_file is None:
        return None
    try:
        labels = json.loads(subject.labels_file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{subject.labels_file} is not a JSON list of class ids: {error}") from error
    if not isinstance(labels, list) or not all(type(x) is int for x in labels):
        raise InputError(f"{subject.labels_file} is not a JSON list of class ids.")
    stems = [p.stem for p in image_files(path)] if path.is_dir() else []
    if stems and all(s.isdecimal() and int(s) < len(labels) for s in stems):
        return [labels[int(s)] for s in stems]
    return labels if len(labels) == num_images else None


def sample_model(ctx: CommandContext, config: EvaluateConfig, subject: Subject, device: Any) -> Samples:
    """Sample the model (the one place where this command makes images)."""
    from arsp.stack import DEFAULT_BATCH, sample_images

    num = config.num or DEFAULT_MODEL_IMAGES
    batch_size = min(num, config.batch_size or DEFAULT_BATCH)
    if subject.source.origin == "embedded":
        ctx.log(f"{subject.source.name}: embedded tiny model ({subject.source.card['about']})")
    with ctx.progress(num, f"sample {subject.name}") as advance:
        images_N3HW, labels, stack, cost = sample_images(
            num=num, seed=config.seed, device=device, dtype=ctx.torch_dtype(), batch_size=batch_size, progress=advance, log=ctx.log,
            **subject.recipe.model_dump(),
        )  # fmt: skip
    return Samples(images_N3HW, labels, stack, cost | {"batch_size": batch_size})


def describe(run: Run, subject: Subject, samples: Samples) -> None:
    """Stack, cost, parents and artifacts of the record: the parent's (absolute paths), or a grid and the samples made here."""
    from arsp.data.images import make_grid, save_npz, save_png

    run.record["stack"] = samples.stack
    run.set_cost(**samples.cost)
    if subject.parent is not None:
        run.record["parents"] = [subject.parent["id"]]
        if "curves" in subject.parent:
            run.record["curves"] = subject.parent["curves"]
        for artifact in subject.parent["artifacts"]:
            path = subject.parent_dir / artifact["path"]
            if artifact.get("kind") in ("grid", "image-dir", "npz") and path.exists():
                run.record["artifacts"].append(artifact | {"path": str(path.resolve())})
    if subject.recipe is not None:
        run.add_artifact(save_npz(samples.images_N3HW, run.path / "samples.npz", samples.labels), "npz", num=len(samples.images_N3HW))
    if not any(a["kind"] == "grid" for a in run.record["artifacts"]):
        grid = make_grid(samples.images_N3HW[:GRID_IMAGES], columns=GRID_COLUMNS)
        run.add_artifact(save_png(grid, run.path / "grid.png"), "grid", labels=(samples.labels or [])[:GRID_IMAGES])


def measured(
    ctx: CommandContext,
    config: EvaluateConfig,
    samples: Samples,
    reference: Reference,
    source: FeatureSource | None,
    featnet: Any,
    device: Any,
) -> Iterable[dict[str, Any]]:
    """The metric entries, fidelity first."""
    from arsp.data.shapes import VARIANTS
    from arsp.metrics import attributes, fidelity

    if source is not None:
        ctx.log(f"features: {source.name} (sha256 {source.sha256[:12]}), reference: {reference.name}")
        if source.is_toy or len(samples.images_N3HW) < config.comparable_min_images:
            why = "embedded features" if source.is_toy else f"fewer than {config.comparable_min_images} images"
            ctx.log(f"not comparable with published numbers: {why}")
        total = fidelity.progress_total(len(samples.images_N3HW), reference)
        with ctx.progress(total, "features") as advance:
            yield from fidelity.measure(
                samples.images_N3HW, reference, [m for m in config.metric if m != "acc"], source, device=device,
                batch_size=config.batch_size or (256 if source.is_toy else 32), options=fidelity_options(config), advance=advance,
                notice=lambda text: ctx.log(text, "warning"),
            )  # fmt: skip
    if "acc" in config.metric:
        variant = next((name for name in (reference.name, samples.stack.get("dataset")) if name in VARIANTS), DEFAULT_DATASET)
        if samples.labels is None:
            ctx.log("acc: no class labels known for these images, so class_accuracy is left out", "warning")
        yield from attributes.measure_attributes(samples.images_N3HW, samples.labels, featnet.to(device), variant)
