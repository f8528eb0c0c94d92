"""Guidance that is combined where somebody looks is the guidance of the formula, number for number."""

import pytest
import torch

from arsp.decode.ar import ARGenerator
from arsp.decode.decoder import RasterDecoder
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import Guidance, Guided, RampGuidance
from arsp.decode.law import Law
from arsp.models.llamagen import GPT, GPTConfig
from arsp.protocols import Request

FORMS = {
    "scale": lambda c, u: (Guidance(1.7).halves(c, u, torch.arange(c.shape[1])), u.float() + 1.7 * (c.float() - u.float())),
    "interval": lambda c, u: (
        Guidance(1.7, 0).halves(c, u, torch.arange(c.shape[1])),
        torch.cat((u[:, :2].float() + 1.7 * (c[:, :2].float() - u[:, :2].float()), c[:, 2:].float()), 1),
    ),
    "ramp": lambda c, u: (RampGuidance(1.7, 10).halves(c, u, 4), (1 + 1.7 * 4 / 9) * c.float() - 1.7 * 4 / 9 * u.float()),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def halves(dtype, rows=4, positions=5, codes=30):
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(2 * rows, positions, codes, generator=generator)).to(dtype).chunk(2)


@forms
@dtypes
def test_every_way_to_look_gives_the_combined_numbers(form, dtype):
    apart, dense = form(*halves(dtype))
    assert apart.shape == dense.shape and len(apart) == 4 and torch.equal(apart.float(), dense)
    rows, index = torch.tensor([2, 0])[:, None], torch.tensor([[1, 4], [3, 0]])
    codes = torch.tensor([[[5], [7]], [[0], [29]]])
    assert torch.equal(apart[rows, index].float(), dense[rows, index])
    assert torch.equal(apart[:, 1:].float(), dense[:, 1:]) and torch.equal(apart[rows[:, 0]].float(), dense[rows[:, 0]])
    at = (rows.unsqueeze(-1), index.unsqueeze(-1), codes)
    assert torch.equal(apart[at], dense[at])
    assert torch.equal(Guided.cat([apart[:, :2], apart[:, 2:]]).float(), dense)


@forms
@dtypes
@pytest.mark.parametrize(
    "pipeline", [LogitsPipeline(), LogitsPipeline(0.7, 20, 0.9), LogitsPipeline(0.0), LogitsPipeline(top_h=0.5)], ids=str
)
def test_laws_and_draws_are_those_of_the_combined_logits(form, dtype, pipeline):
    apart, dense = form(*halves(dtype))
    ids, drafts, positions = torch.arange(4), torch.arange(20).view(4, 5), torch.arange(5).expand(4, 5)
    (law, *ours), (wanted, *theirs) = (pipeline.verify(x, drafts, 3, ids, positions, 0) for x in (apart, dense))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(law.log_probs(), wanted.log_probs()) and torch.equal(pipeline(apart), pipeline(dense))
    assert torch.equal(law.log_prob(drafts.unsqueeze(-1)), wanted.log_prob(drafts.unsqueeze(-1)))
    assert torch.equal(law.behind_first().select(ids[1:3]).log_probs(), wanted.log_probs()[1:3, 1:])
    assert torch.equal(Law.stack([law.at(ids, positions[:, :2]), law.at(ids, positions[:, 2:])]).log_probs(), wanted.log_probs())
    if pipeline.top_h == 0:
        assert law.logits_BmV is apart and law.bytes == apart.nbytes + 16 * 20, "a law of two halves makes nothing of the size of V"


@dtypes
def test_what_is_kept_does_not_change_with_the_next_pass_and_takes_no_more_than_combined(dtype):
    for rows in (1, 4):
        apart, dense = FORMS["interval"](*halves(dtype, rows))
        kept = LogitsPipeline().law(apart).behind_first()
        before = kept.log_probs()
        for half in (apart.cond_BmV, apart.uncond_BmV):
            half.zero_()
        assert torch.equal(kept.log_probs(), before) and kept.bytes == dense[:, 1:].nbytes + 16 * 4 * rows


@dtypes
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0), Guidance(2.0, 5)], ids=["off", "guided", "interval"])
def test_a_decoder_gives_the_halves_that_its_logits_are_made_of(dtype, guidance):
    torch.manual_seed(0)
    model = GPT(GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=40, block_size=16, num_classes=5, multiple_of=16)).eval().to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    decoder, request = RasterDecoder(model, guidance), Request(torch.arange(3), 0, labels_B=torch.arange(3))
    codes = ARGenerator(decoder, LogitsPipeline(0.9, 20, 0.95)).generate(request).codes_BL
    for fed in ((None, codes[:, :1]), (codes[:, :4], codes[:, 4:9])):
        states = [decoder.start(request) for _ in range(2)]
        for part in fed:
            apart, dense = decoder.step_apart(states[0], part), decoder.step(states[1], part)
            assert torch.equal(apart.float(), dense) and dense.dtype == torch.float32
            assert isinstance(apart, Guided) == guidance.active
            assert (apart.cond_BmV if guidance.active else apart).dtype == dtype, "no cast was made"
