"""Distilled Decoding 1 (arXiv 2412.17153): the student's objective and its training task.

For a batch row with ``t`` known codes, t drawn from {0, t2}: the input holds codebook vectors before t and the ORIGINAL noise
behind; the targets are the teacher's codes. Loss = ce * CE(logits, codes) + vec * |vectors - codebook[codes]|^2 / E, both over
positions >= t. No image data is used anywhere. A share of the updates may train the first codes only: what a student says about them
does not depend on what follows, and where the sequence ends in many codes that follow from the first, they deserve more updates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from arsp.config import StrictModel
from arsp.distill.trajectories import Trajectories, minibatches
from arsp.train.loop import Task


class DD1Config(StrictModel):
    """Weights of the objective and the trajectory points that are trained."""

    known: tuple[int, ...] = Field((0, 5), description="counts of known codes that are trained: 0 and the start of the second step")
    ce: float = Field(1.0, ge=0, description="weight of the cross-entropy on codes")
    vec: float = Field(1.0, ge=0, description="weight of the squared error on codebook vectors")
    short: float = Field(0.0, ge=0, le=1, description="share of the updates that train the first short_codes codes only")
    short_codes: int = Field(0, ge=0, description="codes of a short update: behind known, whole scales of a VAR")


class DD1Task(Task):
    """Trains ``student(labels_B, x_BLE, known_B) -> logits_BLV, vectors_BLE`` on trajectories."""

    def __init__(
        self,
        student: nn.Module,
        codebook_VE: Tensor,
        config: DD1Config,
        training: Trajectories,
        held_out: Trajectories,
        short: Trajectories | None = None,
    ):
        """``short``: further trajectories of the first ``config.short_codes`` codes, for short updates."""
        super().__init__()
        self.trained = student
        self.register_buffer("codebook", codebook_VE.detach().clone())
        self.config, self.training_set, self.held_out = config, training, held_out
        first = training.first_codes(config.short_codes)
        self.short_set = first if short is None else first.joined(short)
        self.probe: Callable[[nn.Module], dict[str, float]] | None = None  # further figures of the training curve

    def loss(self, step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        cut = self.config.short and torch.rand((), generator=generator) < self.config.short
        trajectories = self.short_set if cut else self.training_set
        rows = torch.randint(len(trajectories), (batch_size,), generator=generator)
        which = torch.randint(len(self.config.known), (batch_size,), generator=generator)
        codes, labels, noise = (x.to(self.codebook.device) for x in trajectories.batch(rows))
        known = torch.tensor(self.config.known)[which].to(self.codebook.device)
        logits, vectors = self.trained(labels, trajectory_point(codes, noise, known, self.codebook), known)
        unknown = torch.arange(codes.shape[1], device=known.device) >= known[:, None]
        ce = F.cross_entropy(logits[unknown], codes[unknown])
        vec = (vectors - self.codebook[codes]).square().mean(-1)[unknown].mean()
        return {"loss": self.config.ce * ce + self.config.vec * vec, "ce": ce, "vec": vec}

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Held-out cross-entropy and map accuracy at t = 0 and t2; the same with the noise shuffled between samples."""
        figures = {f"heldout_{name}": value for name, value in self._figures(module, self.config.known[0])[0].items()}
        for known in self.config.known[1:]:
            figures |= {f"heldout_{name}_t{known}": value for name, value in self._figures(module, known)[0].items()}
        figures["heldout_ce_shuffled_noise"] = self._figures(module, 0, shuffle=True)[0]["ce"]
        return figures | (self.probe(module) if self.probe else {})

    def accuracy_by_position(self, module: nn.Module, known: int = 0) -> list[float]:
        """Share of held-out samples whose argmax at each position equals the trajectory's code."""
        return self._figures(module, known)[1].tolist()

    @torch.no_grad()
    def _figures(self, module: nn.Module, known: int, shuffle: bool = False) -> tuple[dict[str, float], Tensor]:
        ce, hits, total = 0.0, 0.0, 0
        for rows in minibatches(len(self.held_out), 512):
            codes, labels, noise = (x.to(self.codebook.device) for x in self.held_out.batch(rows))
            if shuffle:
                noise = noise.roll(1, dims=0)
            known_B = torch.full_like(labels, known)
            logits, _ = module(labels, trajectory_point(codes, noise, known_B, self.codebook), known_B)
            ce += float(F.cross_entropy(logits[:, known:].flatten(0, 1), codes[:, known:].flatten())) * len(rows)
            hits = hits + (logits.argmax(-1) == codes).float().sum(0)
            total += len(rows)
        by_position = hits / total
        return {"ce": ce / total, "accuracy": float(by_position[known:].mean())}, by_position


def trajectory_point(codes_BL: Tensor, noise_BLE: Tensor, known_B: Tensor, codebook_VE: Tensor) -> Tensor:
    """``X_{t+1}``: codebook vectors of the first ``known_B[b]`` codes, the original noise behind them."""
    is_known = torch.arange(codes_BL.shape[1], device=known_B.device) < known_B[:, None]
    return torch.where(is_known.unsqueeze(-1), codebook_VE[codes_BL], noise_BLE.to(codebook_VE))
