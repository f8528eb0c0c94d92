"""Rows that become 8-bit codes: plain and balanced rows to the bit of the reference, rows that an operator makes within its rounding."""

import pytest
import torch
import torch.nn.functional as F

from arsp import kernels
from arsp.errors import ConfigError
from arsp.kernels import build, ops, reference
from arsp.kernels.reference import rotate
from arsp.models.llamagen import RMSNorm
from arsp.quant.balance import rotation_signs
from arsp.quant.quantiser import quantise_shifted

EVERY_ISA = pytest.mark.parametrize("isa", range(len(build.ISA)), ids=build.ISA)
DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-5


def use(compiled, isa):
    if compiled.use_isa(isa) != build.ISA[isa]:
        pytest.skip(f"this processor has no {build.ISA[isa]}")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hard_rows(columns):
    x = draw(9, columns)
    if columns:
        x[1] = 0  # a row of zeros
        x[2] = -3.0  # constant
        x[3, columns // 2] = 1e30  # one outlier
        x[4] = torch.arange(columns) % 255 / 2 - 63.5  # halves when the largest is 127: ties
        x[4, 0] = 127
        x[5] = 1e-45  # sx is not above 0
        x[6] = 180e-45  # sx has one bit
        x[7, -1] = torch.inf
        x[8, 0] = torch.nan
    return x


def same(found, wanted, what):
    apart = (found[0] != wanted[0]).sum().item()
    assert found[0].dtype == torch.int8 and found[0].shape == wanted[0].shape and apart == 0, f"{what}: {apart} codes differ"
    assert torch.equal(found[1].nan_to_num(-1), wanted[1].nan_to_num(-1)), f"{what}: sx {found[1]} and {wanted[1]}"


def close(found, wanted, what):
    """Codes at most one apart, and few of them; scales equal up to rounding."""
    (xq, sx, *offset), (wanted_xq, wanted_sx, *wanted_offset) = found, wanted
    assert xq.dtype == torch.int8 and xq.shape == wanted_xq.shape and sx.shape == wanted_sx.shape, f"{what}: {xq.shape} {sx.shape}"
    assert torch.equal(sx.isfinite(), wanted_sx.isfinite()), f"{what}: sx {sx} and {wanted_sx}"
    off = ((sx - wanted_sx).abs() / wanted_sx).nan_to_num(0).max().item() if sx.numel() else 0
    steps = (xq.int() - wanted_xq.int()).abs()
    apart = steps.sum().item()
    assert off <= 1e-6, f"{what}: scales differ by {off:.1e}"
    assert apart <= 2 + xq.numel() // 1000 and (not apart or steps.max() == 1), f"{what}: {apart} of {xq.numel()} codes differ"
    for ours, theirs in zip(offset, wanted_offset, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7, equal_nan=True), f"{what}: offsets {ours} and {theirs}"


@EVERY_ISA
@pytest.mark.parametrize("balanced", ["", "smooth", "signs", "smooth signs"])
def test_rows_are_balanced_and_quantised_to_the_bit_of_the_reference(compiled, isa, balanced):
    use(compiled, isa)
    for columns in (0, 1, 8, 40, 97, 768, 1025, 2048, 16384):
        smooth = draw(columns, seed=1).exp() if "smooth" in balanced else None
        signs = rotation_signs(columns, 0) if "signs" in balanced else None
        for dtype in DTYPES:
            x = hard_rows(columns).to(dtype)
            found, wanted = ops.quantize_per_token(x, smooth, signs), reference.quantize_per_token(x, smooth, signs)
            same(found, wanted, f"K={columns} {dtype} {balanced} {build.ISA[isa]}")


def test_codes_and_scales_of_known_rows():
    x = torch.tensor([[0.0, 0.0, 0.0], [127.0, 0.5, -1.5], [-254.0, 254.0, 3.0]])
    xq, sx = reference.quantize_per_token(x)
    assert xq.tolist() == [[0, 0, 0], [127, 0, -2], [-127, 127, 2]] and sx.tolist() == [1.0, 1.0, 2.0], "ties go to even"
    xq, sx = reference.quantize_per_token(torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0]]))
    assert xq.tolist() == [[0, 0], [0, 0]] and sx[0].isnan() and sx[1].isinf()


def test_balancing_is_scaling_then_rotation():
    x, smooth, signs = draw(5, 96), draw(96, seed=1).exp(), rotation_signs(96, 0)
    same(reference.quantize_per_token(x, smooth, signs), reference.quantize_per_token(rotate(x * smooth, signs)), "K 96")


