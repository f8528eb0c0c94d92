"""Which layer gets how many bits: the integer programme of MixDQ (arXiv 2405.17873), solved with scipy's HiGHS.

Exactly one option per layer; the total score is maximal among all choices whose total cost is within the budget. Costs may be bytes,
parameters times bits, or microseconds; scores may be signal-to-noise ratios, or errors with a minus sign. Ties are free.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from arsp.errors import ConfigError, InputError, NumericalError

K = TypeVar("K", bound=Hashable)  # what tells the options of a layer apart: bits, or the name of a format
SPREAD = 1e3  # the largest difference of scores within a layer, as the solver sees it: its tolerances are absolute (1e-6)
SLACK = 1e-12  # relative: sums of rounded numbers that meet the budget exactly are within it


@dataclass(frozen=True)
class Option:
    """What a layer costs and is worth with one of its numbers of bits."""

    cost: float
    score: float


def allocate(layers: Mapping[str, Mapping[K, Option]], budget: float, floor: float | None = None) -> dict[str, K]:
    """Bits of every layer, by name: the greatest total score with a total cost of at most ``budget`` and, if given, at least ``floor``.

    ConfigError when there is none, with the smallest budget that has one. InputError for NaN, infinity, or a layer without options.
    """
    if not layers:
        raise ConfigError("there is no layer to allocate bits to.", hint="Check the layers that the recipe names.")
    for name, options in layers.items():
        if not options or not np.isfinite([(option.cost, option.score) for option in options.values()]).all():
            raise InputError(f"{name}: costs and scores must be finite, and there must be at least one option.")
    scores = [np.array([option.score for option in options.values()]) for options in layers.values()]
    largest = max(np.ptp(score) for score in scores) or 1.0
    gains = np.concatenate([(score - score.max()) * (SPREAD / largest) for score in scores])
    chosen = _solve(layers, gains, -np.inf if floor is None else floor, budget)
    if chosen is None:
        smallest = smallest_budget(layers, floor)
        if smallest is None:
            raise ConfigError(f"no choice of bits costs {floor:g} or more.", hint="Lower the floor, or allow more bits.")
        raise ConfigError(
            f"the budget {budget:g} cannot be met: the smallest feasible budget is {smallest:.10g}.",
            hint=f"Give a budget of at least {smallest:.10g}, or allow fewer bits.",
        )
    return chosen


def smallest_budget(layers: Mapping[str, Mapping[K, Option]], floor: float | None = None) -> float | None:
    """The least total cost that is at least ``floor``; None when all choices cost less."""
    if floor is None:
        return float(sum(min(option.cost for option in options.values()) for options in layers.values()))
    costs = np.array([option.cost for options in layers.values() for option in options.values()])
    chosen = _solve(layers, -costs * (SPREAD / (np.abs(costs).max() or 1.0)), floor, np.inf)
    return None if chosen is None else total_cost(layers, chosen)


def split_mean_bits(mean: float, size_ratio: float, bits_ratio: float) -> tuple[float, float]:
    """Mean bits of (quality, content) layers whose sizes are as 1 to ``size_ratio`` and whose mean bits are to be as 1 to ``bits_ratio``,
    so that the mean over both is ``mean``: MixDQ allocates the two groups apart, each by its own metric."""
    quality = mean * (1 + size_ratio) / (bits_ratio * size_ratio + 1)
    return quality, bits_ratio * quality


def total_cost(layers: Mapping[str, Mapping[K, Option]], bits: Mapping[str, K]) -> float:
    return float(sum(layers[name][chosen].cost for name, chosen in bits.items()))


def total_score(layers: Mapping[str, Mapping[K, Option]], bits: Mapping[str, K]) -> float:
    return float(sum(layers[name][chosen].score for name, chosen in bits.items()))


def _solve(layers: Mapping[str, Mapping[K, Option]], gains: np.ndarray, low: float, high: float) -> dict[str, K] | None:
    """The choice with the greatest sum of ``gains`` (one an option, in order) whose cost is in ``low..high``; None when there is none."""
    sizes = [len(options) for options in layers.values()]
    costs = np.array([option.cost for options in layers.values() for option in options.values()])
    unit = np.abs(costs).max() or 1.0
    layer = np.repeat(np.arange(len(sizes)), sizes)
    allowance = SLACK * unit * len(sizes)
    constraints = [
        LinearConstraint(csr_array((np.ones(len(layer)), (layer, np.arange(len(layer))))), 1, 1),  # one option each
        LinearConstraint(costs[None] / unit, (low - allowance) / unit, (high + allowance) / unit),
    ]
    while True:
        with _silent_stdout():
            solution = milp(
                -gains, integrality=np.ones(len(gains)), bounds=Bounds(0, 1), constraints=constraints, options={"mip_rel_gap": 0}
            )
        if solution.status == 2:
            return None
        if solution.x is None:
            raise NumericalError(f"the allocation of bits was not solved: {solution.message}.")
        picks = [int(np.argmax(part)) for part in np.split(solution.x, np.cumsum(sizes)[:-1])]
        bits = {name: list(options)[pick] for (name, options), pick in zip(layers.items(), picks, strict=True)}
        if low - allowance <= total_cost(layers, bits) <= high + allowance:
            return bits
        taken = np.cumsum([0, *sizes[:-1]]) + picks  # outside by less than the solver's tolerance: not this choice
        constraints.append(LinearConstraint(np.isin(np.arange(len(gains)), taken).astype(float)[None], -np.inf, len(sizes) - 1))


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """What C code prints to standard output is dropped: HiGHS (scipy 1.17) reports an inner step there, where results belong."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    stdout, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(null)
