"""Drafts of the verify family: guessed codes, the law that each was drawn from, and where first guesses come from.

What decides exactness is the *recorded* law, not how good a guess is: a proposal is exact if the law it really had, given the positions
before it, is what it is tested against. A deterministic guess has a one-hot law.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from arsp.decode.filters import LogitsPipeline, impossible
from arsp.decode.guidance import Logits, step_apart
from arsp.decode.law import Law
from arsp.errors import ConfigError, NumericalError, nearest
from arsp.kernels import keyed_argmax
from arsp.kernels.reference import ONE_HOT, PRIOR, UNIFORM
from arsp.protocols import Decoder, Request
from arsp.rng import Purpose, keyed_uniform

INITIALISERS = {  # name -> the law it records
    "random_uniform": "1/V for every code",
    "random_onehot": "one-hot",
    "repeat_left": "one-hot; the first column is random, 1/V",
    "repeat_above": "one-hot; the first row is random, 1/V",
    "prior": "code frequencies of the teacher by class and position",
    "left_law": "the law of the last position that has one; at the start 1/V",
    "ngram": "one-hot where samples of the teacher went on from the last three codes; else what a draft has already, or 1/V",
}


@dataclass
class Tape:
    """The rows of a batch that are not finished: known codes, then drafts, and the law of each draft.

    ``known_B`` codes of a row are final, those up to ``drafted_B`` are drafts. ``laws`` come from one pass: O(window V) memory, and
    None where no law is needed.
    """

    request: Request
    vocab_size: int
    length: int
    codes_BL: Tensor
    known_B: Tensor
    drafted_B: Tensor
    source_BL: Tensor  # law of the draft: ONE_HOT, UNIFORM or PRIOR, which need no storage, or its position in ``laws``
    rows_B: Tensor  # which row of the whole request this is
    uniform_BL: Tensor  # for the test of the draft at each position: a position is tested once in a way that counts
    laws: Law | None = None
    prior_YLV: Tensor | None = None  # probabilities by class, position and code; shared by all rows
    passes: int = 0
    before: tuple[Tensor, Tensor] | None = None  # first position and log p of the last pass, for a redraw that compares
    known: list[int] | None = None  # ``known_B`` and ``drafted_B`` on the host where the loop keeps them there
    drafted: list[int] | None = None
    stop: list[int] | None = None  # of a drafter that is at work: up to where there have to be drafts
    claims: list[tuple[Tensor, NumericalError]] = field(default_factory=list)  # see :meth:`claim`

    @staticmethod
    def of(request: Request, length: int, vocab_size: int, prior_YLV: Tensor | None = None, spare: int = 0) -> Tape:
        """Nothing known yet. ``prior_YLV``: probabilities by class, position and code. ``spare``: positions behind the end that a method
        may scribble on."""
        ids = request.sample_ids_B
        codes, none, rows = ids.new_zeros(len(ids), length + spare), torch.zeros_like(ids), torch.arange(len(ids), device=ids.device)
        prior = None if prior_YLV is None else prior_YLV.to(ids.device)
        uniform = keyed_uniform(request.seed, ids[:, None], torch.arange(codes.shape[1], device=ids.device), Purpose.ACCEPT, 1)[..., 0]
        return Tape(request, vocab_size, length, codes, none, none, torch.full_like(codes, ONE_HOT), rows, uniform, prior_YLV=prior)

    def __len__(self) -> int:
        return len(self.known_B)

    @property
    def ids_B(self) -> Tensor:
        return self.request.sample_ids_B

    def select(self, rows: Tensor) -> Tape:
        """The tape of these rows only."""
        laws = None if self.laws is None else self.laws.select(rows)
        before = None if self.before is None else (self.before[0][rows], self.before[1][rows])
        known, drafted = (None if x is None else [x[row] for row in rows.tolist()] for x in (self.known, self.drafted))
        return Tape(
            self.request.rows(rows), self.vocab_size, self.length, self.codes_BL[rows], self.known_B[rows], self.drafted_B[rows],
            self.source_BL[rows], self.rows_B[rows], self.uniform_BL[rows], laws, self.prior_YLV, self.passes, before, known, drafted,
        )  # fmt: skip

    def ends(self) -> tuple[list[int], list[int]]:
        """Known codes and drafts of every row, from the host or else from the device."""
        return (self.known, self.drafted) if self.known is not None else torch.stack((self.known_B, self.drafted_B)).tolist()

    def stops(self, stop_B: Tensor) -> list[int]:
        """The numbers ``stop_B`` that a drafter was called with, from the host or else from the device."""
        return stop_B.tolist() if self.stop is None else self.stop

    def claim(self, holds: Tensor, error: NumericalError) -> None:
        """Something that has to hold: the host looks at it when it reads the results of the pass, and raises the error otherwise."""
        self.claims.append((holds, error))

    def draw(
        self, log_w_BmV: Tensor, positions_Bm: Tensor, purpose: Purpose, stream: int = 0, rows_B: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Codes ``(B, m)`` drawn from log-weights of all rows, or of ``rows_B``, keyed by seed, sample and position."""
        ids = (self.ids_B if rows_B is None else self.ids_B[rows_B])[:, None].expand(positions_Bm.shape).flatten()
        flat = log_w_BmV.flatten(0, 1)
        return keyed_argmax(flat, self.request.seed, ids, positions_Bm.flatten(), int(purpose), stream).view(positions_Bm.shape)

    def log_q(self, positions_Bm: Tensor, codes_BmK: Tensor) -> Tensor:
        """Log-probabilities ``(B, m, K)`` of K codes under the laws recorded for the drafts at these positions."""
        source = self.source_BL.gather(1, positions_Bm).unsqueeze(-1)
        own = self.codes_BL.gather(1, positions_Bm).unsqueeze(-1) == codes_BmK
        log_q = torch.zeros(codes_BmK.shape, device=own.device).masked_fill_(~own, -torch.inf)
        log_q = torch.where(source == UNIFORM, -torch.tensor(float(self.vocab_size)).log(), log_q)
        if self.prior_YLV is not None:
            rows = torch.arange(len(self), device=own.device)[:, None, None]
            log_q = torch.where(source == PRIOR, self.prior(rows, positions_Bm.unsqueeze(-1), codes_BmK).log(), log_q)
        if self.laws is not None:
            log_q = torch.where(source >= 0, self.laws.log_prob(codes_BmK, self._index(source)), log_q)
        return log_q

    def q(self, rows_r: Tensor, positions_rm: Tensor) -> Tensor:
        """Dense probabilities ``(r, m, V)`` of the laws recorded for some rows at some positions."""
        row = rows_r.unsqueeze(-1)
        source = self.source_BL[row, positions_rm].unsqueeze(-1)
        q = torch.nn.functional.one_hot(self.codes_BL[row, positions_rm], self.vocab_size).float()
        q = torch.where(source == UNIFORM, 1.0 / self.vocab_size, q)
        if self.prior_YLV is not None:
            q = torch.where(source == PRIOR, self.prior(row, positions_rm), q)
        if self.laws is not None:
            q = torch.where(source >= 0, self.laws.at(rows_r, self._index(source)).log_probs().exp(), q)
        return q

    def recorded(self, rows_r: Tensor, positions_rm: Tensor) -> tuple[Any, ...]:
        """These laws as :func:`arsp.kernels.draw_residual` takes them: q, q_how, sources, drafts, prior, places."""
        row, q, prior, places = rows_r.unsqueeze(-1), ([], []), None, None
        source = self.source_BL[row, positions_rm]
        if self.laws is None:
            source = source.clamp_max(ONE_HOT)
        else:
            q, num = self.laws.arguments(), self.laws.lse_Bm.shape[1]
            source = torch.where(source < 0, source, row * num + source.clamp_max(num - 1))
        if self.prior_YLV is not None:
            labels_B, places = self.request.labels_B, positions_rm.clamp_max(self.length - 1)
            places = places if labels_B is None else labels_B[row] * self.prior_YLV.shape[1] + places
            prior, places = self.prior_YLV.flatten(0, 1), places.flatten()
        return *q, source.flatten(), self.codes_BL[row, positions_rm].flatten(), prior, places

    def prior(self, rows: Tensor, positions: Tensor, codes: Any = slice(None)) -> Tensor:
        """Probabilities of the prior at the broadcast indices, of all codes by default; behind the end those of the last position."""
        labels_B = self.request.labels_B
        return self.prior_YLV[0 if labels_B is None else labels_B[rows], positions.clamp_max(self.length - 1), codes]

    def _index(self, source: Tensor) -> Tensor:
        return source.squeeze(-1).clamp(0, self.laws.lse_Bm.shape[1] - 1)

    @property
    def state_bytes(self) -> int:
        """Bytes of one row kept between two passes, beside its codes and its cache."""
        past = 0 if self.before is None else self.before[1].numel() * self.before[1].element_size()
        return ((0 if self.laws is None else self.laws.bytes) + past) // len(self)


