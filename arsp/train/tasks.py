"""What ``arsp train`` trains: the feature network, a tokenizer, a class-conditional teacher."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arsp.data import shapes
from arsp.metrics.features import FeatNet
from arsp.models.llamagen import GPT, GPTConfig
from arsp.models.var import VAR
from arsp.runs import check_stop
from arsp.tokenizers.llamagen_vq import VQModel
from arsp.tokenizers.pixels import to_pixels
from arsp.tokenizers.var_vqvae import VQVAE
from arsp.train.loop import Task


class FeatureTask(Task):
    """Attribute classification on fresh procedural images; the sum of cross-entropies + 3 x smooth L1 on the position."""

    def __init__(self, variant: str = "shapes32", seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.trained = FeatNet()
        self.variant = variant

    def _draw(self, num: int, seed: int) -> tuple[Tensor, shapes.Attributes]:
        """Images and attributes on the device of the network."""
        device = next(self.trained.parameters()).device
        images, attrs = shapes.draw(num, seed, self.variant)
        return images.to(device), {key: value.to(device) for key, value in attrs.items()}

    def _targets(self, attrs: shapes.Attributes) -> Tensor:
        radius = torch.tensor(shapes.RADII, dtype=torch.float32, device=attrs["ri"].device)[attrs["ri"]]
        return torch.stack((attrs["cx"] / 16 - 1, attrs["cy"] / 16 - 1, radius / 8 - 1), dim=-1)

    def loss(self, step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        images, attrs = self._draw(batch_size, 1000 + step)
        out = self.trained(images)
        heads = {name: F.cross_entropy(out[name].float(), attrs[name]) for name in ("shape", "color", "bg")}
        heads["pos"] = 3 * F.smooth_l1_loss(out["pos"].float(), self._targets(attrs))
        return {"loss": sum(heads.values()), **heads}

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        images, attrs = self._draw(2000, 7)
        out = module(images)
        figures = {f"{name}_accuracy": float((out[name].argmax(-1) == attrs[name]).float().mean()) for name in ("shape", "color", "bg")}
        error = (out["pos"] - self._targets(attrs)).abs().mean(0)
        return {**figures, "position_error_px": 16 * float(error[:2].mean()), "radius_error_px": 8 * float(error[2])}


class TokenizerTask(Task):
    """L1 + 2 MSE + quantiser losses; unused codes are re-seeded from encoder outputs early on. This class: the LlamaGen tokenizer."""

    def __init__(self, model: nn.Module, images_u8: Tensor, held_out_u8: Tensor, *, total_steps: int = 1000):
        super().__init__()
        self.trained = model
        self.register_buffer("usage", torch.zeros(len(model.codebook_VE)))
        self.pool, self.held_out, self.reseed_until = images_u8, held_out_u8, int(0.7 * total_steps)

    def loss(self, step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(self.pool), (batch_size,), generator=generator)
        pixels = to_pixels(self.pool[rows]).to(self.usage.device)
        quantised, extra = self._quantise(step, self.trained.latents(pixels).float(), generator)
        error = self.trained.decode_map(quantised).float() - pixels
        l1, mse = error.abs().mean(), error.square().mean()
        return {"loss": l1 + 2 * mse + extra, "l1": l1, "mse": mse}

    def _quantise(self, step: int, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The map to decode, with a straight-through gradient, and the weighted losses of the quantiser."""
        quantised, vq_loss, commit_loss, codes = self.trained.quantize(latents)
        if self.training:
            vectors = F.normalize(latents.detach().movedim(1, -1).flatten(0, -2), dim=-1)
            self._track(
                step, torch.bincount(codes.flatten(), minlength=len(self.usage)).float(), lambda num: _pick(vectors, num, generator)
            )
        width = latents.shape[1]  # the quantiser's losses are means over E components
        return quantised, 0.25 * width * (vq_loss + commit_loss)

    @torch.no_grad()
    def _track(self, step: int, counts_V: Tensor, draw: Callable[[int], Tensor]) -> None:
        """Running usage of the codes; ``draw(n)`` gives vectors that replace n dead ones."""
        self.usage.mul_(0.99).add_(counts_V, alpha=0.01)
        if step == 30:
            dead = torch.ones_like(self.usage, dtype=torch.bool)
        elif step > 30 and step % 50 == 0 and step < self.reseed_until:
            dead = self.usage < 0.02 * self.usage.mean()
        else:
            return
        if dead.any():
            self.trained.quantize.embedding.weight[dead] = draw(int(dead.sum()))
            self.usage[dead] = self.usage.mean()

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        parts = [to_pixels(part).to(self.usage.device) for part in self.held_out.split(256)]
        codes = [module.encode(part) for part in parts]
        errors = torch.cat(
            [(module.decode_codes(c) - p).clamp(-2, 2).square().flatten(1).mean(1) for c, p in zip(codes, parts, strict=True)]
        )
        share = torch.bincount(torch.cat(codes).flatten(), minlength=len(self.usage)).float()
        share = share / share.sum()
        perplexity = torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
        return {
            "psnr_db": float(10 * torch.log10(4 / errors).mean()),
            "codes_used": float((share > 0).sum()),
            "perplexity": float(perplexity),
        }


