"""What each kind of training needs before the loop and leaves behind after it."""

from __future__ import annotations

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
from arsp.errors import ConfigError, InputError, nearest
from arsp.metrics.features import FEATNET_NAME
from arsp.models.llamagen import GPTConfig
from arsp.runs import atomic_file
from arsp.tokenizers.llamagen_vq import VQConfig, VQModel
from arsp.tokenizers.var_vqvae import VQVAE, VQVAEConfig
from arsp.train.data import load_pool
from arsp.train.loop import OptimConfig, Task
from arsp.train.tasks import FeatureTask, ScaleTokenizerTask, TeacherTask, TokenizerTask, tokenise
from arsp.zoo.bundle import save_bundle
from arsp.zoo.load import load_tokenizer, resolve_tokenizer


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
    z_channels: int = Field(8, ge=1)
    vocab_size: int = Field(512, ge=2)
    patch_nums: tuple[PositiveInt, ...] = Field((1, 2, 3, 4, 6, 8), min_length=2, description="sides of the maps, rising")
    truncate: float = Field(0.3, ge=0, le=1, description="share of the rows decoded from their first scales only")


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
    ("features", "llamagen"): FeatureTraining,
}


@dataclass
class Job:
    """A task ready for :func:`arsp.train.loop.fit`, and how its result becomes a bundle."""

    task: Task
    export: Callable[[Path, dict[str, Any]], Any]


def prepare(config: Any, directory: Path, stage: Callable[[int, str], Any], log: Callable[[str], None]) -> Job:
    """Data and task of a training, told by its schema. InputError or ConfigError before any long work when the data do not fit."""
    makers = {
        TokenizerTraining: _tokenizer, VARTokenizerTraining: _var_tokenizer, TeacherTraining: _teacher, FeatureTraining: _features,
    }  # fmt: skip
    return makers[type(config)](config, directory, stage, log)


def _tokenizer(config: TokenizerTraining, directory: Path, stage: Callable, log: Callable) -> Job:
    images, held_out, side = _pool(config.data)
    vq = VQConfig(**config.vq.model_dump(), image_size=side)
    if side % vq.downsample:
        raise ConfigError(f"images of {side} px: expected a size divisible by {vq.downsample} (vq.ch_mult).")
    torch.manual_seed(config.optim.seed)
    task = TokenizerTask(VQModel(vq), images, held_out, total_steps=config.optim.steps)
    return Job(task, lambda path, state: _bundle(path, "llamagen", "tokenizer", _plain(vq), task, state, config.data))


def _var_tokenizer(config: VARTokenizerTraining, directory: Path, stage: Callable, log: Callable) -> Job:
    images, held_out, side = _pool(config.data)
    vq = VQVAEConfig(**config.vq.model_dump(exclude={"truncate"}))
    if side != vq.image_size:
        raise ConfigError(f"images of {side} px: vq.patch_nums and vq.ch_mult make {vq.image_size} px.")
    torch.manual_seed(config.optim.seed)
    task = ScaleTokenizerTask(VQVAE(vq), images, held_out, total_steps=config.optim.steps, truncate=config.vq.truncate)
    return Job(task, lambda path, state: _bundle(path, "var", "tokenizer", _plain(vq), task, state, config.data))


def _pool(data: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """All images, up to 1000 of them for figures, and their side."""
    images, _, _ = load_pool(data)
    if images.shape[-1] != images.shape[-2]:
        raise ConfigError(f"images of {images.shape[-1]}x{images.shape[-2]} px: expected squares.")
    return images, images[torch.linspace(0, len(images) - 1, min(1000, len(images))).long()], images.shape[-1]


def _teacher(config: TeacherTraining, directory: Path, stage: Callable, log: Callable) -> Job:
    tokenizer = load_tokenizer(config.tokenizer)
    images, labels, names = load_pool(config.data)
    if images.shape[-1] != tokenizer.config.image_size:
        raise InputError(f"{config.data}: images of {images.shape[-1]} px, the tokenizer takes {tokenizer.config.image_size} px.")
    cache = directory / "codes.safetensors"
    if cache.exists():
        log(f"codes of an earlier start: {cache}")
    else:
        with stage(len(images), "tokenise") as advance:
            codes = tokenise(tokenizer, images, advance)
        with atomic_file(cache) as temporary:
            save_file({"codes": codes, "labels": labels}, temporary)
    try:
        stored = load_file(cache)
        codes, labels = stored["codes"], stored["labels"]
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{cache} cannot be read: {error}", f"Delete {cache} and run the same command again.") from error
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
    rows = torch.linspace(0, len(codes) - 1, min(1000, len(codes))).long()
    task = TeacherTask(gpt, codes, labels, (codes[rows], labels[rows]), seed=config.optim.seed)
    embedded = resolve_tokenizer(config.tokenizer).origin == "embedded"
    spec = {"bundle": config.tokenizer} if embedded else {"config": _plain(tokenizer.config)}
    weights = None if embedded else tokenizer.state_dict()
    more = {"tokenizer": spec, "tokenizer_weights": weights, "sampling": config.sampling.model_dump(), "classes": names}
    return Job(task, lambda path, state: _bundle(path, "llamagen", "teacher", asdict(gpt), task, state, config.data, **more))


def _features(config: FeatureTraining, directory: Path, stage: Callable, log: Callable) -> Job:
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
