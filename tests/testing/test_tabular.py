"""The enumerable decoder keeps the Decoder protocol: windows, ragged rows, rewind."""

import pytest
import torch

from arsp.errors import InputError
from arsp.protocols import Decoder, Request
from arsp.testing.tabular import TabularDecoder, random_tables, sequence_ids, toy_teacher


@pytest.fixture
def decoder():
    return TabularDecoder(random_tables(4, 5, seed=1, scale=1.0))


def request(n):
    return Request(torch.arange(n), 0)


def test_it_is_a_decoder_with_a_normalised_joint(decoder):
    assert isinstance(decoder, Decoder)
    assert abs(decoder.joint.sum().item() - 1) < 1e-12 and decoder.joint.shape == (4**5,)


def test_the_joint_is_the_product_of_the_conditionals(decoder):
    codes = torch.tensor([[3, 0, 2, 1, 1], [0, 0, 0, 0, 0]])
    log_p = torch.log_softmax(decoder.teacher_forced(request(2), codes), -1).gather(-1, codes[..., None]).sum((1, 2))
    worst = (log_p.exp() - decoder.joint[sequence_ids(codes, 4)]).abs().max().item()
    assert worst < 1e-6, worst


def test_one_window_gives_the_logits_of_single_steps(decoder):
    codes = torch.randint(0, 4, (3, 4), generator=torch.Generator().manual_seed(0))
    expected = decoder.teacher_forced(request(3), torch.cat((codes, codes[:, :1]), 1))
    state = decoder.start(request(3))
    logits = torch.cat((decoder.step(state, None), decoder.step(state, codes)), 1)
    assert torch.equal(logits, expected)


def test_rows_rewind_and_continue_at_their_own_lengths(decoder):
    codes = torch.randint(0, 4, (3, 4), generator=torch.Generator().manual_seed(0))
    state = decoder.start(request(3))
    decoder.step(state, codes)
    lengths = torch.tensor([1, 3, 2])
    decoder.rewind(state, lengths)
    new = torch.tensor([[3], [1], [0]])
    logits = decoder.step(state, new)
    for b, length in enumerate(lengths.tolist()):
        row = torch.cat((codes[b, :length], new[b], torch.zeros(1, dtype=torch.int64)))[None]
        expected = decoder.teacher_forced(request(1), row)[0, length + 1]
        assert torch.equal(logits[b, 0], expected), f"row {b} at length {length}"
    assert state.lengths_B.tolist() == [2, 4, 3]


def test_selected_rows_continue_alone(decoder):
    codes = torch.tensor([[0, 1], [2, 3], [1, 1]])
    state = decoder.start(request(3))
    decoder.step(state, codes)
    part = decoder.select(state, torch.tensor([2, 0]))
    new = torch.tensor([[3], [2]])
    assert torch.equal(decoder.step(part, new), decoder.step(state, torch.tensor([[2], [0], [3]]))[[2, 0]])


def test_more_tokens_than_the_capacity_are_refused(decoder):
    state = decoder.start(request(1))
    with pytest.raises(InputError, match="4 tokens"):
        decoder.step(state, torch.zeros(1, 5, dtype=torch.int64))
    wide = decoder.start(request(1), capacity=7)
    assert decoder.step(wide, torch.zeros(1, 6, dtype=torch.int64))[0, -1].tolist() == [0.0] * 4, "uniform past the end"


def test_wrong_tables_and_unenumerable_sizes_are_refused():
    with pytest.raises(InputError, match="table 1"):
        TabularDecoder([torch.ones(1, 3) / 3, torch.ones(2, 3) / 3])
    big = torch.ones(1, 4096) / 4096
    with pytest.raises(InputError, match="too many"):
        TabularDecoder([big, torch.empty(4096, 4096), torch.empty(4096**2, 4096, device="meta")])


def test_the_toy_teacher_has_the_documented_dependence():
    teacher = toy_teacher()
    joint = teacher.joint
    entropy = -(joint * joint.clamp_min(1e-300).log()).sum().item()
    distance = 0.5 * (joint - teacher.product_of_marginals).abs().sum().item()
    assert joint.shape == (4096,) and teacher.codebook_VE.shape == (8, 4)
    assert abs(entropy - 2.06) < 0.01 and abs(distance - 0.51) < 0.01, (entropy, distance)
