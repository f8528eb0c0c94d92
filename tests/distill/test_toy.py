"""DD1 from end to end on a teacher whose joint law can be enumerated: trajectories, training, one and two passes.

The same student as in ``arsp bench exact --testbed toy --sampler dd1``; about 55 s of one CPU core. Measured total variation to the
joint with 100 000 draws: one pass 0.025, two passes 0.021, the flow map itself 0.007, exact draws 0.006, the best sampler that
draws all positions independently 0.512.
"""

from __future__ import annotations

import pytest
import torch

from arsp.distill.flow import keyed_noise
from arsp.distill.tabular import NUM, SEED, TabularStudent, distil_tabular, tabular_trajectories
from arsp.errors import ConfigError
from arsp.metrics.exact import count_sequences, run_exact, total_variation
from arsp.protocols import Generator, Request
from arsp.testing.tabular import TabularDecoder, random_tables, toy_teacher

DRAWS = 100_000


@pytest.fixture(scope="module")
def teacher():
    return toy_teacher()


@pytest.fixture(scope="module")
def trained(teacher):
    """The task and the training state; the samplers of this teacher use the same student."""
    return distil_tabular(teacher)


@pytest.fixture(scope="module")
def distances(teacher, trained):
    """Total variation to the joint of one and of two passes, noise of a seed that was not trained on."""
    return {name: run_exact(name, teacher, num=DRAWS, seeds=(5,))[0] for name in ("dd1", "dd1-2step")}


def test_trajectories_follow_the_law_of_the_teacher(teacher):
    """Twice the distance of as many exact draws at most; the rest is the solver's error. The seed is fixed."""
    everything = tabular_trajectories(teacher)
    exact = torch.multinomial(teacher.joint, NUM, replacement=True, generator=torch.Generator().manual_seed(0))
    floor = total_variation(torch.bincount(exact, minlength=8**4), teacher.joint)
    found = total_variation(count_sequences(everything.tokens_NL.long(), 8), teacher.joint)
    assert found < 2 * floor, f"total variation {found:.4f}, of exact draws {floor:.4f}"
    codes, labels, noise = everything.batch(torch.tensor([59_999, 3]))
    assert torch.equal(noise, keyed_noise(Request(torch.tensor([59_999, 3]), SEED), 4)(torch.arange(4)))
    assert labels.tolist() == [0, 0] and codes.shape == (2, 4)


@pytest.mark.slow
def test_one_pass_reproduces_the_joint_law_that_independent_draws_miss(teacher, distances):
    independent = total_variation(teacher.product_of_marginals, teacher.joint)
    report = distances["dd1"]
    print(f"one pass: total variation {report.tv:.4f}, sampling noise {report.tv_floor:.4f}, independent draws {independent:.4f}")
    assert independent > 0.45, independent
    assert report.tv < 0.1 and report.exactness == "approximate", f"{report}, independent draws {independent:.4f}"


@pytest.mark.slow
def test_a_second_pass_comes_closer(distances):
    one, two = distances["dd1"].tv, distances["dd1-2step"].tv
    print(f"two passes: total variation {two:.4f}, one pass {one:.4f}")
    assert two < one, f"two passes {two:.4f}, one pass {one:.4f}"


@pytest.mark.slow
def test_the_student_uses_its_noise(trained):
    figures = trained[1]["history"][-1]
    print(figures)
    assert figures["heldout_accuracy"] > 0.93 and figures["heldout_accuracy_t2"] > 0.93, figures
    assert figures["heldout_ce_shuffled_noise"] > 10 * figures["heldout_ce"], figures


@pytest.mark.slow
def test_later_codes_are_harder_because_they_depend_on_all_earlier_noise(trained):
    accuracy = trained[0].accuracy_by_position(trained[0].trained)
    assert accuracy[0] > 0.98 and accuracy == sorted(accuracy, reverse=True), accuracy


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "passes"), [(1, 1), (2, 2)])
def test_passes_are_counted_and_the_batch_does_not_matter(teacher, trained, steps, passes):
    sampler = TabularStudent(teacher, steps)
    whole = sampler.generate(Request(torch.arange(5_000), 0))
    assert isinstance(sampler, Generator) and whole.stats["passes"] == passes
    part = sampler.generate(Request(torch.arange(1_900, 2_100), 0)).codes_BL
    assert (part != whole.codes_BL[1_900:2_100]).sum() == 0


@pytest.mark.parametrize(("codebook", "length", "message"), [(None, 4, "no codebook"), (torch.eye(3), 3, "perfect square")])
def test_decoders_that_cannot_be_distilled_are_refused(codebook, length, message):
    with pytest.raises(ConfigError, match=message):
        TabularStudent(TabularDecoder(random_tables(3, length, seed=0, scale=1.0), codebook))
