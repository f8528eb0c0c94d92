"""Few-step sampling of a distilled student, alone or with its teacher in the loop (arXiv 2412.17153; docs/methods/dd1.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arsp.decode.ar import decode_blocks, keyed_choice
from arsp.decode.filters import LogitsPipeline
from arsp.errors import ConfigError
from arsp.models.attention import AttentionContext, DensePolicy, dense_attention, visible
from arsp.protocols import Capabilities, Decoder, Generation, Layout, Request
from arsp.rng import Purpose, keyed_normal


@dataclass(frozen=True)
class FewStep:
    """``known`` = ascending counts of already final codes, one per pass, the first 0 (one step: ``(0,)``); positions below
    ``split`` are decoded from the nearest codes of the logits head, those behind from the continuous head (-1: all codes).

    Both count positions. In a next-scale layout they stand at the end of a scale.
    """

    known: tuple[int, ...] = (0,)
    split: int = -1

    def check(self, layout: Layout) -> None:
        """ConfigError when the counts do not fit the layout."""
        ends, L = (0, *layout.ends), layout.num_tokens
        where = "" if layout.is_raster else f" at the ends of scales, {list(ends)}"
        rising = all(a < b for a, b in zip(self.known, self.known[1:], strict=False))
        if not self.known or self.known[0] != 0 or not rising or not set(self.known) <= set(ends[:-1]):
            raise ConfigError(f"student steps {self.known}: expected ascending counts from 0 below {L}{where}.")
        if self.split not in (-1, *ends):
            raise ConfigError(f"split {self.split}: expected -1 or 0..{L}{where}.")


def request_noise(request: Request, num_tokens: int, code_dim: int) -> Tensor:
    """The noise trajectory ``(B, L, E)`` of each sample id: N(0, I), keyed by (seed, sample id, position)."""
    positions = torch.arange(num_tokens, device=request.sample_ids_B.device)
    return keyed_normal(request.seed, request.sample_ids_B[:, None], positions, code_dim, Purpose.NOISE)


def nearest_codes(vectors: Tensor, codebook_VE: Tensor) -> Tensor:
    """Ids of the nearest codebook rows: argmin |c|^2 - 2 <x, c> (|x|^2 cancels)."""
    return (codebook_VE.square().sum(-1) - 2 * vectors @ codebook_VE.T).argmin(-1)


def student_pass(student: nn.Module, labels_B: Tensor, x_BLE: Tensor, known: int, codebook_VE: Tensor) -> tuple[Tensor, Tensor]:
    """One pass -> ``codes_BL`` and ``vectors_BLE``, the first ``known`` positions replaced by (the nearest code of) the input."""
    known_B = torch.full_like(labels_B, known)
    logits, vectors = student(labels_B, x_BLE, known_B)
    codes = logits.argmax(-1)
    if known:
        codes[:, :known] = nearest_codes(x_BLE[:, :known], codebook_VE)
        vectors[:, :known] = x_BLE[:, :known]
    return codes, vectors


def merge(codes_BL: Tensor, vectors_BLE: Tensor, split: int, codebook_VE: Tensor) -> Tensor:
    """Codebook vectors before ``split``, continuous ones from it on."""
    return torch.cat((codebook_VE[codes_BL[:, :split]], vectors_BLE[:, split:]), dim=1)


class StudentGenerator:
    """A distilled student as a Generator: ``len(known)`` passes an image, no guidance, no sampling."""

    def __init__(self, student: nn.Module, codebook_VE: Tensor, layout: Layout, settings: FewStep):
        settings.check(layout)
        self.student, self.codebook_VE, self.layout, self.settings = student, codebook_VE, layout, settings
        self.capabilities = Capabilities(order=layout.order, codebook=True, teacher=False)

    @property
    def split(self) -> int:
        return self.layout.num_tokens if self.settings.split < 0 else self.settings.split

    @torch.inference_mode()
    def generate(self, request: Request, callback: Callable[[int], None] | None = None) -> Generation:
        noise = request_noise(request, self.layout.num_tokens, self.codebook_VE.shape[1]).to(self.codebook_VE)
        return self.from_noise(request.labels_B.to(noise.device), noise, callback)

    @torch.inference_mode()
    def from_noise(self, labels_B: Tensor, noise_BLE: Tensor, callback: Callable[[int], None] | None = None) -> Generation:
        """Sample from given noise ``(B, L, E)``."""
        x = noise_BLE
        for known in self.settings.known:
            x = torch.cat((x[:, :known], noise_BLE[:, known:]), dim=1)  # known part kept, ORIGINAL noise behind
            codes, vectors = student_pass(self.student, labels_B, x, known, self.codebook_VE)
            x = merge(codes, vectors, self.split, self.codebook_VE)
            if callback:
                callback(self.layout.num_tokens - known)
        embeddings = None if self.split >= self.layout.num_tokens else x
        return Generation(
            codes, embeddings, {"passes": len(self.settings.known), "tokens_per_pass": codes.shape[1] / len(self.settings.known)}
        )


class TeacherLoopGenerator:
    """``pre-trained-n-m``: the teacher regenerates steps ``start``..``stop`` - 1 of the layout (codes of a raster, scales of a
    next-scale model), the student does the rest.

    One student pass gives the prefix (none when ``start`` is 0), the teacher draws its steps by its own rule, a last student
    pass with everything before step ``stop`` known fills in what follows.
    """

    def __init__(self, student: StudentGenerator, teacher: Decoder, pipeline: LogitsPipeline, start: int, stop: int):
        steps = len(student.layout.blocks)
        if not 0 <= start < stop < steps:
            raise ConfigError(f"teacher {_unit(student.layout)} {start}..{stop}: expected 0 <= start < stop < {steps}.")
        self.student, self.teacher, self.pipeline, self.start, self.stop = student, teacher, pipeline, start, stop
        self.capabilities = student.capabilities

    @torch.inference_mode()
    def generate(self, request: Request, callback: Callable[[int], None] | None = None) -> Generation:
        book = self.student.codebook_VE
        return self.from_noise(request, request_noise(request, self.student.layout.num_tokens, book.shape[1]).to(book), callback)

    @torch.inference_mode()
    def from_noise(self, request: Request, noise: Tensor, callback: Callable[[int], None] | None = None) -> Generation:
        """Sample from given noise ``(B, L, E)``; the teacher's draws are keyed by the request as always."""
        one, book = self.student, self.student.codebook_VE
        labels, ends = request.labels_B.to(book.device), (0, *one.layout.ends)
        start, stop = ends[self.start], ends[self.stop]
        codes = labels.new_zeros(len(labels), 0)
        if start:
            first, vectors = student_pass(one.student, labels, noise, 0, book)
            codes = nearest_codes(merge(first, vectors, one.split, book), book)[:, :start]
        choose = keyed_choice(request)
        result = decode_blocks(self.teacher, request, choose, self.pipeline, callback, prefix_Bp=codes, stop=stop)
        codes = result.codes_BL[:, :stop]
        x = torch.cat((book[codes], noise[:, stop:]), dim=1)
        final, vectors = student_pass(one.student, labels, x, stop, book)
        final[:, :stop] = codes
        embeddings = None if one.split >= one.layout.num_tokens else merge(final, vectors, one.split, book)
        teacher_passes = self.stop - self.start
        passes = (self.start > 0) + teacher_passes + 1
        return Generation(
            final, embeddings, {"passes": passes, "teacher_passes": teacher_passes, "tokens_per_pass": one.layout.num_tokens / passes}
        )