class ScaleTokenizerTask(TokenizerTask):
    """The multi-scale tokenizer of VAR (arXiv 2404.02905): the quantiser's losses are means over the running sums of all scales.

    A VAR draws the codes of a scale independently, so what they must agree on has to stand in a coarser scale. Three things see to it.
    A helper network, dropped after training, paints a thumbnail from what the first scale quantises, with noise; a second one reads
    every cell's own place from the encoder's features, because an average can only tell where a thing is if its cells know.
    ``truncate`` is the share of the rows decoded from their first k scales only. And the gradient passes through the averaging of every
    scale, skipping only the rounding to codes. A few times the codebook is fitted anew by k-means: ``first_share`` of it to the first
    scale, the rest evenly.
    """

    refits = (0.02, 0.1, 0.25, 0.45, 0.6, 0.75)  # at these parts of the training

    def __init__(
        self, model: VQVAE, images_u8: Tensor, held_out_u8: Tensor, *, total_steps: int = 1000, truncate: float = 0.0,
        first_share: float = 0.5, thumbnail: int = 8,
    ):  # fmt: skip
        super().__init__(model, images_u8, held_out_u8, total_steps=total_steps)
        config = model.config
        self.truncate, self.first_codes, self.side = truncate, round(first_share * config.vocab_size), thumbnail
        self.refit_at = {round(part * total_steps) for part in self.refits}
        width = config.z_channels * config.patch_nums[0] ** 2
        self.painter = nn.Sequential(
            nn.Linear(width, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 3 * thumbnail**2)
        )  # fmt: skip
        self.locator = nn.Conv2d(config.ch * config.ch_mult[-1], 2, 1)
        ramp = torch.linspace(-1, 1, config.patch_nums[-1])
        self.register_buffer("places", torch.stack(torch.meshgrid(ramp, ramp, indexing="ij")), persistent=False)

    @property
    def optimised(self) -> nn.Module:
        return nn.ModuleList((self.trained, self.painter, self.locator))

    def loss(self, step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        if step in self.refit_at:
            self._refit(step)
        rows = torch.randint(len(self.pool), (batch_size,), generator=generator)
        pixels = to_pixels(self.pool[rows]).to(self.usage.device)
        encoder = self.trained.encoder
        features = encoder.features(pixels)
        place = (self.locator(features).float() - self.places).square().mean()
        latents = self.trained.quant_conv(encoder.conv_out(F.silu(encoder.norm_out(features)))).float()
        fixed = latents.detach()
        with torch.autocast(latents.device.type, enabled=False):
            codes, maps = self.trained.quantize.encode(fixed)
            sums, first = self._straight_through(latents, codes)
        quantiser = sum(F.mse_loss(found, fixed) + 0.25 * F.mse_loss(latents, found.detach()) for found in maps) / len(maps)
        last = torch.full((batch_size,), len(maps) - 1)
        cut = torch.rand(batch_size, generator=generator) < self.truncate
        last = torch.where(cut, torch.randint(len(maps) - 1, (batch_size,), generator=generator), last)
        error = self.trained.decode_map(torch.stack(sums)[last, torch.arange(batch_size)]).float() - pixels
        spread = first.std(dim=(0, 1), correction=0, keepdim=True).detach()
        first = first + 0.1 * spread * torch.randn(first.shape, generator=generator).to(first)
        thumbnail = F.mse_loss(self.painter(first.flatten(1)), F.adaptive_avg_pool2d(pixels, self.side).flatten(1))
        l1, mse = error.abs().mean(), error.square().mean()
        loss = l1 + 2 * mse + quantiser + 4 * thumbnail + place
        return {"loss": loss, "l1": l1, "mse": mse, "thumbnail_mse": thumbnail, "place_mse": place}

    def _straight_through(self, latents: Tensor, codes: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The running sums again, with a gradient to ``latents`` that skips the rounding to codes and nothing else, and what the
        first scale quantises."""
        quantizer = self.trained.quantize
        rest, f_hat, sums, first = latents, torch.zeros_like(latents), [], None
        for k, (pn, ids) in enumerate(zip(quantizer.patch_nums, codes, strict=True)):
            z = F.interpolate(rest, size=(pn, pn), mode="area").flatten(2).transpose(1, 2)
            vectors = z + (quantizer.embedding(ids) - z).detach()
            first = z if first is None else first
            added = quantizer.contribution(vectors, k)
            rest, f_hat = rest - added, f_hat + added
            sums.append(f_hat)
        return sums, first

    @torch.no_grad()
    def _refit(self, seed: int) -> None:
        """Codebook from k-means of what each scale has to quantise over (a sample of) the pool, scale after scale."""
        from scipy.cluster.vq import kmeans2

        quantizer, sample = self.trained.quantize, self.pool[:: max(1, len(self.pool) // 8192)]
        rest = torch.cat([self.trained.latents(to_pixels(part).to(self.usage.device)).float() for part in sample.split(256)])
        book, scales = quantizer.embedding.weight, len(quantizer.patch_nums)
        others = (len(book) - self.first_codes) // (scales - 1)
        row = 0
        for k, pn in enumerate(quantizer.patch_nums):
            num = self.first_codes if k == 0 else others if k < scales - 1 else len(book) - row
            z = F.interpolate(rest, size=(pn, pn), mode="area").flatten(2).transpose(1, 2)
            vectors = z.flatten(0, 1).cpu()
            some = vectors[torch.linspace(0, len(vectors) - 1, min(len(vectors), 16_384)).long()]
            with warnings.catch_warnings(action="ignore"):  # fewer different vectors than codes: some codes stay unused
                centres = torch.from_numpy(kmeans2(some.numpy(), num, minit="++", rng=seed)[0]).to(book)
            book[row : row + num] = centres
            rest = rest - quantizer.contribution(centres[torch.cdist(z, centres).argmin(-1)], k)
            row += num

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Also the PSNR after each scale, and how many codes the first scale uses."""
        pixels = to_pixels(self.held_out[:256]).to(self.usage.device)
        codes, maps = module.quantize.encode(module.latents(pixels))
        psnr = lambda f_hat: float(10 * torch.log10(4 / (module.decode_map(f_hat) - pixels).square().flatten(1).mean(1)).mean())  # noqa: E731
        first = {"first_scale_codes": float(len(codes[0].unique()))}
        return super().evaluate(module) | first | {f"psnr_db_scale_{k}": psnr(f_hat) for k, f_hat in enumerate(maps[:-1])}


def _pick(vectors_NE: Tensor, num: int, generator: torch.Generator) -> Tensor:
    return vectors_NE[torch.randint(len(vectors_NE), (num,), generator=generator)]


class TeacherTask(Task):
    """Next-code cross-entropy on tokenised images, classes dropped at ``class_dropout_prob`` for guidance."""

    def __init__(self, config: GPTConfig, codes_NL: Tensor, labels_N: Tensor, held_out: tuple[Tensor, Tensor], *, seed: int = 0):
        super().__init__()
        self.trained = GPT(config)
        self.trained.init_weights(torch.Generator().manual_seed(seed))
        self.codes, self.labels, self.held_out = codes_NL, labels_N, held_out

    def _nats(self, codes_BL: Tensor, labels_B: Tensor) -> Tensor:
        device = self.trained.output.weight.device
        codes_BL, labels_B = codes_BL.to(device), labels_B.to(device)
        logits_BLV = self.trained(codes_BL[:, :-1], labels_B)
        return F.cross_entropy(logits_BLV.flatten(0, 1), codes_BL.flatten())

    def loss(self, step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(self.codes), (batch_size,), generator=generator)
        codes, labels = self.codes[rows], self.labels[rows].clone()
        drop = torch.rand(batch_size, generator=generator) < self.trained.config.class_dropout_prob
        labels[drop] = self.trained.config.num_classes
        return {"loss": self._nats(codes, labels)}

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        codes, labels = self.held_out
        parts = [(self._nats(c, y), len(c)) for c, y in zip(codes.split(512), labels.split(512), strict=True)]
        return {"nats_per_token": float(sum(loss * n for loss, n in parts) / len(codes))}


class ScaleTeacherTask(Task):
    """Cross-entropy of a VAR on tokenised images (arXiv 2404.02905), every position the same weight, classes dropped for guidance.

    ``scales``: first and last scale that is trained (a specialised drafter or refiner, arXiv 2411.17787); the sequence ends there.
    ``short``: share of the updates that see the first ``short_scales`` scales only: they decide the image and hold few codes.
    ``expert``: another VAR whose law is matched too, ``weight`` KL(expert || model) + (1 - ``weight``) cross-entropy, at the scales from
    ``expert_from`` on; the coarser ones learn from the images alone.
    """

    no_decay = ("pos_", "lvl_embed", "ada_gss", "scale_mul")

    def __init__(
        self, model: VAR, quantizer: nn.Module, codes_NL: Tensor, labels_N: Tensor, held_out: tuple[Tensor, Tensor], *,
        scales: tuple[int, int] | None = None, short: float = 0.0, short_scales: int = 0, expert: VAR | None = None, weight: float = 0.0,
        expert_from: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.trained, self.config = model, model.config
        self.codes, self.labels, self.held_out = codes_NL, labels_N, held_out
        self.first, self.last = scales or (0, model.config.num_scales - 1)
        self.short, self.short_scales, self.weight, self.expert_from = short, short_scales, weight, expert_from
        self._frozen = [quantizer, expert]  # in a list: no part of the checkpoint

    def _logits(self, codes_BL: Tensor, labels_B: Tensor, last: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits and codes of scales first .. last, and the expert's logits of the same positions."""
        quantizer, expert = self._frozen
        device, own = self.trained.head.weight.device, self.config.scale_slice(self.first, last)
        codes_BL, labels_B = codes_BL.to(device), labels_B.to(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            end = self.config.scale_slice(0, last - 1).stop
            inputs = quantizer.to(device).inputs(codes_BL[:, :end]) if last else codes_BL.new_zeros(len(codes_BL), 0, self.config.code_dim)
            taught = expert.to(device)(labels_B, inputs)[:, own] if expert is not None else None
        return self.trained(labels_B, inputs)[:, own], codes_BL[:, own], taught

    def loss(self, step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(self.codes), (batch_size,), generator=generator)
        labels = self.labels[rows].clone()
        labels[torch.rand(batch_size, generator=generator) < self.config.cond_drop_rate] = self.config.num_classes
        cut = float(torch.rand(1, generator=generator)) < self.short
        logits, codes, taught = self._logits(self.codes[rows], labels, self.short_scales - 1 if cut else self.last)
        if taught is None:
            return {"loss": F.cross_entropy(logits.flatten(0, 1), codes.flatten())}
        ce = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").mean(0)
        kl = F.kl_div(F.log_softmax(logits, -1), F.log_softmax(taught, -1), reduction="none", log_target=True).sum(-1).mean(0)
        start = self.config.scale_slice(0, self.expert_from - 1).stop if self.expert_from else 0
        weight = torch.full_like(kl, self.weight)
        weight[: max(0, start - self.config.scale_slice(self.first, self.last).start)] = 0
        return {"loss": (weight * kl + (1 - weight) * ce).mean(), "ce": ce.mean(), "kl": kl.mean()}

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Nats a code, an image, and a code of each scale."""
        codes, labels = self.held_out
        total = 0.0
        for c, y in zip(codes.split(256), labels.split(256), strict=True):
            logits, target, _ = self._logits(c, y, self.last)
            total = total + F.cross_entropy(logits.transpose(1, 2), target, reduction="none").sum(0)
        by_position = total / len(codes)
        sizes = [pn * pn for pn in self.config.patch_nums[self.first : self.last + 1]]
        scales = {f"nats_scale_{self.first + i}": float(part.mean()) for i, part in enumerate(by_position.split(sizes))}
        return {"nats_per_token": float(by_position.mean()), "nats_per_image": float(by_position.sum()), **scales}


@torch.inference_mode()
def tokenise(tokenizer: VQModel | VQVAE, images_u8: Tensor, progress=lambda n: None) -> Tensor:
    """Codes ``(N, L)`` int64 of all images, in batches of 256. Interrupted between batches when asked to stop."""
    parts = []
    for batch in images_u8.split(256):
        check_stop()
        parts.append(tokenizer.encode(to_pixels(batch)))
        progress(len(batch))
    return torch.cat(parts)
