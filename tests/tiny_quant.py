"""Tiny random models for quantisation: 64 wide, so that groups of 32 and 64 inputs fit; a teacher and a student of both families."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import tiny_models
import tiny_var
from torch import Tensor, nn

from arsp.config import deep_merge, validate
from arsp.decode.filters import LogitsPipeline
from arsp.kernels.reference import rotate
from arsp.models.student import LlamaGenStudent
from arsp.quant.calibrate import Samples, own_samples
from arsp.quant.linear import InputFormat, QuantLinear
from arsp.quant.quantiser import QuantisedWeight, fold_shift, integer_linear, quantise_activation, quantise_shifted
from arsp.quant.recipe import Recipe, recipe_card
from arsp.stack import StackConfig, sampling_rule
from arsp.zoo.bundle import save_bundle
from arsp.zoo.load import LoadedModel, load_model

GPT_CONFIG = replace(tiny_models.GPT_CONFIG, dim=64, n_layer=2, n_head=4, multiple_of=32)  # feed-forward layers are 192 wide
VAR_CONFIG = replace(tiny_var.CONFIG, embed_dim=64, num_heads=4)
KINDS = ("llamagen", "llamagen-student", "var", "var-student")


def make(kind: str, path: Path) -> Path:
    """A bundle of one of ``KINDS``."""
    family = kind.partition("-")[0]
    tiny, config = (tiny_models, GPT_CONFIG) if family == "llamagen" else (tiny_var, VAR_CONFIG)
    if kind == "llamagen":
        module = tiny_models.gpt_model(config)
    elif kind == "llamagen-student":
        module = tiny_models._noisy(LlamaGenStudent(config, 4), 3)
    else:
        module = tiny_var.var_model(config) if kind == "var" else tiny_var.student_model(config)
    for parameter in module.parameters():  # of the size that keeps activations near 1
        parameter.data.mul_(0.4)
    tokenizer = tiny_models.vq_model() if family == "llamagen" else tiny_var.tokenizer_model()
    more = {"code_dim": 4, "known": [0, 5], "teacher": "llamagen"} if kind.endswith("student") else {}
    return save_bundle(
        path, family=family, kind="student" if more else "teacher",
        config=asdict(config) if family == "llamagen" else tiny_var.plain(config), model=module.state_dict(),
        tokenizer={"config": tiny.plain(tiny.VQ)}, tokenizer_weights=tokenizer.state_dict(), classes=tiny.CLASSES,
        sampling=tiny.SAMPLING, **more,
    )  # fmt: skip


def load(kind: str, path: Path) -> LoadedModel:
    return load_model(str(make(kind, path / kind)))


def rule(model: LoadedModel) -> tuple[object, LogitsPipeline]:
    return sampling_rule(model.source, StackConfig(model=model.name))


def samples(model: LoadedModel, num: int = 4, batch_size: int = 2) -> Samples:
    return own_samples(model, *rule(model), num=num, batch_size=batch_size, seed=0)


def recipe(name: str = "w4a8", **changes: object) -> Recipe:
    """A recipe by name with some sections changed."""
    return validate(Recipe, deep_merge(recipe_card(name), changes))


def by_hand(weight: QuantisedWeight, bias_N: Tensor | None, input_format: InputFormat, x: Tensor) -> Tensor:
    """A quantised layer step by step: balance, quantise every row, multiply whole numbers."""
    if input_format.shifted:
        codes, scales = quantise_shifted(x)
        return integer_linear(codes, scales, weight, fold_shift(weight, bias_N))
    x = x.float() if input_format.smooth_K is None else x.float() * input_format.smooth_K
    x = x if input_format.signs_K is None else rotate(x, input_format.signs_K)
    codes, scales = quantise_activation(x)
    return integer_linear(codes, scales, weight, bias_N)


def sqnr_db(given: Tensor, found: Tensor) -> float:
    noise = float((given - found).double().square().sum())
    return 10 * math.log10(float(given.double().square().sum()) / noise) if noise else math.inf


def weight_bytes(module: nn.Module) -> dict[str, int]:
    """Bytes of the weights by part: ``W4``, ``W8`` (codes, scales, zero points, biases) and ``other`` (everything else)."""
    found: dict[str, int] = {}
    for part in module.modules():
        key = f"W{part.bits}" if isinstance(part, QuantLinear) else "other"
        for tensor in _own_tensors(part):
            found[key] = found.get(key, 0) + tensor.numel() * tensor.element_size()
    return found


def _own_tensors(part: nn.Module) -> Iterator[Tensor]:
    yield from part.parameters(recurse=False)
    yield from part.buffers(recurse=False)
    if isinstance(part, QuantLinear):
        yield from (tensor for tensor in vars(part.input_format).values() if isinstance(tensor, Tensor))
