"""Compiled blocks give the results of plain ones, with few compilations, in every kind of stack."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from arsp.models.compiled import compile_blocks
from arsp.stack import StackConfig, build
from arsp.testing.tolerance import assert_close


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options",
    [
        {"model": "llamagen"},
        {"model": "llamagen", "sampler": "sjd"},
        {"model": "llamagen", "apply": ["w4a8"]},
        {"model": "llamagen-dd1", "student_steps": 2},
        {"model": "var"},
        {"model": "var", "apply": ["litevar"]},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_traced_blocks_make_the_same_codes_with_few_graphs(options):
    stack = build(StackConfig(**options))
    request = stack.request(torch.arange(2), 3, torch.tensor([1, 7]))
    expected = stack.generator.generate(request).codes_BL
    compile_blocks(stack.model.module, backend="eager")
    assert torch.equal(stack.generator.generate(request).codes_BL, expected)
    assert 0 < counters["stats"]["unique_graphs"] <= 24, counters["stats"]


@pytest.mark.slow
def test_a_compiled_student_makes_the_same_codes():
    plain, compiled = (build(StackConfig(model="llamagen-dd1", compile=compile)) for compile in (False, True))
    request = plain.request(torch.arange(8), 3, torch.arange(8))
    expected, found = (stack.generator.generate(request).codes_BL for stack in (plain, compiled))
    assert (expected == found).float().mean() > 0.95, "a rounding may move a near tie, no more"
    assert compiled.name == f"{plain.name} + compile" and counters["stats"]["unique_graphs"] > 0


def test_logits_state_and_copies_of_a_compiled_model():
    stack = build(StackConfig(model="llamagen"))
    decoder, request = stack.generator.decoder, stack.request(torch.arange(3), 0, torch.arange(3))
    codes = torch.randint(0, decoder.vocab_size, (3, 16), generator=torch.Generator().manual_seed(0))
    keys, expected = list(stack.model.module.state_dict()), decoder.teacher_forced(request, codes)
    compile_blocks(stack.model.module, backend="eager")
    assert list(stack.model.module.state_dict()) == keys
    assert_close(decoder.teacher_forced(request, codes), expected, abs_tol=1e-3, what="logits")
    assert counters["stats"]["unique_graphs"] > 0
    twin = copy.deepcopy(stack.model.module)
    assert torch.equal(twin.layers[0].attention.wqkv.weight, stack.model.module.layers[0].attention.wqkv.weight)
