"""Quantised linear layers: every instruction set gives the very numbers of the integer reference, which is checked against whole-number
arithmetic written out here."""

import itertools

import numpy as np
import pytest
import torch

from arsp import kernels
from arsp.errors import ConfigError
from arsp.kernels import build, layouts, ops, reference

EVERY_ISA = pytest.mark.parametrize("isa", range(len(build.ISA)), ids=build.ISA)
ROWS = (0, 1, 2, 3, 5, 6, 7, 13, 16, 37)
OUTPUTS = (1, 15, 16, 17, 64, 65, 113)
DTYPES = (torch.float32, torch.bfloat16)


def use(compiled, isa):
    if compiled.use_isa(isa) != build.ISA[isa]:
        pytest.skip(f"this processor has no {build.ISA[isa]}")


def pack_words(codes_NK):
    """The canonical words: code 8 w + i in bits 4 i of word w."""
    words = np.zeros((codes_NK.shape[0], codes_NK.shape[1] // 8), np.uint32)
    for i in range(8):
        words |= codes_NK[:, i::8].numpy().astype(np.uint32) << (4 * i)
    return torch.from_numpy(words.view(np.int32))


def draw_x(rows, columns, generator):
    codes = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    return codes, torch.rand(rows, generator=generator) + 0.01


def draw_w4(rows, columns, outputs, group, seed=0, extreme=False):
    """Arguments of ``ops.w4a8_linear`` before bias and type, and the codes."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group < 0 else columns // group
    codes = torch.randint(0, 16, (outputs, columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(outputs, groups, generator=generator)
    zeros = torch.randint(0, 16, (outputs, groups), generator=generator, dtype=torch.uint8)
    xq, sx = draw_x(rows, columns, generator)
    if extreme:
        codes.fill_(15), zeros.fill_(0), xq.fill_(-128)
    return (xq, sx, kernels.pack_w4_cpu(pack_words(codes)), scales, zeros), codes


def draw_w8(rows, columns, outputs, seed=0, extreme=False):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (outputs, columns), generator=generator, dtype=torch.int8)
    scale = torch.rand(outputs, generator=generator)
    xq, sx = draw_x(rows, columns, generator)
    if extreme:
        codes.fill_(-128), xq.fill_(-128)
    return (xq, sx, kernels.pack_w8_cpu(codes), scale), codes


def draw_rest(rows, outputs, dtype):
    """Bias, type, offset and rowsum; by the rows, each of the optional ones is there or not."""
    generator = torch.Generator().manual_seed(2)
    bias, rowsum = torch.randn(2, outputs, generator=generator)
    shift = (torch.randn(rows, generator=generator), rowsum) if rows % 3 else (None, None)
    return bias if rows % 2 else None, dtype, *shift


def by_hand(xq_MK, sx_M, codes_NK, scales_NG, zeros_NG, bias_N):
    """The contract in numpy, one scalar operation of float32 at a time over whole numbers of int64."""
    xq, codes, zeros = (tensor.numpy().astype(np.int64) for tensor in (xq_MK, codes_NK, zeros_NG))
    size = xq.shape[1] // scales_NG.shape[1]
    total = np.zeros((len(xq), len(codes)), np.float32)
    for g in range(scales_NG.shape[1]):
        part = slice(g * size, (g + 1) * size)
        inner = xq[:, part] @ (codes[:, part] - zeros[:, g : g + 1]).T
        total = total + inner.astype(np.float32) * scales_NG[:, g].numpy()
    return torch.from_numpy(total * sx_M.numpy()[:, None] + bias_N.numpy())


def same(found, wanted, what):
    assert found.dtype == wanted.dtype and found.shape == wanted.shape, f"{what}: {found.dtype} {tuple(found.shape)}"
    apart = (found != wanted).sum().item()
    assert torch.equal(found, wanted), f"{what}: {apart} of {found.numel()} results differ from the reference"


@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_reference_of_4_bits_is_the_contract(group):
    arguments, codes = draw_w4(7, 384, 21, group)
    xq, sx, _, scales, zeros = arguments
    bias = torch.randn(21, generator=torch.Generator().manual_seed(1))
    wanted = by_hand(xq, sx, codes, scales, zeros, bias)
    same(reference.w4a8_linear(*arguments, bias, torch.float32), wanted, f"group {group}")
    same(reference.w4a8_linear(*arguments, bias, torch.bfloat16), wanted.bfloat16(), f"group {group} bfloat16")


def test_shifted_inputs_add_the_offset_times_the_sums_of_the_weight():
    arguments, codes = draw_w4(7, 384, 21, 64)
    xq, sx, _, scales, zeros = arguments
    bias, offset, rowsum = torch.randn(21), torch.randn(7), torch.randn(21)
    wanted = by_hand(xq, sx, codes, scales, zeros, bias) + offset[:, None] * rowsum
    same(reference.w4a8_linear(*arguments, bias, torch.float32, offset, rowsum), wanted, "shifted")


def test_reference_of_8_bits_is_the_contract():
    arguments, codes = draw_w8(7, 383, 21)
    xq, sx, _, scale = arguments
    bias = torch.randn(21, generator=torch.Generator().manual_seed(1))
    wanted = by_hand(xq, sx, codes, scale[:, None], torch.zeros(21, 1, dtype=torch.uint8), bias)
    same(reference.w8a8_linear(*arguments, bias, torch.float32), wanted, "K 383")


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_layouts_are_as_documented_and_return_every_code(outputs):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (outputs, 40), generator=generator, dtype=torch.uint8)
    packed = kernels.pack_w4_cpu(pack_words(codes))
    assert packed.shape == (-(-outputs // 16), 5, 64)
    assert torch.equal(layouts.unpack_w4_cpu(packed, outputs), codes)
    n, k = outputs - 1, 29  # row n % 16 of its tile, piece 3, 29 - 24 = 5: high nibble of byte 1
    assert packed[n // 16, 3, 4 * (n % 16) + 1] >> 4 == codes[n, k]
    assert packed.view(-1, 5, 16, 4).transpose(1, 2).reshape(-1, 20)[outputs:].count_nonzero() == 0, "rows past N are zero"

    codes = torch.randint(-128, 128, (outputs, 41), generator=generator, dtype=torch.int8)
    packed = kernels.pack_w8_cpu(codes)
    assert packed.shape == (-(-outputs // 16), 11, 64)
    assert torch.equal(layouts.unpack_w8_cpu(packed, outputs, 41), codes)
    assert packed[n // 16, 7, 4 * (n % 16) + 1].int() == codes[n, k].int() + 128


@EVERY_ISA
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_4_bit_kernel_equals_the_reference_to_the_bit(compiled, isa, group):
    use(compiled, isa)
    for rows in ROWS:
        for outputs in OUTPUTS:
            for columns in (128, 384) if group > 0 else (8, 136, 1000):
                arguments, _ = draw_w4(rows, columns, outputs, group, rows + outputs)
                for dtype in DTYPES:
                    what = f"M={rows} N={outputs} K={columns} g={group} {dtype} {build.ISA[isa]}"
                    rest = (*arguments, *draw_rest(rows, outputs, dtype))
                    same(ops.w4a8_linear(*rest), reference.w4a8_linear(*rest), what)


@EVERY_ISA
def test_8_bit_kernel_equals_the_reference_to_the_bit(compiled, isa):
    use(compiled, isa)
    for rows in ROWS:
        for outputs in OUTPUTS:
            for columns in (1, 4, 97, 768):
                arguments, _ = draw_w8(rows, columns, outputs, rows + outputs)
                for dtype in DTYPES:
                    what = f"M={rows} N={outputs} K={columns} {dtype} {build.ISA[isa]}"
                    rest = (*arguments, *draw_rest(rows, outputs, dtype))
                    same(ops.w8a8_linear(*rest), reference.w8a8_linear(*rest), what)


def draw_end(rows, per_row, outputs):
    """Gain (R, 1, N) and residual (R, n, N), one of them in bfloat16, the gain a part of wider rows as the vectors of a VAR are."""
    generator = torch.Generator().manual_seed(rows + outputs)
    gain = torch.randn(rows, 3, outputs, generator=generator)[:, 1:2]
    residual = torch.randn(rows, per_row, outputs, generator=generator)
    return (gain.bfloat16(), residual) if rows % 2 else (gain, residual.bfloat16())


def with_rows(arguments, *lead):
    """The same rows in these dimensions."""
    xq, sx, *layer = arguments
    return xq.view(*lead, -1), sx.view(lead), *layer


@EVERY_ISA
@pytest.mark.parametrize("bits", [4, 8])
def test_gain_and_residual_are_added_to_the_bit(compiled, isa, bits):
    use(compiled, isa)
    op, plain = (ops.w4a8_linear, reference.w4a8_linear) if bits == 4 else (ops.w8a8_linear, reference.w8a8_linear)
    for (rows, per_row), outputs in itertools.product(((1, 1), (2, 3), (3, 1), (5, 9)), OUTPUTS):
        drawn, _ = draw_w4(rows * per_row, 128, outputs, 64, rows) if bits == 4 else draw_w8(rows * per_row, 97, outputs, rows)
        arguments = with_rows(drawn, rows, per_row)
        gain, residual = draw_end(rows, per_row, outputs)
        bias, offset = residual[0, 0].float(), arguments[1] - 0.5
        for dtype, end in itertools.product(DTYPES, ((None, residual), (gain, None), (gain, residual))):
            call = (*arguments, bias, dtype, offset, bias, False, *end)
            same(op(*call), plain(*call), f"R={rows} n={per_row} N={outputs} {dtype} {build.ISA[isa]}")


@EVERY_ISA
@pytest.mark.parametrize("bits", [4, 8])
def test_gelu_differs_by_its_own_rounding(compiled, isa, bits):
    use(compiled, isa)
    op, plain = (ops.w4a8_linear, reference.w4a8_linear) if bits == 4 else (ops.w8a8_linear, reference.w8a8_linear)
    for rows, outputs in itertools.product((1, 6, 37), (1, 17, 113)):
        drawn, _ = draw_w4(rows, 128, outputs, 32, rows) if bits == 4 else draw_w8(rows, 97, outputs, rows)
        xq, sx, *layer = with_rows(drawn, rows, 1)
        sx = sx / 2000  # where a GELU is curved
        gain, residual = draw_end(rows, 1, outputs)
        for end in ((), (gain, residual)):
            call = (xq, sx, *layer, None, torch.float32, None, None, True, *end)
            torch.testing.assert_close(op(*call), plain(*call), rtol=2e-6, atol=2e-6)
            call = (xq, sx, *layer, None, torch.bfloat16, None, None, True, *end)
            torch.testing.assert_close(op(*call), plain(*call), rtol=2**-7, atol=2e-6)


def swiglu_arguments(bits, rows, columns, outputs, group):
    (xq, sx, *gate), _ = draw_w4(rows, columns, outputs, group, 1) if bits == 4 else draw_w8(rows, columns, outputs, 1)
    (_, _, *up), _ = draw_w4(rows, columns, outputs, group, 2) if bits == 4 else draw_w8(rows, columns, outputs, 2)
    return xq, sx / 2000, *gate, *up


@EVERY_ISA
@pytest.mark.parametrize("bits", [4, 8])
def test_a_gated_product_differs_by_the_rounding_of_its_silu(compiled, isa, bits):
    use(compiled, isa)
    op, plain = (ops.w4a8_swiglu, reference.w4a8_swiglu) if bits == 4 else (ops.w8a8_swiglu, reference.w8a8_swiglu)
    for rows, outputs, group in itertools.product((0, 1, 6, 37), (1, 17, 113), (32, -1)):
        arguments = swiglu_arguments(bits, rows, 96 if bits == 4 else 97, outputs, group)
        torch.testing.assert_close(op(*arguments, torch.float32), plain(*arguments, torch.float32), rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(op(*arguments, torch.bfloat16), plain(*arguments, torch.bfloat16), rtol=2**-7, atol=1e-6)


@EVERY_ISA
def test_largest_sums_do_not_saturate(compiled, isa):
    use(compiled, isa)
    w4, _ = draw_w4(3, 65528, 17, -1, extreme=True)
    same(ops.w4a8_linear(*w4, None, torch.float32), reference.w4a8_linear(*w4, None, torch.float32), "4 bits")
    w8, _ = draw_w8(3, 65535, 17, extreme=True)
    same(ops.w8a8_linear(*w8, None, torch.float32), reference.w8a8_linear(*w8, None, torch.float32), "8 bits")


@EVERY_ISA
def test_rows_that_are_not_finite_stay_visible_and_touch_no_other(compiled, isa):
    use(compiled, isa)
    arguments, _ = draw_w4(0, 128, 33, 32)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    clean = ops.w4a8_linear(*ops.quantize_per_token(x), *arguments[2:], None, torch.float32)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    found = ops.w4a8_linear(*ops.quantize_per_token(x), *arguments[2:], None, torch.float32)
    assert found[1:].isnan().all() and torch.equal(found[0], clean[0])


def test_every_result_is_written_and_nothing_behind_it(compiled):
    """Freed memory full of NaN is handed out again; an unwritten result would show."""
    compiled.use_isa(-1)
    for rows, outputs in ((1, 113), (6, 65), (37, 17)):
        w4, _ = draw_w4(rows, 256, outputs, 64)
        w8, _ = draw_w8(rows, 97, outputs)
        for dtype in DTYPES:
            for op, plain, arguments in ((ops.w4a8_linear, reference.w4a8_linear, w4), (ops.w8a8_linear, reference.w8a8_linear, w8)):
                wanted = plain(*arguments, None, dtype)
                poison = [torch.full((rows, outputs), torch.nan, dtype=dtype) for _ in range(8)]
                del poison
                same(op(*arguments, None, dtype), wanted, f"{op} {rows} rows {dtype}")


def test_result_depends_on_neither_the_threads_nor_the_other_rows_nor_the_strides(compiled):
    compiled.use_isa(-1)
    arguments, _ = draw_w4(29, 512, 1041, 128)
    xq, sx, weight, scales, zeros = arguments
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = ops.w4a8_linear(*arguments, None, torch.float32)
        x = torch.randn(29, 512, generator=torch.Generator().manual_seed(0))
        quantised = ops.quantize_per_token(x)
        torch.set_num_threads(1)
        same(ops.w4a8_linear(*arguments, None, torch.float32), together, "1 thread")
        same(ops.quantize_per_token(x)[0], quantised[0], "1 thread, codes")
    finally:
        torch.set_num_threads(threads)
    for num in (1, 2, 6, 7, 16):
        same(ops.w4a8_linear(xq[:num], sx[:num], weight, scales, zeros, None, torch.float32), together[:num], f"{num} rows")
    by_column = (scales.mT.contiguous().mT, zeros.mT.contiguous().mT)
    same(ops.w4a8_linear(xq, sx, weight, *by_column, None, torch.float32), together, "scales kept by columns")
    wide = torch.empty(29, 1024, dtype=torch.int8)[:, ::2].copy_(xq)
    same(ops.w4a8_linear(wide, sx, weight, scales, zeros, None, torch.float32), together, "strided codes")
    same(ops.quantize_per_token(x.mT.contiguous().mT)[0], quantised[0], "strided x")


def test_public_functions_run_the_kernels_and_the_reference_with_the_same_bits(compiled):
    compiled.use_isa(-1)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    w4, _ = draw_w4(0, 256, 40, 64)
    w8, _ = draw_w8(0, 256, 40)

    def both():
        xq, sx = kernels.quantize_per_token(x)
        return kernels.w4a8_linear(xq, sx, *w4[2:], 64), kernels.w8a8_linear(xq, sx, *w8[2:], dtype=torch.bfloat16)

    try:
        fast = both()
        kernels.set_backend("reference")
        for found, wanted in zip(both(), fast, strict=True):
            same(found, wanted, "reference back end")
    finally:
        kernels.set_backend("auto")


@EVERY_ISA
def test_tiles_of_a_weight_are_a_layer_of_their_own(compiled, isa):
    """Rows [first, stop) of a packed weight, in place: queries and keys apart from values."""
    use(compiled, isa)
    for columns, group in ((256, 64), (256, -1)):
        arguments, _ = draw_w4(3, columns, 112, group)
        xq, sx, weight, *grid = arguments
        scales, zeros = (tensor.mT.contiguous().mT for tensor in grid)
        whole = ops.w4a8_linear(xq, sx, weight, scales, zeros, None, torch.float32)
        w8, _ = draw_w8(3, columns, 112)
        whole8 = ops.w8a8_linear(*w8, None, torch.float32)
        for first, stop in ((0, 80), (80, 112), (16, 32)):
            tiles = slice(first // layouts.TILE, stop // layouts.TILE)
            part = ops.w4a8_linear(xq, sx, weight[tiles], scales[first:stop], zeros[first:stop], None, torch.float32)
            same(part, whole[:, first:stop], f"rows {first}..{stop}, 4 bits, {build.ISA[isa]}")
            part = ops.w8a8_linear(*w8[:2], w8[2][tiles], w8[3][first:stop], None, torch.float32)
            same(part, whole8[:, first:stop], f"rows {first}..{stop}, 8 bits, {build.ISA[isa]}")


def test_leading_dimensions_are_kept(compiled):
    compiled.use_isa(-1)
    arguments, _ = draw_w4(6, 128, 17, 64)
    w8, _ = draw_w8(6, 97, 17)
    offset, rowsum = torch.randn(6), torch.randn(17)
    for op, (xq, sx, *layer) in ((ops.w4a8_linear, arguments), (ops.w8a8_linear, w8)):
        flat = op(xq, sx, *layer, None, torch.float32, offset, rowsum)
        for lead in ((2, 3), (6, 1), (1, 2, 3)):
            call = (xq.view(*lead, -1), sx.view(lead), *layer, None, torch.float32, offset.view(lead), rowsum)
            same(op(*call), flat.view(*lead, 17), f"{op} {lead}")
        same(op(xq[0], sx[0], *layer, None, torch.float32, offset[0], rowsum), flat[0], f"{op}, one row without dimensions before it")


def test_opcheck_accepts_the_ops(compiled):
    w4, _ = draw_w4(2, 128, 17, 64)
    w8, _ = draw_w8(2, 97, 17)
    for dtype in DTYPES:
        torch.library.opcheck(ops.w4a8_linear, (*w4, torch.randn(17), dtype))
        torch.library.opcheck(ops.w8a8_linear, (*w8, None, dtype, torch.randn(2), torch.randn(17)))
        gain, residual = draw_end(1, 2, 17)
        torch.library.opcheck(ops.w4a8_linear, (*with_rows(w4, 1, 2), None, dtype, None, None, True, gain, residual))
    torch.library.opcheck(ops.w4a8_swiglu, (*swiglu_arguments(4, 2, 128, 17, 64), torch.bfloat16))
    torch.library.opcheck(ops.w8a8_swiglu, (*swiglu_arguments(8, 2, 97, 17, -1), torch.bfloat16))


def change(arguments, **other):
    names = ("xq", "sx", "weight", "scales_NG", "zeros_NG")
    return {**dict(zip(names, arguments, strict=True)), "group_size": 64, **other}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"group_size": 48}, "groups of 48 do not fit K = 128"),
        ({"group_size": 32}, "groups of 32 do not fit K = 128 and scales of shape (17, 2)"),
        ({"xq": torch.zeros(2, 96, dtype=torch.int8)}, "groups of 64 do not fit K = 96"),
        ({"xq": torch.zeros(2, 128)}, "expected xq int8"),
        ({"sx": torch.zeros(3)}, "expected xq int8"),
        ({"weight": torch.zeros(2, 15, 64, dtype=torch.uint8)}, "is not the layout of 17 rows and K = 128"),
        ({"zeros_NG": torch.zeros(17, 1, dtype=torch.uint8)}, "zeros is torch.uint8 (17, 1), expected torch.uint8 (17, 2)"),
        ({"scales_NG": torch.zeros(17, 2, dtype=torch.float64)}, "expected torch.float32"),
        ({"bias_N": torch.zeros(16)}, "bias is torch.float32 (16,), expected (17,)"),
        ({"offset": torch.zeros(2)}, "offset and rowsum come together"),
        ({"offset": torch.zeros(2), "rowsum_N": torch.zeros(16)}, "rowsum is torch.float32 (16,), expected torch.float32 (17,)"),
        ({"offset": torch.zeros(3), "rowsum_N": torch.zeros(17)}, "offset is torch.float32 (3,), expected torch.float32 (2,)"),
        ({"dtype": torch.float16}, "no results in torch.float16"),
        ({"gain": torch.zeros(2, 1, 17)}, "a gain (R, 1, N) is for xq (R, n, K), not (2, 128)"),
        ({"residual": torch.zeros(2, 16)}, "residual is torch.float32 (2, 16), expected (2, 17)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(other, message):
    arguments, _ = draw_w4(2, 128, 17, 64)
    for backend in ("auto", "reference"):
        kernels.set_backend(backend)
        try:
            with pytest.raises(ConfigError) as caught:
                kernels.w4a8_linear(**change(arguments, **other))
        finally:
            kernels.set_backend("auto")
        assert message in caught.value.message, backend


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_weights_that_do_not_belong_together_are_refused_by_name(backend):
    kernels.set_backend(backend)
    try:
        xq, sx, gate, gate_scales, gate_zeros, up, up_scales, up_zeros = swiglu_arguments(4, 2, 128, 17, 64)
        with pytest.raises(ConfigError, match=r"w4a8_swiglu: scales of up is torch.float32 \(16, 2\), expected \(17, 2\)"):
            kernels.w4a8_swiglu(xq, sx, gate, gate_scales, gate_zeros, up, up_scales[:16], up_zeros[:16], 64)
        with pytest.raises(ConfigError, match="w4a8_swiglu: weight torch.uint8 .* is not the layout"):
            kernels.w4a8_swiglu(xq, sx, gate, gate_scales, gate_zeros, up[:, :8], up_scales, up_zeros, 64)
        with pytest.raises(ConfigError, match="w4a8_swiglu: groups of 32 do not fit"):
            kernels.w4a8_swiglu(xq, sx, gate, gate_scales, gate_zeros, up, up_scales, up_zeros, 32)
        xq, sx, gate, gate_scale, up, up_scale = swiglu_arguments(8, 2, 97, 17, -1)
        with pytest.raises(ConfigError, match="w8a8_swiglu: scale of up"):
            kernels.w8a8_swiglu(xq, sx, gate, gate_scale, up, up_scale[:16])
        xq, sx, *layer = draw_w8(2, 97, 17)[0]
        with pytest.raises(ConfigError, match=r"w8a8_linear: gain is torch.float32 \(1, 1, 17\), expected \(2, 1, 17\)"):
            kernels.w8a8_linear(xq[:, None], sx[:, None], *layer, gain=torch.zeros(1, 1, 17))
    finally:
        kernels.set_backend("auto")


def test_wrong_matrices_are_refused_by_name():
    with pytest.raises(ConfigError, match="expected int32"):
        kernels.pack_w4_cpu(torch.zeros(3, 4, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="expected int8"):
        kernels.pack_w8_cpu(torch.zeros(3, 4, dtype=torch.uint8))
    arguments, _ = draw_w8(2, 97, 17)
    with pytest.raises(ConfigError, match="is not the layout"):
        kernels.w8a8_linear(*arguments[:2], torch.zeros(2, 24, 64, dtype=torch.uint8), arguments[3])
