"""Quantisation end to end: what the model runs on, statistics, formats under a budget, codes, comparison, bundle."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from arsp.data.images import image_files, load_images
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import Guidance, RampGuidance
from arsp.errors import ConfigError, NumericalError
from arsp.quant import store
from arsp.quant.agreement import Agreement, Judge
from arsp.quant.calibrate import InputStatistics, Samples, image_samples, observe, own_samples
from arsp.quant.install import QuantisedLayer, install, linear_layers, simulate, sites
from arsp.quant.pack import to_tensors
from arsp.quant.picture import sensitivity_figure
from arsp.quant.quantiser import dequantise
from arsp.quant.recipe import Recipe
from arsp.quant.sensitivity import check_budget, choices, costs, measure_sensitivity, mix
from arsp.quant.transform import Format, balanced_weight, choose_layers, quantise_layers
from arsp.report.plots import theme, to_png
from arsp.runs import atomic_file, check_stop
from arsp.zoo.bundle import save_bundle
from arsp.zoo.load import LoadedModel, ModelSource, build_module, tokenizer_entry

NOT_INHERITED = {  # of the base model's card: what is not true of a quantised one, or stands elsewhere in its manifest
    "schema", "family", "kind", "variant", "bundle", "files", "config", "tokenizer", "sha256", "about", "measured", "published", "curves",
    "training", "parents",
}  # fmt: skip

Stage = Callable[[int, str], AbstractContextManager[Callable[..., None]]]


class QuantizeConfig(Recipe):
    """Configuration of ``arsp quantize``: a model and all of a recipe."""

    model: str = Field("llamagen", description="zoo name, bundle, or official file; teacher or student")
    tokenizer: str | None = Field(None, description="tokenizer file of an official GPT file")
    recipe: str = Field("w4a8", description="where the values below start from")
    cfg: float | None = Field(None, ge=0, description="guidance of the samples (default: the card's)")
    rest: Literal["float16", "bfloat16", "float32"] = Field("float16", description="stored precision of what is not quantised")
    device: str = "auto"
    threads: int | None = Field(None, ge=1)


@dataclass
class Quantised:
    """What a run made: the bundle, a line a layer, bytes, the comparison with the base model."""

    bundle: Path
    layers: list[dict[str, Any]]
    bytes: dict[str, int]
    agreement: Agreement
    picture: Path | None


def check(config: QuantizeConfig, source: ModelSource) -> dict[str, Format]:
    """The layers and their formats before any weight is read. ConfigError for what cannot be quantised, or is already; InputError
    for a folder without images."""
    if source.kind not in ("teacher", "student"):
        raise ConfigError(f"{source.name} is of kind '{source.kind}': there is nothing to quantise.", "See: arsp models ls")
    if "quantization" in source.card:
        raise ConfigError(
            f"{source.name} is quantised already.", "Quantise the model it was made from (arsp models info shows its parents)."
        )
    if "class" not in source.capabilities.conditions:
        raise ConfigError(f"{source.name} is conditioned on text: its samples need captions.", "Quantise a class-conditional model.")
    if config.activations.scales == "static" and source.layout.is_raster:
        raise ConfigError("activations.scales static: one scale for every scale of a next-scale model.", "Use it with var, or dynamic.")
    if source.kind == "student" and config.calibration.source:
        raise ConfigError("a student is looked at on its own noise, not on images.", "Drop --calib-source.")
    if config.calibration.source and not Path(config.calibration.source).is_file():
        image_files(config.calibration.source)  # InputError without an image
    with torch.device("meta"):
        module = build_module(source)
    formats = choose_layers(module, config)
    if config.budget.size is not None and config.budget.of == "bytes":
        options = choices(module, formats, config.budget)
        check_budget(*costs(module, options, config.budget), config.budget)
    return formats


def run(
    config: QuantizeConfig,
    model: LoadedModel,
    guidance: Guidance | RampGuidance,
    pipeline: LogitsPipeline,
    path: Path,
    *,
    stage: Stage,
    log: Callable[[str], None] = lambda text: None,
) -> Quantised:
    """Quantise a loaded float32 model and write ``path/bundle``; the sensitivity of a budget's layers resumes from ``path``."""
    formats = choose_layers(model.module, config)
    statistics, samples = None, None
    if config.needs_inputs or config.budget.size is not None:
        samples = _samples(config, model, guidance, pipeline, stage)
    if config.needs_inputs:
        with stage(sum(request.batch_size for request, _ in samples.batches), "looking at the inputs of layers") as advance:
            statistics = observe(samples, sites(model.module, formats), _tick(advance))
    picture = None
    if config.budget.size is not None:
        formats, picture = _mixed(config, samples, formats, statistics, path, stage, log)

    kept = [name for name in linear_layers(model.module) if name not in formats]
    layers: dict[str, QuantisedLayer] = {}
    if config.simulate:
        quantised = simulate(copy.deepcopy(model.module), {name: format_.bits for name, format_ in formats.items()}, config.simulate)
    else:
        with stage(len(formats), "quantising layers") as advance:
            layers = quantise_layers(model.module, formats, config, statistics, _tick(lambda name: advance(1)))
        quantised = install(copy.deepcopy(model.module), layers, torch.float32)
    with stage(2, "comparing with the unquantised model") as advance:
        rule = {"num": config.calibration.check, "batch_size": config.calibration.batch_size, "seed": config.calibration.seed + 1}
        judge = Judge(own_samples(model, guidance, pipeline, **rule))
        advance(1)
        agreement = judge(quantised)
    lines = [_line(name, formats[name], model.module.get_submodule(name), layers.get(name)) for name in formats]
    return Quantised(export(config, model, formats, layers, kept, path / "bundle"), lines, _bytes(lines), agreement, picture)


