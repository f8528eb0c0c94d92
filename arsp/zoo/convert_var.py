"""Official VAR files (arXiv 2404.02905; distilled: 2412.17153) -> (clean state dict, configuration read from the shapes).

A model file is a flat state dict, or a trainer checkpoint that holds it beside the optimizer and the tokenizer. What the
configuration implies (level ids, mask, the zero bias of the keys) is compared with it and dropped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arsp.errors import ConfigError, InputError
from arsp.models.var import DERIVED_KEYS, VAR, VARConfig, block_causal_mask
from arsp.models.var_student import VARStudent
from arsp.tokenizers.var_vqvae import PATCH_NUMS, VQVAE, VQVAEConfig
from arsp.zoo.bundle import mismatch
from arsp.zoo.convert import read_tensors, require, unwrap

_KEY, _VQ_KEY = "pos_1LC", "quantize.embedding.weight"
_STUDENT_KEY = "n_d_embed.weight"  # a distilled student tells noise from data
_TRAINED = ("trainer.var_wo_ddp", "var_wo_ddp", "model", "module", "state_dict")
_AVERAGED = ("trainer.ema_parameters", "ema_parameters", "ema")
_VQ_ORDER = ("trainer.vae_local", "vae_local", "model", "module", "state_dict")
_USAGE = "quantize.ema_vocab_hit_SV"
_PHI = re.compile(r"quantize\.quant_resi\.(qresi|qresi_ls\.\d+|\d+)\.weight$")


def read_var(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A VAR file: flat, or wrapped by its trainer; the configuration holds the fields of :class:`VARConfig`.

    A distilled student is told by its keys: its averaged weights are preferred, as its authors sample them; its configuration
    holds ``student`` too, and the ``patch_nums`` of its teacher (the class position, a level of its own, is left out).
    InputError, naming depth, width and scales, for a file whose weights are not all of such a model and nothing else.
    """
    obj = read_tensors(path)
    weights = unwrap(obj, _KEY, (*_TRAINED, *_AVERAGED), path, "VAR")
    if _STUDENT_KEY in weights:
        implied = {key: value for key, value in weights.items() if _is_derived(key)}  # the average may lack them
        weights = {**implied, **unwrap(obj, _STUDENT_KEY, (*_AVERAGED, *_TRAINED), path, "VAR")}
    config = var_config(weights, path)
    _check_derived(weights, config, path)
    weights = {key: value for key, value in weights.items() if not _is_derived(key)}
    _check(lambda: _build(config), weights, describe(config), path)
    return weights, config


