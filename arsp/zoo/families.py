"""One entry per model family: how to build its modules from a configuration and bind them to a Decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from arsp.decode.decoder import RasterDecoder
from arsp.decode.guidance import Guidance
from arsp.models import llamagen
from arsp.models.student import LlamaGenStudent
from arsp.protocols import Decoder
from arsp.tokenizers import llamagen_vq
from arsp.zoo import convert


@dataclass(frozen=True)
class Family:
    """What the rest of arsp needs to know of an architecture; every callable takes plain dictionaries from cards and bundles."""

    name: str
    variants: dict[str, dict[str, Any]]
    complete: Callable[[dict[str, Any]], dict[str, Any]]  # partial configuration -> checked, full one
    build: Callable[[dict[str, Any]], nn.Module]
    build_student: Callable[[dict[str, Any], int], nn.Module]
    build_tokenizer: Callable[[dict[str, Any]], nn.Module]
    tokenizers: dict[str, dict[str, Any]]
    decoder: Callable[[nn.Module, Guidance], Decoder]
    read_official: Callable[..., tuple[dict[str, Any], dict[str, Any]]]  # path -> (state dict, configuration from shapes)
    read_official_tokenizer: Callable[..., tuple[dict[str, Any], dict[str, Any]]]


def _vq(config: dict[str, Any]) -> llamagen_vq.VQModel:
    return llamagen_vq.VQModel(llamagen_vq.VQConfig(**{**config, "ch_mult": tuple(config["ch_mult"])}))


LLAMAGEN = Family(
    name="llamagen",
    variants=llamagen.VARIANTS,
    complete=lambda config: asdict(llamagen.GPTConfig.from_dict(config)),
    build=lambda config: llamagen.GPT(llamagen.GPTConfig.from_dict(config)),
    build_student=lambda config, code_dim: LlamaGenStudent(llamagen.GPTConfig.from_dict(config), code_dim),
    build_tokenizer=_vq,
    tokenizers={name.lower(): asdict(config) for name, config in llamagen_vq.VARIANTS.items()},
    decoder=lambda module, guidance: RasterDecoder(module, guidance),
    read_official=convert.read_llamagen,
    read_official_tokenizer=convert.read_llamagen_vq,
)
