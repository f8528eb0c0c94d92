"""Speculative Jacobi decoding: one loop in which a pass looks at a window of drafts, keeps what stands and guesses on.

A method says how drafts come about, which of them stand, and what becomes of the others; the loop owns the cache, rows of different
lengths, the end of the sequence and the counters. A scheme is exact when it is *position-local*: the draft at position j has the law
recorded for it given everything at positions before j, when j is decided depends on these positions only, and the decision is a valid one
for that law. Every exact method here is; the relaxed ones say what they give up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from arsp.decode.accept import ExactRule, resample
from arsp.decode.drafts import Tape
from arsp.decode.filters import LogitsPipeline, impossible
from arsp.decode.guidance import Logits, step_apart
from arsp.decode.law import Law
from arsp.kernels import accept_scan
from arsp.protocols import Decoder, Generation, Request
from arsp.rng import Purpose, keyed_uniform


@dataclass(frozen=True)
class Advance:
    """What one pass did: how many drafts each row looked at and how many of them stood."""

    tested_B: Tensor
    accepted_B: Tensor


class Method(Protocol):
    """One way of guessing and checking. ``begin`` is called once a batch, ``advance`` once a pass, ``select`` when rows are finished."""

    exactness: str
    slots: int  # cache slots beside those of the sequence

    def begin(self, request: Request, length: int, vocab_size: int) -> Tape: ...

    def advance(self, decoder: Decoder, state: Any, tape: Tape, window: int) -> Advance: ...

    def select(self, rows: Tensor) -> None: ...


class Redraw:
    """What becomes of drafts behind the first rejection: codes for all positions of the pass and the laws recorded for them.

    ``fresh``: drawn anew from p (arXiv 2410.01699). ``gumbel``: drawn with noise that stays with the position (arXiv 2510.24211).
    ``maximal``: kept with probability min(1, p / q), else from the residual, and p recorded (same paper; arXiv 2603.18599).
    ``rising``: from ``p max(1, p / p_before)^g`` (after arXiv 2603.27115), which is then the law recorded. ``reuse``: kept where p / q
    exceeds ``tau`` (after arXiv 2512.07503), which no recorded law describes: lossy.
    """

    def __init__(self, name: str = "fresh", *, gain: float = 1.0, tau: float = 0.5):
        self.name, self.gain, self.tau = name, gain, tau

    def stream(self, tape: Tape) -> int:
        """Which noise the draws of this pass use."""
        return 0 if self.name == "gumbel" else tape.passes + 1

    def __call__(self, law: Law, drawn_Bm: Tensor, ratio_Bm: Tensor, tape: Tape, positions_Bm: Tensor) -> tuple[Tensor, Law]:
        if self.name in ("fresh", "gumbel"):
            return drawn_Bm, law
        if self.name == "rising":
            return self._rising(law, tape, positions_Bm)
        drafts, old = tape.codes_BL.gather(1, positions_Bm), positions_Bm < tape.drafted_B[:, None]
        if self.name == "reuse":
            return torch.where(old & (ratio_Bm > self.tau), drafts, drawn_Bm), law
        uniform = keyed_uniform(tape.request.seed, tape.ids_B[:, None], positions_Bm, Purpose.COUPLE, 1, tape.passes)[..., 0]
        rows, index = torch.arange(len(tape), device=old.device), torch.arange(old.shape[1], device=old.device)
        rejected = old & (uniform >= ratio_Bm)
        fresh = resample(law, tape, rows, torch.where(rejected, index, -1), positions_Bm, Purpose.DRAFT, tape.passes + 1)
        return torch.where(rejected, fresh, torch.where(old, drafts, drawn_Bm)), law

    def _rising(self, law: Law, tape: Tape, positions_Bm: Tensor) -> tuple[Tensor, Law]:
        log_p = law.log_probs()
        past = log_p
        if tape.before is not None:
            first_B, before = tape.before
            index = positions_Bm - first_B[:, None]
            seen = (index >= 0) & (index < before.shape[1])
            rows = torch.arange(len(tape), device=log_p.device)[:, None]
            past = torch.where(seen.unsqueeze(-1), before[rows, index.clamp(0, before.shape[1] - 1)], log_p)
        floor = torch.tensor(1e-9).log()
        weights = Law.of_weights(log_p + self.gain * (log_p - past.clamp_min(floor)).clamp_min(0).nan_to_num(0.0))
        tape.before = (positions_Bm[:, 0], log_p)
        return tape.draw(weights.log_probs(), positions_Bm, Purpose.DRAFT, tape.passes + 1), weights

    @property
    def exactness(self) -> str:
        return "lossy" if self.name == "reuse" else "exact"


class Chain:
    """Drafts one behind another. Without a rule: the fixed point of keyed draws. With one, drafts are tested against the law recorded for
    them, a rejected one is replaced from the residual, and those behind are redrawn (without ``redraw``: left to the drafter)."""

    def __init__(
        self, pipeline: LogitsPipeline, drafter: Any, rule: ExactRule | None = None, redraw: Redraw | None = None,
        prior_YLV: Tensor | None = None,
    ):  # fmt: skip
        self.pipeline, self.drafter, self.rule, self.redraw, self.prior = pipeline, drafter, rule, redraw, prior_YLV
        exact = [part.exactness for part in (rule, redraw) if part is not None and part.exactness != "exact"]
        self.exactness, self.slots = exact[0] if exact else "exact", 0

    def begin(self, request: Request, length: int, vocab_size: int) -> Tape:
        if hasattr(self.drafter, "begin"):
            self.drafter.begin(request)
        return Tape.of(request, length, vocab_size, self.prior)

    def select(self, rows: Tensor) -> None:
        if hasattr(self.drafter, "select"):
            self.drafter.select(rows)

    def advance(self, decoder: Decoder, state: Any, tape: Tape, window: int) -> Advance:
        """One pass over ``window`` drafts a row, fewer where the sequence ends.

        note: rows near the end look at fewer drafts; what they feed instead are known codes before these, again.
        """
        length, device, known = tape.length, tape.codes_BL.device, tape.ends()[0]
        m = min(window, length - 1 - min(known))
        if m == 0:
            return self._plain(decoder, state, tape, known)
        base_B, base = tape.known_B.clamp_max(length - 1 - m), [min(at, length - 1 - m) for at in known]
        tape.stop = [at + m for at in base]
        self.drafter.fill(tape, base_B + m)
        tape.stop, offsets = None, torch.arange(m + 1, device=device)
        positions = base_B[:, None] + offsets
        drafts = tape.codes_BL.gather(1, positions)
        logits = feed(decoder, state, tape, base_B, base, m)
        if self.rule is None:
            law, drawn, _ = self.pipeline.verify(logits, drafts, tape.request.seed, tape.ids_B, positions, Purpose.TOKEN)
            ratio, new, recorded = None, drawn, None
        else:
            stream = self._stream(tape)
            law, drawn, log_p = self.pipeline.verify(logits, drafts, tape.request.seed, tape.ids_B, positions, Purpose.DRAFT, stream)
            ratio = self.rule.ratio(law, log_p, tape, positions, drafts)
            new, recorded = (drawn, None) if self.redraw is None else self.redraw(law, drawn, ratio, tape, positions)
        uniform = None if ratio is None else tape.uniform_BL.gather(1, positions)
        last_B = self._stood(m, tape.known_B - base_B, drafts, drawn, ratio, uniform)
        if self.rule is not None:
            new = self._replace(law, drawn, tape, positions, last_B, new, m)
        codes = torch.where(offsets < last_B[:, None], drafts, new)
        advance = Advance(base_B + m - tape.known_B, base_B + last_B - tape.known_B)
        tape.codes_BL = tape.codes_BL.scatter(1, positions, codes)
        if recorded is not None:  # the first position is known from here on
            recorded = recorded.behind_first()
            tape.source_BL = tape.source_BL.scatter(1, positions[:, 1:], offsets[:m].expand(len(tape), m))
        tape.laws, tape.known_B, tape.drafted_B = recorded, base_B + last_B + 1, base_B + m + 1
        tape.drafted = [at + m + 1 for at in base]
        tape.passes += 1
        return advance

    def _stood(
        self, m: int, ahead_B: Tensor, drafts: Tensor, drawn: Tensor, ratio: Tensor | None, uniform: Tensor | None
    ) -> Tensor:  # fmt: skip
        """How many codes of the window of m stand, those ``ahead_B`` at the front that were known before included."""
        drafts, drawn, ratio, uniform = (None if x is None else x[:, :m] for x in (drafts, drawn, ratio, uniform))
        return accept_scan(drafts, drawn, ahead_B, ratio, uniform)

    def _stream(self, tape: Tape) -> int:
        return tape.passes + 1 if self.redraw is None else self.redraw.stream(tape)

    def _plain(self, decoder: Decoder, state: Any, tape: Tape, known: list[int]) -> Advance:
        """A pass without drafts: every row draws its next code, with the noise that it would have as the bonus of a wider pass."""
        place = tape.known_B[:, None]
        logits = feed(decoder, state, tape, tape.known_B, known, 0)
        purpose, stream = (Purpose.TOKEN, 0) if self.rule is None else (Purpose.DRAFT, self._stream(tape))
        drawn = self.pipeline.verify(logits, torch.full_like(place, -1), tape.request.seed, tape.ids_B, place, purpose, stream)[1]
        tape.codes_BL = tape.codes_BL.scatter(1, place, drawn)
        tape.laws, tape.known_B = None, tape.known_B + 1
        tape.drafted_B, tape.drafted = tape.known_B, [at + 1 for at in known]
        tape.passes += 1
        none = torch.zeros_like(tape.known_B)
        return Advance(none, none)

    def _replace(self, law: Law, drawn: Tensor, tape: Tape, positions: Tensor, last_B: Tensor, new: Tensor, m: int) -> Tensor:
        """``new`` with the code that each row commits behind its last accepted draft: from the residual, or the bonus."""
        at = last_B[:, None]
        rejected, rows = at < m, torch.arange(len(tape), device=at.device)
        fresh = resample(law, tape, rows, torch.where(rejected, at, -1), positions.gather(1, at), Purpose.RESAMPLE)
        return new.scatter(1, at, torch.where(rejected, fresh, drawn.gather(1, at)))


def feed(decoder: Decoder, state: Any, tape: Tape, base_B: Tensor, base: list[int], num: int) -> Logits:
    """Feed the code before ``base_B`` and the ``num`` codes from it on: logits ``(B, num + 1, V)`` of positions ``base_B .. base_B + num``.
    ``base``: the same on the host.

    The first pass has no code before: it feeds the condition.
    """
    if tape.passes == 0:
        return step_apart(decoder, state, tape.codes_BL[:, :num] if num else None)
    decoder.rewind(state, torch.tensor([at - 1 for at in base]))
    offsets = torch.arange(-1, num, device=base_B.device)
    return step_apart(decoder, state, tape.codes_BL.gather(1, base_B[:, None] + offsets))


@dataclass(frozen=True)
class Seen:
    """What the host knows of a pass, row by row: codes known before and after it, and its :class:`Advance`."""

    before: list[int]
    known: list[int]
    tested: list[int]
    accepted: list[int]


def look(tape: Tape, before: list[int], advance: Advance) -> Seen:
    """The one read of a pass: where every row stands, and whether all is as it has to be. NumericalError: a law without a possible code, or
    a broken claim."""
    rows = torch.stack((tape.known_B, advance.tested_B, advance.accepted_B, tape.codes_BL.amin(1)))
    claims, tape.claims = tape.claims, []
    numbers = torch.cat((rows.flatten(), *(holds.view(1) for holds, _ in claims))).tolist()
    for holds, (_, error) in zip(numbers[rows.numel() :], claims, strict=True):
        if not holds:
            raise error
    known, tested, accepted, least = (numbers[i * len(tape) : (i + 1) * len(tape)] for i in range(4))
    if min(least) < 0:
        raise impossible()
    return Seen(before, known, tested, accepted)


@dataclass
class Statistics:
    """Counters over all images so far."""

    images: int = 0
    passes: int = 0  # of rows: an image counts the passes it took part in
    histogram: dict[int, int] = field(default_factory=dict)  # codes committed by a pass -> how often
    state_bytes: int = 0
    changes: list[list[int]] = field(default_factory=lambda: [[], []])  # of how often a place was tested, and accepted, from place to place

    def add(self, seen: Seen, length: int, state_bytes: int) -> None:
        """One pass over rows of ``length`` codes."""
        if not any(seen.tested):
            self.count(len(seen.tested), 1)
            return
        tested, accepted = self.changes = [counts or [0] * (length + 1) for counts in self.changes]
        for first, looked, stood in zip(seen.before, seen.tested, seen.accepted, strict=True):
            self.histogram[stood + 1] = self.histogram.get(stood + 1, 0) + 1
            for counts, num in ((tested, min(stood + 1, looked)), (accepted, stood)):
                counts[first] += 1
                counts[first + num] -= 1
        self.passes += len(seen.tested)
        self.state_bytes = max(self.state_bytes, state_bytes)

    @property
    def tested_L(self) -> Tensor | None:
        """How often a draft at each place was looked at; None where no pass had drafts."""
        return torch.tensor(self.changes[0][:-1]).cumsum(0) if self.changes[0] else None

    @property
    def accepted_L(self) -> Tensor | None:
        """How often it stood."""
        return torch.tensor(self.changes[1][:-1]).cumsum(0) if self.changes[1] else None

    def count(self, images: int, committed: int) -> None:
        """One pass in which every image got ``committed`` codes."""
        self.histogram[committed] = self.histogram.get(committed, 0) + images
        self.passes += images

    def report(self, grid: tuple[int, int]) -> dict[str, Any]:
        """Everything as plain values; acceptance by place in the image, None where no draft was tested."""
        total = sum(self.histogram.values())
        codes = sum(number * count for number, count in self.histogram.items())
        none = [0] * (grid[0] * grid[1])
        accepted, tested = (none if counts is None else counts.tolist() for counts in (self.accepted_L, self.tested_L))
        rate = [stood / num if num else None for stood, num in zip(accepted, tested, strict=True)]
        return {
            "images": self.images,
            "passes_per_image": self.passes / max(1, self.images),
            "tokens_per_pass": codes / max(1, total),
            "committed": {str(number): self.histogram[number] for number in sorted(self.histogram)},
            "single_token_share": self.histogram.get(1, 0) / max(1, total),
            "acceptance": sum(accepted) / sum(tested) if any(tested) else None,
            "acceptance_map": [rate[row * grid[1] : (row + 1) * grid[1]] for row in range(grid[0])],
            "state_bytes_per_image": self.state_bytes,
        }


class JacobiGenerator:
    """The loop: a Generator for any decoder that rewinds."""

    def __init__(self, decoder: Decoder, method: Any, window: int | Any):
        """``window``: drafts a pass, or what makes a :class:`arsp.decode.planner.WindowPlanner` from the first request."""
        self.decoder, self.method, self.window, self.planner = decoder, method, window, None
        self.capabilities, self.exactness, self.statistics = decoder.capabilities, method.exactness, Statistics()

    @torch.inference_mode()
    def generate(self, request: Request, callback: Callable[[int], None] | None = None) -> Generation:
        """Codes of every row; ``callback(codes committed)`` after every pass."""
        decoder, method, length = self.decoder, self.method, self.decoder.layout.num_tokens
        if self.planner is None and not isinstance(self.window, int):
            self.planner = self.window(request)
        planner = self.planner
        tape, state = method.begin(request, length, decoder.vocab_size), decoder.start(request, length - 1 + method.slots)
        codes_BL = tape.codes_BL.new_zeros(len(tape), length)
        self.statistics.images += len(tape)
        passes = rows_passed = 0
        tape.known, tape.drafted = [0] * len(tape), [0] * len(tape)
        while len(tape):
            before, num = tape.known, len(tape)
            width = self.window if planner is None else planner.choose(num, length - min(before))
            seen = look(tape, before, method.advance(decoder, state, tape, width))
            tape.known = seen.known
            self.statistics.add(seen, length, tape.state_bytes)
            passes, rows_passed = passes + 1, rows_passed + num
            if planner is not None:
                planner.observe(seen.accepted, seen.tested)
            if callback:
                callback(sum(seen.known) - sum(before))
            going = [row for row, known in enumerate(seen.known) if known < length]
            if len(going) < num:
                done = torch.tensor([row for row, known in enumerate(seen.known) if known == length])
                codes_BL[tape.rows_B[done]] = tape.codes_BL[done, :length]
                rows = torch.tensor(going, dtype=torch.int64)
                tape, state = tape.select(rows), decoder.select(state, rows)
                method.select(rows)
        stats = {"passes": rows_passed / max(1, len(codes_BL)), "tokens_per_pass": length * len(codes_BL) / max(1, rows_passed)}
        stats |= {"batch_passes": passes, "kv_bytes": state.peak_kv_bytes} if hasattr(state, "peak_kv_bytes") else {}
        return Generation(codes_BL, stats=stats)
