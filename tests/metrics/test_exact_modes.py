"""The verify family is exact: every mode that says so draws from the joint law of enumerable models, in every configuration.

Each test compares sequences with the joint by :func:`arsp.metrics.exact.run_exact` and fails at p <= 1e-4: a correct sampler fails one
with probability 1e-4, all of this file with less than 3 %; seeds are fixed. The same function catches each of the wrong samplers of
``test_exact_mutants.py``.
"""

import itertools

import pytest
import torch
from tabular_models import guided_decoder, table_decoder

from arsp.decode.ar import ARGenerator
from arsp.decode.drafts import INITIALISERS
from arsp.decode.filters import LogitsPipeline
from arsp.decode.jacobi import JacobiGenerator
from arsp.decode.modes import MODES
from arsp.metrics.exact import filtered, mode_generator, run_exact
from arsp.protocols import Request
from arsp.testing.golden import find_cases
from arsp.testing.tabular import TabularDecoder

EXACT = [  # every exact mode, mc with both couplings
    pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
    for name, mode in MODES.items()
    if mode.exactness == "exact"
    for options in ([{"coupling": "maximal"}, {"coupling": "gumbel"}] if name == "mc" else [{}])
]
FROM_GUESSES = [mode for mode in EXACT if "init" in MODES[mode.values[0]].options]
STARTS = {"random_uniform", "repeat_left"}  # of the quick part of the grid
CUT = LogitsPipeline(temperature=0.8, top_k=3, top_p=0.9)


def check(name, decoder, num, seed=0, pipeline=None, **options):
    (report,) = run_exact(name, decoder, num=num, seeds=(seed,), pipeline=pipeline, options=options)
    assert report.exactness == "exact" and report.passed, report


def sequences(name, decoder, num, batch, seed=0, pipeline=None, **options):
    """Codes of ids 0 .. num - 1, so many at a time."""
    generator = mode_generator(name, decoder, pipeline, **options)
    ids = torch.arange(num).split(batch)
    return torch.cat([generator.generate(Request(part, seed)).codes_BL for part in ids])


@pytest.mark.slow
@pytest.mark.golden
@pytest.mark.parametrize(("name", "options"), EXACT)
@pytest.mark.parametrize("case", find_cases(kind="ar_table"), ids=str)
def test_every_exact_mode_reproduces_the_recorded_joint(case, name, options):
    """200 000 sequences a seed (trees 60 000, they take four times as long), three seeds."""
    tree = name in ("pac", "kseq", "rsd")
    decoder = TabularDecoder([case.io[f"table.{i}"] for i in range(case.config["L"])])
    for report in run_exact(name, decoder, num=60_000 if tree else 200_000, options=options):
        assert report.exactness == "exact" and report.passed, report
        assert report.tv < 1.3 * report.tv_floor or report.df < 100, report  # of few cells, the noise is noisy itself


GRID = [
    pytest.param(
        *mode.values, window, init, id=f"{mode.id}-{window}-{init}",
        marks=[] if window == 2 and init in STARTS else pytest.mark.slow,
    )
    for mode, window, init in itertools.product(FROM_GUESSES, (1, 2, 3), INITIALISERS)
    if mode.id != "seeded"  # its codes are compared one by one below
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "window", "init"), GRID)
def test_windows_and_first_guesses_do_not_change_the_law(name, options, window, init):
    """All redraws, windows 1 to 3 on 2 x 3 codes, every initialiser: 20 000 sequences each, 8000 of trees."""
    check(name, table_decoder(), 8_000 if name == "pac" else 20_000, seed=window, window=window, init=init, **options)


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize(("name", "option"), [("draft-model", {}), ("kseq", {"width": 2}), ("kseq", {"width": 4})], ids=str)
def test_windows_of_draft_models_do_not_change_the_law(name, option, window):
    check(name, table_decoder(), 10_000, seed=window, window=window, **option)


@pytest.mark.parametrize(
    ("name", "option"),
    [("rsd", {"branches": "3"}), ("rsd", {"branches": "2,1,3"}), ("rsd", {"branches": "5,1"}),
     ("pac", {"window": 4, "levels": 2, "width": 2}), ("pac", {"window": 5, "levels": 4, "width": 3}), ("pac", {"window": 2, "levels": 8}),
     ("vp", {"gain": 3.0})], ids=str,
)  # fmt: skip
def test_shapes_of_trees_and_strengths_do_not_change_the_law(name, option):
    """Also more siblings than there are codes, and trees deeper than the window."""
    check(name, table_decoder(), 8_000, **option)


