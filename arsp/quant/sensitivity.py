"""How much worse the model gets when one layer alone is quantised, and which format each layer gets for it (MixDQ, arXiv 2405.17873).

Scores read the logits of teacher-forced samples: ``sqnr`` in dB, ``kl`` the divergence of the quantised law from the model's, every step
of the layout counting the same. ``decoupled`` judges attention by the one and feed-forward layers by the other, as MixDQ judges quality
and content apart; how the budget is split between the two is found by trying ratios, and one allocation of all layers, on the model itself.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from arsp.bench.timing import measure
from arsp.errors import ConfigError
from arsp.quant.agreement import Judge
from arsp.quant.allocate import Option, allocate, split_mean_bits
from arsp.quant.calibrate import InputStatistics
from arsp.quant.install import install
from arsp.quant.linear import InputFormat, QuantLinear
from arsp.quant.quantiser import quantise_weight
from arsp.quant.recipe import BudgetConfig, Recipe, matches, parse_budget
from arsp.quant.transform import Format, quantise_layers
from arsp.runs import check_stop, write_json

FEED_FORWARD = ("*.feed_forward.*", "*.ffn.*")  # what MixDQ calls content
RATIOS = (0.46, 1.36)  # of mean bits, content to quality: the range of the official sweep

MOST_DB = 300.0  # of a layer that loses nothing

Scores = dict[str, dict[str, dict[str, float]]]  # layer -> format -> score -> value


def choices(module: nn.Module, formats: Mapping[str, Format], config: BudgetConfig) -> dict[str, dict[str, Format]]:
    """The formats that each layer may get, by their names."""
    found = {}
    for name in formats:
        fitting = [Format(*choice).fitting(module.get_submodule(name)) for choice in config.choices]
        found[name] = {str(format_): format_ for format_ in fitting}
    return found


def measure_sensitivity(
    judge: Judge,
    options: Mapping[str, Mapping[str, Format]],
    recipe: Recipe,
    statistics: InputStatistics | None,
    file: Path,
    callback: Callable[[int], None] = lambda layers: None,
) -> Scores:
    """Scores of every layer in every format, all others as they are. Kept in ``file`` layer by layer: what is there is not repeated."""
    module, scores = judge.samples.model.module, json.loads(file.read_text()) if file.is_file() else {}
    for name, formats in options.items():
        if scores.get(name, {}).keys() != formats.keys():
            own = module.get_submodule(name)
            scores[name] = {}
            for key, format_ in formats.items():
                layer = quantise_layers(module, {name: format_}, recipe, statistics)[name]
                module.set_submodule(name, QuantLinear(layer.weight, layer.bias_N, layer.input_format, torch.float32))
                try:
                    found = judge(module)
                finally:
                    module.set_submodule(name, own)
                scores[name][key] = {"kl": found.kl_by_step, "sqnr": min(found.sqnr_db, MOST_DB)}
            write_json(file, scores)
        callback(1)
        check_stop()
    return scores


def costs(
    module: nn.Module, options: Mapping[str, Mapping[str, Format]], config: BudgetConfig
) -> tuple[dict[str, dict[str, float]], float]:
    """Cost of each layer in each format in the unit of the budget, and the budget."""
    size, unit = parse_budget(config.size, config.of)
    if config.of == "bytes":
        found = {name: {key: float(f.bytes(module.get_submodule(name))) for key, f in formats.items()} for name, formats in options.items()}
        whole = sum(2.0 * module.get_submodule(name).weight.numel() for name in options)
    else:
        found, whole = latencies(module, options, config.rows)
    if unit == "x":
        found = {name: {key: cost / whole for key, cost in formats.items()} for name, formats in found.items()}
    return found, size


def check_budget(found: Mapping[str, Mapping[str, float]], size: float, config: BudgetConfig) -> None:
    """ConfigError when every choice costs more than the budget, with the smallest one that can be met, written as it is given."""
    least = sum(min(formats.values()) for formats in found.values())
    if least <= size * (1 + 1e-9):
        return
    unit = parse_budget(config.size, config.of)[1]
    factor, suffix = (1e-3, "KB") if unit == "bytes" else (1, unit)
    digits = 10.0 ** (3 - math.floor(math.log10(least * factor)))
    text = f"{math.ceil(least * factor * digits) / digits:.10g}{suffix}"
    raise ConfigError(
        f"the budget {config.size} cannot be met: the smallest feasible one is {text}.",
        f"Give --budget {text} or more, or allow smaller formats in budget.choices.",
    )


def latencies(module: nn.Module, options: Mapping[str, Mapping[str, Format]], rows: int) -> tuple[dict[str, dict[str, float]], float]:
    """Microseconds of each layer in each format with this many rows (median, measured here and now), and of all in bfloat16."""
    works, key_of = {}, {}
    for name, formats in options.items():
        N, K = module.get_submodule(name).weight.shape
        for key, format_ in formats.items():
            key_of[name, key] = f"{N}x{K} {key}"
            if key_of[name, key] not in works:
                codes = quantise_weight(torch.randn(N, K), format_.bits, format_.group_size)
                layer, x_MK = QuantLinear(codes, None, InputFormat(), torch.float32), torch.randn(rows, K)
                works[key_of[name, key]] = lambda layer=layer, x_MK=x_MK: layer(x_MK)
        weight_NK, x_MK = torch.randn(N, K, dtype=torch.bfloat16), torch.randn(rows, K, dtype=torch.bfloat16)
        key_of[name, ""] = f"{N}x{K} bfloat16"
        works.setdefault(key_of[name, ""], lambda x_MK=x_MK, weight_NK=weight_NK: F.linear(x_MK, weight_NK))
    with torch.inference_mode():
        times = {name: 1e3 * timing.median_ms for name, timing in measure(works, repeats=21, memory=False).items()}
    found = {name: {key: times[key_of[name, key]] for key in formats} for name, formats in options.items()}
    return found, sum(times[key_of[name, ""]] for name in options)


def mix(
    judge: Judge,
    options: Mapping[str, Mapping[str, Format]],
    scores: Scores,
    found: Mapping[str, Mapping[str, float]],
    size: float,
    recipe: Recipe,
    statistics: InputStatistics | None,
    callback: Callable[[str], None] = lambda text: None,
) -> dict[str, Format]:
    """The format of every layer at costs ``found`` within ``size`` (:func:`costs`). ConfigError as of :func:`check_budget`."""
    module, config = judge.samples.model.module, recipe.budget
    check_budget(found, size, config)

    def programme(names: list[str], score: str) -> dict[str, dict[str, Option]]:
        sign = -1 if score == "kl" else 1
        return {name: {key: Option(cost, sign * scores[name][key][score]) for key, cost in found[name].items()} for name in names}

    def joint(score: str) -> dict[str, Format]:
        return {name: options[name][key] for name, key in allocate(programme(list(options), score), size).items()}

    content = [name for name in options if matches(name, FEED_FORWARD)]
    quality = [name for name in options if name not in content]
    if config.score != "decoupled" or not content or not quality:
        return joint("kl" if config.score == "decoupled" else config.score)

    weight = lambda names: sum(module.get_submodule(name).weight.numel() for name in names)  # noqa: E731
    candidates = {"all layers by their KL": joint("kl")}
    for ratio in np.linspace(*RATIOS, config.sweep):
        means = split_mean_bits(size / weight(options), weight(content) / weight(quality), float(ratio))
        chosen: dict[str, str] = {}
        try:
            for names, score, mean in ((quality, "sqnr", means[0]), (content, "kl", means[1])):
                chosen |= allocate(programme(names, score), mean * weight(names))
        except ConfigError:
            continue  # this split asks one of the two groups for less than it can
        candidates[f"bits of feed-forward to attention layers {ratio:.2f}"] = {name: options[name][key] for name, key in chosen.items()}
    divergence = {}
    for label, formats in candidates.items():
        layers = quantise_layers(module, formats, recipe, statistics)
        divergence[label] = judge(install(copy.deepcopy(module), layers, torch.float32)).kl_by_step
        callback(f"{label}: KL {divergence[label]:.4g}")
        check_stop()
    return candidates[min(candidates, key=divergence.__getitem__)]
