"""The exactness test itself: right on exact samplers, and it catches wrong ones."""

import math

import pytest
import torch

from arsp.decode.ar import ARGenerator
from arsp.decode.filters import LogitsPipeline
from arsp.errors import ConfigError
from arsp.metrics.exact import chi_square, count_sequences, default_testbed, filtered, run_exact, total_variation
from arsp.protocols import Generation, Request
from arsp.testing.golden import find_cases
from arsp.testing.tabular import TabularDecoder


class Tempered:
    """Mutant: samples at temperature 0.93 and claims to be exact."""

    def __init__(self, decoder):
        self.inner, self.capabilities = ARGenerator(decoder, LogitsPipeline(temperature=0.93)), decoder.capabilities

    def generate(self, request, callback=None):
        return self.inner.generate(request)


class StaleLastToken(Tempered):
    """Mutant: redraws the first token after the others were drawn from it, in one row of ten."""

    def generate(self, request, callback=None):
        codes = ARGenerator(self.inner.decoder).generate(request).codes_BL.clone()
        again = ARGenerator(self.inner.decoder).generate(Request(request.sample_ids_B, request.seed + 1)).codes_BL
        codes[::10, 0] = again[::10, 0]
        return Generation(codes)


def test_total_variation_of_known_laws():
    assert total_variation(torch.tensor([1.0, 0]), torch.tensor([0, 1.0])) == 1.0
    assert math.isclose(total_variation(torch.tensor([30.0, 70]), torch.tensor([0.5, 0.5])), 0.2)


def test_chi_square_merges_rare_cells_into_one():
    counts, joint = torch.tensor([48.0, 42, 6, 4]), torch.tensor([0.5, 0.4, 0.06, 0.04], dtype=torch.float64)
    statistic, df, p = chi_square(counts, joint)
    assert df == 2 and math.isclose(statistic, 4 / 50 + 4 / 40, rel_tol=1e-12), (statistic, df)
    assert math.isclose(p, math.exp(-statistic / 2), rel_tol=1e-9), "survival function of chi-square with 2 degrees of freedom"


def test_drawing_an_impossible_sequence_is_a_certain_failure():
    statistic, _, p = chi_square(torch.tensor([99.0, 1.0]), torch.tensor([1.0, 0.0]))
    assert math.isinf(statistic) and p == 0


def test_sequences_are_counted_at_their_place_in_the_joint():
    counts = count_sequences(torch.tensor([[0, 0], [2, 1], [2, 1]]), 3)
    assert counts.tolist() == [1, 0, 0, 0, 0, 0, 0, 2, 0]


@pytest.mark.parametrize("sampler", ["ar", "ar-torch"])
def test_plain_sampling_is_exact(sampler):
    """3 seeds, each p > 1e-4: an exact sampler fails with probability 3e-4, and the seeds are fixed."""
    for report in run_exact(sampler):
        assert report.passed, report
        assert report.tv < 1.3 * report.tv_floor, report


def test_filters_are_part_of_the_law():
    """Joint of the filtered tables; same false-alarm rate of 3e-4."""
    for report in run_exact("ar", pipeline=LogitsPipeline(temperature=0.8, top_k=4, top_p=0.9, top_h=0.9)):
        assert report.passed, report


@pytest.mark.parametrize("mutant", [Tempered, StaleLastToken])
def test_biased_samplers_are_caught(mutant):
    decoder = default_testbed()
    for report in run_exact(mutant(decoder), decoder, seeds=(0,)):
        assert not report.passed and report.tv > 1.3 * report.tv_floor, f"{mutant.__name__} was not caught: {report}"


def test_sampling_through_the_flow_map_is_close_to_the_law():
    """One seed of 50 000 sequences with the default solver, p > 1e-4 (the false-alarm rate; the seed is fixed)."""
    (report,) = run_exact("flow", num=50_000, seeds=(0,))
    assert report.exactness == "approximate" and report.passed, report


def test_reports_become_metrics_with_all_numbers():
    (report,) = run_exact("ar", num=2_000, seeds=(4,))
    metrics = {metric["name"]: metric for metric in report.metrics()}
    assert metrics["exact_tv"]["value"] == report.tv and metrics["exact_p"]["value"] == report.p
    for metric in metrics.values():
        assert metric["n"] == 2_000 and metric["seed"] == 4 and metric["df"] > 0 and metric["passed"] is report.passed, metric


def test_progress_is_reported_in_sequences():
    done = []
    run_exact("ar", num=2_500, seeds=(0, 1), batch_size=1_000, callback=done.append)
    assert done == [1000, 1000, 500] * 2


def test_unknown_samplers_are_refused_with_the_known_names():
    with pytest.raises(ConfigError) as caught:
        run_exact("aar")
    assert "ar" in caught.value.hint


def test_a_filtered_decoder_has_a_normalised_joint():
    joint = filtered(default_testbed(), LogitsPipeline(top_k=2)).joint
    assert abs(joint.sum().item() - 1) < 1e-6 and (joint > 0).sum() == 2**4


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="ar_table"), ids=str)
def test_recorded_tables_have_the_recorded_joint_and_are_sampled_exactly(case):
    """Joint to 1e-12; 3 seeds of 200 000 sequences, each p > 1e-4 (false alarm 3e-4)."""
    decoder = TabularDecoder([case.io[f"table.{i}"] for i in range(case.config["L"])])
    worst = (decoder.joint - case.io["joint"]).abs().max().item()
    assert worst < 1e-12, f"max difference of the joint {worst}"
    for report in run_exact("ar", decoder):
        assert report.passed, report
