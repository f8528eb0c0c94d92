"""The CUDA kernel of attention to a cache whose rows hold different numbers of slots: against float64, on the emulated device and on a
real one. Slots that a row does not hold are NaN throughout."""

import pytest
import torch
import torch.nn.functional as F
from cuda_emulation import TARGETS

from arsp.kernels import cuda, reference

# (heads, queries, width, capacity, starts): one slot, tiles and steps that are full or cut, heads of all presets, several blocks of queries
CASES = [
    (1, 1, 64, 1, [0]),
    (3, 1, 64, 70, [69, 0, 15, 16]),
    (2, 17, 64, 60, [43, 0, 7]),
    (1, 16, 48, 40, [16, 24]),
    (2, 5, 100, 50, [45, 11, 12]),
    (1, 40, 128, 70, [30, 1]),
    (2, 1, 72, 33, [32, 31]),
    (1, 70, 4, 90, [20, 3]),
    (1, 3, 32, 700, [690, 3, 352]),  # two parts
    (1, 18, 104, 970, [952]),  # three
]


def draw(case, seed=0, strangers=1):
    """New q, k, v as a layer leaves them, caches with rows of strangers behind, and the slots that rows begin at."""
    heads, n, width, capacity, starts = case
    generator = torch.Generator().manual_seed(seed)
    rows = len(starts)
    qkv = torch.randn(rows, n, 3 * heads, width, generator=generator).bfloat16()
    q, k, v = (x.transpose(1, 2) for x in qkv.split(heads, dim=2))
    caches = [torch.full((rows + strangers, heads, capacity, width), torch.nan).bfloat16() for _ in range(2)]
    for row, start in enumerate(starts):
        for cache in caches:
            cache[row, :, :start] = torch.randn(heads, start, width, generator=generator)
    return q, k, v, *caches, torch.tensor(starts)


def attend(target, q, k, v, k_cache, v_cache, starts, scale=None):
    return target("cached_attention", q, k, v, k_cache, v_cache, 0, None, scale, starts)


def in_float64(q, k, v, k_cache, v_cache, starts, scale=None):
    """Row by row over what it holds."""
    found = []
    for row, start in enumerate(starts.tolist()):
        keys, values = (torch.cat((cache[row, :, :start], new[row]), 1).double() for cache, new in ((k_cache, k), (v_cache, v)))
        mask = torch.ones(q.shape[2], keys.shape[1], dtype=torch.bool).tril(start)
        found.append(F.scaled_dot_product_attention(q[row].double(), keys, values, attn_mask=mask, scale=scale))
    return torch.stack(found)


@TARGETS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_torch_and_new_slots_are_stored(target, case):
    for scale in (None, 0.25):
        arguments = draw(case, len(case[4]))
        wanted = in_float64(*arguments, scale)
        q, k, v, *caches, starts = arguments
        plain = [cache.nan_to_num() for cache in caches]
        theirs = reference.cached_attention(q, k, v, *plain, 0, None, scale, starts)
        found = attend(target, *arguments, scale)
        assert found.dtype == torch.bfloat16 and found.shape == q.shape and found.transpose(1, 2).is_contiguous()
        for ours, expected in zip(caches, plain, strict=True):
            assert torch.equal(ours.nan_to_num(), expected), "caches differ"
        error, allowed = ((x.double() - wanted).abs().max().item() for x in (found, theirs))
        allowed = 2 * allowed + 2**-8 * wanted.abs().max().item()
        assert error <= allowed, f"scale {scale}: error {error:.3e}, allowed {allowed:.3e}"


@TARGETS
@pytest.mark.parametrize(("n", "capacity"), [(1, 700), (19, 60)])
def test_each_query_sees_its_own_row_up_to_itself(target, n, capacity):
    """Equal logits, and values of 1 for one slot a dimension: every output says whether its slot is seen, and among how many."""
    starts = torch.tensor([0, 13, 16, capacity - n])
    chosen = torch.randint(int(starts.max()) + n, (64,), generator=torch.Generator().manual_seed(n))
    chosen[:8] = torch.tensor([0, 12, 13, 15, 16, 17, capacity - n, capacity - 1])  # a dimension tells whether its slot is seen
    indicator = (torch.arange(capacity)[:, None] == chosen).to(torch.bfloat16).expand(4, 1, capacity, 64)
    slots = starts[:, None] + torch.arange(n)
    new = torch.stack([indicator[row, :, held] for row, held in enumerate(slots)])
    v_cache, k_cache = indicator.clone(), torch.randn(4, 1, capacity, 64).bfloat16()
    for row, start in enumerate(starts):
        k_cache[row, :, start:], v_cache[row, :, start:] = torch.nan, torch.nan
    found = attend(target, torch.zeros(4, 1, n, 64).bfloat16(), torch.randn(4, 1, n, 64).bfloat16(), new, k_cache, v_cache, starts)
    seen = chosen <= slots[..., None]
    share = seen.double() / (slots + 1)[..., None]
    assert torch.equal(found[:, 0] > 0, seen)
    assert ((found[:, 0].double() - share).abs() <= 2**-8 * share).all()


