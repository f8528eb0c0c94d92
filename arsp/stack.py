"""Recipe -> checked, built pipeline: model, tokenizer, guidance, sampler or student, and how its images are made.

``check`` refuses impossible combinations from names and configurations alone, before any weight is read; ``build`` loads; a
:class:`Stack` turns sample ids into uint8 images. Every command that needs images goes through here.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from arsp.config import StrictModel
from arsp.decode.baselines import MarginalGenerator, SkipGenerator, class_frequencies, parse_baseline
from arsp.decode.drafts import NGrams, Tape
from arsp.decode.few_step import (
    FewStep,
    OfficialPrefixPolicy,
    StudentGenerator,
    TeacherLoopGenerator,
    parse_teacher_range,
    step_counts,
)
from arsp.decode.filters import LogitsPipeline
from arsp.decode.graphed import GraphedDecoder, GraphedScales, GraphedStudent
from arsp.decode.guidance import Guidance, RampGuidance
from arsp.decode.modes import MODES, Parts, VerifyConfig, build_mode, settle
from arsp.decode.planner import WindowPlanner, measured
from arsp.decode.schedule import ScaleRow, ScaleStep, describe_rows, load_schedule, parse_collab
from arsp.decode.smooth import SmoothGenerator
from arsp.errors import ConfigError, InputError, nearest
from arsp.kernels.build import require_compiler
from arsp.models.compiled import compile_blocks
from arsp.protocols import Generation, Generator, Request
from arsp.quant.linear import SimulatedLinear
from arsp.quant.recipe import RECIPES
from arsp.quant.transform import Quantise, data_free
from arsp.registry import Registry
from arsp.rng import Purpose, keyed_labels
from arsp.runs import atomic_file, cache_root, check_stop
from arsp.tokenizers.fast_decode import PixelDecoder, prepare_decoder
from arsp.tokenizers.pixels import resize_for_evaluation, to_uint8
from arsp.zoo.load import LoadedModel, ModelSource, load_model, module_bytes, resolve
from arsp.zoo.steps import beside, check_steps, load_steps, parts_of

SAMPLERS = Registry("samplers")
ON_LOAD = tuple(name for name in RECIPES if name != "litevar")  # of that name is an attention policy
DEFAULT_BATCH = 64  # images at a time where the user does not say


class StackConfig(StrictModel):
    """One pipeline. A value left at None comes from the model's card."""

    model: str = Field("llamagen", description="zoo name, bundle, or official file")
    tokenizer: str | None = Field(None, description="tokenizer file of an official GPT file")
    sampler: str = Field("ar", description="how codes are drawn from a teacher: ar, or a mode of arsp speculate")
    verify: VerifyConfig = Field(VerifyConfig(), description="options of such a mode")
    rng: Literal["keyed", "torch"] = Field("keyed", description="keyed: image i depends on (seed, i) only; torch: multinomial stream")
    cfg: float | None = Field(None, ge=0, description="guidance scale (off: <= 1, of a next-scale model 0)")
    cfg_interval: int = Field(-1, ge=-1, description="guide only the first codes, official counting (-1: all)")
    temperature: float | None = Field(None, ge=0)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    top_h: float | None = Field(None, ge=0, le=1, description="share of the entropy kept (0: off)")
    student_steps: int | None = Field(None, ge=1, le=2, description="passes of a distilled student (default 1)")
    split: int | None = Field(
        None, ge=-1, description="codes before it come from the logits head, vectors behind from the other (-1: all codes)"
    )
    teacher_range: str | None = Field(None, description="N-M: the teacher regenerates codes N..M-1 (1-based) between two student passes")
    compat_official_prefix: bool = Field(
        False, description="with teacher_range: the prefix enters a VAR teacher without mask, as in the released script"
    )
    baseline: str | None = Field(None, description="naive, mode or skip-N instead of the sampler")
    random_weights: bool = Field(False, description="no checkpoint: cost only, the images are noise")
    collab: str | None = Field(None, min_length=1, description="BIG:SMALL@N: the big model makes the first N scales (next-scale models)")
    schedule: str | None = Field(None, min_length=1, description="YAML file, one row a scale: model, depth, attention, cfg, precision")
    apply: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = Field(
        [], description="what makes a pass cheaper: litevar=PROFILE, or a data-free recipe of arsp quantize (w4a8, w8a8)"
    )
    share: Literal["map"] | None = Field(None, description="guidance halves share the attention maps at every scale")
    more_smooth: bool = Field(False, description="Gumbel-smoothed vectors instead of codes (next-scale; pictures, never metrics)")
    graphs: bool = Field(False, description="replay passes as CUDA graphs (--device cuda)")
    compile: bool = Field(False, description="run the blocks of the transformer through torch.compile")
    image_size: int | None = Field(None, ge=1, description="bicubic resize of the decoder's output before uint8")
    decoder_dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="precision of the tokenizer's decoder")
    decoder_channels_last: bool | None = Field(None, description="its memory layout (default: where it is faster)")
    decoder_chunk: int | None = Field(None, ge=1, description="images it decodes at a time (default: half a million pixels)")
    decoder_compile: bool = Field(False, description="run it through torch.compile")

    @model_validator(mode="before")
    @classmethod
    def _collab_names_the_model(cls, values: dict[str, Any]) -> dict[str, Any]:
        collab = values.get("collab")
        return {"model": collab.partition(":")[0], **values} if isinstance(collab, str) else values


