"""The CUDA kernels of quantised linear layers give the very bits of the reference, on the emulated device and on a real one."""

import numpy as np
import pytest
import torch
from cuda_emulation import TARGETS

from arsp.errors import ConfigError
from arsp.kernels import cuda, layouts, reference

ROWS = (1, 3, 8, 9, 16, 17, 32, 33, 64, 65, 129)  # both sides of every kernel's range
DTYPES = (torch.float32, torch.bfloat16)
OUTPUTS = (1, 17, 113, 160)  # neither multiples of a tile nor of the rows of a block, and one that is


def pack_words(codes_NK):
    """The canonical words: code 8 w + i in bits 4 i of word w."""
    words = np.zeros((codes_NK.shape[0], codes_NK.shape[1] // 8), np.uint32)
    for i in range(8):
        words |= codes_NK[:, i::8].numpy().astype(np.uint32) << (4 * i)
    return torch.from_numpy(words.view(np.int32))


def draw_x(rows, columns, generator):
    x = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    return x, torch.rand(rows, generator=generator) + 0.01


def draw_w4(rows, columns, outputs, group, seed=0):
    """Arguments of ``w4a8_linear`` before the bias."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group < 0 else columns // group
    codes = torch.randint(0, 16, (outputs, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (outputs, groups), generator=generator, dtype=torch.uint8)
    scales = torch.rand(outputs, groups, generator=generator)
    return *draw_x(rows, columns, generator), layouts.pack_w4_cpu(pack_words(codes)), scales, zeros


def draw_w8(rows, columns, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (outputs, columns), generator=generator, dtype=torch.int8)
    return *draw_x(rows, columns, generator), layouts.pack_w8_cpu(codes), torch.rand(outputs, generator=generator)


def ending(rows, outputs):
    """Bias, type, offset and rowsum: none, some or all."""
    generator = torch.Generator().manual_seed(rows + outputs)
    bias, rowsum, offset = (torch.randn(size, generator=generator) for size in (outputs, outputs, rows))
    return [(None, torch.float32), (bias, torch.bfloat16), (bias.bfloat16(), torch.float32, offset, rowsum)][(rows + outputs) % 3]


def same(found, wanted, what):
    assert found.dtype == wanted.dtype and found.shape == wanted.shape, f"{what}: {found.dtype} {tuple(found.shape)}"
    assert torch.equal(found, wanted), f"{what}: {(found != wanted).sum().item()} of {found.numel()} results differ from the reference"


@TARGETS
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_4_bit_layers_equal_the_reference_to_the_bit(target, group):
    for rows in ROWS:
        for outputs in OUTPUTS:
            for columns in (128, 2432 if outputs == 17 else 384) if group > 0 else (8, 136, 2040):
                arguments = (*draw_w4(rows, columns, outputs, group, rows + outputs), *ending(rows, outputs))
                same(target("w4a8_linear", *arguments), reference.w4a8_linear(*arguments), f"M={rows} N={outputs} K={columns} g={group}")


@TARGETS
def test_8_bit_layers_equal_the_reference_to_the_bit(target):
    for rows in ROWS:
        for outputs in OUTPUTS:
            for columns in (1, 97, 768):
                arguments = (*draw_w8(rows, columns, outputs, rows + outputs), *ending(rows, outputs))
                same(target("w8a8_linear", *arguments), reference.w8a8_linear(*arguments), f"M={rows} N={outputs} K={columns}")


def draw_layer(bits, rows, columns, outputs, group, seed=0):
    return draw_w4(rows, columns, outputs, group, seed) if bits == 4 else draw_w8(rows, columns, outputs, seed)


def draw_end(rows, per_row, outputs):
    """Gain (R, 1, N), a part of wider rows, and residual (R, n, N), one of them in bfloat16."""
    generator = torch.Generator().manual_seed(rows + outputs)
    gain, residual = torch.randn(rows, 3, outputs, generator=generator)[:, 1:2], torch.randn(rows, per_row, outputs, generator=generator)
    return (gain.bfloat16(), residual) if outputs % 2 else (gain, residual.bfloat16())


@TARGETS
@pytest.mark.parametrize("bits", [4, 8])
def test_gain_and_residual_are_added_to_the_bit(target, bits):
    plain = reference.w4a8_linear if bits == 4 else reference.w8a8_linear
    for rows, per_row in ((1, 1), (3, 1), (2, 6), (3, 10), (4, 13), (3, 43)):
        for outputs in (17, 160):
            xq, sx, *layer = draw_layer(bits, rows * per_row, 128, outputs, 64, rows)
            xq, sx = xq.view(rows, per_row, -1), sx.view(rows, per_row)
            gain, residual = draw_end(rows, per_row, outputs)
            ends = ((None, residual), (gain, None), (gain, residual))
            bias = residual[0, 0].float()
            arguments = (xq, sx, *layer, bias, DTYPES[rows % 2], sx, bias, False, *ends[(rows + per_row) % 3])
            same(target(f"w{bits}a8_linear", *arguments), plain(*arguments), f"R={rows} n={per_row} N={outputs}")


@TARGETS
def test_gelu_differs_by_its_own_rounding(target):
    for rows in (3, 20, 40, 70):
        xq, sx, *layer = draw_w4(rows, 128, 33, 32, rows)
        gain, residual = draw_end(1, rows, 33)
        for end in ((), (gain, residual)):
            arguments = (xq[None], sx[None] / 2000, *layer, None, torch.float32, None, None, True, *end)
            torch.testing.assert_close(target("w4a8_linear", *arguments), reference.w4a8_linear(*arguments), rtol=2e-6, atol=2e-6)


@TARGETS
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (4, -1), (8, -1)])
def test_a_gated_product_differs_by_the_rounding_of_its_silu(target, bits, group):
    plain = reference.w4a8_swiglu if bits == 4 else reference.w8a8_swiglu
    for rows in (1, 9, 17, 33, 65, 129):
        for outputs in (1, 40, 113):
            (xq, sx, *gate), (_, _, *up) = (draw_layer(bits, rows, 256, outputs, group, seed) for seed in (rows, 1000))
            arguments = (xq, sx / 2000, *gate, *up, torch.float32)
            found = target(f"w{bits}a8_swiglu", *arguments)
            torch.testing.assert_close(found, plain(*arguments), rtol=2e-6, atol=1e-6, msg=f"M={rows} N={outputs}")
    xq, sx, *gate = draw_layer(bits, 16, 256, 4200, group, 1)  # wide, and rounded once
    arguments = (xq, sx / 2000, *gate, *gate, torch.bfloat16)
    torch.testing.assert_close(target(f"w{bits}a8_swiglu", *arguments), plain(*arguments), rtol=2**-7, atol=1e-6)


@TARGETS
def test_weights_of_a_gated_product_may_lie_differently(target):
    (xq, sx, *gate), (_, _, up, scales, zeros) = draw_w4(5, 256, 48, 64), draw_w4(5, 256, 48, 64, 1)
    together = target("w4a8_swiglu", xq, sx, *gate, up, scales, zeros, torch.float32)
    by_column = (scales.mT.contiguous().mT, zeros.mT.contiguous().mT)
    same(target("w4a8_swiglu", xq, sx, *gate, up, *by_column, torch.float32), together, "scales of one weight kept by columns")


def on_hopper(monkeypatch):
    """Many rows take wgmma where the device has it."""
    monkeypatch.setattr(cuda, "WGMMA", 1)


@TARGETS
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_many_rows_by_wgmma_equal_the_reference_to_the_bit(target, group, monkeypatch):
    on_hopper(monkeypatch)
    for rows, columns, outputs in ((65, 128, 17), (130, 640 if group > 0 else 136, 150)):
        arguments = (*draw_w4(rows, columns, outputs, group, rows), *ending(rows, outputs))
        same(target("w4a8_linear", *arguments), reference.w4a8_linear(*arguments), f"M={rows} N={outputs} K={columns} g={group}")
    xq, sx, *layer = draw_w4(75, 256, 33, group)
    arguments = (xq.view(3, 25, -1), sx.view(3, 25), *layer, None, torch.bfloat16, None, None, False, *draw_end(3, 25, 33))
    same(target("w4a8_linear", *arguments), reference.w4a8_linear(*arguments), "gain and residual, an odd number of outputs")


@TARGETS
def test_many_rows_of_8_bit_layers_by_wgmma(target, monkeypatch):
    on_hopper(monkeypatch)
    for rows, columns, outputs in ((65, 97, 17), (130, 256, 150), (80, 900, 34)):
        arguments = (*draw_w8(rows, columns, outputs, rows), *ending(rows, outputs))
        same(target("w8a8_linear", *arguments), reference.w8a8_linear(*arguments), f"M={rows} N={outputs} K={columns}")


@TARGETS
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 128), (4, -1), (8, -1)])
def test_many_rows_of_gated_products_by_wgmma(target, bits, group, monkeypatch):
    on_hopper(monkeypatch)
    plain = reference.w4a8_swiglu if bits == 4 else reference.w8a8_swiglu
    for rows, outputs in ((65, 17), (130, 80)):
        (xq, sx, *gate), (_, _, *up) = (draw_layer(bits, rows, 256, outputs, group, seed) for seed in (rows, 1000))
        arguments = (xq, sx / 2000, *gate, *up, torch.float32)
        found = target(f"w{bits}a8_swiglu", *arguments)
        torch.testing.assert_close(found, plain(*arguments), rtol=2e-6, atol=1e-6, msg=f"M={rows} N={outputs}")


@TARGETS
def test_largest_sums_and_zero_points_by_wgmma(target, monkeypatch):
    on_hopper(monkeypatch)
    xq, sx, weight, scales, zeros = draw_w4(65, 4096, 17, -1)
    xq.fill_(-128)
    for code, zero in ((255, 0), (0, 15), (0, 128), (255, 128)):
        weight.fill_(code), zeros.fill_(zero)
        arguments = (xq, sx, weight, scales, zeros, None, torch.float32)
        same(target("w4a8_linear", *arguments), reference.w4a8_linear(*arguments), f"codes {code % 16}, zero point {zero}")


@TARGETS
def test_wide_layers_take_their_own_path(target):
    arguments = draw_w4(16, 256, 8200, 128)
    same(target("w4a8_linear", *arguments, None, torch.float32), reference.w4a8_linear(*arguments, None, torch.float32), "N=8200, 4 bits")
    arguments = draw_w8(11, 64, 8200)
    same(target("w8a8_linear", *arguments, None, torch.float32), reference.w8a8_linear(*arguments, None, torch.float32), "N=8200, 8 bits")


@TARGETS
def test_largest_sums_do_not_overflow(target):
    for rows in (3, 33):
        xq, sx, weight, scales, zeros = draw_w4(rows, 65528, 17, -1)
        weight.fill_(255), zeros.zero_(), xq.fill_(-128)
        arguments = (xq, sx, weight, scales, zeros, None, torch.float32)
        same(target("w4a8_linear", *arguments), reference.w4a8_linear(*arguments), f"4 bits, {rows} rows")
        xq, sx, weight, scale = draw_w8(rows, 65535, 17)
        weight.zero_(), xq.fill_(-128)  # a byte of 0 is the code -128
        arguments = (xq, sx, weight, scale, None, torch.float32)
        same(target("w8a8_linear", *arguments), reference.w8a8_linear(*arguments), f"8 bits, {rows} rows")


@TARGETS
def test_rows_that_are_not_finite_stay_visible_and_touch_no_other(target):
    for rows in (3, 40):
        xq, sx, *rest = draw_w4(rows, 128, 33, 32)
        clean = target("w4a8_linear", xq, sx, *rest, None, torch.float32)
        sx[1], sx[2] = torch.nan, torch.inf
        xq[1:3] = 0
        found = target("w4a8_linear", xq, sx, *rest, None, torch.float32)
        assert found[1:3].isnan().all() and torch.equal(found[0], clean[0]) and torch.equal(found[3:], clean[3:])


@TARGETS
def test_a_row_depends_on_neither_the_other_rows_nor_the_strides(target):
    xq, sx, weight, scales, zeros = draw_w4(70, 512, 96, 128)
    together = target("w4a8_linear", xq, sx, weight, scales, zeros, None, torch.float32)
    for num in (1, 2, 9, 20, 50):
        same(target("w4a8_linear", xq[:num], sx[:num], weight, scales, zeros, None, torch.float32), together[:num], f"{num} rows")
    by_column = (scales.mT.contiguous().mT, zeros.mT.contiguous().mT)
    same(target("w4a8_linear", xq, sx, weight, *by_column, None, torch.float32), together, "scales kept by columns")
    strided = torch.empty(70, 1024, dtype=torch.int8)[:, ::2].copy_(xq)
    same(target("w4a8_linear", strided, sx, weight, scales, zeros, None, torch.float32), together, "strided codes")
    shifted = torch.empty(70 * 512 + 8, dtype=torch.int8)[8:].view(70, 512).copy_(xq)
    same(target("w4a8_linear", shifted, sx, weight, scales, zeros, None, torch.float32), together, "codes at an odd address")
    part = (weight[2:5], scales[32:80], zeros[32:80])
    same(target("w4a8_linear", xq, sx, *part, None, torch.float32), together[:, 32:80].contiguous(), "rows 32 to 79 of the weight")
    grown = target("w4a8_linear", xq.view(7, 10, 512), sx.view(7, 10), weight, scales, zeros, None, torch.float32)
    same(grown, together.view(7, 10, 96), "three dimensions")


@TARGETS
def test_no_rows_give_no_results(target):
    assert target("w4a8_linear", *draw_w4(0, 128, 17, 64), None, torch.float32).shape == (0, 17)


def test_groups_that_are_not_offered_are_refused():
    from cuda_emulation import emulated_ops

    arguments = list(draw_w4(2, 96, 17, 32))
    arguments[3:] = arguments[3][:, :2].contiguous(), arguments[4][:, :2].contiguous()
    with pytest.raises(ConfigError, match="groups of 48"):
        emulated_ops().w4a8_linear(*arguments, None, torch.float32)


@pytest.mark.gpu
def test_opcheck_accepts_layers_with_all_that_may_follow_and_gated_products():
    cuda.load_library()
    xq, sx, *layer = draw_w4(6, 128, 34, 64)
    end = (None, torch.bfloat16, None, None, True, *draw_end(2, 3, 34))
    linear = (xq.view(2, 3, -1), sx.view(2, 3), *layer, *end)
    for name, arguments in (("w4a8_linear", linear), ("w4a8_swiglu", (xq, sx, *layer, *layer, torch.bfloat16))):
        moved = tuple(value.cuda() if isinstance(value, torch.Tensor) else value for value in arguments)
        torch.library.opcheck(getattr(torch.ops.arsp, name).default, moved)
