"""Classifier-free guidance, below the sampler: whatever is drawn or verified is the guided distribution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from arsp.errors import ConfigError
from arsp.kernels.reference import guide


@dataclass(frozen=True)
class Guided:
    """Guided logits ``(B, m, V)`` that are not combined yet: both halves as the model made them, float32 or bfloat16.

    They are combined (:func:`arsp.kernels.reference.guide`) where somebody looks: by the kernel ``verify`` while it reads the rows, by
    ``float()`` for all codes, by an index into the codes for some. Otherwise it is used like a tensor.
    """

    cond_BmV: Tensor
    uncond_BmV: Tensor
    scale: float
    ramp: bool = False
    guided_Bm: Tensor | None = None  # bool; None: all positions are

    @property
    def shape(self) -> torch.Size:
        return self.cond_BmV.shape

    @property
    def device(self) -> torch.device:
        return self.cond_BmV.device

    @property
    def nbytes(self) -> int:
        return self.cond_BmV.nbytes + self.uncond_BmV.nbytes

    def __len__(self) -> int:
        return len(self.cond_BmV)

    def float(self) -> Tensor:
        """The guided logits of all codes, float32."""
        guided = None if self.guided_Bm is None else self.guided_Bm.unsqueeze(-1)
        return guide(self.cond_BmV, self.uncond_BmV, self.scale, self.ramp, guided)

    def __getitem__(self, index: Any) -> Guided | Tensor:
        """Some rows and positions; with an index into the codes, too, their logits in float32."""
        of_codes = isinstance(index, tuple) and len(index) == 3
        guided = None if self.guided_Bm is None else self.guided_Bm[index[:2] if of_codes else index]
        cond, uncond = self.cond_BmV[index], self.uncond_BmV[index]
        if of_codes:
            return guide(cond, uncond, self.scale, self.ramp, guided)
        return replace(self, cond_BmV=cond, uncond_BmV=uncond, guided_Bm=guided)

    def clone(self) -> Logits:
        """The same in memory of its own: halves of bfloat16, or else the combined logits, which take half as much."""
        if self.cond_BmV.element_size() > 2:
            return self.float()
        guided = None if self.guided_Bm is None else self.guided_Bm.clone()
        return replace(self, cond_BmV=self.cond_BmV.clone(), uncond_BmV=self.uncond_BmV.clone(), guided_Bm=guided)

    def arguments(self) -> tuple[Tensor, float, bool, Tensor | None]:
        """What :func:`arsp.kernels.verify` takes beside the conditional rows ``(B m, V)``."""
        return self.uncond_BmV.flatten(0, 1), self.scale, self.ramp, None if self.guided_Bm is None else self.guided_Bm.flatten()

    @staticmethod
    def cat(parts: list[Guided]) -> Guided:
        """Consecutive positions as one."""
        join = lambda name: torch.cat([getattr(part, name) for part in parts], dim=1)  # noqa: E731
        guided = None if parts[0].guided_Bm is None else join("guided_Bm")
        return replace(parts[0], cond_BmV=join("cond_BmV"), uncond_BmV=join("uncond_BmV"), guided_Bm=guided)


Logits = Tensor | Guided


def step_apart(decoder: Any, state: Any, codes_Bn: Tensor | None, *nodes: Any) -> Logits:
    """``decoder.step``, with the halves of guidance not combined and logits in the type that the model made, where it offers that. What it
    returns may be overwritten by the next pass."""
    return getattr(decoder, "step_apart", decoder.step)(state, codes_Bn, *nodes)


@dataclass(frozen=True)
class Guidance:
    """``logits = u + scale * (c - u)`` on raw float32 logits.

    note: official LlamaGen semantics. ``scale <= 1`` switches guidance off (it does not interpolate). ``interval`` m >= 0 guides
    tokens 0..m+1 only: the prefill is always guided and decode step i, which yields token i + 1, is guided while i <= m.
    """

    scale: float = 1.0
    interval: int = -1

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise ConfigError(f"guidance scale {self.scale}: expected a number >= 0.")

    @property
    def active(self) -> bool:
        return self.scale > 1.0

    @property
    def last_guided(self) -> float:
        """Largest token index that is guided (-1: none, inf: all)."""
        if not self.active:
            return -1
        return float("inf") if self.interval <= -1 else self.interval + 1

    def halves(self, cond: Tensor, uncond: Tensor, tokens_m: Tensor) -> Guided:
        """The guided logits ``(B, m, V)`` of both halves; ``tokens_m`` = indices of the predicted tokens, ``(m,)`` or ``(B, m)``."""
        everywhere = self.last_guided == float("inf")
        return Guided(cond, uncond, self.scale, guided_Bm=None if everywhere else (tokens_m <= self.last_guided).expand(cond.shape[:2]))

    def combine(self, cond: Tensor, uncond: Tensor, tokens_m: Tensor) -> Tensor:
        """:meth:`halves` in one, float32."""
        return self.halves(cond, uncond, tokens_m).float()


@dataclass(frozen=True)
class RampGuidance:
    """Guidance of VAR (arXiv 2404.02905): ``logits = (1 + t) c - t u`` with ``t = scale * k / (K - 1)`` at scale k of K.

    note: another meaning of the number than LlamaGen's: 0 is off, 1.5 ends at 2.5 c - 1.5 u, and the first scale is never guided.
    """

    scale: float
    num_scales: int
    interval: int = -1

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise ConfigError(f"guidance scale {self.scale}: expected a number >= 0.")
        if self.interval != -1:
            raise ConfigError("--cfg-interval: the guidance of VAR is a ramp over scales.", "Drop it, or give a schedule with cfg off.")

    @property
    def active(self) -> bool:
        return self.scale > 0

    def halves(self, cond: Tensor, uncond: Tensor, k: int) -> Guided:
        """The guided logits of scale k of both halves."""
        return Guided(cond, uncond, self.scale * k / (self.num_scales - 1), ramp=True)

    def combine(self, cond: Tensor, uncond: Tensor, k: int) -> Tensor:
        """:meth:`halves` in one, float32."""
        return self.halves(cond, uncond, k).float()