@TARGETS
def test_rows_do_not_matter_to_each_other_and_nan_stays_in_its_head(target):
    arguments = draw((2, 17, 64, 40, [20, 3, 11]))
    wanted = attend(target, *arguments)
    q, k, v, k_cache, v_cache, starts = draw((2, 17, 64, 40, [20, 3, 11]))
    k[0], q[2], starts[0] = torch.nan, 7.0, 1
    assert torch.equal(attend(target, q, k, v, k_cache, v_cache, starts)[1], wanted[1])
    alone = draw((2, 17, 64, 40, [20, 3, 11]))
    assert torch.equal(attend(target, *(x[1:2] for x in alone)), wanted[1:2]), "fewer rows, as many parts"
    q, k, v, k_cache, v_cache, starts = draw((2, 17, 64, 40, [20, 3, 11]))
    k_cache[1, 0, 2] = torch.nan
    found = attend(target, q, k, v, k_cache, v_cache, starts)
    assert found[1, 0].isnan().all()
    found[1, 0], wanted[1, 0] = 0, 0
    assert torch.equal(found, wanted)


@TARGETS
def test_one_start_for_all_rows_is_the_same_and_starts_may_lie_anywhere(target):
    for case in ((2, 4, 64, 30, [9, 9]), (1, 1, 128, 700, [650, 650])):
        wanted = attend(target, *draw(case))
        q, k, v, k_cache, v_cache, _ = draw(case)
        assert torch.equal(target("cached_attention", q, k, v, k_cache, v_cache, case[4][0]), wanted)
        q, k, v, k_cache, v_cache, starts = draw(case)
        positions = starts[:, None] + torch.arange(3)
        assert torch.equal(attend(target, q, k, v, k_cache, v_cache, positions[:, 0]), wanted)


@TARGETS
def test_rows_that_do_not_fit_their_cache_get_nan_and_touch_nothing(target):
    for capacity in (20, 700):
        q, k, v, k_cache, v_cache, starts = draw((2, 4, 64, capacity, [3, 5, 9]))
        starts[0], starts[2] = capacity - 3, -1
        before = k_cache.clone()
        found = attend(target, q, k, v, k_cache, v_cache, starts)
        assert found[[0, 2]].isnan().all() and found[1].isfinite().all()
        before[1, :, 5:9] = k[1]
        assert torch.equal(k_cache.nan_to_num(), before.nan_to_num())


@TARGETS
def test_any_layout_is_taken_and_what_has_no_kernel_is_left_to_torch(target):
    case = (2, 3, 64, 20, [5, 5])
    wanted = attend(target, *draw(case))
    q, k, v, k_cache, v_cache, starts = draw(case)
    odd = torch.empty(q.numel() + 1).bfloat16()[1:].view(q.shape).copy_(q)
    room = torch.full((3, 20, 2, 68), torch.nan).bfloat16().transpose(1, 2)[..., 4:]  # rows begin at multiples of 8 bytes
    room.copy_(k_cache)
    torch.testing.assert_close(attend(target, odd, k, v, room, v_cache, starts), wanted, atol=1e-2, rtol=1e-2)
    for columns, dtype in ((slice(64), torch.float32), (slice(62), torch.bfloat16), (slice(1, 64), torch.bfloat16)):
        q, k, v, *caches, starts = draw(case)
        plain = [x[..., columns].to(dtype) for x in (q, k, v, *(cache.nan_to_num() for cache in caches))]
        theirs = [x.clone() for x in plain]
        expected = reference.cached_attention(*theirs, 0, None, None, starts)
        torch.testing.assert_close(attend(target, *plain, starts), expected, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(plain[3], theirs[3])
    q, k, v, *caches, starts = draw(case)
    mask = torch.ones(2, 1, 3, 8, dtype=torch.bool).tril(4)
    masked = target("cached_attention", q, k, v, *(cache.nan_to_num() for cache in caches), 5, mask)
    torch.testing.assert_close(masked[:, :, 1:], reference.cached_attention(q, k, v, *caches, 5, mask)[:, :, 1:], atol=2e-2, rtol=2e-2)


def test_few_blocks_become_more_and_larger_whatever_the_lengths():
    assert cuda._shares(32, 64, 257, 132) == (1, 16), "one image of LlamaGen-L at 256 px, with guidance"
    assert cuda._shares(40, 64, 1025, 132) == (3, 16) and cuda._shares(40, 64, 577, 132) == (1, 16)
    assert cuda._shares(64, 100, 1025, 132) == (2, 8), "wider heads take twice the registers"
    assert cuda._shares(1280, 64, 1025, 132) == (1, 8)
