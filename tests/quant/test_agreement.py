"""How far a quantised model is from its base: the figures by hand, on the laws that are sampled."""

import copy
import math
from dataclasses import dataclass, field

import pytest
import tiny_quant
import torch
from torch import nn

from arsp.protocols import Layout
from arsp.quant import agreement
from arsp.quant.agreement import Judge, divergence

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Fixed:
    """Samples whose logits are those of a table; two batches of the scales 1 and 4."""

    tables: list = field(default_factory=list)

    @property
    def model(self):
        return self

    module = None

    @property
    def source(self):
        return self

    layout = Layout.next_scale((1, 2))

    def logits(self, module):
        yield from self.tables[0 if module is None else module]


def table(seed, *rows):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num, 5, 7, generator=generator) for num in rows]


def test_figures_are_means_over_all_positions_of_all_batches():
    given, found = table(0, 2, 1), table(1, 2, 1)
    figures = Judge(Fixed([given, found]))(1)
    p_ML, q_ML = (torch.cat(part).double().log_softmax(-1) for part in (given, found))
    kl_ML = (p_ML.exp() * (p_ML - q_ML)).sum(-1)
    assert figures.positions == 15
    assert figures.top1 == pytest.approx(float((p_ML.argmax(-1) == q_ML.argmax(-1)).double().mean()))
    assert figures.kl == pytest.approx(float(kl_ML.mean()), rel=1e-9)
    assert figures.kl_by_step == pytest.approx(float((kl_ML[:, 0].mean() + kl_ML[:, 1:].mean()) / 2), rel=1e-9)
    assert figures.sqnr_db == pytest.approx(tiny_quant.sqnr_db(torch.cat(given), torch.cat(found)), rel=1e-6)


def test_a_model_agrees_with_itself():
    figures = Judge(Fixed([table(0, 2), table(0, 2)]))(1)
    assert (figures.top1, figures.kl, figures.kl_by_step, figures.sqnr_db) == (1.0, 0.0, 0.0, math.inf)


def test_divergence_is_of_the_laws_not_of_the_logits():
    logits = table(0, 2)[0]
    assert float(divergence(logits, logits + 3).abs().max()) < 1e-12
    assert bool((divergence(logits, -logits) > 0).all())
    two = torch.tensor([[[0.0, math.log(3.0)]]])
    assert float(divergence(torch.zeros(1, 1, 2), two)) == pytest.approx(math.log(0.5 / 0.25) / 2 + math.log(0.5 / 0.75) / 2)


def test_few_samples_are_kept_where_logits_are_many(monkeypatch):
    monkeypatch.setattr(agreement, "MOST_BYTES", 4 * 5 * 7 * 4)
    judge = Judge(Fixed([table(0, 3, 2, 2), table(1, 3, 2, 2)]))
    assert [len(part) for part in judge.logits] == [3, 2] and judge(1).positions == 25


@pytest.mark.parametrize("kind", tiny_quant.KINDS)
def test_more_noise_is_less_agreement(kind, tmp_path):
    model = tiny_quant.load(kind, tmp_path)
    judge = Judge(tiny_quant.samples(model))
    head = "head" if kind.startswith("var") else "output"
    figures = []
    for noise in (0.0, 0.02, 0.5):
        module = copy.deepcopy(model.module)
        weight: nn.Parameter = module.get_submodule(head).weight
        weight.data += noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        figures.append(judge(module))
    assert figures[0].kl == 0 and figures[0].top1 == 1 and figures[0].positions == 4 * model.source.layout.num_tokens
    assert 0 < figures[1].kl < figures[2].kl and figures[1].sqnr_db > figures[2].sqnr_db and figures[1].top1 >= figures[2].top1
    assert figures[1].kl_by_step > 0
    if model.source.layout.is_raster:
        assert figures[2].kl_by_step == pytest.approx(figures[2].kl)
