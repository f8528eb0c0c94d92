"""Timing of several callables in one process: warm-up, interleaved rounds, medians, paired ratios, peak memory.

Rules behind every published figure: the work of a timed region is finished before the clock is read (device synchronised);
the callables take turns (A B C, B C A, C A B, ...), so a slow moment of the machine hits all of them; the ratio of two is
the median over rounds of the ratio *within* a round, with a bootstrap interval over rounds. The number of threads is torch's
(``--threads``) and part of the record's environment.

Peak memory: on CUDA the highest number of bytes that torch's allocator held (``max_memory_allocated``: weights included); on
the CPU how far the resident memory of the process rose above its level before the call (weights loaded before are not
included; memory that the process had freed but not returned can hide an increase). Both come from one extra, untimed call per
callable, before all timed ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from arsp.errors import ConfigError

Work = Callable[[], object]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Timing:
    """The rounds of one callable. ``seconds[r]`` was measured in round r of all callables."""

    name: str
    seconds: tuple[float, ...]
    peak_mem_bytes: int | None = None

    def percentile_ms(self, percent: float) -> float:
        """Linear interpolation between rounds."""
        return float(np.percentile(self.seconds, percent)) * 1e3

    @property
    def median_ms(self) -> float:
        return self.percentile_ms(50)

    def latency_ms(self) -> dict[str, float]:
        """``{"p50", "p95"}`` of the record. With fewer than 20 rounds p95 is close to the slowest round."""
        return {"p50": self.percentile_ms(50), "p95": self.percentile_ms(95)}


@dataclass(frozen=True)
class Ratio:
    """How many times ``value`` of something; ``low``-``high`` is the bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done all it was given."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    work: Mapping[str, Work],
    *,
    repeats: int = 5,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    memory: bool = True,
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Time every callable ``repeats`` times in interleaved rounds, after one call for memory and ``warmup`` untimed rounds.

    ``progress(1)`` is called after each call, ``(memory + warmup + repeats) * len(work)`` times. Garbage collection is off
    while the clock runs.
    """
    if repeats < 1 or warmup < 0 or not work:
        raise ConfigError(
            f"nothing to measure: {len(work)} callables, {repeats} repeats, {warmup} warm-up rounds.", "Use --repeats 1 or more."
        )
    tick = progress or (lambda n: None)
    names = list(work)
    peaks: dict[str, int | None] = dict.fromkeys(names)
    if memory:
        for name in names:
            peaks[name] = peak_memory(work[name], device)
            tick(1)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            elapsed = _timed(work[name], device)
            if turn >= warmup:
                seconds[name].append(elapsed)
            tick(1)
    return {name: Timing(name, tuple(seconds[name]), peaks[name]) for name in names}


def _timed(work: Work, device: torch.device | str) -> float:
    enabled = gc.isenabled()
    gc.disable()
    try:
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - started
    finally:
        if enabled:
            gc.enable()


def speedup(fast: Timing, slow: Timing, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Ratio:
    """How many times faster ``fast`` is than ``slow``: median over rounds of slow/fast, percentile bootstrap over rounds."""
    if len(fast.seconds) != len(slow.seconds):
        raise ConfigError(f"{fast.name} has {len(fast.seconds)} rounds and {slow.name} {len(slow.seconds)}: not measured together.")
    per_round = np.asarray(slow.seconds) / np.asarray(fast.seconds)
    draws = np.random.default_rng(seed).integers(len(per_round), size=(resamples, len(per_round)))
    low, high = np.quantile(np.median(per_round[draws], axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Ratio(float(np.median(per_round)), float(low), float(high))


# -- memory -----------------------------------------------------------------------------------------------------------------


def peak_memory(work: Work, device: torch.device | str) -> int | None:
    """Peak bytes of one call (see the head of this file); None where the system does not tell."""
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    _return_free_memory()
    _reset_peak()
    before = _status_bytes("VmRSS") or _high_water()
    work()
    after = _status_bytes("VmHWM") or _high_water()
    return None if before is None or after is None else max(0, after - before)


def _return_free_memory() -> None:
    """Give freed heap pages back to the system (glibc), so that the next call's pages count as an increase."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> None:
    """Linux: make the high-water mark of resident memory start again from the present level."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(field: str) -> int | None:
    """A field of /proc/self/status in bytes (Linux only)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) << 10
    return None


def _high_water() -> int | None:
    """Highest resident memory since the process started: cannot show a call that stays below an earlier peak."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used << 10
