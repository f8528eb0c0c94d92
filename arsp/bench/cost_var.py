"""What one VAR image must compute and keep, counted from the model's sizes alone (arXiv 2404.02905; no weights are needed).

Counting rules. One MAC = one multiplication and one addition. Linear layers: rows x inputs x outputs; attention: D MACs per head for
every query-key pair in Q K^T and again in map x V; norms, softmax, lookups and sampling count nothing. Everything is per image.
Letters of the formulas: R rows (2 with guidance, 1 without), L positions, K scales, P query-key pairs of one head and layer,
C width, D layers, V codes, E codebook width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from arsp.decode.schedule import SHARES
from arsp.errors import ConfigError
from arsp.sparse.window import dense_pairs

if TYPE_CHECKING:
    from arsp.decode.schedule import ScaleStep
    from arsp.models.var import VARConfig
    from arsp.tokenizers.var_vqvae import VQVAEConfig

NONE, MAP, OUTPUT = 0, 1, 2  # sharing between the guidance halves, as profiles store it
ADALN = ("ada_lin", "head ada_lin")  # parts that are computed once an image


@dataclass(frozen=True)
class Part:
    """One line of the count."""

    name: str
    macs: int
    formula: str


@dataclass(frozen=True)
class Savings:
    """What a policy leaves of the attention: ``pairs_DK`` kept query-key pairs per head of every (layer, scale), averaged over heads,
    and ``share_DK`` how the two halves of guidance share them (0 none, 1 map, 2 output)."""

    pairs_DK: np.ndarray
    share_DK: np.ndarray


def dense_savings(config: VARConfig, *, kept: float | np.ndarray = 1.0, share: int = NONE) -> Savings:
    """Savings from a kept share of the pairs (a number, per scale, or per layer and scale) and one sharing rule."""
    pairs = np.broadcast_to(np.array(dense_pairs(config.patch_nums)) * kept, (config.depth, len(config.patch_nums)))
    return Savings(pairs, np.full(pairs.shape, share))


# ----------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class AttentionCost:
    """MACs of softmax attention proper (both products, all layers): what a dense pass needs, what the windows leave, and what is run
    once the halves share. ``kept`` is windowed / dense."""

    dense: int
    windowed: int
    shared: int
    official_claim: int  # the official script: half of the windowed count whatever is shared
    rows: int
    pairs: int

    @property
    def kept(self) -> float:
        return self.windowed / self.dense

    def lines(self) -> list[tuple[Part, float]]:
        """(part, share of the dense count saved)."""
        kept = f"{self.kept:.4f}"
        parts = [
            Part("attention, dense", self.dense, f"2 R P C D, R = {self.rows}, P = {self.pairs:,}"),
            Part("attention, windowed", self.windowed, f"2 R P C D x kept, kept = {kept}"),
            Part("attention, windowed and shared", self.shared, "P C D x kept x (rows of Q K^T + rows of map x V)"),
        ]
        if self.shared < self.windowed:
            claim = f"2 R P C D x kept / 2: map x V counted once for both halves, kept = {kept}"
            parts.append(Part("attention, as the LiteVAR paper counts sharing", self.official_claim, claim))
        return [(part, 1 - part.macs / self.dense) for part in parts]


def attention_cost(
    config: VARConfig, savings: Savings | None = None, *, guidance: bool = True, scales: range | None = None
) -> AttentionCost:
    """Attention of the given scales (default: all)."""
    savings, rows, picked = _defaults(config, savings, guidance, scales)
    dense = np.array(dense_pairs(config.patch_nums))[picked]
    pairs, share = savings.pairs_DK[:, picked], savings.share_DK[:, picked]
    map_rows = np.where(share == NONE, rows, 1)
    value_rows = np.where(share == OUTPUT, 1, rows)
    width, windowed = config.embed_dim, float(pairs.sum())
    return AttentionCost(
        dense=2 * rows * int(dense.sum()) * width * config.depth,
        windowed=round(2 * rows * windowed * width),
        shared=round(float((pairs * (map_rows + value_rows)).sum()) * width),
        official_claim=round(rows * windowed * width),
        rows=rows,
        pairs=int(dense.sum()),
    )


# --------------------------------------------------------------------------------------------------------- transformer


def count_parts(
    config: VARConfig, savings: Savings | None = None, *, guidance: bool = True, scales: range | None = None, head_from: int = 0,
    adaln_per_scale: bool = False,
) -> list[Part]:  # fmt: skip
    """MACs of the transformer by part, for the positions of ``scales`` (default: all) after everything before them is cached.

    ``head_from``: the first scale whose logits are wanted. ``adaln_per_scale``: the official code computes the modulation again at every
    scale, arsp once an image. A half of guidance that shares the map needs no queries and keys of its own, one that shares the output
    no values and output projection either.
    """
    savings, rows, picked = _defaults(config, savings, guidance, scales)
    C, D, V, E = config.embed_dim, config.depth, config.vocab_size, config.code_dim
    n = np.array(config.patch_nums) ** 2
    L = int(n[picked].sum())
    hidden = round(C * config.mlp_ratio)
    share = savings.share_DK[:, picked]
    alone = np.where(share == NONE, rows, 1)  # rows that make queries and keys
    full = np.where(share == OUTPUT, 1, rows)  # rows that make values and project the output
    qk, v = int((alone * n[picked]).sum()), int((full * n[picked]).sum())
    logits = int(n[[k for k in picked if k >= head_from]].sum())
    embedded = int(n[[k for k in picked if k > 0]].sum())
    times, again = (len(picked), " x K") if adaln_per_scale else (1, "")
    blocks, per_block = (1, "") if config.shared_aln else (D, " D")
    attention = attention_cost(config, savings, guidance=guidance, scales=scales)
    shared = " - what the null half does not compute" if (share != NONE).any() and rows == 2 else ""
    return [
        Part("word_embed", embedded * E * C, "(L - n_0) E C, one map for both halves"),
        Part("ada_lin", rows * 6 * C * C * blocks * times, f"R 6 C^2{per_block}{again}"),
        Part("head ada_lin", rows * 2 * C * C * times, f"R 2 C^2{again}"),
        Part("qkv", (2 * qk + v) * C * C, f"R L 3 C^2 D{shared}"),
        Part("attention", attention.shared, "see the attention lines"),
        Part("proj", v * C * C, f"R L C^2 D{shared}"),
        Part("fc1", rows * L * C * hidden * D, "R L 4 C^2 D"),
        Part("fc2", rows * L * C * hidden * D, "R L 4 C^2 D"),
        Part("head", rows * logits * C * V, "R L C V"),
    ]


def count_steps(steps: Sequence[ScaleStep], *, guidance: bool = True) -> list[Part]:
    """The same for a schedule: every scale by the model, depth, windows, sharing and guidance of its step; a model that takes over reads
    the scales before its own without their logits."""
    found: dict[str, Part] = {}
    for owner in dict.fromkeys(step.owner for step in steps):
        own = [k for k, step in enumerate(steps) if step.owner == owner]
        first = steps[own[0]]
        parts = count_parts(first.model.config, guidance=guidance and first.guided, scales=range(1))
        parts = [part for part in parts if part.name in ADALN]
        for k in range(own[-1] + 1):
            step = steps[max(k, own[0])]
            config = replace(step.model.config, depth=step.depth or step.model.config.depth)
            share_DK = np.array([[SHARES.index(step.share(layer, s)) for s in range(len(steps))] for layer in range(config.depth)])
            pairs_DK = step.policy.executed_pairs() if hasattr(step.policy, "executed_pairs") else dense_savings(step.model.config).pairs_DK
            left = Savings(pairs_DK[: config.depth], share_DK)
            more = count_parts(config, left, guidance=guidance and step.guided, scales=range(k, k + 1), head_from=own[0])
            parts += [part for part in more if part.name not in ADALN]
        for part in parts:
            before = found.get(part.name, replace(part, macs=0))
            found[part.name] = replace(before, macs=before.macs + part.macs)
    return list(found.values())


def total_macs(parts: Sequence[Part]) -> int:
    return sum(part.macs for part in parts)


def _defaults(config: VARConfig, savings: Savings | None, guidance: bool, scales: range | None) -> tuple[Savings, int, list[int]]:
    """Savings without sharing where there is no second half, rows, and the scales as a list."""
    savings = dense_savings(config) if savings is None else savings
    rows = 2 if guidance else 1
    if not guidance:
        savings = Savings(savings.pairs_DK, np.zeros_like(savings.share_DK))
    return savings, rows, list(range(len(config.patch_nums)) if scales is None else scales)


# ------------------------------------------------------------------------------------------------- tokenizer and cache


def tokenizer_parts(config: VQVAEConfig) -> list[Part]:
    """The tokenizer's share of one image: adding every scale to f_hat, and the convolutional decoder, counted from its modules."""
    from torch.utils.flop_counter import FlopCounterMode

    from arsp.tokenizers.var_vqvae import VQVAE

    side = config.patch_nums[-1]
    with torch.device("meta"):
        model = VQVAE(config)
        f_hat = torch.empty(1, config.z_channels, side, side)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.decode_map(f_hat)
    phi = len(config.patch_nums) * 9 * config.z_channels**2 * side**2
    return [
        Part("f_hat", phi, "K 9 E^2 h w (3x3 convolution of every scale)"),
        Part("tokenizer decoder", counter.get_total_flops() // 2, "convolutions and attention of the decoder, counted from its modules"),
    ]


def cache_bytes(
    config: VARConfig,
    savings: Savings | None = None,
    *,
    guidance: bool = True,
    last_scale: bool = False,
    dtype: torch.dtype = torch.float16,
) -> int:
    """Bytes of keys and values of one image. Nothing reads the last scale's after its own pass, so arsp does not keep them
    (``last_scale`` False; the official code does). The null half's keys are not stored in a layer that shares at every scale, nor its
    values in one that shares the output at every scale."""
    savings, rows, scales = _defaults(config, savings, guidance, None)
    scales = scales if last_scale else scales[:-1]
    slots, share = sum(config.patch_nums[k] ** 2 for k in scales), savings.share_DK[:, scales]
    keys, values = (np.where((share >= at_least).all(1), 1, rows) for at_least in (MAP, OUTPUT))
    return slots * int((keys + values).sum()) * config.embed_dim * dtype.itemsize


# -------------------------------------------------------------------------------------------------------- collaboration


@dataclass(frozen=True)
class CollabCost:
    """Collaborative decoding (arXiv 2411.17787) at N draft scales: MACs of the big model alone, and of its two stages."""

    alone: int
    draft: int
    refine: int

    @property
    def ratio(self) -> float:
        """How much less is computed than by the big model alone, transformer only."""
        return self.alone / (self.draft + self.refine)


def collab_cost(big: VARConfig, small: VARConfig, draft_scales: int, *, guidance: bool = True) -> CollabCost:
    """The drafter makes scales 0..N-1; the refiner reads them in one pass with scale N (no logits) and makes the rest.

    ConfigError: N out of range, or two models of different scales or codes.
    """
    K = len(big.patch_nums)
    if tuple(big.patch_nums) != tuple(small.patch_nums) or big.vocab_size != small.vocab_size:
        raise ConfigError("collaborative decoding needs two models of one tokenizer: the same patch_nums and codes.")
    if not 1 <= draft_scales < K:
        raise ConfigError(f"the hand-over must be at 1..{K - 1}, got {draft_scales}.", f"The models have {K} scales.")
    alone = total_macs(count_parts(big, guidance=guidance))
    draft = total_macs(count_parts(big, guidance=guidance, scales=range(draft_scales)))
    refine = total_macs(count_parts(small, guidance=guidance, head_from=draft_scales))
    return CollabCost(alone, draft, refine)


def describe(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The parts as plain values of a record."""
    return [{"name": part.name, "macs": part.macs, "formula": part.formula} for part in parts]
