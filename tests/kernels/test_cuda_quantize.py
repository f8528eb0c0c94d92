"""The CUDA producers of 8-bit rows against their references, on the emulated device and on a real one."""

import pytest
import torch
from cuda_emulation import TARGETS, close_codes

from arsp.kernels import reference
from arsp.quant.balance import rotation_signs

COLUMNS = (1, 7, 8, 40, 97, 768, 1536)  # odd, one piece, blocks of 1 to 512
DTYPES = (torch.float32, torch.bfloat16)


def rows(columns, seed=0, num=6):
    """Normal rows, one of zeros, one constant, one with an outlier."""
    x = torch.randn(num, columns, generator=torch.Generator().manual_seed(seed))
    x[1], x[2] = 0, -3.0
    x[3, columns // 2] = 1e4
    return x


def balances(columns):
    smooth = torch.rand(columns, generator=torch.Generator().manual_seed(1)) + 0.5
    signs = rotation_signs(columns, 5)
    return [(None, None), (smooth, None), (None, signs), (smooth, signs)]


@TARGETS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_quantised_as_the_reference_does_it(target, dtype):
    for columns in COLUMNS:
        x = rows(columns).to(dtype)
        for smooth, signs in balances(columns):
            what = f"K={columns} {dtype} smooth {smooth is not None} rotated {signs is not None}"
            found, wanted = target("quantize_per_token", x, smooth, signs), reference.quantize_per_token(x, smooth, signs)
            close_codes(found, wanted, what, exact=signs is None)
        scale = torch.rand(len(x), generator=torch.Generator().manual_seed(2)) + 0.01
        for given in (scale, scale[:1]):
            found = target("quantize_per_token", x, None, None, given)
            close_codes(found, reference.quantize_per_token(x, None, None, given), f"K={columns} with given scales", exact=True)


@TARGETS
def test_ties_outliers_and_rows_that_are_not_finite(target):
    x = rows(1025, num=12)
    x[4] = torch.arange(1025) % 255 / 2 - 63.5  # halves when the largest is 127: ties
    x[4, 0] = 127
    x[5] = 1e-45  # sx is not above 0
    x[6] = 180e-45  # sx has one bit, its inverse is infinite
    x[7, -1], x[8, 0], x[9, 3] = torch.inf, torch.nan, -torch.inf
    x[10] = 3e38
    for dtype in DTYPES:
        found, wanted = target("quantize_per_token", x.to(dtype)), reference.quantize_per_token(x.to(dtype))
        close_codes(found, wanted, str(dtype), exact=True)
        given = torch.full((1,), 0.5)
        close_codes(
            target("quantize_per_token", x.to(dtype), None, None, given), reference.quantize_per_token(x.to(dtype), None, None, given),
            f"{dtype} given", exact=True,
        )  # fmt: skip
    found, wanted = target("gelu_quantize", x), reference.gelu_quantize(x)
    close_codes(found[:2], wanted[:2], "gelu")
    assert torch.equal(found[0][7:10], torch.zeros(3, 1025, dtype=torch.int8)) and found[1][7:10].isnan().all()


@TARGETS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_producers_are_their_parts_up_to_a_step(target, dtype):
    for columns in COLUMNS:
        generator = torch.Generator().manual_seed(columns)
        x, other = rows(columns).to(dtype), torch.randn(6, columns, generator=generator).to(dtype)
        weight = torch.rand(columns, generator=generator).to(dtype)
        grown = x.view(2, 3, columns)
        chunks = torch.randn(2, 1, 6, columns, generator=generator).to(dtype)  # as they come out of one linear layer
        for smooth, signs in balances(columns):
            for op, arguments in (
                ("rms_norm_quantize", (x, weight, 1e-5)),
                ("modulate_quantize", (grown, chunks[:, :, 2], chunks[:, :, 4], 1e-6)),
                ("swiglu_quantize", (x, other)),
            ):
                found, wanted = target(op, *arguments, smooth, signs), getattr(reference, op)(*arguments, smooth, signs)
                close_codes(found, wanted, f"{op} K={columns} {dtype} smooth {smooth is not None} rotated {signs is not None}")
        found, wanted = target("gelu_quantize", x), reference.gelu_quantize(x)
        close_codes(found[:2], wanted[:2], f"gelu_quantize K={columns} {dtype}")
        torch.testing.assert_close(found[2], wanted[2], atol=1e-5, rtol=1e-5)


@TARGETS
def test_long_rows_and_large_rotations(target):
    for columns in (4096, 8704, 16384):
        x, signs = rows(columns), rotation_signs(columns, 3)
        close_codes(target("quantize_per_token", x), reference.quantize_per_token(x), f"K={columns}", exact=True)
        close_codes(target("quantize_per_token", x, None, signs), reference.quantize_per_token(x, None, signs), f"K={columns} rotated")


@TARGETS
def test_rows_may_be_views_and_shapes_are_kept(target):
    x = rows(64)
    wide = torch.full((6, 80), torch.nan)
    wide[:, 3:67] = x
    wanted = reference.quantize_per_token(x)
    for view in (wide[:, 3:67], x.t().contiguous().t()):
        close_codes(target("quantize_per_token", view), wanted, "a view", exact=True)
    found = target("quantize_per_token", x.view(2, 3, 64))
    assert found[0].shape == (2, 3, 64) and found[1].shape == (2, 3) and torch.equal(found[0].view(6, 64), wanted[0])
    halves = torch.cat([x, 2 * x], -1)
    close_codes(target("swiglu_quantize", halves[:, :64], halves[:, 64:]), reference.swiglu_quantize(x, 2 * x), "halves of one matrix")
    none = target("quantize_per_token", torch.zeros(0, 64))
    assert none[0].shape == (0, 64) and none[1].shape == (0,)
