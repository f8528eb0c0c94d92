"""What each kind of training needs before the loop and leaves behind after it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from arsp.config import StrictModel
from arsp.data.shapes import VARIANTS
from arsp.decode.schedule import parse_scales
from arsp.errors import ConfigError, InputError, nearest
from arsp.metrics.features import FEATNET_NAME
from arsp.models.llamagen import GPTConfig
from arsp.models.var import VAR, VARConfig
from arsp.runs import atomic_file, cache_root
from arsp.tokenizers.llamagen_vq import VQConfig, VQModel
from arsp.tokenizers.var_vqvae import VQVAE, VQVAEConfig
from arsp.train.data import load_pool
from arsp.train.loop import OptimConfig, Task
from arsp.train.tasks import FeatureTask, ScaleTeacherTask, ScaleTokenizerTask, TeacherTask, TokenizerTask, tokenise
from arsp.zoo.bundle import save_bundle
from arsp.zoo.load import LoadedModel, load_model, load_tokenizer, resolve, resolve_tokenizer


class VQSection(StrictModel):
    """Sizes of the tokenizer; the defaults are those of the embedded one (32x32 px -> 4x4 codes)."""

    ch: int = Field(32, ge=32, multiple_of=32)
    ch_mult: tuple[PositiveInt, ...] = Field((1, 2, 2, 2), min_length=1)
    num_res_blocks: int = Field(1, ge=1)
    z_channels: int = Field(64, ge=32, multiple_of=32)
    codebook_size: int = Field(256, ge=2)
    codebook_embed_dim: int = Field(8, ge=1)


class MultiScaleSection(StrictModel):
    """Sizes of a VAR tokenizer; the defaults are those of the embedded one (32x32 px -> six maps up to 8x8, 130 codes)."""

    ch: int = Field(32, ge=32, multiple_of=32)
    ch_mult: tuple[PositiveInt, ...] = Field((1, 2, 2), min_length=1)
    num_res_blocks: int = Field(1, ge=1)
    z_channels: int = Field(12, ge=1)
    vocab_size: int = Field(1536, ge=2)
    patch_nums: tuple[PositiveInt, ...] = Field((1, 2, 3, 4, 6, 8), min_length=2, description="sides of the maps, rising")
    truncate: float = Field(0.3, ge=0, le=1, description="share of the rows decoded from their first scales only")
    first_share: float = Field(0.65, gt=0, lt=1, description="share of the codebook that is fitted to the first scale")


class GPTSection(StrictModel):
    """Sizes of the teacher; vocabulary, grid and classes come from the tokenizer and the data."""

    dim: int = Field(128, ge=4)
    n_layer: int = Field(10, ge=1)
    n_head: int = Field(4, ge=1)
    multiple_of: int = Field(32, ge=1)
    class_dropout_prob: float = Field(0.1, ge=0, lt=1)
    dropout: float = Field(0.0, ge=0, lt=1, description="of tokens, attention output and feed-forward output")


class TokenizerTraining(StrictModel):
    """Configuration of ``arsp train tokenizer``."""

    data: str = "shapes32-coarse"
    vq: VQSection = VQSection()
    optim: OptimConfig = OptimConfig(steps=3000, batch_size=32, lr=1e-3, warmup=100, schedule="flat-linear", eval_every=100)


class VARTokenizerTraining(StrictModel):
    """Configuration of ``arsp train tokenizer --family var``."""

    data: str = "shapes32-coarse"
    vq: MultiScaleSection = MultiScaleSection()
    optim: OptimConfig = OptimConfig(steps=4000, batch_size=32, lr=1e-3, warmup=100, schedule="flat-linear", eval_every=200)


class SamplingSection(StrictModel):
    """The rule that the card of a teacher recommends."""

    cfg: float = Field(1.25, ge=0)
    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(0.95, ge=0, le=1)
    top_h: float = Field(0.0, ge=0, le=1)


class TeacherTraining(StrictModel):
    """Configuration of ``arsp train teacher``."""

    data: str = "shapes32-coarse"
    tokenizer: str = "shapes-vq16"
    gpt: GPTSection = GPTSection()
    optim: OptimConfig = OptimConfig(
        steps=4000, batch_size=128, lr=1.5e-3, warmup=150, schedule="cosine", eval_every=200, checkpoint_every=500
    )
    sampling: SamplingSection = Field(SamplingSection(), description="rule written into the card")


class VARSection(StrictModel):
    """Sizes of a VAR teacher; scales, vocabulary and classes come from the tokenizer and the data."""

    depth: int = Field(8, ge=1)
    embed_dim: int = Field(128, ge=4)
    num_heads: int = Field(4, ge=1)
    shared_aln: bool = False
    cond_drop_rate: float = Field(0.1, ge=0, lt=1)
    drop_path_rate: float = Field(0.0, ge=0, lt=1)


class VARSampling(SamplingSection):
    """The rule that the card of a VAR teacher recommends; guidance 0 is off."""

    cfg: float = Field(0.5, ge=0)


class VARTeacherTraining(StrictModel):
    """Configuration of ``arsp train teacher --family var``."""

    data: str = "shapes32-coarse"
    tokenizer: str = "shapes-msvq"
    var: VARSection = VARSection()
    optim: OptimConfig = OptimConfig(
        steps=3600, batch_size=64, lr=1.5e-3, warmup=150, schedule="cosine", eval_every=200, checkpoint_every=200
    )
    sampling: VARSampling = Field(VARSampling(), description="rule written into the card")
    short: float = Field(0.6, ge=0, le=1, description="share of the updates that train the first short_scales scales only")
    short_scales: int = Field(4, ge=1)
    init: str | None = Field(None, description="start from this teacher of the same tokenizer (its sizes are taken)")
    scales: str | None = Field(None, description="a-b: train these scales only (a drafter or a refiner)")
    expert: str | None = Field(None, description="match the law of this teacher too")
    expert_weight: float = Field(0.5, ge=0, le=1)
    expert_from: int = Field(0, ge=0, description="match it from this scale on; coarser ones learn from the images alone")


class FeatureTraining(StrictModel):
    """Configuration of ``arsp train features`` (the packaged network is frozen: it defines the metric's name)."""

    data: str = "shapes32"
    optim: OptimConfig = OptimConfig(
        steps=700, batch_size=128, lr=4e-3, warmup=150, schedule="cosine", final_lr=0.0, weight_decay=1e-4, eval_every=100
    )


SCHEMAS: dict[tuple[str, str], type[StrictModel]] = {  # (what, family)
    ("tokenizer", "llamagen"): TokenizerTraining,
    ("tokenizer", "var"): VARTokenizerTraining,
    ("teacher", "llamagen"): TeacherTraining,
    ("teacher", "var"): VARTeacherTraining,
    ("features", "llamagen"): FeatureTraining,
}


@dataclass
class Job:
    """A task ready for :func:`arsp.train.loop.fit`, and how its result becomes a bundle."""

    task: Task
    export: Callable[[Path, dict[str, Any]], Any]


def prepare(config: Any, stage: Callable[[int, str], Any], log: Callable[[str], None]) -> Job:
    """Data and task of a training, told by its schema. InputError or ConfigError before any long work when the data do not fit."""
    makers = {
        TokenizerTraining: _tokenizer, VARTokenizerTraining: _var_tokenizer, TeacherTraining: _teacher,
        VARTeacherTraining: _var_teacher, FeatureTraining: _features,
    }  # fmt: skip
    return makers[type(config)](config, stage, log)


def _tokenizer(config: TokenizerTraining, stage: Callable, log: Callable) -> Job:
    images, held_out, side = _pool(config.data)
    vq = VQConfig(**config.vq.model_dump(), image_size=side)
    if side % vq.downsample:
        raise ConfigError(f"images of {side} px: expected a size divisible by {vq.downsample} (vq.ch_mult).")
    torch.manual_seed(config.optim.seed)
    task = TokenizerTask(VQModel(vq), images, held_out, total_steps=config.optim.steps)
    return Job(task, lambda path, state: _bundle(path, "llamagen", "tokenizer", _plain(vq), task, state, config.data))


def _var_tokenizer(config: VARTokenizerTraining, stage: Callable, log: Callable) -> Job:
    images, held_out, side = _pool(config.data)
    vq = VQVAEConfig(**config.vq.model_dump(exclude={"truncate", "first_share"}))
    if side != vq.image_size:
        raise ConfigError(f"images of {side} px: vq.patch_nums and vq.ch_mult make {vq.image_size} px.")
    if vq.vocab_size - round(config.vq.first_share * vq.vocab_size) < len(vq.patch_nums) - 1:
        raise ConfigError(f"vq.first_share {config.vq.first_share:g} of {vq.vocab_size} codes leaves less than one to each other scale.")
    torch.manual_seed(config.optim.seed)
    task = ScaleTokenizerTask(
        VQVAE(vq), images, held_out, total_steps=config.optim.steps, truncate=config.vq.truncate, first_share=config.vq.first_share
    )
    return Job(task, lambda path, state: _bundle(path, "var", "tokenizer", _plain(vq), task, state, config.data))


def _pool(data: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """All images, up to 1000 of them for figures, and their side."""
    images, _, _ = load_pool(data)
    if images.shape[-1] != images.shape[-2]:
        raise ConfigError(f"images of {images.shape[-1]}x{images.shape[-2]} px: expected squares.")
    return images, images[torch.linspace(0, len(images) - 1, min(1000, len(images))).long()], images.shape[-1]


def _codes(data: str, tokenizer: Any, stage: Callable, log: Callable) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Codes and labels of all images, and the names of the classes. Codes are kept in the cache under the hash of images and tokenizer."""
    images, labels, names = load_pool(data)
    side = tokenizer.config.image_size
    if images.shape[-1] != side:
        raise InputError(f"{data}: images of {images.shape[-1]} px, the tokenizer takes {side} px.")
    digest = hashlib.sha256(repr(tokenizer.config).encode())
    for tensor in (images, *tokenizer.state_dict().values()):
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    cache = cache_root() / "codes" / f"{digest.hexdigest()[:24]}.safetensors"
    if cache.exists():
        log(f"codes of an earlier run: {cache}")
    else:
        with stage(len(images), "tokenise") as advance:
            codes = tokenise(tokenizer, images, advance)
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(cache) as temporary:
            save_file({"codes": codes}, temporary)
    try:
        return load_file(cache)["codes"], labels, names
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{cache} cannot be read: {error}", f"Delete {cache} and run the same command again.") from error


def _held_out(codes: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.linspace(0, len(codes) - 1, min(1000, len(codes))).long()
    return codes[rows], labels[rows]


def _tokenizer_parts(name: str, tokenizer: Any) -> dict[str, Any]:
    """How a teacher's bundle holds its tokenizer: an embedded one by name, others in full."""
    if resolve_tokenizer(name).origin == "embedded":
        return {"tokenizer": {"bundle": name}}
    return {"tokenizer": {"config": _plain(tokenizer.config)}, "tokenizer_weights": tokenizer.state_dict()}


def _teacher(config: TeacherTraining, stage: Callable, log: Callable) -> Job:
    tokenizer = _tokenizer_of(config.tokenizer, "llamagen")
    codes, labels, names = _codes(config.data, tokenizer, stage, log)
    drop = config.gpt.dropout
    gpt = GPTConfig(
        dim=config.gpt.dim,
        n_layer=config.gpt.n_layer,
        n_head=config.gpt.n_head,
        multiple_of=config.gpt.multiple_of,
        vocab_size=tokenizer.config.codebook_size,
        block_size=codes.shape[1],
        num_classes=len(names),
        class_dropout_prob=config.gpt.class_dropout_prob,
        token_dropout_p=drop,
        resid_dropout_p=drop,
        ffn_dropout_p=drop,
    )
    task = TeacherTask(gpt, codes, labels, _held_out(codes, labels), seed=config.optim.seed)
    more = {**_tokenizer_parts(config.tokenizer, tokenizer), "sampling": config.sampling.model_dump(), "classes": names}
    return Job(task, lambda path, state: _bundle(path, "llamagen", "teacher", asdict(gpt), task, state, config.data, **more))


def _tokenizer_of(name: str, family: str) -> Any:
    """The tokenizer, if it is one of the family."""
    found = resolve_tokenizer(name).family.name
    if found != family:
        raise ConfigError(f"--tokenizer {name} belongs to the family {found}, this trains {family}.", f"Use --family {found}.")
    return load_tokenizer(name)


def _var_teacher(config: VARTeacherTraining, stage: Callable, log: Callable) -> Job:
    tokenizer = _tokenizer_of(config.tokenizer, "var")
    sides = tokenizer.config.patch_nums
    scales = parse_scales(config.scales, len(sides)) if config.scales else range(len(sides))
    if config.short and not scales.start < config.short_scales < scales.stop:
        said = f"short_scales {config.short_scales}: no part of the trained scales {scales.start}-{scales.stop - 1}"
        if config.short_scales != VARTeacherTraining.model_fields["short_scales"].default:
            raise ConfigError(f"{said}.", f"Give a number above {scales.start} and below {scales.stop}, or short=0.")
        log(f"{said}, so no update is short")
        config = config.model_copy(update={"short": 0.0})
    if config.expert_from and not (config.expert and config.expert_from < scales.stop):
        raise ConfigError(
            f"expert_from {config.expert_from}: there is no expert, or no trained scale to match.",
            "Give expert=MODEL and a smaller number.",
        )
    if config.init and config.var != VARSection():
        raise ConfigError("var.*: the sizes are those of --init.", "Drop one of the two.")
    start, expert = (name and _same_scales(name, tokenizer) for name in (config.init, config.expert))
    codes, labels, names = _codes(config.data, tokenizer, stage, log)
    for other in (start, expert):
        if other and other.module.config.num_classes != len(names):
            raise ConfigError(f"{other.name} knows {other.module.config.num_classes} classes, {config.data} has {len(names)}.")
    if start:
        model, sizes = start.module.float().requires_grad_(True), start.module.config
    else:
        sizes = VARConfig(
            **config.var.model_dump(), num_classes=len(names), vocab_size=tokenizer.config.vocab_size,
            code_dim=tokenizer.config.z_channels, patch_nums=sides,
        )  # fmt: skip
        model = VAR(sizes)
        model.init_weights(torch.Generator().manual_seed(config.optim.seed))
    task = ScaleTeacherTask(
        model, tokenizer.quantize, codes, labels, _held_out(codes, labels), scales=(scales.start, scales.stop - 1), short=config.short,
        short_scales=config.short_scales, expert=expert.module if expert else None, weight=config.expert_weight,
        expert_from=config.expert_from,
    )  # fmt: skip
    more = {**_tokenizer_parts(config.tokenizer, tokenizer), "sampling": config.sampling.model_dump(), "classes": names}
    if start or expert:
        more["parents"] = [{"model": other.name, "sha256": other.sha256} for other in (start, expert) if other]
    if config.scales:
        more["scales"] = [scales.start, scales.stop - 1]
    return Job(task, lambda path, state: _bundle(path, "var", "teacher", _plain(sizes), task, state, config.data, **more))


def _same_scales(name: str, tokenizer: Any) -> LoadedModel:
    """A VAR teacher over the codes of ``tokenizer``."""
    source = resolve(name)
    if source.kind != "teacher" or source.family.name != "var":
        raise ConfigError(f"{name} is a {source.family.name} {source.kind}; a VAR teacher is needed here.", "For example var.")
    loaded = load_model(source)
    if (
        not torch.equal(loaded.codebook_VE, tokenizer.codebook_VE.float())
        or tuple(source.config["patch_nums"]) != tokenizer.config.patch_nums
    ):
        raise ConfigError(f"{name} was trained on another tokenizer.")
    return loaded


def _features(config: FeatureTraining, stage: Callable, log: Callable) -> Job:
    if config.data not in VARIANTS:
        raise ConfigError(
            f"data '{config.data}': the feature network learns attributes, which only the procedural sets have.",
            nearest(config.data, VARIANTS),
        )
    task = FeatureTask(config.data, config.optim.seed)
    log(f"the packaged {FEATNET_NAME} stays the metric; this trains another one")
    return Job(task, lambda path, state: _bundle(path, "llamagen", "features", {}, task, state, config.data))


def _bundle(path: Path, family: str, kind: str, config: dict[str, Any], task: Task, state: dict[str, Any], data: str, **more: Any) -> Path:
    last = state["history"][-1] if state["history"] else None
    training = {"steps": state["step"], "minutes": round(state["elapsed_s"] / 60, 1), "final": last}
    return save_bundle(
        path, family=family, kind=kind, config=config, model=task.trained.state_dict(), dataset=data, training=training, **more
    )


def _plain(config: Any) -> dict[str, Any]:
    """A configuration dataclass as JSON values."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
