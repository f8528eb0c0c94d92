"""Timing with a fake clock: nothing here depends on how fast the machine is."""

import pytest
import torch

from arsp.bench import timing
from arsp.bench.timing import Timing, measure, peak_memory, speedup
from arsp.errors import ConfigError


class Clock:
    """Stands in for ``time``: callables move it by hand."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def work(self, calls, name, seconds):
        def run():
            calls.append(name)
            self.now += seconds

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_callables_take_turns_and_warm_up_rounds_are_not_counted(clock):
    calls, ticks = [], []
    work = {name: clock.work(calls, name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    result = measure(work, repeats=3, warmup=1, memory=False, progress=ticks.append)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc", "each round starts one further"
    assert [result[name].seconds for name in "abc"] == [(1.0,) * 3, (2.0,) * 3, (4.0,) * 3]
    assert sum(ticks) == len(calls) == 12
    assert result["b"].latency_ms() == {"p50": 2000.0, "p95": 2000.0}


def test_speedup_pairs_the_rounds_so_that_a_slow_phase_of_the_machine_cancels():
    load = (1.0, 7.0, 1.5, 3.0, 2.0, 9.0)
    ratio = speedup(Timing("fast", load), Timing("slow", tuple(2.0 * x for x in load)))
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert str(ratio) == "2.00x [2.00, 2.00]"


def test_bootstrap_interval_holds_the_median_and_is_repeatable():
    fast, slow = Timing("f", (1.0,) * 7), Timing("s", (1.0, 1.2, 1.4, 1.5, 1.6, 1.8, 3.0))
    ratio = speedup(fast, slow)
    assert ratio == speedup(fast, slow)
    assert 1.0 <= ratio.low <= ratio.value == 1.5 <= ratio.high <= 3.0, ratio
    with pytest.raises(ConfigError, match="not measured together"):
        speedup(fast, Timing("s", (1.0,)))


@pytest.mark.parametrize("wrong", [dict(repeats=0), dict(warmup=-1)])
def test_nothing_to_measure_is_refused(wrong):
    with pytest.raises(ConfigError, match="nothing to measure"):
        measure({"a": lambda: None}, **wrong)


def test_peak_memory_sees_what_a_call_held_at_its_highest():
    size = 64 << 20
    if peak_memory(lambda: None, "cpu") is None:
        pytest.skip("this system does not tell its resident memory")
    seen = peak_memory(lambda: torch.ones(size // 4), "cpu")
    assert 0.9 * size <= seen <= 1.5 * size, f"{seen / 2**20:.1f} MiB for a tensor of 64 MiB"
