"""What a model runs on while it is looked at, and what is kept of it.

Samples are the model's own by default, so no data set is needed: a teacher draws codes with its sampling rule and is then fed them in one
pass, guidance halves and all; a student runs on keyed noise. Or images of a folder, as codes. Inputs of the condition's position are
left out of the statistics: one token that is far from all others would decide every scale (the BOS rule of MixDQ, arXiv 2405.17873).
A next-scale teacher has no such position; its first scale starts from the class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from arsp.decode.ar import ARGenerator
from arsp.decode.few_step import request_noise
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import Guidance, RampGuidance
from arsp.errors import ConfigError, InputError, NumericalError
from arsp.protocols import Request
from arsp.quant.balance import ChannelRange
from arsp.quant.rounding import InputMoments
from arsp.zoo.load import LoadedModel


@dataclass
class Samples:
    """Batches that a model can be run on again and again: requests with the codes of a teacher or the noise of a student."""

    model: LoadedModel
    guidance: Guidance | RampGuidance
    batches: list[tuple[Request, Tensor]] = field(default_factory=list)

    @torch.inference_mode()
    def logits(self, module: nn.Module) -> Iterator[Tensor]:
        """``logits_BLV`` of ``module`` (the model or a quantised copy of it), batch by batch: guided and teacher-forced, of a student
        those of one pass."""
        source = self.model.source
        if source.kind == "student":
            for request, noise_BLE in self.batches:
                known_B = torch.zeros_like(request.labels_B)
                yield module(request.labels_B, noise_BLE.to(module.dtype), known_B)[0]
            return
        decoder = source.family.decoder(module, self.model.tokenizer, self.guidance, None)
        for request, codes_BL in self.batches:
            yield decoder.teacher_forced(request, codes_BL)


def own_samples(
    model: LoadedModel,
    guidance: Guidance | RampGuidance,
    pipeline: LogitsPipeline,
    *,
    num: int,
    batch_size: int,
    seed: int,
    callback: Callable[[int], None] = lambda images: None,
) -> Samples:
    """``num`` samples of the model itself, classes in turn. ``callback`` is told the images of every batch."""
    samples, layout = Samples(model, guidance), model.source.layout
    generator = None if model.source.kind == "student" else ARGenerator(model.decoder(guidance), pipeline)
    for ids in torch.arange(num).split(batch_size):
        labels_B = (ids % model.source.config["num_classes"]).to(model.device)
        request = Request(ids.to(model.device), seed, labels_B=labels_B)
        if generator is None:
            samples.batches.append((request, request_noise(request, layout.num_tokens, model.codebook_VE.shape[1])))
        else:
            samples.batches.append((request, generator.generate(request).codes_BL))
        callback(len(ids))
    return samples


@torch.inference_mode()
def image_samples(model: LoadedModel, guidance: Guidance | RampGuidance, images_N3HW: Tensor, *, batch_size: int) -> Samples:
    """Codes of uint8 images, classes in turn. ConfigError for a student or images of another size, InputError for none."""
    if model.source.kind == "student":
        raise ConfigError("a student is looked at on its own noise, not on images.", "Drop --calib-source.")
    if len(images_N3HW) == 0:
        raise InputError("the calibration set is empty.", "Give a folder of images, or drop --calib-source.")
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer to make codes of images.", "Give --tokenizer FILE.")
    samples = Samples(model, guidance)
    for ids in torch.arange(len(images_N3HW)).split(batch_size):
        pixels = images_N3HW[ids].to(model.device).float() / 127.5 - 1
        codes_BL = model.tokenizer.encode(pixels)
        if codes_BL.shape[1] != model.source.layout.num_tokens:
            size = "x".join(map(str, images_N3HW.shape[-2:]))
            raise ConfigError(f"images of {size} make {codes_BL.shape[1]} codes, {model.name} has {model.source.layout.num_tokens}.")
        labels_B = (ids % model.source.config["num_classes"]).to(model.device)
        samples.batches.append((Request(ids.to(model.device), 0, labels_B=labels_B), codes_BL))
    return samples


class SiteStatistics:
    """Of the rows that enter a site: their moments, and of every step of the layout (a raster model counts as one) the range of each
    channel, as channel balancing wants it, and its largest magnitude."""

    def __init__(self, num_inputs: int, num_steps: int):
        self.moments = InputMoments(num_inputs)
        self.ranges = [ChannelRange() for _ in range(num_steps)]
        self.peaks_SK = torch.zeros(num_steps, num_inputs)

    def update(self, x_RnK: Tensor, step: int) -> None:
        """Rows of one step."""
        self.ranges[step].update(x_RnK)
        self.peaks_SK[step] = torch.maximum(self.peaks_SK[step], x_RnK.float().abs().amax((0, 1)).cpu())

    def largest_K(self) -> Tensor:
        """Largest range of every channel at any step: all of them share one weight."""
        return torch.stack([seen.range_K for seen in self.ranges if seen.range_K is not None]).amax(0)


InputStatistics = Mapping[str, SiteStatistics]


def observe(
    samples: Samples,
    sites: Mapping[str, list[str]],
    callback: Callable[[int], None] = lambda images: None,
) -> dict[str, SiteStatistics]:
    """Run the model on the samples and keep the statistics of each site (name -> its readers, as :func:`arsp.quant.transform.sites`).

    InputError without a sample. NumericalError when the input of a layer is not finite.
    """
    if not samples.batches:
        raise InputError("the calibration set is empty.", "Give at least one sample.")
    module, source = samples.model.module, samples.model.source
    blocks = [tuple(range(source.layout.num_tokens))] if source.layout.is_raster else source.layout.blocks
    num_tokens, is_raster_teacher = source.layout.num_tokens, source.kind == "teacher" and source.layout.is_raster
    found: dict[str, SiteStatistics] = {}

    def watch(site: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            x_RnK = x if x.dim() == 3 else x.unsqueeze(1)
            if site not in found:
                found[site] = SiteStatistics(x.shape[-1], len(blocks))
            if not bool(x_RnK.isfinite().all()):
                raise NumericalError(f"calibration: the input of {site} contains NaN or infinity.")
            length = x_RnK.shape[1]
            condition = 1 if is_raster_teacher and length == num_tokens else max(length - num_tokens, 0)
            x_RnK = x_RnK[:, condition:]
            found[site].moments.update(x_RnK)
            for step, rows_RmK in parts(x_RnK):
                found[site].update(rows_RmK, step)

        return hook

    def parts(x_RnK: Tensor) -> list[tuple[int, Tensor]]:
        """Rows by step: of a pass over everything, over one scale, or of a raster. Rows that are one an image count to the first."""
        length = x_RnK.shape[1]
        if len(blocks) == 1 or length == 1:
            return [(0, x_RnK)]
        if length == num_tokens:
            return [(step, x_RnK[:, block[0] : block[-1] + 1]) for step, block in enumerate(blocks)]
        return [(step, x_RnK) for step, block in enumerate(blocks) if len(block) == length]

    hooks = [module.get_submodule(names[0]).register_forward_pre_hook(watch(site)) for site, names in sites.items()]
    try:
        for (request, _), _ in zip(samples.batches, samples.logits(module), strict=True):
            callback(request.batch_size)
    finally:
        for hook in hooks:
            hook.remove()
    return found
