"""Where the time of an image goes: exclusive wall clock by part of the model, for our decoder and for the official way in one run.

Functions and methods are replaced by timed ones for the duration of a call. A part that calls another is not charged for it, and what
no part covers is "rest", so the parts of a call add up to its wall clock. On a GPU the device is synchronised at every boundary,
which makes the call slower than it is; the shares are what to read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from arsp.bench import official_var
from arsp.bench.timing import Work, synchronize
from arsp.decode import ar, next_scale
from arsp.decode.filters import LogitsPipeline
from arsp.models import var
from arsp.models.attention import DensePolicy

Entry = tuple[Any, str, str]  # owner of a callable, its attribute, the part it belongs to

PROJECTIONS, SOFTMAX = "attention: qkv, proj, cache", "attention: softmax"
FFN, NORMS, ADALN = "ffn", "norms, modulation, residual", "adaln"
HEAD, EMBED, SAMPLING, DECODER, REST = "head", "embeddings, f_hat", "guidance, filters, draws", "tokenizer decoder", "rest"
PARTS = (PROJECTIONS, SOFTMAX, FFN, NORMS, ADALN, HEAD, EMBED, SAMPLING, DECODER, REST)

OFFICIAL: tuple[Entry, ...] = (
    (official_var, "attention", PROJECTIONS),
    (official_var, "softmax_attention", SOFTMAX),
    (official_var, "feed_forward", FFN),
    (official_var, "run_block", NORMS),
    (official_var, "adaln", ADALN),
    (official_var, "modulation", ADALN),
    (official_var, "head", HEAD),
    (official_var, "positions", EMBED),
    (official_var, "embed", EMBED),
    (official_var, "add_scale", EMBED),
    (official_var, "draw", SAMPLING),
    (official_var, "to_pixels", DECODER),
)


def ours(policies: Sequence[Any] = ()) -> list[Entry]:
    """Where our next-scale decoder spends its time; ``policies``: those of its schedule (none: dense)."""
    from arsp.stack import Stack

    return [
        (var.Attention, "forward", PROJECTIONS),
        *((kind, "attend", SOFTMAX) for kind in {type(policy): None for policy in policies or [DensePolicy()]}),
        (var.FeedForward, "forward", FFN),
        (var.Block, "forward", NORMS),
        (var.VAR, "conditioning", ADALN),
        (var.VAR, "raw_logits", HEAD),
        (var.VAR, "embed", EMBED),
        (next_scale.NextScaleDecoder, "_add", EMBED),
        (LogitsPipeline, "__call__", SAMPLING),
        (LogitsPipeline, "verify", SAMPLING),
        (ar, "draw_codes", SAMPLING),
        (Stack, "decode", DECODER),
    ]


@dataclass
class Clock:
    """Seconds by part; the part on top of the stack is the one that runs."""

    device: torch.device | str
    seconds: dict[str, float] = field(default_factory=dict)
    _running: list[str] = field(default_factory=lambda: [REST])
    _since: float = 0.0

    def switch(self) -> None:
        """Charge the time since the last switch to the part that runs."""
        synchronize(self.device)
        now = time.perf_counter()
        part = self._running[-1]
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now

    def measure(self, work: Work) -> dict[str, float]:
        """Seconds by part of one call."""
        synchronize(self.device)
        self.seconds, self._since = {}, time.perf_counter()
        work()
        self.switch()
        return self.seconds

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """``function``, charged to ``part``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self._running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self._running.pop()

        return call


@contextmanager
def replaced(entries: Sequence[Entry], clock: Clock) -> Iterator[None]:
    """The callables of ``entries`` are timed inside the block."""
    missing = object()
    before = [(owner, name, vars(owner).get(name, missing)) for owner, name, _ in entries]
    for owner, name, part in entries:
        setattr(owner, name, clock.timed(getattr(owner, name), part))
    try:
        yield
    finally:
        for owner, name, function in before:
            delattr(owner, name) if function is missing else setattr(owner, name, function)


def measure_parts(
    work: Mapping[str, tuple[Work, Sequence[Entry]]], *, repeats: int, device: torch.device | str = "cpu", tick: Callable[[int], None]
) -> dict[str, list[dict[str, Any]]]:
    """For each name a line per part: median ``ms`` over the rounds and median ``share`` of its round. The callables take turns, and
    ``tick(1)`` is called after each call."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in work}
    names, clock = list(work), Clock(device)
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            call, entries = work[name]
            with replaced(entries, clock):
                rounds[name].append(clock.measure(call))
            tick(1)
    return {name: _lines(seen) for name, seen in rounds.items()}


def _lines(rounds: list[dict[str, float]]) -> list[dict[str, Any]]:
    def median(values: Iterator[float]) -> float:
        return float(np.median(list(values)))

    return [
        {
            "part": part,
            "ms": 1e3 * median(seconds.get(part, 0.0) for seconds in rounds),
            "share": median(seconds.get(part, 0.0) / sum(seconds.values()) for seconds in rounds),
        }
        for part in PARTS
    ]
