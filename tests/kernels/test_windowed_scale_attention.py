"""windowed_scale_attention against float64, on every instruction set of this machine; windows exactly as they are written."""

import math

import pytest
import torch
import torch.nn.functional as F

from arsp import kernels
from arsp.errors import ConfigError
from arsp.kernels import build, ops, reference

SIDES = (1, 2, 3, 5, 7, 16)
# (B, H, G, sides, D, Dv): every lane count of a last tile, chunks of keys, widths that are no multiple of a register
CASES = [
    (1, 3, 1, SIDES[:1], 64, 64),
    (3, 1, 2, SIDES[:2], 8, 8),
    (2, 3, 1, SIDES[:3], 12, 12),
    (1, 5, 2, SIDES[:4], 64, 64),
    (3, 3, 1, SIDES[:5], 12, 21),
    (1, 3, 2, SIDES, 64, 64),
    (1, 3, 1, SIDES, 8, 100),
    (2, 1, 1, (3, 7, 2), 5, 3),
]


def draw(case, dtype, seed=0):
    """q, k, v and windows with at least one kept key a query: dense, dropped and all radii in one call."""
    batch, heads, sets, sides, width, value_width = case
    generator = torch.Generator().manual_seed(seed)
    total, scales = sum(side * side for side in sides), len(sides)
    q = torch.randn(batch, heads, sides[-1] ** 2, width, generator=generator) * 2 / math.sqrt(width)
    k = torch.randn(batch, heads, total, width, generator=generator)
    v = torch.randn(sets * batch, heads, total, value_width, generator=generator)
    windows = torch.randint(-1, 5, (heads, scales), generator=generator, dtype=torch.int32)
    windows[windows.eq(0).all(1), -1] = 1
    return q.to(dtype), k.to(dtype), v.to(dtype), windows, list(sides), scales - 1


def exact(q, k, v, *rest):
    return reference.windowed_scale_attention(q.double(), k.double(), v.double(), *rest)


def assert_close_enough(draws, what):
    """The rule of the project over all ``draws``: at most twice the largest error of the reference in the same precision, plus
    one float32 rounding of the largest result."""
    ours = theirs = tiny = 0.0
    for arguments in draws:
        wanted, kernel = exact(*arguments), ops.windowed_scale_attention(*arguments)
        assert kernel.dtype == arguments[0].dtype and kernel.shape == wanted.shape, f"{what}: {kernel.dtype} {tuple(kernel.shape)}"
        ours = max(ours, (kernel.double() - wanted).abs().max().item())
        theirs = max(theirs, (reference.windowed_scale_attention(*arguments).double() - wanted).abs().max().item())
        tiny = max(tiny, torch.finfo(torch.float32).eps * wanted.abs().max().item())
    assert ours <= 2 * theirs + tiny, f"{what}: error {ours:.3e} > twice that of plain torch, {theirs:.3e}, plus {tiny:.1e}"


def brute_force_mask(radius, queries, keys):
    """The definition, query by query and key by key, in the units of the key map."""
    mask = torch.zeros(queries**2, keys**2, dtype=torch.bool)
    for i in range(queries**2):
        cy, cx = ((part + 0.5) * keys / queries - 0.5 for part in divmod(i, queries))
        for j in range(keys**2):
            row, column = divmod(j, keys)
            mask[i, j] = radius < 0 or (radius > 0 and abs(row - cy) <= radius and abs(column - cx) <= radius)
    return mask


@pytest.mark.parametrize("radius", [-1, 0, 1, 2, 5])
def test_mask_of_the_reference_is_the_definition(radius):
    for queries, sides in ((16, SIDES), (5, (1, 3, 5)), (2, (7, 2)), (1, (1,))):
        windows = torch.full((2, len(sides)), radius, dtype=torch.int32)
        wanted = torch.cat([brute_force_mask(radius, queries, keys) for keys in sides], 1)
        assert torch.equal(reference.window_mask(windows, sides, len(sides) - 1)[1], wanted), f"{queries} queries a side, maps {sides}"


def test_kept_pairs_on_the_256_px_maps_of_var_match_the_count():
    """19,718, 55,386 and 95,446 of 286,434 pairs over all scales at radius 1, 2, 3."""
    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    for radius, wanted in ((1, 19_718), (2, 55_386), (3, 95_446), (-1, 286_434)):
        kept = 0
        for s in range(len(sides)):
            kept += int(reference.window_mask(torch.full((1, s + 1), radius, dtype=torch.int32), sides, s).sum())
        assert kept == wanted, f"radius {radius}: {kept} pairs"


