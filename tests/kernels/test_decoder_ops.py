"""What a decoder computes between its linear layers: equal to torch up to the rounding of its precision."""

import pytest
import torch
import torch.nn.functional as F

from arsp import kernels
from arsp.kernels import build, ops, reference
from arsp.models.llamagen import rope_table

EVERY_ISA = pytest.mark.parametrize("isa", range(len(build.ISA)), ids=build.ISA)
DTYPES = (torch.float32, torch.bfloat16)


def use(compiled, isa):
    if compiled.use_isa(isa) != build.ISA[isa]:
        pytest.skip(f"this processor has no {build.ISA[isa]}")


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def as_exact_as_torch(found, plain, exact, what):
    """max |kernel - float64| <= 2 max |torch - float64|, plus a rounding of the result."""
    assert found.dtype == plain.dtype and found.shape == plain.shape, f"{what}: {found.dtype} {tuple(found.shape)}"
    if found.numel():
        ours, theirs = ((x.double() - exact).abs().max().item() for x in (found, plain))
        allowed = 2 * theirs + torch.finfo(found.dtype).eps * exact.abs().max().item()
        assert ours <= allowed, f"{what}: error {ours:.2e}, torch {theirs:.2e}"


@EVERY_ISA
def test_rms_norm(compiled, isa):
    use(compiled, isa)
    for shape in ((0, 8), (1, 1), (2, 1, 40), (3, 97), (2, 768), (2, 5, 1280)):
        for dtype in DTYPES:
            x, weight = draw(*shape, dtype=dtype), draw(shape[-1], seed=1, dtype=dtype)
            wide = x.double()
            exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
            what = f"{shape} {dtype} {build.ISA[isa]}"
            as_exact_as_torch(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), exact, what)
    found = ops.rms_norm(torch.tensor([[0.0, 0.0], [torch.nan, 1.0], [3.0, 4.0]]), torch.ones(2), 0.0)
    assert found[:2].isnan().all() and found[2].isfinite().all(), "0 / 0 and NaN stay visible in their own row"


