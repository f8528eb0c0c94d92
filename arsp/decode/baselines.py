"""Controls that need no training: what a one-pass sampler without the joint map, or a shortened teacher, achieves.

``naive``: every position drawn independently from its empirical frequency given the class (arXiv 2412.17153, "onestep*").
``mode``: the most frequent code of every position given the class, no noise: the fair control for a student decoding by argmax.
``skip-N``: the teacher stops N steps early: N codes of a raster, whose missing latent vectors are zero, or N scales of a
next-scale model, whose coarser scales alone are decoded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from arsp.decode.ar import decode_blocks, draw_codes, keyed_choice
from arsp.decode.filters import LogitsPipeline
from arsp.errors import ConfigError
from arsp.protocols import Capabilities, Decoder, Generation, Generator, Layout, Request
from arsp.runs import atomic_file, check_stop

NAMES = ("naive", "mode", "skip-N")


def parse_baseline(text: str, layout: Layout) -> tuple[str, int]:
    """``"skip-5"`` -> ("skip", 5); ConfigError for anything unknown or out of range."""
    if text in ("naive", "mode"):
        return text, 0
    match, steps = re.fullmatch(r"skip-(\d+)", text), len(layout.blocks)
    if match and 0 < int(match.group(1)) < steps:
        return "skip", int(match.group(1))
    raise ConfigError(f"unknown baseline '{text}'.", f"Use naive, mode, or skip-N with 0 < N < {steps}.")


def class_frequencies(
    generator: Generator,
    layout: Layout,
    num_classes: int,
    vocab_size: int,
    *,
    num: int,
    seed: int,
    cache: Path,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Empirical code frequencies ``(num_classes, L, V)`` over ``num`` samples of the teacher on ``device``, kept in ``cache``."""
    if cache.is_file():
        return load_file(cache)["frequencies"]
    counts = torch.zeros(num_classes, layout.num_tokens, vocab_size)
    per_class = max(1, num // num_classes)
    for label in range(num_classes):
        ids = torch.arange(label * per_class, (label + 1) * per_class)
        for part in ids.to(device).split(512):
            check_stop()
            codes = generator.generate(Request(part, seed, labels_B=torch.full_like(part, label))).codes_BL
            counts[label].scatter_add_(1, codes.T.cpu(), torch.ones(codes.T.shape))
    cache.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(cache) as temporary:
        save_file({"frequencies": counts / per_class}, temporary)
    return counts / per_class


class MarginalGenerator:
    """``naive`` (drawn with the keyed generator) or ``mode`` (argmax) from class-conditional position frequencies, in one pass."""

    def __init__(self, frequencies_YLV: Tensor, layout: Layout, mode: bool):
        self.frequencies, self.mode = frequencies_YLV, mode
        self.capabilities = Capabilities(order=layout.order, codebook=True, teacher=False)

    def generate(self, request: Request, callback: Callable[[int], None] | None = None) -> Generation:
        p_BLV = self.frequencies.to(request.labels_B.device)[request.labels_B]
        L = p_BLV.shape[1]
        positions = torch.arange(L, device=p_BLV.device)
        codes = p_BLV.argmax(-1) if self.mode else draw_codes(p_BLV.log(), request.seed, request.sample_ids_B, positions)
        if callback:
            callback(L)
        return Generation(codes, stats={"passes": 1, "tokens_per_pass": L})


class SkipGenerator:
    """The teacher without its last ``skip`` steps. A raster gets zero vectors there; of a next-scale model the codes that were
    made are returned, ``(B, kept)``."""

    def __init__(self, decoder: Decoder, pipeline: LogitsPipeline, codebook_VE: Tensor, skip: int):
        self.decoder, self.pipeline, self.codebook_VE, self.skip = decoder, pipeline, codebook_VE, skip
        self.capabilities = decoder.capabilities

    def generate(self, request: Request, callback: Callable[[int], None] | None = None) -> Generation:
        layout = self.decoder.layout
        kept = layout.ends[-1 - self.skip]
        result = decode_blocks(self.decoder, request, keyed_choice(request), self.pipeline, callback, stop=kept)
        if not layout.is_raster:
            return Generation(result.codes_BL[:, :kept], stats=result.stats)
        vectors = self.codebook_VE[result.codes_BL]
        vectors[:, kept:] = 0
        return Generation(result.codes_BL, vectors, result.stats)
