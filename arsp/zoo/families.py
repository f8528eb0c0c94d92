"""One entry per model family: how to build its modules from a configuration and bind them to a Decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from arsp.decode.decoder import RasterDecoder
from arsp.decode.guidance import Guidance, RampGuidance
from arsp.decode.next_scale import NextScaleDecoder
from arsp.models import llamagen, var
from arsp.models.student import LlamaGenStudent
from arsp.models.var_student import VARStudent
from arsp.protocols import Decoder, Layout
from arsp.tokenizers import llamagen_vq, var_vqvae
from arsp.zoo import convert, convert_var


@dataclass(frozen=True)
class Family:
    """What the rest of arsp needs to know of an architecture; every callable takes plain dictionaries from cards and bundles."""

    name: str
    variants: dict[str, dict[str, Any]]
    required: tuple[str, ...]  # keys without which a configuration describes no generative model
    complete: Callable[[dict[str, Any]], dict[str, Any]]  # partial configuration -> checked, full one
    layout: Callable[[dict[str, Any]], Layout]
    build: Callable[[dict[str, Any]], nn.Module]
    build_student: Callable[[dict[str, Any], int], nn.Module]
    build_tokenizer: Callable[[dict[str, Any]], nn.Module]
    tokenizers: dict[str, dict[str, Any]]
    # (tokenizer configuration, the model's) -> the first completed: grid or scales follow the model
    fit_tokenizer: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
    guidance: Callable[[float | None, int, dict[str, Any]], Any]  # (scale or None: off, interval, configuration)
    decoder: Callable[..., Decoder]  # (module, tokenizer, guidance, steps of a schedule or None)
    read_official: Callable[..., tuple[dict[str, Any], dict[str, Any]]]  # path -> (state dict, configuration from shapes)
    read_official_tokenizer: Callable[..., tuple[dict[str, Any], dict[str, Any]]]  # (path, the model's configuration)
    student: str  # the embedded student, for hints


def _plain(config: Any) -> dict[str, Any]:
    """A configuration dataclass as JSON values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def _tuples(config: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def _vq_for(config: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    side = round(model["block_size"] ** 0.5)
    return {**config, "image_size": side * 2 ** (len(config["ch_mult"]) - 1)}


def _raster(config: dict[str, Any]) -> Layout:
    side = round(config["block_size"] ** 0.5)
    return Layout.raster(side, side)


LLAMAGEN = Family(
    name="llamagen",
    variants=llamagen.VARIANTS,
    required=("block_size", "vocab_size"),
    complete=lambda config: asdict(llamagen.GPTConfig.from_dict(config)),
    layout=_raster,
    build=lambda config: llamagen.GPT(llamagen.GPTConfig.from_dict(config)),
    build_student=lambda config, code_dim: LlamaGenStudent(llamagen.GPTConfig.from_dict(config), code_dim),
    build_tokenizer=lambda config: llamagen_vq.VQModel(llamagen_vq.VQConfig(**_tuples(config))),
    tokenizers={name.lower(): asdict(config) for name, config in llamagen_vq.VARIANTS.items()},
    fit_tokenizer=_vq_for,
    guidance=lambda scale, interval, config: Guidance(1.0 if scale is None else scale, interval),
    decoder=lambda module, tokenizer, guidance, steps=None: RasterDecoder(module, guidance),
    read_official=convert.read_llamagen,
    read_official_tokenizer=lambda path, model: convert.read_llamagen_vq(path),
    student="llamagen-dd1",
)


VAR = Family(
    name="var",
    variants=var.VARIANTS,
    required=("depth", "embed_dim", "num_heads", "patch_nums", "vocab_size"),
    complete=lambda config: _plain(var.VARConfig.from_dict(config)),
    layout=lambda config: Layout.next_scale(tuple(config["patch_nums"])),
    build=lambda config: var.VAR(var.VARConfig.from_dict(config)),
    build_student=lambda config, code_dim: VARStudent(var.VARConfig.from_dict(config), code_dim),
    build_tokenizer=lambda config: var_vqvae.VQVAE(var_vqvae.VQVAEConfig(**_tuples(config))),
    tokenizers={name.lower(): _plain(config) for name, config in var_vqvae.VARIANTS.items()},
    fit_tokenizer=lambda config, model: {**config, "patch_nums": list(model["patch_nums"])},
    guidance=lambda scale, interval, config: RampGuidance(scale or 0.0, len(config["patch_nums"]), interval),
    decoder=lambda module, tokenizer, guidance, steps=None: NextScaleDecoder(module, tokenizer.quantize, guidance, steps),
    read_official=convert_var.read_var,
    read_official_tokenizer=lambda path, model: convert_var.read_var_vq(path, len(model["patch_nums"])),
    student="var-dd1",
)
