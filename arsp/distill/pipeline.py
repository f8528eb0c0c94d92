"""Distillation end to end: the teacher's own trajectories, a student initialised from it, training, and the bundle.

No data set is read. Every stage resumes: shards are complete or absent, training restarts from its newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from arsp.config import StrictModel
from arsp.decode.few_step import FewStep, StudentGenerator, default_second_step
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import Guidance
from arsp.distill.dd1 import DD1Config, DD1Task
from arsp.distill.flow import FlowSettings
from arsp.distill.trajectories import Trajectories, TrajectoryRule, generate_shards, load_shards
from arsp.errors import ConfigError, InputError
from arsp.quant.linear import QuantLinear
from arsp.train.loop import OptimConfig, fit
from arsp.zoo.bundle import save_bundle
from arsp.zoo.load import LoadedModel, ModelSource, tokenizer_entry


class TrajectoryConfig(StrictModel):
    """The distillation set: how many trajectories, and the teacher's sampling rule (None: the card's evaluation rule)."""

    num: int = Field(24_000, ge=2, description="trajectories, held-out ones included")
    held_out: int = Field(1000, ge=1, description="of these kept for the held-out figures")
    short: int = Field(0, ge=0, description="further ones of the first objective.short_codes codes only, for the short updates")
    shard_size: int = Field(2000, ge=1)
    batch_size: int = Field(500, ge=1)
    seed: int = Field(20_241_217, ge=0, lt=1 << 64, description="of labels, noise and therefore of every trajectory")
    cfg: float | None = Field(None, ge=0)
    cfg_interval: int = Field(-1, ge=-1)
    temperature: float | None = Field(None, gt=0)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_h: float | None = Field(None, ge=0, le=1)
    solver: Literal["2m", "euler", "midpoint", "adaptive"] = "2m"
    solver_steps: int = Field(64, ge=1, description="grid intervals of the flow map")


class DistillConfig(StrictModel):
    """Configuration of ``arsp distill``."""

    teacher: str = Field("llamagen", description="zoo name, bundle, or official file")
    tokenizer: str | None = Field(None, description="tokenizer file of an official GPT file")
    method: str = Field("dd1", description="distillation method")
    student_steps: int = Field(
        2, ge=1, le=2, description="1: trained for one pass; 2: also for a second pass that starts at known[1] codes"
    )
    second_step_at: int | None = Field(
        None, ge=1, description="known codes at the second pass, whole scales of a VAR (default: the card's, else as published in share)"
    )
    trajectories: TrajectoryConfig = TrajectoryConfig()
    objective: DD1Config = Field(DD1Config(known=(0,)), description="weights; known is set from student_steps")
    optim: OptimConfig = OptimConfig(
        steps=2000,
        batch_size=64,
        lr=1.5e-3,
        warmup=100,
        schedule="flat-linear",
        ema=0.995,
        autocast="off",
        eval_every=200,
        checkpoint_every=200,
    )
    probe_images: int = Field(500, ge=0, description="images of the Frechet distance in the training curve (embedded set only; 0: none)")


@dataclass
class Distilled:
    """What a distillation run leaves behind."""

    bundle: Path
    figures: dict[str, float]
    curves: dict[str, list[dict[str, float]]]
    state: dict[str, Any]


def check(config: DistillConfig, source: ModelSource) -> DistillConfig:
    """The configuration completed for this teacher. ConfigError when it cannot be distilled."""
    if source.kind != "teacher":
        raise ConfigError(
            f"{source.name} is a {source.kind}; distillation needs an autoregressive teacher.", "Use --teacher llamagen or var."
        )
    if source.config.get("model_type") == "t2i":
        raise ConfigError(f"{source.name} is text-conditional; {config.method} draws class labels.", "Use a class-conditional teacher.")
    second = config.second_step_at or source.card.get("distillation", {}).get("second_step_at") or default_second_step(source.layout)
    known = (0,) if config.student_steps == 1 else (0, second)
    FewStep(known).check(source.layout)
    if config.objective.known not in ((0,), known):
        raise ConfigError(
            f"objective.known {list(config.objective.known)}: it follows from student_steps and second_step_at, here {list(known)}."
        )
    short, ends = config.objective.short_codes, [end for end in source.layout.ends[:-1] if end > known[-1]]
    if config.objective.short and short not in ends:
        raise ConfigError(
            f"objective.short_codes {short}: expected more than {known[-1]} and less than {source.layout.num_tokens} codes"
            + ("." if source.layout.is_raster else f" at the end of a scale, here {ends}."),
            "Or objective.short=0: every update trains all codes.",
        )
    if config.trajectories.short and not config.objective.short:
        raise ConfigError("trajectories.short: no update would read them.", "Give objective.short and objective.short_codes too.")
    if source.origin == "file" and config.tokenizer is None:
        raise InputError(
            f"{source.name} is an official file without a tokenizer, and the flow map needs its codebook.", "Give --tokenizer FILE."
        )
    if config.trajectories.held_out >= config.trajectories.num:
        raise ConfigError(f"trajectories.held_out {config.trajectories.held_out} leaves none of {config.trajectories.num} to train on.")
    return config.model_copy(update={"objective": config.objective.model_copy(update={"known": known}), "second_step_at": second})


def distill(
    config: DistillConfig,
    teacher: LoadedModel,
    guidance: Guidance,
    pipeline: LogitsPipeline,
    directory: Path,
    *,
    device: torch.device,
    stage: Callable[[int, str], Any],
    log: Callable[[str], None],
) -> Distilled:
    """Run a checked configuration. ``stage(total, name)`` is a progress context yielding ``advance(n)``.

    Raises Interrupted after a checkpoint, NumericalError when training diverges, InputError on damaged shards.
    """
    rule = config.trajectories
    book = teacher.codebook_VE.to(device)
    made = TrajectoryRule(
        rule.seed,
        teacher.source.config["num_classes"],
        guidance.scale,
        guidance.interval,
        pipeline,
        FlowSettings(solver=rule.solver, steps=rule.solver_steps),
    )
    make = partial(
        generate_shards, decoder=teacher.decoder(guidance), codebook_VE=book, rule=made, teacher_sha256=str(teacher.sha256),
        shard_size=rule.shard_size, batch_size=rule.batch_size,
    )  # fmt: skip
    with stage(rule.num, "trajectories") as advance:
        everything = load_shards(make(directory / "trajectories", num=rule.num, progress=advance), book.shape[1])
    short = None
    if rule.short:
        with stage(rule.short, "short trajectories") as advance:
            part = {"first_id": rule.num, "num": rule.short, "length": config.objective.short_codes}
            short = load_shards(make(directory / "trajectories-short", **part, progress=advance), book.shape[1])
    task = make_task(config, teacher, everything, short, book)
    with stage(config.optim.steps, "train the student") as advance:
        state = fit(task, config.optim, directory, device=device, progress=advance, log=log)
    figures = {k: v for k, v in state["history"][-1].items() if k not in ("step", "minutes")} if state["history"] else {}
    curves = training_curves(state["history"], task.accuracy_by_position(task.trained))
    path = directory / "bundle"
    if not path.exists():
        export(config, teacher, task, state, guidance, pipeline, curves, path)
    return Distilled(path, figures, curves, state)


def make_task(
    config: DistillConfig, teacher: LoadedModel, everything: Trajectories, short: Trajectories | None, book: torch.Tensor
) -> DD1Task:
    """Student from the teacher, the held-out split, and the images probe of the training curve."""
    generator = torch.Generator().manual_seed(config.optim.seed)
    torch.manual_seed(config.optim.seed)
    student = teacher.source.family.build_student(teacher.source.config, book.shape[1]).float()
    for name, layer in [*teacher.module.named_modules()]:
        if isinstance(layer, QuantLinear):  # a student starts from weights, of whatever precision its teacher drew with
            teacher.module.set_submodule(name, layer.floating())
    student.init_from_teacher(teacher.module.float().cpu(), book.cpu(), generator)  # its work on the device is done
    task = DD1Task(
        student,
        book,
        config.objective,
        everything.rows(slice(config.trajectories.held_out, None)),
        everything.rows(slice(0, config.trajectories.held_out)),
        short,
    )
    dataset = teacher.source.card.get("dataset")
    if config.probe_images and dataset is not None:
        task.probe = ImageProbe(teacher, book, dataset, config.probe_images)
    return task


class ImageProbe:
    """Frechet distance and class accuracy of a one-step student on a fixed seed, for the training curve only."""

    def __init__(self, teacher: LoadedModel, book: torch.Tensor, dataset: str, num: int):
        from arsp.data import shapes
        from arsp.metrics.features import extract, load_featnet

        self.net, self.extract = load_featnet(), extract
        self.tokenizer, self.book, self.layout, self.num = teacher.tokenizer, book, teacher.source.layout, num
        self.labels = torch.arange(num) % teacher.source.config["num_classes"]
        self.reference = extract(self.net, shapes.draw(10_000, 999, dataset)[0])["features"]

    def __call__(self, student: torch.nn.Module) -> dict[str, float]:
        from arsp.metrics.fidelity import frechet_distance
        from arsp.protocols import Request
        from arsp.tokenizers.pixels import to_uint8

        generator = StudentGenerator(student, self.book, self.layout, FewStep())
        codes = generator.generate(Request(torch.arange(self.num), 77, labels_B=self.labels.to(self.book.device))).codes_BL
        with torch.inference_mode():
            images = torch.cat([to_uint8(self.tokenizer.decode_codes(part)).cpu() for part in codes.split(100)])
        found = self.extract(self.net, images)
        accuracy = (found["shape"].argmax(-1) == self.labels).float().mean()
        return {"fid": frechet_distance(found["features"], self.reference), "class_accuracy": float(accuracy)}


def training_curves(history: list[dict[str, Any]], by_position: list[float]) -> dict[str, list[dict[str, float]]]:
    """The ``curves`` block of a record: every figure over minutes of training, and the one-step accuracy over positions."""
    keys = sorted({key for point in history for key in point} - {"step", "minutes"})
    curves = {key: [{"x": point["minutes"], "y": point[key]} for point in history if key in point] for key in keys}
    return curves | {"accuracy_by_position": [{"x": i, "y": y} for i, y in enumerate(by_position)]}


def export(
    config: DistillConfig,
    teacher: LoadedModel,
    task: DD1Task,
    state: dict[str, Any],
    guidance: Guidance,
    pipeline: LogitsPipeline,
    curves: dict[str, Any],
    path: Path,
) -> None:
    """Write the student's bundle: self-contained unless the teacher's tokenizer is an embedded one, which is referred to."""
    save_bundle(
        path,
        family=teacher.source.family.name,
        kind="student",
        config=teacher.source.config,
        model=task.trained.state_dict(),
        **tokenizer_entry(teacher),
        method=config.method,
        teacher=teacher.source.name,
        known=list(config.objective.known),
        code_dim=task.codebook.shape[1],
        dataset=teacher.source.card.get("dataset"),
        classes=teacher.source.card.get("classes"),
        sampling={
            "cfg": guidance.scale,
            "temperature": pipeline.temperature,
            "top_k": pipeline.top_k,
            "top_p": pipeline.top_p,
            "top_h": pipeline.top_h,
        },
        parents=[{"model": teacher.source.name, "sha256": teacher.sha256}],
        training={
            "steps": state["step"],
            "minutes": round(state["elapsed_s"] / 60, 1),
            "trajectories": config.trajectories.num,
            **({"short_trajectories": config.trajectories.short} if config.trajectories.short else {}),
            "final": state["history"][-1] if state["history"] else None,
        },
        curves=curves,
    )