@pytest.mark.parametrize("isa", range(len(build.ISA)), ids=build.ISA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_error_is_at_most_twice_that_of_torch_at_awkward_shapes(compiled, isa, dtype):
    if compiled.use_isa(isa) != build.ISA[isa]:
        pytest.skip(f"this processor has no {build.ISA[isa]}")
    for case in CASES:
        draws = [draw(case, dtype, seed) for seed in range(4 + 40 // case[3][-1] ** 2)]
        assert_close_enough(draws, f"{case} {dtype} {build.ISA[isa]}")


@pytest.mark.parametrize("isa", range(len(build.ISA)), ids=build.ISA)
def test_each_window_decides_alone_which_keys_count(compiled, isa):
    """Equal logits and values that are powers: a single key too many or too few changes the mean of the kept keys."""
    compiled.use_isa(isa)
    for sides in (SIDES, (1, 3, 6), (4, 9), (7, 3)):
        total, s = sum(side * side for side in sides), len(sides) - 1
        windows = torch.tensor([[-1, 0, 1, 2, 3, 4][(head + u) % 6] for head in range(6) for u in range(s + 1)]).view(6, s + 1).int()
        windows[windows.eq(0).all(1), -1] = 1
        n = sides[-1] ** 2
        v = torch.rand(1, 6, total, 2, generator=torch.Generator().manual_seed(0))
        found = ops.windowed_scale_attention(torch.zeros(1, 6, n, 4), torch.randn(1, 6, total, 4), v, windows, sides, s)
        mask = reference.window_mask(windows, sides, s).double()
        wanted = mask @ v[0].double() / mask.sum(-1, keepdim=True)
        worst = (found[0].double() - wanted).abs().max().item()
        assert worst < 1e-6, f"{sides}: mean of the kept keys is off by {worst:.1e}"


def test_keys_outside_every_window_are_not_read(compiled):
    for isa in range(len(build.ISA)):
        compiled.use_isa(isa)
        q, k, v, _, sides, s = draw((1, 3, 2, (1, 2, 9), 16, 16), torch.float32)
        windows = torch.tensor([[-1, 0, 1], [1, 1, 0], [0, 0, 2]], dtype=torch.int32)
        clean = ops.windowed_scale_attention(q, k, v, windows, sides, s)
        unseen = ~reference.window_mask(windows, sides, s).any(1)  # (H, T)
        assert unseen.any(1).all()
        k[:, unseen], v[:, unseen] = math.nan, math.inf
        assert torch.equal(ops.windowed_scale_attention(q, k, v, windows, sides, s), clean), build.ISA[isa]


def test_keys_outside_a_querys_window_do_not_change_its_result(compiled):
    for isa in range(len(build.ISA)):
        compiled.use_isa(isa)
        q, k, v, windows, sides, s = draw((1, 2, 1, (4, 12), 16, 16), torch.float32)
        windows[:] = 1
        clean = ops.windowed_scale_attention(q, k, v, windows, sides, s)
        far = ~reference.window_mask(windows, sides, s)[0, 77]
        k[:, :, far], v[:, :, far] = 50 * k[:, :, far], 1e30
        found = ops.windowed_scale_attention(q, k, v, windows, sides, s)
        assert torch.equal(found[:, :, 77], clean[:, :, 77]), build.ISA[isa]
        assert not torch.equal(found, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_map_for_two_value_sets_equals_two_calls(compiled, dtype):
    compiled.use_isa(-1)
    q, k, v, *rest = draw((2, 3, 2, SIDES[:5], 64, 64), dtype)
    both = ops.windowed_scale_attention(q, k, v, *rest)
    halves = [ops.windowed_scale_attention(q, k, half, *rest) for half in v.chunk(2)]
    assert torch.equal(both, torch.cat(halves))


def test_dense_windows_are_scaled_dot_product_attention(compiled):
    compiled.use_isa(-1)
    q, k, v, windows, sides, s = draw((2, 3, 1, SIDES, 64, 64), torch.float32)
    found = ops.windowed_scale_attention(q, k, v, torch.full_like(windows, -1), sides, s)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, scale=1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_neither_overflow_nor_vanish(compiled, dtype):
    compiled.use_isa(-1)
    q, k, v, *rest = draw((1, 3, 1, SIDES, 16, 16), dtype)
    for sign in (1, -1):
        arguments = (100 * q, sign * k.abs(), v, *rest)  # logits of several hundred, in chunks with different maxima
        assert ops.windowed_scale_attention(*arguments).isfinite().all()
        assert_close_enough([arguments], f"sign {sign}")


def test_nan_in_a_query_or_a_kept_key_is_not_hidden(compiled):
    for isa in range(len(build.ISA)):
        compiled.use_isa(isa)
        q, k, v, windows, sides, s = draw((1, 2, 1, (2, 5), 16, 16), torch.float32)
        windows[:] = 1
        broken = q.clone()
        broken[0, 0, 3, 1] = math.nan
        found = ops.windowed_scale_attention(broken, k, v, windows, sides, s)
        assert found[0, 0, 3].isnan().all() and found.isnan().sum() == 16, build.ISA[isa]
        broken = k.clone()
        broken[0, 1, 4 + 12] = math.nan  # the middle of the last map: kept by its 3 x 3 neighbours
        found = ops.windowed_scale_attention(q, broken, v, windows, sides, s)
        assert found.isnan().sum() == 9 * 16, build.ISA[isa]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_of_a_cache_give_what_copies_give(compiled, dtype):
    compiled.use_isa(-1)
    q, k, v, *rest = draw((2, 3, 2, SIDES[:5], 12, 20), dtype)
    wanted = ops.windowed_scale_attention(q, k, v, *rest)
    total = k.shape[2]
    k_cache, v_cache = (torch.full((5, 3, total + 9, t.shape[3] + 3), math.nan, dtype=dtype) for t in (k, v))
    k_view, v_view = k_cache[1:3, :, 4 : 4 + total, :12], v_cache[:4, :, :total, 1:21]
    k_view.copy_(k)
    v_view.copy_(v)
    q_view = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert not (k_view.is_contiguous() or v_view.is_contiguous() or q_view.is_contiguous())
    assert torch.equal(ops.windowed_scale_attention(q_view, k_view, v_view, *rest), wanted)
    turned = [t.mT.contiguous().mT for t in (q, k, v)]  # last stride not 1: copied
    assert torch.equal(ops.windowed_scale_attention(*turned, *rest), wanted)
    expanded = k[:1].expand(2, -1, -1, -1)
    assert torch.equal(ops.windowed_scale_attention(q, expanded, v, *rest), ops.windowed_scale_attention(q, expanded.clone(), v, *rest))


def test_result_does_not_depend_on_threads_or_batch(compiled):
    compiled.use_isa(-1)
    q, k, v, *rest = draw((3, 5, 1, SIDES, 64, 64), torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.windowed_scale_attention(q, k, v, *rest)
        torch.set_num_threads(3)
        assert torch.equal(ops.windowed_scale_attention(q, k, v, *rest), alone), "3 threads differ from 1"
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(ops.windowed_scale_attention(q[1:2], k[1:2], v[1:2], *rest), alone[1:2]), "one row differs from three"


def test_query_without_keys_is_nan_as_in_torch(compiled):
    q, k, v, windows, sides, s = draw((1, 2, 1, (1, 3), 8, 8), torch.float32)
    windows[0], windows[1] = 0, -1
    for attend in (ops.windowed_scale_attention, reference.windowed_scale_attention):
        found = attend(q, k, v, windows, sides, s)
        assert found[:, 0].isnan().all() and found[:, 1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_accepts_the_op(compiled, dtype):
    torch.library.opcheck(ops.windowed_scale_attention, draw((2, 3, 2, SIDES[:3], 12, 20), dtype))


def test_compiled_graphs_contain_the_op(compiled):
    compiled.use_isa(-1)
    arguments = draw((1, 2, 1, SIDES[:3], 12, 12), torch.float32)
    wanted = kernels.windowed_scale_attention(*arguments)  # back ends are chosen outside the graph
    graph = torch.compile(kernels.windowed_scale_attention, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(graph(*arguments), wanted)


def test_public_function_uses_the_kernel_and_leaves_training_to_torch(compiled):
    compiled.use_isa(-1)
    q, k, v, *rest = draw((2, 3, 2, SIDES[:4], 12, 12), torch.float32)
    assert torch.equal(kernels.windowed_scale_attention(q, k, v, *rest), ops.windowed_scale_attention(q, k, v, *rest))
    q.requires_grad_()
    kernels.windowed_scale_attention(q, k, v, *rest).sum().backward()
    assert q.grad.isfinite().all() and q.grad.abs().max() > 0
    double = exact(q, k, v, *rest)
    assert torch.equal(kernels.windowed_scale_attention(q.double(), k.double(), v.double(), *rest), double), "float64 is torch's"


def test_reference_can_be_chosen():
    arguments = draw((2, 3, 2, SIDES[:4], 12, 12), torch.float32)
    try:
        kernels.set_backend("reference")
        found = kernels.windowed_scale_attention(*arguments)
    finally:
        kernels.set_backend("auto")
    assert torch.equal(found, reference.windowed_scale_attention(*arguments))


BAD = {
    "k rows": ("k", lambda a: (a[0], a[1][:1], *a[2:])),
    "k keys": ("k", lambda a: (a[0], a[1][:, :, 1:], *a[2:])),
    "q queries": ("q", lambda a: (a[0][:, :, 1:], *a[1:])),
    "three value sets": ("v", lambda a: (*a[:2], torch.cat([a[2], a[2][:2]]), *a[3:])),
    "windows of another scale": ("windows", lambda a: (*a[:3], a[3][:, 1:], *a[4:])),
    "windows of other heads": ("windows", lambda a: (*a[:3], a[3][1:], *a[4:])),
    "int64 windows": ("windows", lambda a: (*a[:3], a[3].long(), *a[4:])),
    "scale": ("scale", lambda a: (*a[:5], 3)),
    "types": ("type", lambda a: (a[0], a[1].bfloat16(), *a[2:])),
}


@pytest.mark.parametrize("what", BAD)
def test_arguments_that_do_not_fit_are_refused_by_name(compiled, what):
    word, change = BAD[what]
    arguments = change(draw((2, 3, 2, SIDES[:3], 12, 12), torch.float32))
    with pytest.raises(ConfigError, match=f"windowed_scale_attention: .*{word}"):
        kernels.windowed_scale_attention(*arguments)
    with pytest.raises(RuntimeError, match="windowed_scale_attention: "):
        ops.windowed_scale_attention(*arguments)