@EVERY_ISA
def test_given_scales_are_used_and_what_does_not_fit_saturates(compiled, isa):
    use(compiled, isa)
    for columns in (1, 40, 97):
        x = hard_rows(columns)
        for scale in (torch.tensor([0.01]), torch.rand(9, generator=torch.Generator().manual_seed(0)) * 0.1, torch.zeros(1)):
            found, wanted = ops.quantize_per_token(x, scale=scale), reference.quantize_per_token(x, scale=scale)
            same(found, wanted, f"K={columns} {build.ISA[isa]}")
            finite = x.isfinite().all(1)
            expected = torch.where(scale == 0, 1.0, scale).expand(9)
            assert torch.equal(found[1][finite], expected[finite]) and found[1][~finite].isnan().all()
            assert torch.equal(found[0][finite].float(), (x / expected[:, None]).round().clamp(-127, 127)[finite])


def producers(shape, dtype):
    """Op, reference, arguments and what the model computes without them, by name."""
    x, a, b = (draw(*shape, seed=seed).to(dtype) for seed in range(3))
    norm = RMSNorm(shape[-1], EPS)
    norm.weight.data = draw(shape[-1], seed=3).to(dtype)
    scale, shift = (draw(shape[0], 1, shape[-1], seed=seed).to(dtype) for seed in (4, 5))
    return {
        "rms_norm": ((x, norm.weight.data, EPS), lambda: norm(x)),
        "modulate": ((x, scale, shift, EPS), lambda: F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift),
        "swiglu": ((a, b), lambda: F.silu(a) * b),
        "gelu": ((x,), lambda: F.gelu(x, approximate="tanh")),
    }


@EVERY_ISA
@pytest.mark.parametrize("name", ["rms_norm", "modulate", "swiglu", "gelu"])
def test_producers_are_the_reference_up_to_rounding(compiled, isa, name):
    use(compiled, isa)
    op, plain = (getattr(module, f"{name}_quantize") for module in (ops, reference))
    for shape in ((1, 1, 1), (0, 3, 8), (2, 0, 8), (2, 1, 40), (2, 3, 97), (1, 2, 768), (2, 5, 2048), (1, 2, 16384)):
        for dtype in DTYPES:
            arguments, _ = producers(shape, dtype)[name]
            what = f"{name} {shape} {dtype} {build.ISA[isa]}"
            close(op(*arguments), plain(*arguments), what)
            if name != "gelu" and dtype == torch.float32:
                balance = (draw(shape[-1], seed=6).exp(), rotation_signs(shape[-1], 0))
                close(op(*arguments, *balance), plain(*arguments, *balance), f"{what} balanced")


