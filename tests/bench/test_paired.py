"""A mode beside plain sampling, on tiny models: what is compared, in which order, and what is counted."""

import pytest
import tiny_models
import torch

from arsp import stack as stacks
from arsp.bench import paired
from arsp.bench.paired import Paired, cost_of, draft_of, measure_pair, plain_stack
from arsp.bench.timing import Timing
from arsp.stack import StackConfig


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(tiny_models.teacher_bundle(tmp_path_factory.mktemp("models") / "teacher"))


def pair(teacher, num=5, batch_size=2, **options):
    stack = stacks.build(StackConfig(model=teacher, **options))
    plain = plain_stack(stack)
    labels = stacks.labels_for(stack, num + batch_size, 3, None)
    measured = measure_pair(stack, plain, labels, num=num, batch_size=batch_size, seed=3, progress=lambda n: None)
    return stack, plain, measured


def test_the_plain_stack_is_that_of_arsp_sample_under_the_same_rule(teacher):
    options = {"model": teacher, "cfg": 2.0, "top_k": 5, "cfg_interval": 6}
    stack = stacks.build(StackConfig(sampler="mc", verify={"window": 4}, **options))
    plain, expected = plain_stack(stack), stacks.build(StackConfig(**options))
    assert plain.describe() == expected.describe() and plain.name == expected.name and plain.model is stack.model
    labels = stacks.labels_for(plain, 4, 0, None)
    codes = [each.generator.generate(each.request(torch.arange(4), 0, labels)).codes_BL for each in (plain, expected)]
    assert torch.equal(*codes)


def test_codes_are_those_of_the_same_ids_seed_and_labels_in_any_batch(teacher):
    _, _, three = pair(teacher, batch_size=3, sampler="seeded", verify={"window": 4})
    _, _, one = pair(teacher, batch_size=1, sampler="seeded", verify={"window": 4})
    assert three.differing == one.differing == [], "the seeded mode draws what plain sampling draws"
    assert torch.equal(three.plain_codes_NL, one.plain_codes_NL) and three.codes_NL.shape == (5, 16)
    assert (three.batches, one.batches) == (2, 5)


def test_images_with_other_codes_are_named():
    codes = torch.arange(12).reshape(4, 3)
    other = codes.clone()
    other[1, 2] = other[3, 0] = 99
    timing = Timing("x", (1.0,))
    assert Paired(other, codes, timing, timing, None).differing == [1, 3]


def test_both_take_turns_at_going_first_and_the_warm_up_shows_other_images(teacher, monkeypatch):
    calls = []
    real = stacks.Stack.request
    monkeypatch.setattr(
        stacks.Stack, "request", lambda self, ids, seed, labels: calls.append(ids.tolist()) or real(self, ids, seed, labels)
    )
    order = []
    measure = paired.measure
    monkeypatch.setattr(paired, "measure", lambda work, **more: order.append(list(work)) or measure(work, **more))
    stack, plain, measured = pair(teacher, sampler="sjd")
    assert calls == [[5, 6], [5, 6], [0, 1], [2, 3], [4]]
    assert order == [["plain", "mode"], ["mode", "plain"], ["plain", "mode"]]
    assert stack.generator.statistics.images == 5 and sum(count for count, _ in plain.batch_seconds) == 5
    assert len(measured.timing.seconds) == len(measured.plain_timing.seconds) == 3


def test_times_are_those_of_an_image_and_the_speedup_is_the_median_of_ratios():
    codes = torch.zeros(3, 2, dtype=torch.int64)
    measured = Paired(codes, codes, Timing("mode", (1.0, 2.0, 4.0)), Timing("plain", (2.0, 6.0, 16.0)), None)
    assert measured.speedup.value == 3.0 and measured.speedup.low == 2.0 and measured.speedup.high == 4.0
    assert measured.batches == 3


def test_costs_are_means_over_images_and_medians_over_batches(teacher):
    stack, plain, measured = pair(teacher, sampler="mc", verify={"window": 4})
    cost, beside = cost_of(stack, measured.timing), cost_of(plain, measured.plain_timing)
    report = stack.generator.statistics.report((4, 4))
    assert cost["passes"] == report["passes_per_image"] < beside["passes"] == 16
    assert cost["tokens_per_pass"] == report["tokens_per_pass"] == pytest.approx(16 / cost["passes"])
    assert cost["images_per_s"] == pytest.approx(1e3 / cost["latency_ms"]["p50"])
    assert cost["kv_bytes"] > 0 and cost["weight_bytes"] == beside["weight_bytes"] and "draft_weight_bytes" not in cost


@pytest.mark.parametrize(("mode", "options"), [("draft-model", {"window": 3}), ("rsd", {"branches": "2,1"}), ("seeded", {"window": 3})])
def test_passes_and_weights_of_a_draft_model_are_counted_without_the_warm_up(teacher, mode, options):
    stack, _, measured = pair(teacher, sampler=mode, verify={"draft_model": teacher, **options})
    draft = draft_of(stack)
    total = draft.draft_passes if mode == "rsd" else draft.passes
    assert 0 < measured.draft_passes * measured.batches < total
    cost = cost_of(stack, measured.timing)
    assert cost["draft_weight_bytes"] == cost["weight_bytes"], "here both are the same model"


def test_modes_without_a_draft_model_count_none(teacher):
    for mode in ("sjd", "pac", "zipar"):
        stack, _, measured = pair(teacher, num=1, batch_size=1, sampler=mode)
        assert draft_of(stack) is None and measured.draft_passes is None