def _samples(
    config: QuantizeConfig, model: LoadedModel, guidance: Guidance | RampGuidance, pipeline: LogitsPipeline, stage: Stage
) -> Samples:
    rule = config.calibration
    if rule.source:
        return image_samples(model, guidance, load_images(rule.source)[: rule.num], batch_size=rule.batch_size)
    with stage(rule.num, "calibration samples") as advance:
        return own_samples(
            model, guidance, pipeline, num=rule.num, batch_size=rule.batch_size, seed=rule.seed, callback=_tick(advance)
        )  # fmt: skip


def _tick(advance: Callable[..., None]) -> Callable[..., None]:
    """Progress that honours a stop signal."""

    def tick(done: Any) -> None:
        advance(done)
        check_stop()

    return tick


def _mixed(
    config: QuantizeConfig,
    samples: Samples,
    formats: dict[str, Format],
    statistics: InputStatistics | None,
    path: Path,
    stage: Stage,
    log: Callable[[str], None],
) -> tuple[dict[str, Format], Path]:
    """Formats under the budget, and the picture of what they were chosen from."""
    options = choices(samples.model.module, formats, config.budget)
    found, size = costs(samples.model.module, options, config.budget)
    check_budget(found, size, config.budget)
    judge = Judge(samples)
    with stage(len(options), "sensitivity of layers") as advance:
        scores = measure_sensitivity(judge, options, config, statistics, path / "sensitivity.json", advance)
    chosen = mix(judge, options, scores, found, size, config, statistics, log)
    title = f"{samples.model.source.label}: {config.budget.of} within {config.budget.size}"
    picture = path / "sensitivity.png"
    with theme(), atomic_file(picture) as temporary:
        temporary.write_bytes(to_png(sensitivity_figure(scores, {name: str(format_) for name, format_ in chosen.items()}, title)))
    return chosen, picture


def _line(name: str, format_: Format, layer: nn.Linear, made: QuantisedLayer | None) -> dict[str, Any]:
    """A layer of the report: format, bytes, signal-to-noise ratio of the weight."""
    fp16 = 2 * layer.weight.numel()
    if made is None:
        return {"layer": name, "format": f"W{format_.bits}A8 simulated", "bytes": fp16, "fp16_bytes": fp16, "sqnr_db": None}
    given = balanced_weight(layer.weight.detach(), made.input_format)
    error = (dequantise(made.weight) - given).double()
    noise = float(error.square().sum())
    sqnr = 10 * math.log10(float(given.double().square().sum()) / noise) if noise else None
    shift = " shifted" if made.input_format.shifted else ""
    balance = " scaled" * (made.input_format.smooth_K is not None) + " rotated" * (made.input_format.signs_K is not None)
    size = sum(tensor.nbytes for tensor in to_tensors(made.weight, name).values())
    return {
        "layer": name, "format": f"{format_}A8{shift}{balance}", "bytes": size, "fp16_bytes": fp16, "sqnr_db": sqnr,
    }  # fmt: skip


def _bytes(lines: list[dict[str, Any]]) -> dict[str, int]:
    return {"quantised": sum(line["bytes"] for line in lines), "quantised_fp16": sum(line["fp16_bytes"] for line in lines)}


def export(
    config: QuantizeConfig, model: LoadedModel, formats: dict[str, Format], layers: dict[str, QuantisedLayer], kept: list[str], path: Path
) -> Path:
    """Write the bundle: integer layers as compressed-tensors has them, the rest in ``config.rest``. NumericalError where a number of the
    rest is too large for it."""
    source, dtype = model.source, getattr(torch, config.rest)
    weights = model.module.state_dict()
    for name in layers:
        weights = {key: value for key, value in weights.items() if key.rpartition(".")[0] != name}
    weights = {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()}
    for key, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise NumericalError(f"{key} does not fit into {config.rest}.", "Store it in more range: rest=bfloat16")
    recipe = Recipe.model_validate({key: getattr(config, key) for key in Recipe.model_fields}).model_dump(mode="json")
    facts = {"recipe": {"name": config.recipe, **recipe}, "base": {"model": source.name, "sha256": model.sha256}}
    if config.simulate:
        block = store.describe_simulated(config.simulate, {name: format_.bits for name, format_ in formats.items()}, kept, **facts)
    else:
        block = store.describe(layers, kept, **facts)
    inherited = {key: value for key, value in source.card.items() if key not in NOT_INHERITED}
    return save_bundle(
        path,
        family=source.family.name,
        kind=source.kind,
        config=source.config,
        model={**weights, **store.layer_tensors(layers)},
        **tokenizer_entry(model),
        about=f"{source.name} quantised by recipe {config.recipe}",
        quantization=block,
        parents=[{"model": source.name, "sha256": model.sha256}],
        **inherited,
    )
