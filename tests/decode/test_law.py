"""Laws without their dense form are the laws of the pipeline, densely, code by code and by rows."""

import pytest
import torch

from arsp.decode.filters import LogitsPipeline
from arsp.decode.law import Law

PIPELINES = [LogitsPipeline(), LogitsPipeline(temperature=0.6), LogitsPipeline(top_k=4), LogitsPipeline(0.8, 5, 0.9), LogitsPipeline(0.0),
             LogitsPipeline(0.8, 0, 1.0, 0.5)]  # fmt: skip


def logits(rows=6, positions=3, codes=12, seed=0, ties=False):
    x = 2 * torch.randn(rows, positions, codes, generator=torch.Generator().manual_seed(seed))
    return x.round() if ties else x


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("pipeline", PIPELINES, ids=str)
def test_the_dense_form_is_that_of_the_pipeline(pipeline, ties):
    x = logits(ties=ties)
    ours, theirs = pipeline.law(x).log_probs(), pipeline(x)
    assert torch.equal(ours == -torch.inf, theirs == -torch.inf), "kept codes"
    kept = theirs > -torch.inf
    assert (ours - theirs)[kept].abs().max() < 2e-6


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("pipeline", PIPELINES, ids=str)
def test_single_codes_have_their_entry_of_the_dense_form(pipeline, ties):
    law, x = pipeline.law(logits(ties=ties)), torch.arange(12).expand(6, 3, 12)
    dense = law.log_probs()
    assert torch.equal(law.log_prob(x), dense)
    index = torch.tensor([[2, 0], [1, 1], [0, 2], [2, 2], [0, 0], [1, 2]])
    picked = dense[torch.arange(6)[:, None], index]
    assert torch.equal(law.log_prob(x[:, :2], index), picked), "at chosen positions"
    rows = torch.tensor([4, 1, 4])
    assert torch.equal(law.at(rows, index[rows]).log_probs(), picked[rows])
    assert torch.equal(law.select(rows).log_probs(), dense[rows])


def test_laws_of_consecutive_positions_become_one():
    pipeline, x = LogitsPipeline(0.7, 5, 0.9), logits()
    parts = [pipeline.law(x[:, :1]), pipeline.law(x[:, 1:])]
    assert torch.equal(Law.stack(parts).log_probs(), pipeline.law(x).log_probs())


def test_weights_need_no_normalising_and_may_be_zero():
    weights = torch.tensor([[[2.0, 0.0, 6.0], [0.0, 0.0, 0.5]]])
    law = Law.of_weights(weights.log())
    torch.testing.assert_close(law.log_probs().exp(), torch.tensor([[[0.25, 0.0, 0.75], [0.0, 0.0, 1.0]]]))
    assert law.log_prob(torch.tensor([[[1], [1]]])).flatten().tolist() == [-torch.inf, -torch.inf]


def test_nothing_of_the_size_of_the_vocabulary_is_made():
    """The law of a decoder's logits keeps them as they are; beside them it holds 16 bytes a position."""
    x = logits(2, 4, 1000)
    for pipeline in (LogitsPipeline(), LogitsPipeline(0.7, 40, 0.9), LogitsPipeline(0.0)):
        law = pipeline.law(x)
        assert law.logits_BmV is x and law.bytes == x.numel() * 4 + 2 * 4 * 16
