"""The logits pipeline: each rule alone, their order, edge cases, and parity with the recorded official filters."""

import math

import pytest
import torch

from arsp.decode.filters import LogitsPipeline
from arsp.errors import ConfigError
from arsp.testing.golden import find_cases

GPT_CASES = [case for kind in ("gpt_c2i", "gpt_t2i") for case in find_cases(kind=kind) if "filter" in case.meta]


def kept(pipeline, probs):
    return (pipeline(torch.tensor(probs).log()) > -torch.inf).nonzero().flatten().tolist()


def entropy(p):
    p = p[p > 0]
    return -(p * p.log()).sum().item()


def test_the_default_is_a_plain_log_softmax_in_float32():
    logits = torch.randn(3, 7, dtype=torch.bfloat16)
    out = LogitsPipeline()(logits)
    assert out.dtype == torch.float32 and torch.equal(out, torch.log_softmax(logits.float(), -1))


def test_top_k_keeps_ties_with_the_last_one_kept():
    assert kept(LogitsPipeline(top_k=2), [0.4, 0.2, 0.2, 0.2]) == [0, 1, 2, 3]
    assert kept(LogitsPipeline(top_k=2), [0.4, 0.3, 0.2, 0.1]) == [0, 1]


@pytest.mark.parametrize("k", [0, 4, 5, 1000])
def test_top_k_of_zero_or_at_least_the_vocabulary_keeps_everything(k):
    assert kept(LogitsPipeline(top_k=k), [0.4, 0.3, 0.2, 0.1]) == [0, 1, 2, 3]


def test_top_p_keeps_the_entry_that_crosses_the_threshold():
    assert kept(LogitsPipeline(top_p=0.5), [0.2, 0.4, 0.3, 0.1]) == [1, 2]
    assert kept(LogitsPipeline(top_p=0.39), [0.2, 0.4, 0.3, 0.1]) == [1]


def test_top_p_zero_keeps_exactly_the_best():
    assert kept(LogitsPipeline(top_p=0.0), [0.2, 0.4, 0.3, 0.1]) == [1]
    assert kept(LogitsPipeline(top_p=0.0), [0.25] * 4) == [0], "the smallest id on ties"


def test_cuts_through_equal_logits_keep_the_smaller_ids():
    assert kept(LogitsPipeline(top_p=0.5), [0.1, 0.2, 0.2, 0.2, 0.2, 0.1]) == [1, 2, 3]
    assert kept(LogitsPipeline(top_p=0.3), [0.0, 0.25, 0.25, 0.25, 0.25]) == [1, 2]


def test_top_p_is_the_shortest_prefix_that_exceeds_the_mass():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(50, 40, generator=generator).mul(3).round()  # many ties
    for mass in (0.1, 0.5, 0.9, 0.999):
        out = LogitsPipeline(top_p=mass)(logits) > -torch.inf
        for row, p in zip(out, logits.softmax(-1), strict=True):
            order = sorted(range(40), key=lambda i: (-p[i].item(), i))
            sizes = [next((k for k in range(1, 41) if p[order[:k]].sum() > mass + slack), 40) for slack in (-1e-6, 1e-6)]
            size = int(row.sum())
            assert sizes[0] <= size <= sizes[1], f"top_p {mass}: {size} kept, expected {sizes} (float32 rounding at the cut)"
            assert row.nonzero().flatten().tolist() == sorted(order[:size]), f"top_p {mass}: not the best {size}, smaller ids first"


def test_temperature_zero_is_one_hot_on_the_smallest_best_id():
    out = LogitsPipeline(temperature=0.0)(torch.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]]))
    assert out.exp().tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.4, 0.7, 0.95])
def test_top_h_keeps_the_longest_prefix_within_its_entropy(alpha):
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 4.0):
        p = torch.softmax(scale * torch.randn(40, dtype=torch.float64, generator=generator), -1)
        size = int((LogitsPipeline(top_h=alpha)(p.log()) > -torch.inf).sum())
        ordered = p.sort(descending=True).values
        within = [entropy(ordered[:k] / ordered[:k].sum()) <= alpha * entropy(p) for k in range(1, 41)]
        assert size == max(1, sum(within)) and within == sorted(within, reverse=True), (alpha, scale, size, sum(within))


def test_top_h_one_keeps_everything_and_a_flat_law_keeps_a_power_of_its_size():
    assert kept(LogitsPipeline(top_h=1.0), [0.4, 0.3, 0.2, 0.1]) == [0, 1, 2, 3]
    assert len(kept(LogitsPipeline(top_h=0.5001), [1 / 64] * 64)) == 8, "entropy log 8 is half of log 64"


def test_rules_apply_in_order_temperature_top_k_top_p_top_h():
    logits = 2 * torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    step = logits
    for rule in (LogitsPipeline(temperature=0.7), LogitsPipeline(top_k=12), LogitsPipeline(top_p=0.9), LogitsPipeline(top_h=0.6)):
        step = rule(step)
    together = LogitsPipeline(temperature=0.7, top_k=12, top_p=0.9, top_h=0.6)(logits)
    assert torch.equal(step > -torch.inf, together > -torch.inf)
    worst = (step.exp() - together.exp()).abs().max().item()
    assert worst < 1e-6, f"max difference of probabilities {worst}"


def test_what_is_already_removed_stays_removed():
    logits = torch.tensor([1.0, -torch.inf, 0.5, -torch.inf])
    out = LogitsPipeline(top_k=3, top_p=0.99, top_h=0.99)(logits)
    assert out[1] == out[3] == -torch.inf and not out.isnan().any(), out.tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("temperature", math.inf), ("temperature", math.nan), ("top_k", -1), ("top_k", 2.5), ("top_p", 1.5),
     ("top_p", -0.1), ("top_h", 2.0), ("top_h", math.nan)],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=field):
        LogitsPipeline(**{field: value})


@pytest.mark.golden
@pytest.mark.parametrize("case", GPT_CASES, ids=str)
def test_filters_equal_the_recorded_official_ones(case):
    compared = 0
    for setting in case.meta["filter"]:
        pipeline = LogitsPipeline(setting["temperature"], setting["top_k"], setting["top_p"])
        for prefix, source in (("filter", "filter.in"), ("filter_ties", "filter.in_ties")):
            name = f"{prefix}.{setting['index']}"
            if f"{name}.logits" not in case.io:
                continue
            compared += 1
            expected, got = case.io[f"{name}.logits"], pipeline.masked_logits(case.io[source])
            assert torch.equal(got == -torch.inf, expected == -torch.inf), f"{name}: another set of codes is removed ({setting})"
            finite = expected > -torch.inf
            worst = ((got - expected)[finite].abs() / expected[finite].abs().clamp(min=1)).max().item()
            assert worst < 1e-6, f"{name}: relative difference of logits {worst}"
            check_probabilities(pipeline, case.io[source], case.io[f"{name}.probs"], name)
    assert compared, f"{case}: golden.json lists filters but no tensors of them"


def check_probabilities(pipeline, logits, expected, name):
    """Equal, except that temperature 0 picks the smallest id where the official division by 1e-5 splits exact ties."""
    got = pipeline(logits).exp()
    if pipeline.temperature == 0:
        expected = torch.nn.functional.one_hot(expected.argmax(-1), expected.shape[-1]).float()
    worst = (got - expected).abs().max().item()
    assert worst < 1e-6, f"{name}: difference of probabilities {worst}"