def read_var_vq(path: Path, num_scales: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A tokenizer file, or the tokenizer in a trainer checkpoint; the configuration holds the fields of :class:`VQVAEConfig` but
    ``patch_nums``, which are the model's.

    The same file serves models of different scales: with ``num_scales``, a usage statistic of other scales is replaced by zeros.
    """
    weights = unwrap(read_tensors(path), _VQ_KEY, _VQ_ORDER, path, "VAR")
    config = vq_config(weights, path)
    usage = weights.get(_USAGE, torch.zeros(len(PATCH_NUMS[256]), config["vocab_size"]))
    scales = num_scales or usage.shape[:1].numel()
    phis = len(_phis(weights))
    if config["share_quant_resi"] == 0 and scales != phis:
        raise InputError(f"{path}: the tokenizer has one phi for each of its {phis} scales, but {scales} scales are asked for.")
    weights[_USAGE] = usage if usage.shape[:1] == (scales,) else torch.zeros(scales, config["vocab_size"])
    full = {**config, "ch_mult": tuple(config["ch_mult"]), "patch_nums": tuple(range(1, scales + 1))}
    what = f"a VAR tokenizer of {config['vocab_size']} codes, base width {config['ch']}, multipliers {config['ch_mult']}"
    _check(lambda: VQVAE(VQVAEConfig(**full)), weights, what, path)
    return weights, config


def describe(config: dict[str, Any]) -> str:
    """What a model configuration is, for messages: depth, width, scales."""
    what = "VAR student" if config.get("student") else "VAR"
    return f"a {what} of depth {config['depth']}, width {config['embed_dim']}, scales {list(config['patch_nums'])}"


def var_config(weights: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Sizes from shapes. The heads come from the learned attention scales; the earliest files have none: 64 channels a head."""
    first = ("blocks.0.attn.mat_qkv.weight", "blocks.0.ffn.fc1.weight")
    require(weights, (_KEY, "pos_start", "lvl_embed.weight", "word_embed.weight", "class_emb.weight", "head.weight", *first), path, "VAR")
    numbers = sorted({int(m.group(1)) for m in (re.match(r"blocks\.(\d+)\.", key) for key in weights) if m})
    width, levels, positions = weights["pos_start"].shape[-1], len(weights["lvl_embed.weight"]), weights[_KEY].shape[1]
    has = f"{path}: a VAR of depth {len(numbers)}, width {width}, {levels} scales of {positions} positions in all"
    if numbers != list(range(len(numbers))):
        raise InputError(f"{has}: its block {next(i for i in range(len(numbers)) if i not in numbers)} is missing.")
    sharpness = weights.get("blocks.0.attn.scale_mul_1H11")
    heads = width // 64 if sharpness is None else sharpness.numel()
    if heads == 0 or width % heads:
        raise InputError(
            f"{has}: {heads} heads do not divide the width.", "Without scale_mul_1H11 in the file, 64 channels a head are assumed."
        )
    student = _STUDENT_KEY in weights
    config = {
        "depth": len(numbers),
        "embed_dim": width,
        "num_heads": heads,
        "mlp_ratio": len(weights["blocks.0.ffn.fc1.weight"]) / width,
        "num_classes": len(weights["class_emb.weight"]) - 1,
        "vocab_size": len(weights["head.weight"]),
        "code_dim": weights["word_embed.weight"].shape[1],
        "patch_nums": _patch_nums(weights, student, has),
        "shared_aln": "shared_ada_lin.1.weight" in weights,
        "attn_l2_norm": sharpness is not None,
    }
    return {**config, "student": True} if student else config


def vq_config(weights: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Sizes of the autoencoder from its encoder's shapes, the way phi is shared from its keys."""
    require(weights, (_VQ_KEY, "encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "quant_conv.weight"), path, "VAR")
    phis = _phis(weights)
    if not phis:
        raise InputError(f"{path}: this is no VAR tokenizer: it has no quantize.quant_resi convolutions.")
    ch, mult, blocks = len(weights["encoder.conv_in.weight"]), [], 0
    while f"encoder.down.{len(mult)}.block.0.conv1.weight" in weights:
        mult.append(len(weights[f"encoder.down.{len(mult)}.block.0.conv1.weight"]) // ch)
    while f"encoder.down.0.block.{blocks}.conv1.weight" in weights:
        blocks += 1
    vocab, width = weights[_VQ_KEY].shape
    return {
        "ch": ch,
        "ch_mult": mult,
        "num_res_blocks": blocks,
        "z_channels": width,
        "vocab_size": vocab,
        "share_quant_resi": 1 if phis == {"qresi"} else len(phis) if any(phi.startswith("qresi_ls") for phi in phis) else 0,
        "quant_conv_ks": weights["quant_conv.weight"].shape[-1],
    }


def _patch_nums(weights: dict[str, Tensor], student: bool, has: str) -> list[int]:
    """Sides from the number of positions a level, or an official layout of as many levels and positions."""
    levels, positions = len(weights["lvl_embed.weight"]), weights[_KEY].shape[1]
    if "lvl_1L" not in weights:
        for sides in PATCH_NUMS.values():
            if (len(sides) + student, sum(pn * pn for pn in sides) + student) == (levels, positions):
                return list(sides)
        raise InputError(f"{has}: none of the official layouts, and its level ids 'lvl_1L' are missing.", "Save it with its buffers.")
    ids, counts = weights["lvl_1L"].flatten().unique_consecutive(return_counts=True)
    sides = [math.isqrt(count) for count in counts.tolist()]
    own = sides[student:]
    squares = [pn * pn for pn in sides] == counts.tolist() and sides[:student] == [1] * student
    if ids.tolist() != list(range(levels)) or counts.sum() != positions or not squares or len(own) < 2 or own != sorted(set(own)):
        raise InputError(f"{has}: its level ids 'lvl_1L' are not those of rising square scales ({counts.tolist()[:16]} positions each).")
    return own


def _check_derived(weights: dict[str, Tensor], config: dict[str, Any], path: Path) -> None:
    """InputError when a stored mask or key bias is not the one this architecture has: the model would compute something else."""
    mask = weights.get("attn_bias_for_masking")
    length = weights[_KEY].shape[1]
    wrong = [key for key, value in weights.items() if key.endswith(".zero_k_bias") and value.any()]
    if mask is not None:
        visible = _visible(config) if mask.shape == (1, 1, length, length) else None
        if visible is None or not torch.equal(mask.float(), torch.zeros(visible.shape).masked_fill(~visible, -math.inf)):
            wrong.append("attn_bias_for_masking")
    if wrong:
        raise InputError(f"{path} holds {describe(config)}, but its {wrong[0]} is not that of such a model.")


def _build(config: dict[str, Any]) -> VAR | VARStudent:
    sizes = VARConfig.from_dict(config)
    return VARStudent(sizes, sizes.code_dim) if config.get("student") else VAR(sizes)


def _visible(config: dict[str, Any]) -> Tensor:
    """Boolean ``(1, 1, L, L)``: what each position sees."""
    if not config.get("student"):
        return block_causal_mask(tuple(config["patch_nums"]))
    with torch.device("meta"):
        student = _build(config)
    return student.levels_and_mask(torch.device("cpu"))[1]


def _check(build: Callable[[], nn.Module], weights: dict[str, Tensor], what: str, path: Path) -> None:
    """InputError unless ``weights`` are those of the module, built on the meta device."""
    try:
        with torch.device("meta"):
            problems = mismatch(build().state_dict(), weights)
    except (ConfigError, ValueError, ZeroDivisionError) as error:
        problems = str(error).rstrip(".")
    if problems:
        raise InputError(f"{path} holds {what}, but not all of its weights are of such a model: {problems}.", "See: arsp models ls")


def _phis(weights: dict[str, Tensor]) -> set[str]:
    return {m.group(1) for m in map(_PHI.match, weights) if m}


def _is_derived(key: str) -> bool:
    return key.rsplit(".", 1)[-1] in DERIVED_KEYS