class Initialiser:
    """First guesses for positions that no pass has looked at. ``purpose``: with the noise of the draw that has to be met (TOKEN) a guess
    from a law near the truth is most often right; a rule that tests drafts needs noise of its own (INIT)."""

    def __init__(self, name: str, width: int, purpose: Purpose = Purpose.INIT, ngrams: NGrams | None = None):
        if name not in INITIALISERS:
            raise ConfigError(f"--init {name}: unknown initialiser.", nearest(name, INITIALISERS))
        self.name, self.width, self.purpose, self.ngrams = name, width, purpose, ngrams

    def fill(self, tape: Tape, stop_B: Tensor) -> None:
        """Drafts for positions ``drafted_B .. stop_B - 1``, and the laws they have."""
        self._fill_new(tape, stop_B)
        if self.name == "ngram":
            self.ngrams.fill(tape, stop_B)

    def _fill_new(self, tape: Tape, stop_B: Tensor) -> None:
        num = max(stop - max(ends) for stop, *ends in zip(tape.stops(stop_B), *tape.ends(), strict=True))
        if num <= 0:
            return
        start_B = torch.maximum(tape.drafted_B, tape.known_B)
        wanted = (start_B < stop_B)[:, None]
        positions = torch.minimum(start_B[:, None] + torch.arange(num, device=stop_B.device), stop_B[:, None] - 1)
        at = positions.clamp(0, tape.length - 1)  # a row that needs fewer makes its last one again
        codes, source = self._guess(tape, at, start_B[:, None])
        tape.codes_BL = tape.codes_BL.scatter(1, at, torch.where(wanted, codes, tape.codes_BL.gather(1, at)))
        tape.source_BL = tape.source_BL.scatter(1, at, torch.where(wanted, source, tape.source_BL.gather(1, at)))
        tape.drafted_B = torch.maximum(tape.drafted_B, stop_B)

    def _guess(self, tape: Tape, positions: Tensor, start_B1: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and recorded laws for consecutive positions from ``start_B1`` on."""
        if self.name == "prior":
            rows = torch.arange(len(tape), device=positions.device)[:, None]
            return tape.draw(tape.prior(rows, positions).log(), positions, self.purpose), torch.full_like(positions, PRIOR)
        if self.name == "left_law" and tape.laws is not None:
            last = tape.laws.lse_Bm.shape[1] - 1
            law = tape.laws.log_probs()[:, -1:].expand(-1, positions.shape[1], -1)
            return tape.draw(law, positions, self.purpose), torch.full_like(positions, last)
        if self.name in ("repeat_left", "repeat_above"):
            return self._repeat(tape, positions, start_B1)
        kind = ONE_HOT if self.name == "random_onehot" else UNIFORM
        return self._random(tape, positions), torch.full_like(positions, kind)

    def _random(self, tape: Tape, positions: Tensor) -> Tensor:
        flat = torch.zeros(1, 1, 1, device=positions.device).expand(*positions.shape, tape.vocab_size)
        return tape.draw(flat, positions, self.purpose)

    def _repeat(self, tape: Tape, positions: Tensor, start_B1: Tensor) -> tuple[Tensor, Tensor]:
        """The code of the left (upper) neighbour, of its neighbour where that one is new too, and so on; random where the image ends."""
        if self.name == "repeat_left":
            origin = torch.maximum(start_B1 - 1, positions - positions % self.width)
            random = origin >= start_B1
        else:
            origin = positions - self.width * -((start_B1 - 1 - positions) // self.width)  # the last known one above
            random = origin < 0
            origin = torch.where(random, positions % self.width, origin)
        random |= origin < 0
        origin = origin.clamp_min(0)
        codes = torch.where(random, self._random(tape, origin), tape.codes_BL.gather(1, origin))
        return codes, torch.where(random & (origin == positions), UNIFORM, ONE_HOT)


@dataclass(frozen=True)
class NGrams:
    """The most frequent code behind every run of ``order`` codes at every position, as counted in sampled sequences."""

    keys_N: Tensor  # int64, sorted
    codes_N: Tensor
    vocab_size: int
    order = 3

    @staticmethod
    def count(codes_ML: Tensor, vocab_size: int) -> NGrams:
        """Of M sequences; the smallest code where two are equally frequent."""
        base, length = vocab_size + 1, codes_ML.shape[1]
        padded = torch.nn.functional.pad(codes_ML, (NGrams.order, 0), value=vocab_size)
        keys = torch.arange(length).expand(codes_ML.shape)
        for back in range(NGrams.order, 0, -1):
            keys = keys * base + padded[:, NGrams.order - back : NGrams.order - back + length]
        pairs, counts = torch.stack((keys.flatten(), codes_ML.flatten())).unique(dim=1, return_counts=True)
        by_count = torch.sort(counts, descending=True, stable=True).indices
        keys, codes = pairs[:, by_count]
        keys, by_key = torch.sort(keys, stable=True)
        first = torch.ones_like(keys, dtype=torch.bool)
        first[1:] = keys[1:] != keys[:-1]
        return NGrams(keys[first], codes[by_key][first], vocab_size)

    def fill(self, tape: Tape, stop_B: Tensor) -> None:
        """Draft positions ``known_B .. stop_B - 1`` anew, one behind another, where the run before them was seen."""
        num = max(stop - known for stop, known in zip(tape.stops(stop_B), tape.ends()[0], strict=True))
        base, keys, best = self.vocab_size + 1, self.keys_N.to(stop_B.device), self.codes_N.to(stop_B.device)
        back = tape.known_B[:, None] + torch.arange(-self.order, 0, device=stop_B.device)
        run = torch.where(back >= 0, tape.codes_BL.gather(1, back.clamp_min(0)), self.vocab_size)
        run_B = (run * base ** torch.arange(self.order - 1, -1, -1, device=stop_B.device)).sum(1)
        codes, source = tape.codes_BL.clone(), tape.source_BL.clone()
        rows = torch.arange(len(tape), device=stop_B.device)
        for step in range(num):
            at = (tape.known_B + step).clamp_max(codes.shape[1] - 1)
            key = run_B + at * base**self.order
            index = torch.searchsorted(keys, key).clamp_max(len(keys) - 1)
            seen = (keys[index] == key) & (at < stop_B)
            code = torch.where(seen, best[index], codes[rows, at])
            codes[rows, at] = code
            source[rows, at] = torch.where(seen, ONE_HOT, source[rows, at])
            run_B = (run_B * base + code) % base**self.order
        tape.codes_BL, tape.source_BL = codes, source


class DraftModel:
    """Drafts of a smaller model with the same codes: ``window`` sequential steps of its own before every pass of the large one.

    ``purpose`` TOKEN: drawn with the noise of the plain sampler; the fixed point of keyed draws needs nothing else. DRAFT: with noise of
    their own, and the small model's law is recorded.
    """

    def __init__(self, decoder: Decoder, pipeline: LogitsPipeline, purpose: Purpose = Purpose.DRAFT):
        self.decoder, self.pipeline, self.purpose, self.state, self.passes = decoder, pipeline, purpose, None, 0

    def begin(self, request: Request) -> None:
        self.state = self.decoder.start(request)

    def select(self, rows: Tensor) -> None:
        self.state = self.decoder.select(self.state, rows)

    def fill(self, tape: Tape, stop_B: Tensor) -> None:
        """Draft positions ``known_B .. stop_B - 1`` anew. A row that has fewer to draft than others follows its known codes first."""
        stops = tape.stops(stop_B)
        num = max(stop - known for stop, known in zip(stops, tape.ends()[0], strict=True))
        if num <= 0:
            return
        first_B, stream, laws, codes = stop_B - num, tape.passes + 1, [], []
        logits = self._catch_up(tape, first_B, [stop - num for stop in stops])
        for step in range(num):
            position = (first_B + step)[:, None]
            known = tape.codes_BL.gather(1, position)
            law, drawn, _ = self.pipeline.verify(
                logits[:, -1:], known, tape.request.seed, tape.ids_B, position, self.purpose, 0 if self.purpose == Purpose.TOKEN else stream
            )
            laws.append(law.clone())
            codes.append(drawn)
            code = torch.where(position < tape.known_B[:, None], known, drawn.clamp_min(0))
            tape.codes_BL = tape.codes_BL.scatter(1, position, code)
            if step + 1 < num or tape.passes == 0:  # the first pass may accept all: then two codes would be missing here
                logits = self._step(code)
        positions = first_B[:, None] + torch.arange(num, device=stop_B.device)
        tape.source_BL = tape.source_BL.scatter(1, positions, torch.arange(num, device=stop_B.device).expand(positions.shape))
        tape.laws = Law.stack(laws) if self.purpose != Purpose.TOKEN else None
        tape.claim((torch.cat(codes, dim=1) >= 0).all(), impossible())
        tape.drafted_B = stop_B

    def _step(self, codes: Tensor | None) -> Logits:
        self.passes += 1
        return step_apart(self.decoder, self.state, codes)

    def _catch_up(self, tape: Tape, first_B: Tensor, first: list[int]) -> Logits:
        """Logits of position ``first_B``. Where all drafts stood, two codes are new to the small model."""
        if tape.passes == 0:
            return self._step(None)
        back = min(2, *first)
        self.decoder.rewind(self.state, torch.tensor([at - back for at in first]))
        return self._step(tape.codes_BL.gather(1, first_B[:, None] - back + torch.arange(back, device=first_B.device)))
