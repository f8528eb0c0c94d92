"""The CUDA kernel of windowed attention against float64, on the emulated device and on a real one; windows exactly as they are written."""

import math

import pytest
import torch
from cuda_emulation import TARGETS

from arsp.kernels import reference

SIDES = (1, 2, 3, 5, 7, 16)
# (B, H, G, sides): tiles cut on two sides, one query, more keys than a list holds, later maps smaller than earlier ones
CASES = [(1, 3, 1, SIDES[:1]), (3, 1, 2, SIDES[:2]), (2, 3, 1, SIDES[:3]), (1, 5, 2, SIDES[:5]), (1, 3, 2, SIDES), (2, 1, 1, (3, 9, 2))]


def draw(case, seed=0):
    """q, k, v and windows with at least one kept key a query: dense, dropped and all radii in one call."""
    batch, heads, sets, sides = case
    generator = torch.Generator().manual_seed(seed)
    total, scales = sum(side * side for side in sides), len(sides)
    q = torch.randn(batch, heads, sides[-1] ** 2, 64, generator=generator) / 4
    k = torch.randn(batch, heads, total, 64, generator=generator)
    v = torch.randn(sets * batch, heads, total, 64, generator=generator)
    windows = torch.randint(-1, 5, (heads, scales), generator=generator, dtype=torch.int32)
    windows[windows.eq(0).all(1), -1] = 1
    return q.bfloat16(), k.bfloat16(), v.bfloat16(), windows, list(sides), scales - 1


def attend(target, *arguments):
    return target("windowed_scale_attention", *arguments)


@TARGETS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_torch(target, case):
    ours = theirs = 0.0
    for seed in range(3):
        arguments = draw(case, seed)
        wanted = reference.windowed_scale_attention(*(x.double() for x in arguments[:3]), *arguments[3:])
        found = attend(target, *arguments)
        assert found.dtype == torch.bfloat16 and found.shape == wanted.shape
        ours = max(ours, (found.double() - wanted).abs().max().item())
        theirs = max(theirs, (reference.windowed_scale_attention(*arguments).double() - wanted).abs().max().item())
    rounding = 2**-8 * wanted.abs().max().item()
    assert ours <= 2 * theirs + rounding, f"error {ours:.3e} > twice that of plain torch, {theirs:.3e}, plus {rounding:.1e}"


@TARGETS
def test_each_window_decides_alone_which_keys_count(target):
    """Equal logits, and values of 1 for one key a dimension: every output says whether its key is kept, and among how many."""
    for sides in (SIDES, (1, 3, 6), (4, 9), (7, 3)):
        total, s = sum(side * side for side in sides), len(sides) - 1
        windows = torch.tensor([[-1, 0, 1, 2, 3, 4][(head + u) % 6] for head in range(6) for u in range(s + 1)]).view(6, s + 1).int()
        windows[windows.eq(0).all(1), -1] = 1
        n = sides[-1] ** 2
        mask = reference.window_mask(windows, sides, s)
        chosen = torch.randint(total, (64,), generator=torch.Generator().manual_seed(s))  # a dimension tells whether its key counts
        v = (torch.arange(total)[:, None] == chosen).to(torch.bfloat16).expand(1, 6, -1, -1)
        found = attend(target, torch.zeros(1, 6, n, 64).bfloat16(), torch.randn(1, 6, total, 64).bfloat16(), v, windows, list(sides), s)
        share = mask[:, :, chosen].double() / mask.sum(-1, keepdim=True)
        assert ((found[0] > 0) == mask[:, :, chosen]).all(), f"{sides}: a key counts that should not, or the other way round"
        assert ((found[0].double() - share).abs() <= 2**-8 * share).all(), f"{sides}: shares of the kept keys are off"


@TARGETS
def test_keys_outside_every_window_are_not_read(target):
    q, k, v, _, sides, s = draw((1, 3, 2, (1, 2, 9)))
    windows = torch.tensor([[-1, 0, 1], [1, 1, 0], [0, 0, 2]], dtype=torch.int32)
    clean = attend(target, q, k, v, windows, sides, s)
    unseen = ~reference.window_mask(windows, sides, s).any(1)
    for tensor in (k, v):
        tensor.masked_fill_(unseen[None, :, :, None], torch.nan)
    assert torch.equal(attend(target, q, k, v, windows, sides, s), clean)


@TARGETS
def test_queries_without_keys_get_nan_and_nan_is_not_hidden(target):
    q, k, v, windows, sides, s = draw((1, 2, 1, (1, 2, 5)))
    windows[0], windows[1] = 0, -1
    found = attend(target, q, k, v, windows, sides, s)
    assert found[:, 0].isnan().all() and found[:, 1].isfinite().all()
    k[0, 1, 3] = torch.nan
    assert attend(target, q, k, v, windows, sides, s)[:, 1].isnan().all()


@TARGETS
def test_views_of_a_cache_are_read_and_rows_do_not_matter_to_each_other(target):
    q, k, v, windows, sides, s = draw((2, 3, 2, (1, 2, 5)))
    together = attend(target, q, k, v, windows, sides, s)
    cache = torch.full((4, 3, 50, 2, 64), torch.nan).bfloat16()
    cache[:2, :, 7:37, 0], cache[:, :, 7:37, 1] = k, v
    views = (q.transpose(1, 2).contiguous().transpose(1, 2), cache[:2, :, 7:37, 0], cache[:, :, 7:37, 1])
    assert torch.equal(attend(target, *views, windows, sides, s), together)
    odd = torch.empty(k.numel() + 1).bfloat16()[1:].view(k.shape).copy_(k)
    assert torch.equal(attend(target, q, odd, v, windows, sides, s), together)
    alone = attend(target, q[1:], k[1:], v[[1, 3]], windows, sides, s)
    assert torch.equal(alone, together[[1, 3]])


@TARGETS
def test_other_types_and_widths_are_left_to_torch(target):
    q, k, v, windows, sides, s = draw((1, 2, 1, (1, 2, 5)))
    for arguments in ((q.float(), k.float(), v.float()), (q[..., :40], k[..., :40], v)):
        wanted = reference.windowed_scale_attention(*arguments, windows, sides, s)
        torch.testing.assert_close(attend(target, *arguments, windows, sides, s), wanted, atol=2e-2, rtol=2e-2)


def test_scale_of_the_draws():
    """Logits of the cases are of deviation 2: neither flat nor one-hot."""
    q, k, *_ = draw((1, 3, 2, SIDES))
    assert 1 < (q.float() @ k.float().mT).std() < 4 and math.isfinite(k.float().sum())