@EVERY_ISA
def test_apply_rope(compiled, isa):
    use(compiled, isa)
    for B, n, H, side, D in ((2, 1, 12, 4, 64), (1, 3, 5, 4, 40), (2, 7, 3, 4, 4), (1, 2, 1, 4, 100), (0, 2, 3, 4, 8)):
        table = rope_table(side, D, 10000.0, 1)[3 : 3 + n]
        by_row = torch.stack([rope_table(side, D, 10000.0, 1)[b : b + n] for b in range(B)]) if B else table.new_empty(0, n, D // 2, 2)
        for dtype in DTYPES:
            x = draw(B, n, 3 * H, D, dtype=dtype)[:, :, : 2 * H]  # queries and keys where a layer left them
            for chosen in (table, by_row):
                exact = reference.apply_rope(x.double(), chosen.double()) if B else x.double()
                what = f"{(B, n, H, D)} {dtype} {build.ISA[isa]}"
                as_exact_as_torch(ops.apply_rope(x, chosen), reference.apply_rope(x, chosen), exact, what)


def attention_inputs(B, H, n, D, start, dtype, capacity=40):
    """New q, k, v as a model hands them over (heads side by side), and caches with NaN behind what is stored."""
    q, k, v = (draw(B, n, 3 * H, D, dtype=dtype).split(H, 2)[i].transpose(1, 2) for i in range(3))
    caches = [torch.full((B + 1, H, capacity, D), torch.nan, dtype=dtype) for _ in range(2)]
    for seed, cache in enumerate(caches):
        cache[:, :, :start] = draw(B + 1, H, start, D, seed=seed + 1, dtype=dtype)
    return q, k, v, *caches


@EVERY_ISA
@pytest.mark.parametrize("masked", [False, True])
def test_cached_attention(compiled, isa, masked):
    use(compiled, isa)
    for B, H, n, D, start in ((2, 3, 1, 64, 17), (1, 2, 1, 40, 0), (2, 2, 5, 64, 0), (2, 1, 7, 100, 30), (1, 1, 16, 4, 9), (0, 2, 1, 8, 3)):
        mask = None
        if masked:
            mask = draw(B, 1, n, start + n, seed=5) > 0
            mask[..., 0] = True
        for dtype in DTYPES:
            q, k, v, k_cache, v_cache = attention_inputs(B, H, n, D, start, dtype)
            for scale in (None, 0.5):
                ours, plain = ([x.clone() for x in (k_cache, v_cache)] for _ in range(2))
                found = ops.cached_attention(q, k, v, *ours, start, mask, scale)
                wanted = reference.cached_attention(q, k, v, *plain, start, mask, scale)
                what = f"{(B, H, n, D, start)} {dtype} mask {masked} scale {scale} {build.ISA[isa]}"
                for mine, theirs in zip(ours, plain, strict=True):
                    assert torch.equal(mine.nan_to_num(9), theirs.nan_to_num(9)), f"{what}: caches differ"
                seen = torch.ones(n, start + n, dtype=torch.bool).tril(start) if mask is None else mask
                keys, values = (cache[:B, :, : start + n].double() for cache in plain)
                exact = F.scaled_dot_product_attention(q.double(), keys, values, attn_mask=seen, scale=scale)
                as_exact_as_torch(found, wanted, exact, what)
                assert found.transpose(1, 2).is_contiguous(), "heads side by side, as the next layer reads them"


@EVERY_ISA
def test_rows_of_different_lengths(compiled, isa):
    use(compiled, isa)
    for H, n, D, starts in ((3, 1, 64, [17, 0, 30]), (2, 5, 40, [9, 33]), (1, 20, 100, [3, 17, 0, 20]), (2, 1, 8, [])):
        starts = torch.tensor(starts, dtype=torch.int64)
        for dtype in DTYPES:
            q, k, v, *caches = attention_inputs(len(starts), H, n, D, 40, dtype)
            for row, start in enumerate(starts):
                for cache in caches:
                    cache[row, :, start:] = torch.nan
            plain = [cache.nan_to_num() for cache in caches]
            wanted = reference.cached_attention(q, k, v, *plain, 0, None, 0.5, starts)
            found = ops.cached_attention(q, k, v, *caches, 0, None, 0.5, starts)
            seen = reference.causal_mask(starts[:, None] + torch.arange(n), 40)
            keys, values = (cache[: len(starts)].double() for cache in plain)
            exact = F.scaled_dot_product_attention(q.double(), keys, values, attn_mask=seen, scale=0.5)
            as_exact_as_torch(found, wanted, exact, f"{H, n, D, starts.tolist()} {dtype} {build.ISA[isa]}")
            for mine, theirs in zip(caches, plain, strict=True):
                assert torch.equal(mine.nan_to_num(), theirs), "caches differ"
            for row, start in enumerate(starts.tolist()):
                one = ops.cached_attention(*(x[row : row + 1] for x in (q, k, v, *caches)), start, None, 0.5)
                assert torch.equal(one, found[row : row + 1]), "a row alone"


def test_attention_depends_on_neither_the_threads_nor_the_other_rows_and_shows_nan(compiled):
    compiled.use_isa(-1)
    q, k, v, k_cache, v_cache = attention_inputs(4, 12, 4, 64, 900, torch.float32, capacity=1000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        wanted = ops.cached_attention(q, k, v, k_cache, v_cache, 900)
        torch.set_num_threads(1)
        assert torch.equal(ops.cached_attention(q, k, v, k_cache, v_cache, 900), wanted)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(ops.cached_attention(q[1:2], k[1:2], v[1:2], k_cache[1:], v_cache[1:], 900), wanted[1:2])
    k_cache[2, 3, 5, 0] = torch.nan
    found = ops.cached_attention(q, k, v, k_cache, v_cache, 900)
    assert found[2, 3].isnan().all()
    found[2, 3], wanted[2, 3] = 0, 0
    assert torch.equal(found, wanted)
    blind = ops.cached_attention(q, k, v, k_cache, v_cache, 900, torch.zeros(1, 1, 4, 904, dtype=torch.bool))
    assert blind.isnan().all(), "a query that sees nothing"


def test_gradients_and_the_reference_back_end_use_torch(compiled):
    compiled.use_isa(-1)
    x, weight = draw(2, 3, 8).requires_grad_(), draw(8, seed=1)
    kernels.rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    x = draw(1, 2, 3, 8).requires_grad_()
    kernels.apply_rope(x, rope_table(2, 8, 10000.0, 0)[:2]).sum().backward()
    assert x.grad is not None
    q, k, v, k_cache, v_cache = attention_inputs(1, 2, 1, 8, 3, torch.float32)
    fast = kernels.cached_attention(q, k, v, k_cache, v_cache, 3)
    assert torch.equal(kernels.cached_attention(q, k, v, k_cache, v_cache, torch.tensor([3])), fast)
    assert not kernels.reads_lengths(k_cache, 33) and kernels.reads_lengths(k_cache, 32)
    try:
        kernels.set_backend("reference")
        assert torch.allclose(kernels.cached_attention(q, k, v, k_cache, v_cache, 3), fast, atol=1e-6)
        assert torch.allclose(kernels.cached_attention(q, k, v, k_cache, v_cache, torch.tensor([3])), fast, atol=1e-6)
        assert not kernels.reads_lengths(k_cache, 32)
    finally:
        kernels.set_backend("auto")


def test_wrong_shapes_are_refused(compiled):
    q, k, v, k_cache, v_cache = attention_inputs(1, 2, 1, 8, 3, torch.float32)
    for call in (
        lambda: ops.rms_norm(draw(2, 8), draw(7), 1e-5),
        lambda: ops.apply_rope(draw(1, 2, 3, 8), draw(3, 4, 2)),
        lambda: ops.cached_attention(q, k, v, k_cache, v_cache, 40),  # behind the last slot
        lambda: ops.cached_attention(q, k[:, :1], v, k_cache, v_cache, 3),
        lambda: ops.cached_attention(q, k, v, k_cache, v_cache, 0, None, None, torch.tensor([40])),
        lambda: ops.cached_attention(q, k, v, k_cache, v_cache, 0, None, None, torch.tensor([-1])),
        lambda: ops.cached_attention(q, k, v, k_cache, v_cache, 0, None, None, torch.tensor([3, 3])),
        lambda: ops.cached_attention(q, k, v, k_cache, v_cache, 0, torch.ones(1, 1, 1, 4, dtype=torch.bool), None, torch.tensor([3])),
        lambda: ops.cached_attention(q, k, v, k_cache, v_cache, 3, torch.ones(1, 1, 1, 3, dtype=torch.bool)),
    ):
        with pytest.raises(RuntimeError, match="rms_norm|apply_rope|cached_attention"):
            call()


def test_opcheck_accepts_the_ops(compiled):
    for dtype in DTYPES:
        torch.library.opcheck(ops.rms_norm, (draw(2, 3, 40, dtype=dtype), draw(40, dtype=dtype), 1e-5))
        torch.library.opcheck(ops.apply_rope, (draw(2, 3, 4, 8, dtype=dtype), rope_table(2, 8, 10000.0, 0)[:3]))
        inputs = [x.nan_to_num() for x in attention_inputs(2, 3, 2, 8, 5, dtype)]
        torch.library.opcheck(ops.cached_attention, (*inputs, 5))
    torch.library.opcheck(ops.cached_attention, (*inputs, 0, None, None, torch.tensor([5, 2])))
