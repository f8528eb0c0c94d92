"""How many drafts the next pass should look at: measured times of a pass, acceptance estimated while decoding.

A pass over W drafts feeds n = W + 1 codes a row and commits E(W) = sum_{d=0}^{W} S_d codes on average, S_d being the probability that at
least d drafts stand. With T(B, n) the time of a pass of B rows, a window gains E(W) T(B, 1) / T(B, W + 1) over one code a pass.

Windows chosen here depend on times and on how many drafts stood in earlier passes, that is on positions that are decided already. So
when a position is decided depends on earlier positions only, and an exact scheme stays exact under any planner of this kind.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arsp.bench import timing
from arsp.errors import ConfigError, InputError, UsageError
from arsp.protocols import Decoder, Request
from arsp.runs import cache_root, cpu_model, write_json

CANDIDATES = (0, 1, 2, 4, 8, 16, 32, 64)

MIN_GAIN = 1.02  # windows that promise less than this are not worth it
HOLD = 4  # passes that a choice is kept for: drafts get better the longer they stay in a window
TRIAL_ROWS = 16  # rows that a window is tried on before it counts as known
MEMORY = 64  # passes that an estimate looks back on, about
PRIOR = 4.0  # rows that the estimate of the next shallower depth counts for
MAX_TRIAL = 2.0  # a trial takes at most this many times what one code takes
NEW_LOSS, AGAIN_LOSS = 0.02, 0.005  # shares of the time that trials may lose: of windows not known yet, and of others
QUARTERS = 4  # parts of the sequence with estimates of their own: first rows of an image have nothing to be guessed from
_MAX_RATIO = 8.0  # passes slower than this (times one code) are not timed but extrapolated
_NORMAL = NormalDist()


# ----------------------------------------------------------------------------------------------------------------- cost


@dataclass(frozen=True)
class StepCost:
    """Seconds of one decoder pass.

    ``seconds[B][n]``: B rows of n codes each, standing at different lengths as they do after drafts were accepted. ``aligned[B]``: one
    code a row, all rows at the same length, which is plain AR. Between measured values interpolation is linear, beyond them along the
    last two; one value alone counts for all.
    """

    seconds: dict[int, dict[int, float]]
    aligned: dict[int, float]

    def of(self, batch: int, num_codes: int, aligned: bool = False) -> float:
        """Seconds of a pass of ``batch`` rows; ``aligned``: they stand at the same length, which makes a difference for one code a row."""
        if aligned and num_codes == 1:
            return _line(self.aligned, batch)
        return _line({rows: _line(by_width, num_codes) for rows, by_width in self.seconds.items()}, batch)


def _line(values: dict[int, float], x: int) -> float:
    """Piecewise linear through ``values``, continued at the upper end, constant below the lower one."""
    known = sorted(values)
    if len(known) == 1 or x <= known[0]:
        return values[known[0]]
    right = min(bisect.bisect_left(known, x), len(known) - 1)
    a, b = known[right - 1], known[right]
    return values[a] + (values[b] - values[a]) * (x - a) / (b - a)


def measure(
    decoder: Decoder, request: Request, batch: int, widths: Sequence[int], repeats: int = 3, after: Callable[[Tensor], object] | None = None
) -> StepCost:
    """Time passes of ``batch`` rows (those of ``request``, repeated) over ``widths`` codes, 1 among them, in the middle of the sequence.

    Medians of ``repeats`` interleaved rounds, of up to 25 where they take less than half a second. ``after(logits_BnV)`` is timed with
    each pass: what a method does with the logits. The widest ones are left out once a pass takes more than 8 times that of one
    code. ConfigError: the decoder cannot rewind, or a width does not fit.
    """
    if not decoder.capabilities.rewind:
        raise ConfigError("this decoder cannot take codes back, so no window of drafts can be timed on it.")
    room = decoder.layout.num_tokens - 1  # the last code predicts nothing
    if 1 not in widths or not all(1 <= n <= room for n in widths):
        raise ConfigError(f"widths {tuple(widths)}: expected 1 and others up to {room}.")
    state = decoder.start(request.rows(torch.arange(batch) % request.batch_size))
    device = state.lengths_B.device
    codes_BL = (torch.arange(room, device=device) % decoder.vocab_size).expand(batch, room)

    def work(n: int, ragged: bool) -> Callable[[], None]:
        length = min(room // 2, room - n)
        lengths_B = torch.full((batch,), length, device=device)
        if ragged and length > 0:
            lengths_B -= torch.arange(batch, device=device) % 2

        def run() -> None:
            decoder.rewind(state, lengths_B)
            logits_BnV = decoder.step(state, codes_BL[:, :n])
            if after is not None:
                after(logits_BnV)

        return run

    decoder.step(state, codes_BL[:, : max(1, room // 2)])
    clock = functools.partial(timing.measure, warmup=0, device=device, memory=False)
    works, once = {}, {}
    for name, each in [("aligned", work(1, False)), *((str(n), work(n, True)) for n in sorted(set(widths)))]:
        once[name] = min(clock({name: each}, repeats=2)[name].seconds)  # the first time may be another
        if once[name] > _MAX_RATIO * once["aligned"] and name != "1":
            break
        works[name] = each
    rounds = max(repeats, min(25, int(0.5 / sum(once[name] for name in works))))
    took = {name: timed.median_ms / 1e3 for name, timed in clock(works, repeats=rounds).items()}
    aligned = took.pop("aligned")
    seconds = {int(name): median for name, median in took.items()}
    return StepCost({batch: seconds if batch > 1 else seconds | {1: aligned}}, {batch: aligned})


def measured(
    decoder: Decoder, request: Request, batch: int, key: str, repeats: int = 3, after: Callable[[Tensor], object] | None = None
) -> StepCost:
    """:func:`measure` for the windows of :data:`CANDIDATES` and 1, 2, 4, .. rows, up to the first power of two not below ``batch``.

    Each number of rows is measured once for a device, its threads and ``key``, and kept in ``cache_root()/planner``; ``key`` names whatever
    else the time depends on (weights, precision, guidance, ``after``). InputError when such a file is damaged.
    """
    room = decoder.layout.num_tokens - 1
    widths = sorted({min(window + 1, room) for window in CANDIDATES})
    device = decoder.start(request.rows(torch.arange(1)), 1).lengths_B.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    cost = StepCost({}, {})
    for exponent in range((batch - 1).bit_length() + 1):
        rows = 1 << exponent
        what = {"device": name, "threads": torch.get_num_threads(), "key": key, "batch": rows, "widths": widths}
        path = cache_root() / "planner" / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]}.json"
        if not path.exists():
            new = measure(decoder, request, rows, widths, repeats, after)
            write_json(path, {**what, "seconds": new.seconds[rows], "aligned": new.aligned[rows]})
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            cost.seconds[rows] = {int(n): float(seconds) for n, seconds in stored["seconds"].items()}
            cost.aligned[rows] = float(stored["aligned"])
            if 1 not in cost.seconds[rows] or min(cost.aligned[rows], *cost.seconds[rows].values()) <= 0:
                raise ValueError("times are missing or not positive")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not the times of a decoder pass ({error}).", f"Delete {path}; they are measured again.") from error
    return cost


# ----------------------------------------------------------------------------------------------------------- acceptance


class Acceptance:
    """Estimates S_d, the probability that at least d drafts of a pass stand, from windows of different sizes.

    A row whose window ends before depth d says nothing about it. So what is averaged, exponentially over passes, is the rate at which
    draft d stands where d - 1 did, over rows whose window reached d, and S_d is the product (Kaplan-Meier). Every window keeps averages of
    its own, since drafts get better the longer they stay in a window; where it has few, those of all windows count, and where
    these are few, the rate of the depth before.
    """

    def __init__(self) -> None:
        self.rows = [0] * len(CANDIDATES)  # seen by each window
        self._reached = np.zeros((len(CANDIDATES), CANDIDATES[-1]))  # by window and depth, which begins at 1
        self._stood = np.zeros_like(self._reached)
        self._shared: list[float] = []  # rates by depth over all windows; this and the next are made when asked for
        self._moments: dict[int, tuple[float, float]] = {}

    def observe(self, accepted: Sequence[int], windows: Sequence[int]) -> None:
        """One pass: how many drafts of each row stood, of how many."""
        if not any(windows):
            return
        self._shared, self._moments = [], {}
        self._reached *= 1 - 1 / MEMORY
        self._stood *= 1 - 1 / MEMORY
        for stood, window in zip(accepted, windows, strict=True):
            own = _own(window)
            self._reached[own, : min(stood + 1, window)] += 1
            self._stood[own, :stood] += 1
            self.rows[own] += window > 0

    @property
    def known(self) -> int:
        """Index of the widest candidate that was looked at often enough; 0: none."""
        return max((own for own, rows in enumerate(self.rows) if rows >= TRIAL_ROWS), default=0)

    def survival(self, window: int) -> list[float]:
        """``[S_0, .., S_window]`` of a pass over this window. Needs an observation (``any(rows)``)."""
        if not self._shared:
            reached, stood = self._reached.sum(0).tolist(), self._stood.sum(0).tolist()
            rate = stood[0] / reached[0]
            self._shared = [rate := (s + PRIOR * rate) / (r + PRIOR) for r, s in zip(reached, stood, strict=True)]
        survival, own = [1.0], _own(window)
        reached, stood = self._reached[own, :window].tolist(), self._stood[own, :window].tolist()
        for r, s, rate in zip(reached, stood, self._shared, strict=False):
            survival.append(survival[-1] * (s + PRIOR * rate) / (r + PRIOR))
        return survival

    def moments(self, window: int) -> tuple[float, float]:
        """Mean E and variance of the codes that a pass over this window commits."""
        if window not in self._moments:
            survival = self.survival(window)
            mean = sum(survival)
            self._moments[window] = mean, max(0.0, sum((2 * d + 1) * s for d, s in enumerate(survival)) - mean**2)
        return self._moments[window]


def _own(window: int) -> int:
    """Index of the largest candidate up to ``window``."""
    return bisect.bisect_right(CANDIDATES, window) - 1


# -------------------------------------------------------------------------------------------------------------- planner


@dataclass(frozen=True)
class Prospect:
    """What a window promises: time of a pass in units of one code, codes it commits, speed-up. None: nothing was observed yet."""

    window: int
    time_ratio: float
    tokens_per_pass: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Place:
    """Where a batch stands: active rows, codes that the one furthest behind lacks, whether all lack as many, quarter of the sequence."""

    batch: int
    remaining: int
    aligned: bool
    quarter: int


class WindowPlanner:
    """Chooses windows from :data:`CANDIDATES`; the same observations give the same windows. Keep one for all batches of a run.

    * A choice holds for four passes, or to the end of the batch. Each quarter of the sequence has estimates of its own.
    * The window with the largest predicted speed-up is taken if that exceeds 1.02, else W = 0: plain AR. Once rows stand at different
      lengths, what it is compared with is W = 0 in this state, which is slower than plain AR. Before that, the prediction
      includes that the rows of a batch end at different times.
    * A window wider than those known in a quarter is tried until 16 rows have been through it: the widest one that takes at most twice the
      time of one code, could gain if every draft behind a first one stood, and, if none stands, keeps what is lost below 2 % of the
      time of what is done and of the next quarter. Passes faster than plain AR pay earlier losses back, and no more than these.
    * W = 0 stays until 0.5 % of the time of what is done pays for another trial of the best window, within the same 2 %.
    """

    def __init__(self, cost: StepCost):
        self.quarters = [Acceptance() for _ in range(QUARTERS)]
        self._seconds = functools.cache(cost.of)
        self._done = self._lost = self._staked = 0.0  # in times of one code of plain AR; staked: on trials of known windows
        self._rows, self._length, self._place = 1, 1, Place(1, 0, True, 0)  # of this batch at its start, and where it stands
        self._held = (0, 0)  # window, passes to come
        self._widest = (1, 1)  # rows and length of the largest batch so far

    def choose(self, batch: int, remaining: int) -> int:
        """Drafts of the next pass, at most ``remaining - 1``; ``batch`` active rows, the one furthest behind lacks ``remaining`` codes."""
        if batch < 1 or remaining < 1:
            raise UsageError(f"choose: {batch} rows with {remaining} codes to come, expected 1 or more of both.")
        (window, passes), aligned = self._held, self._place.aligned
        if remaining > self._place.remaining:  # a new batch
            self._rows, self._length, aligned, passes = batch, remaining, True, 0
            self._widest = max(self._widest, (batch, remaining), key=lambda x: x[0] * x[1])
        self._place = Place(batch, remaining, aligned, QUARTERS * (self._length - remaining) // self._length)
        if not passes:
            chosen, _, stake = self._decide(self._place)
            window, passes = chosen.window, HOLD
            self._staked += stake
        self._held = (window, passes - 1)
        return min(window, remaining - 1)

    def observe(self, accepted_B: Tensor | list[int], window_B: Tensor | list[int]) -> None:
        """After every pass, W = 0 included: how many drafts of each row stood, of how many it looked at."""
        accepted, windows = (x.tolist() if isinstance(x, Tensor) else x for x in (accepted_B, window_B))
        possible = len(accepted) == len(windows) and all(0 <= a <= w <= CANDIDATES[-1] for a, w in zip(accepted, windows, strict=True))
        if not accepted or not possible:
            raise UsageError(
                f"observe: accepted {accepted} of {windows} drafts, expected as many numbers, 0 <= accepted <= {CANDIDATES[-1]}."
            )
        committed = (len(accepted) + sum(accepted)) / self._rows
        took = self._seconds(len(accepted), max(windows) + 1, self._place.aligned) / self._seconds(self._rows, 1, True)
        self._done += committed
        self._lost = max(0.0, self._lost + took - committed)
        self.quarters[self._place.quarter].observe(accepted, windows)
        if len(set(accepted)) > 1:
            self._place = replace(self._place, aligned=False)

    def decision(self) -> str:
        """One sentence: what is done with a batch, given all that was observed."""
        places = self._places()
        chosen, reasons, stakes = zip(*map(self._decide, places), strict=True)
        chosen = [Prospect(0, 1.0, 1.0, 1.0) if stake else x for x, stake in zip(chosen, stakes, strict=True)]  # but for another trial
        widest = max(x.window for x in chosen)
        if widest == 0:
            promise = lambda place: max((x.speedup or 0.0 for x in self._prospects(place)[1:]), default=0.0)  # noqa: E731
            return f"plain AR: {reasons[max(places, key=promise).quarter]}"
        windows = [widest if x.window == place.remaining - 1 else x.window for x, place in zip(chosen, places, strict=True)]
        name = f"window {widest}" if set(windows) == {widest} else f"windows {', '.join(map(str, windows))} by quarter"
        if any(x.speedup is None for x in chosen):
            return f"{name}: being tried at up to {max(x.time_ratio for x in chosen):.1f}x the time of one token."
        passes = sum(1 / x.tokens_per_pass for x in chosen)
        time = sum(x.time_ratio / x.tokens_per_pass for x in chosen)
        return f"{name}: {QUARTERS / passes:.1f} tokens a pass predicted at {time / passes:.1f}x the time of one token."

    def table(self) -> list[dict[str, Any]]:
        """The prospects behind :meth:`decision`, by quarter and window, as plain values."""
        return [{"quarter": place.quarter} | asdict(row) for place in self._places() for row in self._prospects(place)]

    def _places(self) -> list[Place]:
        """The starts of the quarters of the largest batch so far, in step."""
        batch, length = self._widest
        return [Place(batch, max(1, length - length * quarter // QUARTERS), True, quarter) for quarter in range(QUARTERS)]

    def _decide(self, place: Place) -> tuple[Prospect, str, float]:
        """What is done, why if it is plain AR, and what is staked if a known window is tried again."""
        plain, *others = self._prospects(place)
        if not others:
            return plain, "one code is left.", 0.0
        known, gains, stake = self.quarters[place.quarter].known, self._can_gain(place), self._stake(place)
        allowed = NEW_LOSS * (self._done + min(self._length / QUARTERS, place.remaining))
        trials = [x for x in others if _own(x.window) > known and gains(x) and self._lost + stake(x) <= allowed]
        if trials:
            return trials[-1], "", 0.0
        if others[0].speedup is None:
            most = max(others, key=lambda x: (x.window + 1) / x.time_ratio)
            if gains(most):
                return plain, f"no window was tried yet, a trial might lose more than {NEW_LOSS:.0%} of the time so far.", 0.0
            bound = (most.window + 1) / most.time_ratio
            return plain, f"no window gains; with every draft accepted W={most.window} would reach {bound:.2f}x.", 0.0
        best = max(others, key=lambda x: x.speedup)
        if best.speedup >= MIN_GAIN * plain.speedup:
            return best, "", 0.0
        reason = f"no window gains; best W={best.window} predicts {best.speedup:.2f}x."
        if self._staked + stake(best) <= AGAIN_LOSS * self._done and self._lost + stake(best) <= allowed:
            return best, reason, stake(best)
        return plain, reason, 0.0

    def _can_gain(self, place: Place) -> Callable[[Prospect], bool]:
        """Whether a window gains if every draft behind a first one stands, or if all do where nothing is known."""
        acceptance = self.quarters[place.quarter]
        first = acceptance.survival(1)[1] if acceptance.known else 1.0
        return lambda x: (1 + x.window * first) / x.time_ratio >= MIN_GAIN

    def _time(self, batch: int, window: int, aligned: bool) -> float:
        """Of a pass, in units of what plain AR takes for a code of each of these rows."""
        return self._seconds(batch, window + 1, aligned) / self._seconds(batch, 1, True)

    def _prospects(self, place: Place) -> list[Prospect]:
        """Of the candidates that fit, W = 0 first."""
        found, acceptance = [], self.quarters[place.quarter]
        for window in sorted({min(window, place.remaining - 1) for window in CANDIDATES}):
            ratio = self._time(place.batch, window, place.aligned)
            if window == 0:
                found.append(Prospect(0, ratio, 1.0, 1 / ratio))
            elif not any(acceptance.rows):
                found.append(Prospect(window, ratio))
            else:
                tokens, variance = acceptance.moments(window)
                tail = self._tail(place.batch, window, variance / (place.remaining * tokens)) if place.aligned and place.batch > 1 else 0.0
                found.append(Prospect(window, ratio, tokens, tokens / ratio / (1 + tail)))
        return found

    def _tail(self, batch: int, window: int, spread: float) -> float:
        """What the last rows of a batch add to its time while the others are finished, as a share.

        A row of N codes takes about N / E passes; ``spread`` is their relative variance Var / (N E) (renewal theory). The slowest of B
        rows is Blom's normal quantile above the mean, and a pass of few rows saves only what T(1, n) leaves of T(B, n).
        """
        slowest = _NORMAL.inv_cdf((batch - 0.375) / (batch + 0.25))
        return self._seconds(1, window + 1) / self._seconds(batch, window + 1) * slowest * math.sqrt(spread)

    def _stake(self, place: Place) -> Callable[[Prospect], float]:
        """What a trial of a window loses if none of its drafts stands, infinite where it takes too long.

        Its time less that of W = 0; and it may leave rows at different lengths, where each later code is slower.
        """
        plain, passes = self._time(place.batch, 0, place.aligned), min(HOLD, place.remaining - 1)
        uneven = max(0.0, self._time(place.batch, 0, False) - plain) * (place.remaining - 1)
        return lambda x: math.inf if x.time_ratio > MAX_TRIAL * plain else passes * max(0.0, x.time_ratio - plain) + uneven