@pytest.mark.parametrize(("name", "options"), EXACT)
@pytest.mark.parametrize("interval", [pytest.param(-1, id="guided", marks=pytest.mark.slow), pytest.param(1, id="interval")])
def test_the_guided_law_is_what_is_verified(name, options, interval):
    """Guidance of two halves at every step, and, with filters, guidance that ends inside a window."""
    window = {} if name == "rsd" else {"window": 2}
    check(name, guided_decoder(interval=interval), 12_000, pipeline=None if interval < 0 else CUT, **window, **options)


@pytest.mark.parametrize(("name", "options"), EXACT)
def test_filters_are_part_of_the_verified_law(name, options):
    """Temperature, top-k and top-p at once, on five codes; laws end up with one to three of them."""
    check(name, table_decoder(5, (2, 2)), 20_000, seed=1, pipeline=CUT, **options)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", [LogitsPipeline(temperature=1.7), LogitsPipeline(top_p=0.6), LogitsPipeline(top_h=0.6)], ids=str)
@pytest.mark.parametrize("name", ["sjd", "mc", "pac", "rsd"])
def test_single_filters_are_part_of_the_verified_law(name, pipeline):
    check(name, table_decoder(), 15_000, seed=2, pipeline=pipeline)


@pytest.mark.parametrize(("name", "options"), EXACT)
def test_greedy_decoding_is_the_one_greedy_sequence(name, options):
    decoder, greedy = table_decoder(5, (2, 2)), LogitsPipeline(temperature=0.0)
    expected = ARGenerator(decoder, greedy).generate(Request(torch.arange(50), 0)).codes_BL
    assert torch.equal(sequences(name, decoder, 50, 50, 0, greedy, **options), expected)


class Alternating:
    """A planner that goes through some windows, plain steps among them, whatever it sees."""

    def __init__(self, request):
        self.windows = itertools.cycle([3, 1, 0, 2])

    def choose(self, batch, remaining):
        return next(self.windows)

    def observe(self, accepted_B, tested_B):
        pass


@pytest.mark.parametrize(("name", "options"), [mode for mode in FROM_GUESSES if mode.values[0] != "pac"])
@pytest.mark.parametrize("init", ["random_uniform", "left_law", "repeat_above"])
def test_windows_that_change_from_pass_to_pass_do_not_change_the_law(name, options, init):
    decoder = table_decoder()
    generator = mode_generator(name, decoder, init=init, **options)
    changing = JacobiGenerator(decoder, generator.method, Alternating)
    (report,) = run_exact(changing, decoder, num=20_000, seeds=(5,))
    assert report.passed, report


# -- batches ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), EXACT)
def test_a_sequence_does_not_depend_on_its_batch(name, options):
    """Ids one, two and four at a time, and among 1000: rows are ragged, and each has the codes that it has alone."""
    decoder = table_decoder()
    together = sequences(name, decoder, 1000, 1000, **options)
    for batch in (1, 2, 4):
        assert torch.equal(sequences(name, decoder, 12 * batch, batch, **options), together[: 12 * batch]), f"batch {batch}"
    assert len(together.unique(dim=0)) > 100


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", ["sjd", "mc"])
def test_small_batches_follow_the_law(name, batch):
    """8 sequences of 3 codes, 600 draws each: many requests, so few cells."""
    decoder = table_decoder(2, (1, 3))
    (report,) = run_exact(mode_generator(name, decoder, window=2), decoder, num=600, seeds=(batch,), batch_size=batch)
    assert report.passed and report.df >= 6, report


# -- the same codes as plain sampling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [table_decoder(), guided_decoder(interval=1)], ids=["plain", "guided"])
@pytest.mark.parametrize("pipeline", [LogitsPipeline(), CUT, LogitsPipeline(top_h=0.7)], ids=["all", "cut", "entropy"])
def test_seeded_decoding_gives_the_codes_of_plain_sampling(decoder, pipeline):
    """Any window, initialiser, draft model and batch."""
    expected = ARGenerator(decoder, pipeline).generate(Request(torch.arange(400), 9)).codes_BL
    guesses = [{"init": init} for init in INITIALISERS] + [{"draft_model": "disturbed"}]
    for window, guess in itertools.product((1, 2, 4, 6), guesses):
        found = sequences("seeded", decoder, 400, 400 if window > 1 else 130, 9, pipeline, window=window, **guess)
        assert torch.equal(found, expected), f"window {window}, {guess}"


def test_sampling_with_a_pipeline_is_sampling_the_filtered_tables():
    """What the comparisons above rest on: the joint of :func:`filtered` is the law of plain sampling with that pipeline."""
    decoder = guided_decoder(interval=1)
    (report,) = run_exact(ARGenerator(decoder, CUT), filtered(decoder, CUT), num=40_000, seeds=(3,))
    assert report.passed, report