class OfficialPrefixPolicy(DensePolicy):
    """Attention without any mask inside a pass, as the released script feeds a student's prefix to a VAR teacher: the prefix scales
    see later ones, which they never did in training. For comparison with that script only (``--compat-official-prefix``)."""

    def attend(self, q_BHnD: Tensor, k_BHnD: Tensor, v_BHnD: Tensor, layer: int, ctx: AttentionContext) -> Tensor:
        return dense_attention(q_BHnD, *visible(k_BHnD, v_BHnD, layer, ctx), ctx.scale)


def parse_teacher_range(text: str, layout: Layout) -> tuple[int, int]:
    """``"61-81"`` (1-based, end exclusive as published) -> steps ``(60, 80)`` of the layout: codes of a raster, scales of a next-scale
    model; ConfigError when it does not fit."""
    steps = len(layout.blocks)
    try:
        first, last = (int(part) for part in text.split("-"))
    except ValueError as error:
        example = f"1-{max(2, steps // 4)}"
        raise ConfigError(f"teacher range '{text}': expected N-M in {_unit(layout)}, for example {example}.") from error
    if not 1 <= first < last <= steps:
        raise ConfigError(f"teacher range '{text}': expected 1 <= N < M <= {steps} in {_unit(layout)}.")
    return first - 1, last - 1


def default_second_step(layout: Layout) -> int:
    """Known codes at a second pass, as published: 5/16 of a raster (80 of 256), half of the scales (5 of 10 in VAR-d16)."""
    if layout.is_raster:
        return max(1, round(layout.num_tokens * 5 / 16))
    return layout.ends[len(layout.blocks) // 2 - 1]


def step_counts(steps: int, intermediate: Sequence[int]) -> tuple[int, ...]:
    """``--student-steps 1|2`` -> the counts of known codes the student was trained for."""
    if steps == 1:
        return (0,)
    if steps == 2 and intermediate:
        return (0, int(intermediate[0]))
    raise ConfigError(f"student steps {steps}: this student was trained for 1{' or 2' if intermediate else ''}.")


def _unit(layout: Layout) -> str:
    """What one generation step makes, for messages."""
    return "codes" if layout.is_raster else "scales"