@dataclass
class Stack:
    """A built pipeline. ``generator`` makes codes, ``pixels`` decodes them."""

    config: StackConfig
    name: str
    model: LoadedModel
    generator: Generator
    device: torch.device
    pipeline: LogitsPipeline
    guidance: Guidance | RampGuidance
    decoder: PixelDecoder | None = None
    rows: list[ScaleRow] = field(default_factory=list)
    steps: list[ScaleStep] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=dict)
    batch_seconds: list[tuple[int, float]] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        return self.model.source.config.get("num_classes", 0)

    def request(self, sample_ids: Tensor, seed: int, labels: Tensor | None) -> Request:
        return Request(sample_ids.to(self.device), seed, labels_B=None if labels is None else labels.to(self.device))

    @torch.inference_mode()
    def images(self, request: Request) -> Tensor:
        """uint8 ``(B, 3, H, W)`` on the CPU for one batch; its wall-clock time and counters are kept in the stack."""
        started = time.perf_counter()
        generation = self.generator.generate(request)
        images = self.decode(generation)
        self.batch_seconds.append((request.batch_size, time.perf_counter() - started))
        self.stats = dict(generation.stats)
        return images

    def require_decoder(self) -> PixelDecoder:
        """The tokenizer's decoder as configured; InputError where an official file came without a tokenizer."""
        if self.decoder is None:
            raise InputError(f"{self.model.name} has no tokenizer to decode its codes.", "Give --tokenizer FILE.")
        return self.decoder

    @torch.inference_mode()
    def decode(self, generation: Generation) -> Tensor:
        """uint8 images of codes, or of continuous vectors where the generation has them."""
        decoder, codes, vectors_BLE = self.require_decoder(), generation.codes_BL, generation.embeddings_BLE
        pixels = decoder.decode_codes(codes) if vectors_BLE is None else decoder.decode_embeddings(vectors_BLE)
        if self.config.image_size is not None and self.config.image_size != pixels.shape[-1]:
            pixels = resize_for_evaluation(pixels, self.config.image_size)
        return to_uint8(pixels).cpu()

    def batches(self, num: int, seed: int, labels: Tensor | None, batch_size: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(sample ids, images) for ids ``first .. num``, batch by batch."""
        for ids in torch.arange(first, num).split(batch_size):
            yield ids, self.images(self.request(ids, seed, None if labels is None else labels[ids]))

    def describe(self) -> dict[str, Any]:
        """The ``stack`` block of a record."""
        source = self.model.source
        return {
            "name": self.name,
            "model": source.name,
            "kind": source.kind,
            "family": source.family.name,
            "origin": source.origin,
            "weights_sha256": self.model.sha256,
            "dataset": source.card.get("dataset"),
            "sampler": self.config.baseline
            or ("student" if source.kind == "student" else "more-smooth" if self.config.more_smooth else self.config.sampler),
            "cfg": self.guidance.scale,
            "cfg_interval": self.guidance.interval,
            "temperature": self.pipeline.temperature,
            "top_k": self.pipeline.top_k,
            "top_p": self.pipeline.top_p,
            "top_h": self.pipeline.top_h,
            "rng": self.config.rng,
            "num_tokens": source.layout.num_tokens,
            "grid": list(source.layout.grid),
            **(
                {
                    "verify": settle(self.config.sampler, self.config.verify, source.layout).model_dump(exclude_none=True)
                    | {"exactness": self.generator.exactness}
                }
                if hasattr(self.generator, "statistics")
                else {}
            ),
            **({"decoder": changed} if (changed := decoder_options(self.config)) else {}),
            **(
                {
                    "schedule": describe_rows(self.rows, self.sides, str(self.model.dtype), source.name),
                    "parts": parts_of(self.rows, source),
                }
                if self.rows
                else {}
            ),
        }

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the scales of a next-scale model."""
        return tuple(self.model.source.config["patch_nums"])

    def cost(self) -> dict[str, Any]:
        """The ``cost`` block of a record from the batches made so far (wall clock of codes + decoding)."""
        reports = self.attention_reports()
        per_image = sorted(seconds / rows * 1000 for rows, seconds in self.batch_seconds) or [None]
        total = sum(seconds for _, seconds in self.batch_seconds)
        return {
            "passes": self.stats.get("passes"),
            "tokens_per_pass": self.stats.get("tokens_per_pass"),
            "kv_bytes": self.stats.get("kv_bytes"),
            "latency_ms": {"p50": per_image[len(per_image) // 2], "p95": per_image[min(len(per_image) - 1, int(len(per_image) * 0.95))]},
            "images_per_s": sum(rows for rows, _ in self.batch_seconds) / total if total else None,
            "weight_bytes": sum(module_bytes(module) for module in self.modules()),
            "simulated": self.simulated,
            **({"attention": reports} if reports else {}),
            **(
                {"verify": self.generator.statistics.report(self.model.source.layout.grid)} if hasattr(self.generator, "statistics") else {}
            ),
        }

    @property
    def simulated(self) -> bool:
        """Whether work that is said to be saved is done all the same: windows only masked, integers only rounded to."""
        networks = (part for module in self.modules() for part in module.modules())
        return any(step.policy.simulated for step in self.steps) or any(isinstance(part, SimulatedLinear) for part in networks)

    def modules(self) -> list[Any]:
        """Every network of the stack once."""
        return list({id(module): module for module in (self.model.module, *(step.model for step in self.steps))}.values())

    def attention_reports(self) -> list[dict[str, Any]]:
        """What each policy of the schedule computed and what it left out, over all images so far."""
        policies = {id(step.policy): step for step in self.steps if hasattr(step.policy, "report")}
        return [{"model": step.owner or self.model.name, **step.policy.report()} for step in policies.values()]


def check(config: StackConfig) -> ModelSource:
    """Refuse an impossible stack before any weight is read; returns the resolved model."""
    source = resolve(config.model, tokenizer=config.tokenizer)
    transform = transform_of(config)
    if transform and "quantization" in source.card:
        raise ConfigError(f"--apply {transform.name}: {source.name} is quantised already.", "Drop it, or apply it to the base model.")
    if source.kind not in ("teacher", "student"):
        raise ConfigError(f"{config.model} is of kind '{source.kind}', it generates nothing.", "See: arsp models ls")
    if source.kind == "student" and source.origin == "file" and config.tokenizer is None:
        raise InputError(f"{source.name} is a student: it needs the codebook of its tokenizer.", "Give --tokenizer FILE.")
    only_student = {
        "--student-steps": config.student_steps, "--split": config.split, "--teacher-range": config.teacher_range,
        "--compat-official-prefix": config.compat_official_prefix or None,
    }  # fmt: skip
    if config.graphs and config.more_smooth:
        raise ConfigError("graphs: passes over vectors in place of codes are not captured.", "Drop graphs=true.")
    wanted = next_scale_options(config)
    if wanted and (source.layout.is_raster or source.kind != "teacher"):
        raise ConfigError(f"{', '.join(wanted)}: needs a next-scale teacher, {source.name} is none.", "Use --model var.")
    if source.kind == "teacher":
        for option, value in only_student.items():
            if value is not None:
                raise ConfigError(
                    f"{option} belongs to a distilled student; {source.name} is a teacher.",
                    f"Use --model {source.family.student}, or distil your own.",
                )
        if config.sampler in MODES:
            check_mode(config, source)
        else:
            if config.sampler not in (known := SAMPLERS.names()):
                raise ConfigError(f"unknown sampler '{config.sampler}'", nearest(config.sampler, {*known, *MODES}))
            if config.verify != VerifyConfig():
                raise ConfigError(
                    f"verify.*: options of a mode of the verify family, the sampler is {config.sampler}.", "Give --sampler MODE."
                )
        if config.baseline:
            parse_baseline(config.baseline, source.layout)
            if config.rng != "keyed":
                raise ConfigError(f"--rng {config.rng} has no effect on --baseline {config.baseline}, which draws with the keyed stream.")
            if wanted and not config.baseline.startswith("skip"):
                raise ConfigError(f"--baseline {config.baseline} counts the codes of the plain teacher.", f"Drop {', '.join(wanted)}.")
        if config.more_smooth and (config.rng != "keyed" or config.baseline or config.sampler != "ar"):
            raise ConfigError("--more-smooth is a sampler of its own.", "Drop --rng, --sampler and --baseline.")
        if not source.layout.is_raster:
            check_steps(schedule_rows(config, source), source, config.random_weights)
    else:
        if config.baseline:
            raise ConfigError(
                f"--baseline is a control made from a teacher; {source.name} is a student.",
                f"Use --model {source.card.get('teacher', 'llamagen')}.",
            )
        if config.sampler != "ar":
            raise ConfigError(f"--sampler {config.sampler} needs an autoregressive teacher; {source.name} is a distilled student.")
        if config.rng != "keyed":
            raise ConfigError(f"--rng {config.rng} has no effect on {source.name}: the noise of a student is keyed by (seed, image).")
        sampling = {
            "--cfg": config.cfg,
            "--temperature": config.temperature,
            "--top-k": config.top_k,
            "--top-p": config.top_p,
            "--top-h": config.top_h,
        }
        given = [option for option, value in sampling.items() if value is not None] + ["--cfg-interval"] * (config.cfg_interval >= 0)
        if given and config.teacher_range is None:
            raise ConfigError(
                f"{', '.join(given)}: a student has its teacher's rule baked in and does not sample.",
                "Drop it, or add --teacher-range N-M.",
            )
        FewStep(step_counts(config.student_steps or 1, source.card["known"][1:]), _split(config)).check(source.layout)
        first = 0
        if config.teacher_range:
            first, _ = parse_teacher_range(config.teacher_range, source.layout)
            _teacher_source(source)
        if config.compat_official_prefix and (source.layout.is_raster or first == 0):
            raise ConfigError(
                "--compat-official-prefix: no scales are handed to a teacher here.",
                "It takes a student of a VAR and --teacher-range N-M with N above 1.",
            )
    guidance, _ = sampling_rule(source, config)
    if config.share and not guidance.active:
        raise ConfigError("--share: without guidance there are no halves to share.", "Drop it, or give --cfg above 0.")
    return source


def check_mode(config: StackConfig, source: ModelSource) -> VerifyConfig:
    """The settled options of a mode. ConfigError when model, options or draft model do not fit it; no weight is read."""
    if not source.capabilities.rewind:
        raise ConfigError(
            f"mode {config.sampler}: {source.name} is a {source.layout.order} {source.kind} and cannot take codes back.",
            "Use a raster teacher: --model llamagen.",
        )
    options = settle(config.sampler, config.verify, source.layout)
    if config.rng != "keyed":
        raise ConfigError(f"--rng {config.rng} has no effect in mode {config.sampler}, which draws with the keyed stream.")
    if config.baseline:
        raise ConfigError(f"--baseline and mode {config.sampler} both say how codes are made.", "Drop one of the two.")
    if options.draft_model:
        beside(resolve(options.draft_model), source)
    if config.sampler.startswith("lantern") and source.tokenizer_identity is None:
        raise InputError(
            f"mode {config.sampler}: {source.name} has no tokenizer, and near codes need its codebook.", "Give --tokenizer FILE."
        )
    return options


def _mode(config: StackConfig, model: LoadedModel, decoder: Any, pipeline: LogitsPipeline, log: Callable[[str], None]) -> Generator:
    """The generator of a mode of the verify family."""
    options = settle(config.sampler, config.verify, model.source.layout)
    parts = Parts(decoder, pipeline, embedding_VC=model.module.tok_embeddings.weight.detach())
    if config.sampler.startswith("lantern"):
        parts.codebook_VE = model.codebook_VE
    if options.draft_model:
        draft = load_model(
            resolve(options.draft_model), model.device, model.dtype, random_weights=config.random_weights, with_tokenizer=False
        )
        parts.draft = draft.decoder(decoder.guidance)
    if options.init == "prior":
        parts.prior_YLV = _frequencies(model, decoder, pipeline, SAMPLERS.get("ar")(decoder, pipeline, "keyed"), log)
    if options.init == "ngram":
        parts.ngrams = _ngrams(model, decoder, pipeline, SAMPLERS.get("ar")(decoder, pipeline, "keyed"), log)
    if options.window == "auto":

        def plan(request: Request) -> WindowPlanner:
            key = f"{model.sha256}-{model.dtype}-{decoder.guidance}-{pipeline}-{config.sampler}-{parts.ngrams is not None}"
            length = decoder.layout.num_tokens
            tape = functools.cache(lambda rows: Tape.of(request.rows(torch.arange(rows) % request.batch_size), length, decoder.vocab_size))

            def check_drafts(logits_BmV: Tensor) -> None:
                some = tape(len(logits_BmV))
                codes = logits_BmV.new_zeros(logits_BmV.shape[:2], dtype=torch.int64)
                if parts.ngrams is not None:
                    parts.ngrams.fill(some, some.known_B + codes.shape[1] - 1)
                pipeline.verify(logits_BmV, codes, 0, some.ids_B, codes, Purpose.DRAFT)

            log("timing passes of this model to choose windows (kept for the next run)")
            return WindowPlanner(measured(decoder, request, request.batch_size, key, after=check_drafts))

        parts.planner = plan
    return build_mode(config.sampler, parts, options)


def mode_label(config: StackConfig, source: ModelSource) -> str:
    """What a mode of the verify family adds to the name of a stack."""
    if config.sampler not in MODES:
        return ""
    given = {key: value for key, value in config.verify if value is not None}
    return " " + " ".join([config.sampler, *(f"{key}={value}" for key, value in given.items())])


def next_scale_options(config: StackConfig) -> list[str]:
    """The options in use that only a next-scale teacher has."""
    given = {
        "--collab": config.collab, "--schedule": config.schedule, "--apply": policies(config), "--share": config.share,
        "--more-smooth": config.more_smooth,
    }  # fmt: skip
    return [option for option, value in given.items() if value]


def policies(config: StackConfig) -> list[str]:
    """What ``apply`` names that is not a recipe: attention policies. ConfigError for a name that is neither."""
    found = [text for text in config.apply if text not in ON_LOAD]
    for text in found:
        name = text.partition("=")[0]
        if name != "litevar":
            raise ConfigError(f"--apply {text}: unknown transform or policy '{name}'.", f"Known: litevar=PROFILE, {', '.join(ON_LOAD)}")
    return found


def transform_of(config: StackConfig) -> Quantise | None:
    """The recipe that ``apply`` names. ConfigError for two of them, or one that needs samples of the model."""
    names = [text for text in config.apply if text in ON_LOAD]
    if len(names) > 1:
        raise ConfigError(f"--apply {', '.join(names)}: one recipe at a time.", "Keep one.")
    return data_free(names[0]) if names else None


def decoder_options(config: StackConfig) -> dict[str, Any]:
    """Settings of the tokenizer's decoder that are not the default: keyword arguments of ``prepare_decoder``."""
    given = {name: getattr(config, f"decoder_{name}") for name in ("dtype", "channels_last", "chunk", "compile")}
    return {name: value for name, value in given.items() if value != StackConfig.model_fields[f"decoder_{name}"].default}


def schedule_plan(config: StackConfig, source: ModelSource, dtype: str) -> dict[str, Any]:
    """The schedule as ``--dry-run`` prints it: one row a scale; nothing for raster models and students."""
    if source.layout.is_raster or source.kind != "teacher":
        return {}
    return {"schedule": describe_rows(schedule_rows(config, source), tuple(source.config["patch_nums"]), dtype, source.name)}


def schedule_parts(config: StackConfig, source: ModelSource) -> dict[str, str | None]:
    """SHA-256 of the other models and the profiles of a stack by name, as its record has them under ``parts``."""
    return parts_of(schedule_rows(config, source), source) if next_scale_options(config) else {}


def schedule_rows(config: StackConfig, source: ModelSource) -> list[ScaleRow]:
    """One row a scale from the schedule file and the options that fill its columns. ConfigError when they contradict each other."""
    K = len(source.layout.blocks)
    rows = load_schedule(config.schedule, K) if config.schedule else [ScaleRow()] * K
    if config.collab:
        big, small, count = parse_collab(config.collab, K)
        if config.schedule:
            raise ConfigError("--collab and --schedule both choose models.", "Write the models into the schedule's rows.")
        named = resolve(big)
        if (named.name, named.path) != (source.name, source.path):
            raise ConfigError(f"--collab {config.collab}: the big model is not --model {source.name}.", f"Use --model {big}.")
        rows = [*rows[:count], *(row.model_copy(update={"model": small}) for row in rows[count:])]
    for text in policies(config):
        rows = _fill(rows, f"--apply {text}", {"attention": text}, lambda row: row.model == "" and row.attention == "dense")
    if config.share:
        rows = _fill(rows, "--share map", {"cfg": "shared"}, lambda row: row.cfg == "full")
    return rows


def _fill(rows: list[ScaleRow], option: str, cells: dict[str, Any], wanted: Callable[[ScaleRow], bool]) -> list[ScaleRow]:
    """An option's cells in the rows that leave them open. ConfigError when there is none: the option would do nothing."""
    if not any(wanted(row) for row in rows):
        raise ConfigError(f"{option}: every scale of the schedule says something else already.", "Drop one of the two.")
    return [row.model_copy(update=cells) if wanted(row) else row for row in rows]


def build(
    config: StackConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    log: Callable[[str], None] = lambda text: None,
) -> Stack:
    """Check, load and connect. ``log`` is told about anything that takes long before the first image."""
    source, transform = check(config), transform_of(config)
    model = load_model(source, device, torch.float32 if transform else dtype, random_weights=config.random_weights)
    if transform:
        model.module = transform.apply(model.module).to(dtype)
    teacher = model if source.kind == "teacher" else _teacher_of(model, config, device, dtype)
    guidance, pipeline = sampling_rule((teacher or model).source, config)
    rows: list[ScaleRow] = []
    steps: list[ScaleStep] = []
    if source.kind == "student":
        settings = FewStep(step_counts(config.student_steps or 1, source.card["known"][1:]), _split(config))
        student = lambda labels_B, x_BLE, known_B: model.module(labels_B, x_BLE.to(dtype), known_B)  # vectors stay float32
        if config.graphs:
            student = GraphedStudent(student, torch.device(device))
        generator: Generator = StudentGenerator(student, model.codebook_VE, source.layout, settings)
        name = f"{source.label} {config.student_steps or 1}-step"
        if config.teacher_range:
            first, stop = parse_teacher_range(config.teacher_range, source.layout)
            official = ScaleStep(teacher.module, policy=OfficialPrefixPolicy())
            decoder = teacher.decoder(guidance, [official] * len(source.layout.blocks) if config.compat_official_prefix else None)
            generator = TeacherLoopGenerator(generator, decoder, pipeline, first, stop)
            name = f"{source.label} pre-trained-{config.teacher_range}" + " (official prefix)" * config.compat_official_prefix
    else:
        if next_scale_options(config):
            rows = schedule_rows(config, source)
            steps = load_steps(rows, model, device, dtype, config.random_weights)
        decoder = model.decoder(guidance, steps or None)
        if config.graphs:
            raster = source.layout.is_raster
            decoder = GraphedDecoder(decoder.model, guidance, decoder.policy) if raster else GraphedScales(decoder)
        if config.sampler in MODES:
            ar = _mode(config, model, decoder, pipeline, log)
        else:
            ar = SmoothGenerator(decoder, pipeline) if config.more_smooth else SAMPLERS.get(config.sampler)(decoder, pipeline, config.rng)
        generator, name = (
            (ar, source.label + mode_label(config, source))
            if not config.baseline
            else (_baseline(config, model, decoder, pipeline, ar, log), f"{source.label} {config.baseline}")
        )
    pixel_decoder = None if model.tokenizer is None else prepare_decoder(model.tokenizer, **decoder_options(config))
    flags = [flag for flag in ("more_smooth", "graphs", "compile") if getattr(config, flag)]
    named = (config.collab, config.schedule, config.share, *config.apply, *(flag.replace("_", "-") for flag in flags))
    name = " + ".join([name, *(part for part in named if part)])
    if config.decoder_dtype != "float32":
        name = f"{name} + {config.decoder_dtype} decoder"
    stack = Stack(config, name, model, generator, torch.device(device), pipeline, guidance, pixel_decoder, rows, steps)
    if decoder_options(config):
        stack.require_decoder()
    if config.compile:
        require_compiler(device, "compile=true")
        for module in {id(module): module for module in (*stack.modules(), (teacher or model).module)}.values():
            compile_blocks(module)
    return stack


def sampling_rule(
    source: ModelSource, config: StackConfig | Any, card_rule: dict[str, Any] | None = None
) -> tuple[Guidance | RampGuidance, LogitsPipeline]:
    """Guidance and filters: the configuration's values, those of ``card_rule`` (the card's sampling rule) where it is silent."""
    rule = card_rule or source.card.get("sampling") or {}
    pick = lambda key, default: getattr(config, key) if getattr(config, key) is not None else rule.get(key, default)  # noqa: E731
    guidance = source.family.guidance(pick("cfg", None), config.cfg_interval, source.config)
    return guidance, LogitsPipeline(pick("temperature", 1.0), int(pick("top_k", 0)), pick("top_p", 1.0), pick("top_h", 0.0))


def _split(config: StackConfig) -> int:
    return -1 if config.split is None else config.split


def _teacher_source(student: ModelSource) -> ModelSource:
    """The teacher that a student's card or bundle names. ConfigError when it names none or one over other codes."""
    if not student.card.get("teacher"):
        raise ConfigError(f"{student.name} does not say which teacher it was distilled from, and --teacher-range needs it.")
    teacher = resolve(student.card["teacher"])
    same = teacher.layout == student.layout and teacher.config["vocab_size"] == student.config["vocab_size"]
    if teacher.kind != "teacher" or not same:
        raise ConfigError(f"{student.name} was not distilled from {teacher.name}: their codes differ.")
    return teacher


def _teacher_of(student: LoadedModel, config: StackConfig, device: torch.device | str, dtype: torch.dtype) -> LoadedModel | None:
    """The student's teacher, with the tokenizer that is loaded already, where it is in the loop."""
    if not config.teacher_range:
        return None
    teacher = load_model(_teacher_source(student.source), device, dtype, with_tokenizer=False)
    return replace(teacher, tokenizer=student.tokenizer)


def _baseline(
    config: StackConfig, model: LoadedModel, decoder: Any, pipeline: LogitsPipeline, ar: Generator, log: Callable[[str], None]
) -> Generator:
    kind, skip = parse_baseline(config.baseline, decoder.layout)
    if kind == "skip":
        return SkipGenerator(decoder, pipeline, model.codebook_VE, skip)
    return MarginalGenerator(_frequencies(model, decoder, pipeline, ar, log), decoder.layout, mode=kind == "mode")


def _frequencies(model: LoadedModel, decoder: Any, pipeline: LogitsPipeline, ar: Generator, log: Callable[[str], None]) -> Tensor:
    """How often the teacher draws each code, by class and position ``(Y, L, V)``; counted once and kept."""
    num_classes = max(1, model.source.config.get("num_classes", 0))
    num = num_classes * max(50, 5000 // num_classes)
    rule = f"{model.sha256}-{decoder.guidance}-{pipeline}-{num}"
    cache = cache_root() / "frequencies" / f"{_digest(rule)}.safetensors"
    if not cache.is_file():
        log(f"counting the teacher's codes over {num} samples (kept in {cache})")
    try:
        device = model.device
        return class_frequencies(ar, decoder.layout, num_classes, decoder.vocab_size, num=num, seed=1_000_003, cache=cache, device=device)
    except SafetensorError as error:
        raise InputError(f"the stored code frequencies {cache} cannot be read: {error}", f"Delete {cache} to count them again.") from error


def _ngrams(model: LoadedModel, decoder: Any, pipeline: LogitsPipeline, ar: Generator, log: Callable[[str], None]) -> NGrams:
    """What the teacher writes behind three codes, counted once over 10 000 of its samples, classes in turn, and kept."""
    num = 10_000
    cache = cache_root() / "ngrams" / f"{_digest(f'{model.sha256}-{decoder.guidance}-{pipeline}-{num}-{NGrams.order}')}.safetensors"
    if not cache.is_file():
        log(f"counting runs of codes over {num} samples of {model.name} (kept in {cache})")
        parts = []
        for ids in torch.arange(num, device=model.device).split(500):
            check_stop()
            labels = ids % max(1, model.source.config.get("num_classes", 0))
            parts.append(ar.generate(Request(ids, 1_000_003, labels_B=labels)).codes_BL.cpu())
        found = NGrams.count(torch.cat(parts), decoder.vocab_size)
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(cache) as temporary:
            save_file({"keys": found.keys_N, "codes": found.codes_N.contiguous()}, temporary)
    try:
        stored = load_file(cache, device=str(model.device))
    except SafetensorError as error:
        raise InputError(f"the stored runs of codes {cache} cannot be read: {error}", f"Delete {cache} to count them again.") from error
    return NGrams(stored["keys"], stored["codes"], decoder.vocab_size)


def _digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:16]


def labels_for(stack: Stack, num: int, seed: int, classes: list[int] | None) -> Tensor | None:
    """Class ids of samples 0..num: the given ones in turn, else uniform and keyed by (seed, sample id); None for text models."""
    if "class" not in stack.model.source.capabilities.conditions:
        return None
    if classes:
        return torch.tensor(classes, dtype=torch.int64).repeat(-(-num // len(classes)))[:num]
    return keyed_labels(seed, torch.arange(num), stack.num_classes)


def sample_images(
    model: str,
    num: int,
    seed: int = 0,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    progress: Callable[[int], None] = lambda n: None,
    log: Callable[[str], None] = lambda text: None,
    classes: list[int] | None = None,
    **options: Any,
) -> tuple[Tensor, list[int] | None, dict[str, Any], dict[str, Any]]:
    """``num`` uint8 images of a model, their labels, and the ``stack`` and ``cost`` blocks of a record. ``options``: StackConfig."""
    stack = build(StackConfig(model=model, **options), device, dtype, log)
    stack.require_decoder()
    labels, parts = labels_for(stack, num, seed, classes), []
    for ids, images in stack.batches(num, seed, labels, batch_size or DEFAULT_BATCH):
        parts.append(images)
        progress(len(ids))
    return torch.cat(parts), None if labels is None else labels.tolist(), stack.describe(), stack.cost()
