"""The window planner: times of passes, acceptance from windows of different sizes, and what is chosen of both."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_models import gpt_model

from arsp.decode import planner
from arsp.decode.decoder import RasterDecoder
from arsp.decode.guidance import Guidance
from arsp.decode.planner import CANDIDATES, Acceptance, StepCost, WindowPlanner, measure, measured
from arsp.errors import ConfigError, InputError, UsageError
from arsp.protocols import Capabilities, Request

WIDTHS = [window + 1 for window in CANDIDATES]


def cost(seconds, *, uneven: float = 1.0) -> StepCost:
    """``seconds(batch, n)``; passes whose rows stand at different lengths take ``uneven`` times as long."""
    batches = (1, 2, 4, 8, 16)
    table = {b: {n: seconds(b, n) * (uneven if b > 1 else 1) for n in WIDTHS} for b in batches}
    return StepCost(table, {b: seconds(b, 1) for b in batches})


FLAT, LINEAR, MIXED = cost(lambda b, n: 1.0), cost(lambda b, n: b * n), cost(lambda b, n: 60 + 10 * b * n)


class Rows:
    """The loop without its decoder: drafts stand with probability ``rate`` each, none of them before position ``begin``."""

    def __init__(self, chooser: WindowPlanner, times: StepCost, rate: float, seed: int = 0, begin: int = 0):
        self.planner, self.times, self.rate, self.begin = chooser, times, rate, begin
        self.generator, self.time, self.windows = np.random.default_rng(seed), 0.0, []

    def batch(self, length: int, rows: int = 1) -> None:
        known, aligned = np.zeros(rows, int), True
        while len(known):
            window = self.planner.choose(len(known), length - known.min())
            looked = np.minimum(window, length - 1 - known)
            stood = np.minimum(self.generator.geometric(1 - self.rate, len(known)) - 1, looked) * (known >= self.begin)
            self.planner.observe(torch.from_numpy(stood), torch.from_numpy(looked))
            plain = aligned and window == 0
            self.time += self.times.aligned[rows] if plain else self.times.of(len(known), window + 1)
            self.windows.append(window)
            aligned &= len(set(stood)) == 1
            known = known + stood + 1
            known = known[known < length]


# -- cost --------------------------------------------------------------------------------------------------------------------


def test_times_between_and_beyond_the_measured_ones_lie_on_lines():
    times = StepCost({1: {1: 10.0, 3: 14.0, 5: 24.0}, 4: {1: 16.0, 3: 32.0}}, {1: 10.0, 4: 15.0})
    assert times.of(1, 3) == 14 and times.of(1, 2) == 12 and times.of(1, 7) == 34
    assert times.of(4, 2) == 24 and times.of(2, 2) == pytest.approx(12 + (24 - 12) / 3)
    assert times.of(8, 1) == pytest.approx(16 + 2 * 4) and times.of(4, 9) == 80
    assert times.of(4, 1, aligned=True) == 15 and times.of(4, 3, aligned=True) == 32


def tiny(guidance: Guidance | None = None) -> RasterDecoder:
    return RasterDecoder(gpt_model(), guidance)


def request(rows: int = 2) -> Request:
    return Request(torch.arange(rows), 0, labels_B=torch.arange(rows) % 3)


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(1.5)])
def test_passes_of_a_decoder_are_timed_in_the_middle_of_the_sequence(monkeypatch, guidance):
    decoder, lengths, shapes = tiny(guidance), [], set()
    rewind = decoder.rewind
    monkeypatch.setattr(decoder, "rewind", lambda state, lengths_B: (lengths.append(lengths_B.tolist()), rewind(state, lengths_B)))
    times = measure(decoder, request(), 3, (1, 2, 5), repeats=2, after=lambda logits: shapes.add(tuple(logits.shape)))
    assert set(times.seconds) == {3} and times.aligned.keys() == {3} and times.aligned[3] > 0
    assert {1, 2} <= times.seconds[3].keys() <= {1, 2, 5} and min(times.seconds[3].values()) > 0
    assert shapes == {(3, n, 16) for n in (1, 2, 5)}
    assert {tuple(x) for x in lengths} == {(7, 7, 7), (7, 6, 7)}  # plain AR, and rows at different lengths


def test_one_row_has_one_time_of_one_code():
    times = measure(tiny(), request(1), 1, (1, 15), repeats=1)
    assert times.of(1, 1) == times.of(1, 1, aligned=True)


def test_passes_that_take_too_long_are_left_out(monkeypatch):
    def clock(work, **_):
        return {name: planner.timing.Timing(name, (1.0 if name == "aligned" else float(name) ** 2,)) for name in work}

    monkeypatch.setattr(planner.timing, "measure", clock)
    times = measure(tiny(), request(1), 2, (1, 2, 3, 5, 9))
    assert times.seconds == {2: {1: 1.0, 2: 4.0}} and times.aligned == {2: 1.0}


def test_what_cannot_be_timed_is_refused(monkeypatch):
    for widths in ((2, 3), (1, 16), (0, 1)):
        with pytest.raises(ConfigError, match="widths"):
            measure(tiny(), request(), 1, widths)
    decoder = tiny()
    decoder.capabilities = Capabilities(order="next-scale", rewind=False)
    with pytest.raises(ConfigError, match="take codes back"):
        measure(decoder, request(), 1, (1, 2))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "cache_root", lambda: tmp_path)
    return tmp_path / "planner"


def test_times_are_measured_once(cache, monkeypatch):
    first = measured(tiny(), request(), 3, "weights", repeats=1)
    assert set(first.seconds) == set(first.aligned) == {1, 2, 4} and len(list(cache.iterdir())) == 3
    asked = []
    real = planner.measure
    monkeypatch.setattr(planner, "measure", lambda *args: (asked.append(args[2]), real(*args))[1])
    assert measured(tiny(), request(), 4, "weights", repeats=1) == first and asked == []
    measured(tiny(), request(), 5, "weights", repeats=1)
    assert asked == [8]
    measured(tiny(), request(), 1, "other weights", repeats=1)
    assert asked == [8, 1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    measured(tiny(), request(), 1, "weights", repeats=1)
    assert asked == [8, 1, 1]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"seconds": {"2": 1.0}, "aligned": 1.0}', '{"seconds": {"1": 0}, "aligned": 1}'])
def test_a_damaged_file_of_times_is_named_with_what_to_do(cache, content):
    measured(tiny(), request(), 1, "weights", repeats=1)
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["key"] == "weights"
    file.write_text(content)
    with pytest.raises(InputError) as raised:
        measured(tiny(), request(), 1, "weights")
    assert str(file) in raised.value.message and f"Delete {file}" in raised.value.hint


# -- acceptance --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_windows_of_all_sizes_give_the_same_unbiased_estimate(rate):
    """iid acceptance: about 64 x 400 rows count at depth 1. The largest of the errors at depths 1..4 stays below 0.03 unless one of them
    exceeds 5 standard deviations."""
    generator, acceptance = np.random.default_rng(3), Acceptance()
    for _ in range(400):
        windows = generator.choice([0, 1, 2, 3, 4, 8], 400)
        stood = np.minimum(generator.geometric(1 - rate, 400) - 1, windows)
        acceptance.observe(stood.tolist(), windows.tolist())
    for window in (4, 8):
        error = np.abs(np.array(acceptance.survival(window))[1:5] - rate ** np.arange(1, 5)).max()
        assert error < 0.03, f"window {window}: {error:.3f} off"


def test_beyond_the_depths_seen_the_last_rate_goes_on():
    acceptance = Acceptance()
    acceptance.observe([0] * 2000 + [1] * 4000 + [2] * 4000, [2] * 10_000)
    np.testing.assert_allclose(acceptance.survival(8), [1, *(0.8 * 0.5 ** np.arange(8))], atol=1e-3)


def test_a_window_remembers_its_own_acceptance():
    acceptance = Acceptance()
    acceptance.observe([16] * 400 + [0] * 400, [16] * 400 + [2] * 400)
    assert acceptance.survival(16)[16] > 0.9 and acceptance.survival(2)[1] < 0.01
    assert 0.4 < acceptance.survival(8)[1] < 0.6  # nothing of its own: what all windows say


def test_old_passes_fade():
    acceptance = Acceptance()
    for stood in [0] * 300 + [2] * 300:
        acceptance.observe([stood], [2])
    assert acceptance.survival(2)[2] > 0.9


def test_passes_without_drafts_change_nothing():
    acceptance = Acceptance()
    acceptance.observe([1, 2], [2, 2])
    before = acceptance.survival(4)
    acceptance.observe([0, 0], [0, 0])
    assert acceptance.survival(4) == before and sum(acceptance.rows) == 2


# -- choice ------------------------------------------------------------------------------------------------------------------


def seen(times: StepCost, rate: float, windows: tuple[int, ...]) -> WindowPlanner:
    """A planner that has seen 4000 rows through each window, everywhere."""
    chooser, generator = WindowPlanner(times), np.random.default_rng(0)
    for window in windows:
        stood = np.minimum(generator.geometric(1 - rate, 4000) - 1, window).tolist()
        for acceptance in chooser.quarters:
            acceptance.observe(stood, [window] * 4000)
    return chooser


def test_where_width_costs_nothing_the_largest_window_that_fits_is_taken():
    assert WindowPlanner(FLAT).choose(1, 256) == 64
    chooser = seen(FLAT, 0.98, (64,))
    assert chooser.choose(1, 256) == 64 and chooser.choose(1, 20) == 19
    assert chooser.decision().startswith("window 64: 3") and chooser.decision().endswith(
        "tokens a pass predicted at 1.0x the time of one token."
    )


def test_where_every_code_costs_the_same_it_is_plain_ar_and_says_so():
    chooser = WindowPlanner(LINEAR)
    for _ in range(100):
        assert chooser.choose(4, 256) == 0
        chooser.observe([0] * 4, [0] * 4)
    assert chooser.decision() == "plain AR: no window gains; with every draft accepted W=1 would reach 1.00x."


def test_where_too_few_drafts_stand_it_is_plain_ar_and_says_so():
    chooser = seen(MIXED, 0.05, (1, 2, 4, 8))
    assert chooser.choose(1, 256) == 0
    assert chooser.decision() == "plain AR: no window gains; best W=1 predicts 0.92x."


def test_the_first_window_takes_at_most_twice_the_time_of_one_code_and_little_of_the_batch():
    assert WindowPlanner(MIXED).choose(1, 256) == 2  # 2 % of a quarter of 256 codes pays for four passes at 1.29x, not at 1.57x
    assert WindowPlanner(MIXED).choose(1, 16) == 0
    chooser = WindowPlanner(MIXED)
    assert chooser.choose(1, 4096) == 4  # 8 drafts would take 2.14x
    assert chooser.decision() == "window 4: being tried at up to 1.6x the time of one token."


def test_wider_windows_are_not_tried_where_no_first_draft_stands():
    simulated = Rows(seen(MIXED, 0.0, (1,)), MIXED, 0.0)
    for _ in range(20):
        simulated.batch(256)
    assert max(simulated.windows) == 1


def test_quarters_of_the_sequence_have_windows_of_their_own():
    simulated = Rows(WindowPlanner(MIXED), MIXED, 0.8, begin=64)
    for _ in range(10):
        simulated.batch(256)
    simulated.windows.clear()
    simulated.batch(256)
    assert np.mean(simulated.windows[:60]) < 1 and np.mean(simulated.windows[64:]) > 3
    assert simulated.planner.decision().startswith("windows 0, ") and " by quarter: " in simulated.planner.decision()


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.9])
def test_the_window_of_the_largest_predicted_gain_is_taken(rate):
    chooser = seen(MIXED, rate, (4, 8, 16))
    gain = {w: (1 - rate ** (w + 1)) / (1 - rate) * 70 / (60 + 10 * (w + 1)) for w in CANDIDATES}
    best = max(gain, key=gain.get)
    assert chooser.choose(1, 256) == best
    row = next(row for row in chooser.table() if row["window"] == best)
    assert row["speedup"] == pytest.approx(gain[best], rel=0.03) and row["time_ratio"] == pytest.approx((70 + 10 * best) / 70)


def test_it_comes_near_the_best_fixed_window():
    simulated = Rows(WindowPlanner(MIXED), MIXED, 0.8)
    for _ in range(10):
        simulated.batch(256)
    best = max((1 - 0.8 ** (w + 1)) / 0.2 * 70 / (60 + 10 * (w + 1)) for w in CANDIDATES)
    speedup = 10 * 256 * MIXED.aligned[1] / simulated.time
    assert speedup > 0.9 * best, f"{speedup:.2f}x of {best:.2f}x"


@pytest.mark.parametrize("rows, length", [(1, 256), (1, 16), (16, 256), (16, 16)])
@pytest.mark.parametrize("uneven", [1.0, 1.12])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_trials_lose_little(rows, length, uneven, rate):
    times = cost(lambda b, n: 60 + 5 * b * n, uneven=uneven)
    simulated = Rows(WindowPlanner(times), times, rate)
    for count in range(1, 41):
        simulated.batch(length, rows)
        lost = simulated.time / (count * length * times.aligned[rows]) - 1
        assert lost <= 0.021, f"{lost:.1%} lost after {count} batches"  # 2 %, and what a window loses that was taken on an estimate
    assert any(simulated.windows)


@pytest.mark.parametrize("rows", [1, 16])
def test_windows_known_not_to_gain_are_tried_again_at_times(rows):
    times = cost(lambda b, n: 60 + 5 * b * n)
    simulated = Rows(seen(times, 0.0, (1, 2, 4, 8, 16)), times, 0.0)
    for _ in range(40):
        simulated.batch(256, rows)
    tries, passes = np.flatnonzero(simulated.windows), len(simulated.windows)
    assert len(tries) > 4 and tries[-1] > 0.9 * passes, f"trials at {tries} of {passes} passes"
    assert simulated.time <= 1.00501 * passes * times.aligned[rows]


def test_acceptance_that_rises_is_noticed():
    simulated = Rows(WindowPlanner(MIXED), MIXED, 0.0)
    simulated.batch(256)
    simulated.rate = 0.9
    for _ in range(8):
        simulated.batch(256)
    assert np.mean(simulated.windows[-20:]) > 2


def test_rows_at_different_lengths_are_compared_with_what_one_code_costs_them():
    """At 1.5x, 1.25 codes a pass do not pay for leaving plain AR, but once rows are ragged they do."""
    times = cost(lambda b, n: 1.0, uneven=1.5)
    chooser = WindowPlanner(times)
    chooser.quarters[0].observe([0, 0, 0, 0, 1] * 40, [1] * 200)
    for done in range(4):  # passes that a choice is kept for
        assert chooser.choose(2, 64 - done) == 0
        chooser.observe([0, 0], [0, 0])
    assert chooser.choose(2, 60) == 0
    chooser.observe([0, 1], [1, 1])  # as a trial would leave them
    assert [chooser.choose(2, 59 - done) > 0 for done in range(4)] == [False, False, False, True]
    assert chooser.choose(2, 64) == 0  # the next batch begins in step


def test_rows_that_end_at_different_times_count_against_windows_of_a_batch():
    def row(batch, remaining):
        chooser = WindowPlanner(FLAT)
        chooser.quarters[0].observe([0, 1, 2] * 200, [2] * 600)
        chooser.choose(batch, remaining)
        return next(row for row in chooser.table() if row["window"] == 2)

    alone, few, many = row(1, 16), row(16, 16), row(16, 256)
    assert alone["speedup"] == pytest.approx(alone["tokens_per_pass"])
    assert few["speedup"] < many["speedup"] < alone["speedup"]


def test_the_same_observations_give_the_same_windows():
    one, two = Rows(WindowPlanner(MIXED), MIXED, 0.7, 5), Rows(WindowPlanner(MIXED), MIXED, 0.7, 5)
    for simulated in (one, two):
        simulated.batch(128, 4)
    assert one.windows == two.windows and len(set(one.windows)) > 1


def test_before_anything_is_seen_a_table_holds_times_alone():
    chooser = WindowPlanner(MIXED)
    chooser.choose(1, 4)
    rows = json.loads(json.dumps(chooser.table()))
    assert [(row["quarter"], row["window"]) for row in rows] == [(q, w) for q in range(4) for w in range(4 - q)]
    assert rows[1] == {"quarter": 0, "window": 1, "time_ratio": pytest.approx(80 / 70), "tokens_per_pass": None, "speedup": None}


def test_the_last_code_needs_no_window():
    assert WindowPlanner(FLAT).choose(3, 1) == 0


def test_impossible_numbers_are_refused():
    with pytest.raises(UsageError, match="choose"):
        WindowPlanner(FLAT).choose(0, 5)
    for accepted, windows in (([3], [2]), ([1, 1], [2]), ([], []), ([-1], [2]), ([65], [65])):
        with pytest.raises(UsageError, match="observe"):
            WindowPlanner(FLAT).observe(accepted, windows)