@EVERY_ISA
@pytest.mark.parametrize("name", ["rms_norm", "modulate", "swiglu", "gelu"])
def test_hard_rows_of_producers(compiled, isa, name):
    """Zeros, constants, an outlier, NaN and infinity: none touches another row."""
    use(compiled, isa)
    op, plain = (getattr(module, f"{name}_quantize") for module in (ops, reference))
    for columns in (1, 40, 97):
        x = draw(1, 8, columns)
        x[0, 0], x[0, 1], x[0, 2], x[0, 3, columns // 2] = 0, -3, 1e4, 1e4
        x[0, 4, -1], x[0, 5, 0], x[0, 6] = torch.nan, torch.inf, -1e4
        one = torch.ones(1, 1, columns)
        arguments = {"rms_norm": (x, one[0, 0], EPS), "modulate": (x, one, one, EPS), "swiglu": (x, x), "gelu": (x,)}[name]
        close(op(*arguments), plain(*arguments), f"{name} K={columns} {build.ISA[isa]}")


@pytest.mark.parametrize("name", ["rms_norm", "modulate", "swiglu", "gelu"])
def test_producers_are_what_the_models_compute(name):
    arguments, eager = producers((2, 3, 256), torch.float32)[name]
    xq, sx, *offset = getattr(reference, f"{name}_quantize")(*arguments)
    values = xq * sx[..., None] + (offset[0][..., None] if offset else 0)
    assert ((values - eager()).abs() <= 0.5001 * sx[..., None] + 1e-4).all()


def test_the_shifted_format_is_that_of_the_quantiser():
    x = draw(4, 97)
    xq, sx, offset = reference.gelu_quantize(x)
    codes, scale = quantise_shifted(F.gelu(x, approximate="tanh"))
    assert torch.equal(xq.int() + 128, codes.int()) and torch.equal(sx, scale)
    assert torch.equal(offset, 128 * sx - 0.17) and codes.max() == 255
    low = reference.gelu_quantize(torch.full((1, 4), -30.0))  # gelu of these is 0
    assert torch.allclose(low[0] * low[1] + low[2], torch.zeros(4), atol=1e-7)


def test_views_and_threads_and_other_rows_change_nothing(compiled):
    compiled.use_isa(-1)
    both = draw(2, 40, 2048)
    a, b = both.chunk(2, -1)  # halves of one matrix
    wanted = ops.swiglu_quantize(a.contiguous(), b.contiguous())
    same(ops.swiglu_quantize(a, b), wanted, "halves")
    same(ops.swiglu_quantize(a.transpose(0, 1), b.transpose(0, 1)), [part.transpose(0, 1) for part in wanted], "transposed")
    wide = torch.empty(2, 40, 2048)[..., ::2].copy_(a)
    same(ops.swiglu_quantize(wide, b), wanted, "strided")
    vectors = draw(2, 6, 1024).unsqueeze(2).unbind(1)  # as a model has them: rows far apart
    packed = [vector.contiguous() for vector in vectors]
    modulated = ops.modulate_quantize(a, *packed[2:4], EPS)
    same(ops.modulate_quantize(a, *vectors[2:4], EPS), modulated, "vectors of a larger tensor")
    threads = torch.get_num_threads()
    try:
        for num in (1, 2):
            torch.set_num_threads(num)
            same(ops.modulate_quantize(a, *packed[2:4], EPS), modulated, f"{num} threads")
            same(ops.modulate_quantize(a[1:, 3:5], *(part[1:] for part in packed[2:4]), EPS), [x[1:, 3:5] for x in modulated], "two rows")
    finally:
        torch.set_num_threads(threads)
    mixed = ops.modulate_quantize(a, *(part.bfloat16() for part in packed[2:4]), EPS)
    same(mixed, ops.modulate_quantize(a, *(part.bfloat16().float() for part in packed[2:4]), EPS), "vectors of another type")


def test_public_functions_run_the_kernels_and_the_reference(compiled):
    compiled.use_isa(-1)
    arguments = producers((2, 3, 96), torch.bfloat16)
    smooth, signs = draw(96, seed=6).exp(), rotation_signs(96, 0)

    def run():
        found = [kernels.quantize_per_token(arguments["gelu"][0][0], smooth, signs, torch.tensor([0.02]))]
        for name, (values, _) in arguments.items():
            more = {} if name == "gelu" else {"smooth": smooth, "signs": signs}
            found.append(getattr(kernels, f"{name}_quantize")(*values, **more))
        return found

    try:
        fast = run()
        kernels.set_backend("reference")
        for found, wanted in zip(fast, run(), strict=True):
            close(found, wanted, "reference back end")
    finally:
        kernels.set_backend("auto")


def test_opcheck_accepts_the_ops(compiled):
    smooth, signs = draw(96, seed=6).exp(), rotation_signs(96, 0)
    for name, (values, _) in producers((2, 3, 96), torch.bfloat16).items():
        torch.library.opcheck(getattr(ops, f"{name}_quantize"), values if name == "gelu" else (*values, smooth, signs))
    for dtype in DTYPES:
        torch.library.opcheck(ops.quantize_per_token, (draw(3, 40).to(dtype), None, None, torch.tensor([0.1])))


X = torch.zeros(2, 3, 8)
VECTOR = torch.zeros(2, 1, 8)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("quantize_per_token", (torch.tensor(1.0),), "expected rows"),
        ("quantize_per_token", (X, torch.zeros(7)), "smooth is torch.float32 (7,), expected torch.float32 (8,)"),
        ("quantize_per_token", (X, None, torch.ones(8)), "signs is torch.float32 (8,), expected torch.int8 (8,)"),
        ("quantize_per_token", (X, None, None, torch.ones(5)), "scale is torch.float32 (5,), expected torch.float32 (2, 3)"),
        ("rms_norm_quantize", (X, torch.ones(7), EPS), "weight is torch.float32 (7,), expected (8,)"),
        ("modulate_quantize", (X[0], VECTOR, VECTOR, EPS), "expected x (R, n, K)"),
        ("modulate_quantize", (X, VECTOR[:1], VECTOR, EPS), "scale is torch.float32 (1, 1, 8), expected (2, 1, 8)"),
        ("swiglu_quantize", (X, X[:1]), "b is torch.float32 (1, 3, 8), expected (2, 3, 8)"),
        ("gelu_quantize", (torch.tensor(1.0),), "expected rows"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name, arguments, message):
    for backend in ("auto", "reference"):
        kernels.set_backend(backend)
        try:
            with pytest.raises(ConfigError) as caught:
                getattr(kernels, name)(*arguments)
        finally:
            kernels.set_backend("auto")
        assert caught.value.message.startswith(name) and message in caught.value.message, (backend, caught.value.message)
