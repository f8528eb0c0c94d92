"""Integer layers against the same product by hand, in every format, shape, precision and part of their outputs."""

import pytest
import tiny_quant
import torch
import torch.nn.functional as F
from torch import nn

from arsp.models.llamagen import RMSNorm, SwiGLU
from arsp.models.var import GELU, Modulate
from arsp.quant import litevar
from arsp.quant.balance import rotation_signs
from arsp.quant.linear import FUSED, InputFormat, QuantisedRows, QuantLinear, SimulatedLinear
from arsp.quant.quantiser import CHANNEL, dequantise, quantise_weight
from arsp.testing.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smoothing(K, seed=5):
    return normal(K, seed=seed).exp()


def input_format(kind, K):
    return {
        "plain": InputFormat(),
        "smooth": InputFormat(smoothing(K)),
        "rotated": InputFormat(None, rotation_signs(K, 0)),
        "both": InputFormat(smoothing(K), rotation_signs(K, 0)),
        "shifted": InputFormat(shifted=True),
    }[kind]


def layer_of(bits=4, group=32, kind="plain", N=40, K=64, bias=True, symmetric=None, dtype=torch.float32):
    weight = quantise_weight(normal(N, K), bits, CHANNEL if bits == 8 else group, symmetric=symmetric)
    bias_N = normal(N, seed=1) if bias else None
    return QuantLinear(weight, bias_N, input_format(kind, K), dtype), (weight, bias_N, input_format(kind, K))


def close(found, expected, what):
    """Float32 rounding in another order, no more: a wrong code would show."""
    assert_close(found, expected, abs_tol=2e-6 * float(expected.abs().max()) + 1e-12, what=what)


FORMATS = [(4, 32), (4, 64), (4, CHANNEL), (8, CHANNEL)]
KINDS = ("plain", "smooth", "rotated", "both", "shifted")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits,group", FORMATS)
@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 64), (37, 64)])
def test_a_layer_equals_the_product_of_integers_by_hand(bits, group, kind, shape):
    layer, parts = layer_of(bits, group, kind)
    x = F.gelu(normal(*shape, seed=2), approximate="tanh") if kind == "shifted" else normal(*shape, seed=2)
    expected = tiny_quant.by_hand(*parts, x)
    close(layer(x), expected, "product")
    close(layer(layer.quantise(x)), expected, "product of rows that were quantised before")
    assert layer(x).shape == (*shape[:-1], 40) and layer(x).dtype == torch.float32


@pytest.mark.parametrize("K", [7, 12, 100, 33])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["plain", "both", "shifted"])
def test_inputs_that_are_no_multiple_of_eight_are_padded_with_nothing(K, bits, kind):
    layer, parts = layer_of(bits, CHANNEL, kind, N=9, K=K)
    x = normal(4, K, seed=2).clamp(min=-0.17)
    close(layer(x), tiny_quant.by_hand(*parts, x), f"K = {K}")
    assert layer.in_features == K


def test_symmetric_four_bit_codes_are_computed_as_they_are():
    layer, parts = layer_of(4, 32, symmetric=True)
    x = normal(5, 64, seed=2)
    assert parts[0].zeros_NG is None
    close(layer(x), tiny_quant.by_hand(*parts, x), "product")


@pytest.mark.parametrize("bits,group", FORMATS)
def test_rows_of_zeros_and_of_one_value_are_exact(bits, group):
    weight_NK = torch.stack([torch.zeros(64), torch.full((64,), 0.3), torch.full((64,), -2.0)])
    layer = QuantLinear(quantise_weight(weight_NK, bits, group), None, InputFormat(), torch.float32)
    x = torch.stack([torch.zeros(64), torch.ones(64), -torch.ones(64)])
    close(layer(x), x @ weight_NK.T, "constant rows")
    assert torch.equal(layer(x)[0], torch.zeros(3)) and torch.equal(layer(x)[:, 0], torch.zeros(3))


def test_one_outlier_in_a_token_is_kept_and_a_token_that_is_not_finite_spoils_no_other():
    layer, parts = layer_of(8)
    x = normal(4, 64, seed=2)
    x[1, 3] = 1000.0
    assert tiny_quant.sqnr_db(x[1] @ dequantise(parts[0]).T + parts[1], layer(x)[1]) > 30
    x[2, 0] = torch.inf
    y = layer(x)
    assert bool(y[2].isnan().all()) and bool(y[[0, 1, 3]].isfinite().all())


def test_no_row_gives_no_row():
    for bits, group in FORMATS:
        for kind in KINDS:
            layer, _ = layer_of(bits, group, kind)
            assert layer(torch.empty(0, 64)).shape == (0, 40) and layer(torch.empty(2, 0, 64)).shape == (2, 0, 40)


@pytest.mark.parametrize("kind", ["plain", "both", "shifted"])
@pytest.mark.parametrize("bits,group", [(4, 32), (8, CHANNEL)])
@pytest.mark.parametrize("outputs", [slice(0, 32), slice(32, 48), slice(0, 48), slice(8, 40), slice(24, 48), slice(3, 5)])
def test_some_outputs_alone_with_another_bias(bits, group, kind, outputs):
    """As guidance halves take queries and keys, or values, of one matrix; wherever the part begins."""
    layer, (weight, _, form) = layer_of(bits, group, kind, N=48)
    x, bias_N = normal(5, 64, seed=2).clamp(min=-0.17), normal(48, seed=9)
    expected = tiny_quant.by_hand(weight, bias_N, form, x)[:, outputs]
    close(layer(x, outputs=outputs, bias=bias_N[outputs]), expected, str(outputs))
    close(layer(x, outputs=outputs), expected - bias_N[outputs], f"{outputs} without a bias")


def test_the_gelu_behind_a_layer_is_the_tanh_form():
    layer, _ = layer_of()
    x = normal(3, 64, seed=2)
    close(layer(x, gelu=True), F.gelu(layer(x), approximate="tanh"), "GELU")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_adds_its_result_to_a_residual(bits):
    """As torch does behind an unquantised layer, in the wider of both types."""
    layer, (weight, bias_N, form) = layer_of(bits, 32)
    x, residual, gain = normal(2, 5, 64, seed=2), normal(2, 5, 40, seed=3), normal(2, 1, 40, seed=4)
    expected = tiny_quant.by_hand(weight, bias_N, form, x)
    for dtype in (torch.float32, torch.bfloat16):
        layer.to(dtype)
        close(layer(x, residual=residual), residual + expected, "residual")
        close(layer(x, residual=residual, gain=gain), torch.addcmul(residual, gain, expected), "residual and gain")
    assert layer(x, residual=residual.bfloat16()).dtype == torch.bfloat16
    layer.float()
    close(layer(x, outputs=slice(8, 24), residual=residual[..., 8:24]), residual[..., 8:24] + (expected - bias_N)[..., 8:24], "a part")


@pytest.mark.parametrize("bits,group", FORMATS)
@pytest.mark.parametrize("K", [64, 12])
def test_layers_of_one_format_make_a_gated_product(bits, group, K):
    group = group if K == 64 else CHANNEL
    gate, up = (QuantLinear(quantise_weight(normal(40, K, seed=seed), bits, group), None, InputFormat(), torch.float32) for seed in (0, 1))
    x = normal(3, 5, K, seed=2)
    assert gate.gates(up)
    close(gate.swiglu(up, gate.quantise(x)), F.silu(gate(x)) * up(x), "product")


def test_layers_of_two_formats_make_none():
    gate = layer_of(bias=False)[0]
    others = dict(bits=8), dict(group=64), dict(N=48), dict(K=96), dict(bias=True), dict(dtype=torch.bfloat16)
    assert gate.gates(layer_of(bias=False)[0]) and not gate.gates(nn.Linear(64, 40))
    assert not any(gate.gates(layer_of(**{"bias": False, **other})[0]) for other in others)
    assert not layer_of()[0].gates(gate) and not layer_of(kind="shifted", bias=False)[0].gates(layer_of(kind="shifted", bias=False)[0])


# -- precision and place ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_another_precision_is_that_of_the_results_alone(bits, kind):
    layer, parts = layer_of(bits, 32, kind)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    x = normal(4, 64, seed=2).clamp(min=-0.17)
    module = nn.Sequential(layer).to(torch.bfloat16)
    assert module[0] is layer and layer.dtype == torch.bfloat16
    for name, tensor in layer.named_buffers():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    for form in (layer.input_format.smooth_K, layer.input_format.signs_K):
        assert form is None or form.dtype in (torch.float32, torch.int8)
    assert layer(x).dtype == torch.bfloat16
    assert tiny_quant.sqnr_db(tiny_quant.by_hand(*parts, x), layer(x).float()) > 45
    back = layer.float()
    close(back(x), tiny_quant.by_hand(*parts, x), "back in float32")


def test_a_move_takes_the_format_of_the_inputs_along():
    layer, _ = layer_of(kind="both")
    moved = layer.to("meta")
    assert {tensor.device.type for tensor in moved.buffers()} == {"meta"}
    assert moved.input_format.smooth_K.device.type == moved.input_format.signs_K.device.type == "meta"
    assert moved.dtype == torch.float32


def test_what_a_layer_holds_is_not_in_the_state_dict_but_is_counted():
    layer, _ = layer_of(4, 32, "shifted")
    assert not layer.state_dict() and not list(layer.parameters())
    held = {name: tensor.nbytes for name, tensor in layer.named_buffers()}
    assert held == {"codes": 48 * 64 // 2, "scales_NG": 40 * 2 * 4, "zeros_NG": 40 * 2, "bias": 160, "sums_N": 160}
    assert "W4A8" in repr(layer) and "groups of 32" in repr(layer)


# -- producers ----------------------------------------------------------------------------------------------------------------


def producer(kind, K=64):
    """A part of a model that layers read, arguments for it, and what it makes in float32."""
    x, y = normal(2, 5, K, seed=3), normal(2, 5, K, seed=4)
    if kind == "norm":
        norm = RMSNorm(K, 1e-5)
        norm.weight.data = smoothing(K, 6)
        return norm, (x,)
    if kind == "modulate":
        return Modulate(1e-6), (x, y[:, :1], normal(2, 1, K, seed=8), torch.float32)
    return (SwiGLU(), (nn.Identity(), lambda _: y, x)) if kind == "gate" else (GELU(), (nn.Linear(K, K), x))


@pytest.mark.parametrize("kind", ["norm", "modulate", "gate"])
@pytest.mark.parametrize("form", ["plain", "smooth", "rotated", "both"])
def test_a_producer_makes_the_rows_that_its_readers_would_make_themselves(kind, form):
    part, arguments = producer(kind)
    with torch.inference_mode():
        rows = FUSED[type(part)](part, input_format(form, 64))(*arguments)
        expected = input_format(form, 64).quantise(part(*arguments).float())
    assert isinstance(rows, QuantisedRows) and rows.shape == expected.shape and rows.offsets is None
    assert_close(rows.scales, expected.scales, abs_tol=0, rel_tol=1e-5, what="scales")
    differ = (rows.codes.int() - expected.codes.int()).abs()
    assert int(differ.max()) <= 1 and float(differ.float().mean()) < 0.01, f"{int(differ.sum())} codes of {differ.numel()} differ"


class TanhLinear(nn.Linear):
    def forward(self, x, gelu=False):
        return F.gelu(super().forward(x), approximate="tanh") if gelu else super().forward(x)


def test_a_gelu_makes_shifted_rows():
    part, x = GELU(), normal(2, 5, 64, seed=3)
    layer = TanhLinear(64, 48)
    with torch.inference_mode():
        rows = FUSED[GELU](part, InputFormat(shifted=True))(layer, x)
        expected = InputFormat(shifted=True).quantise(part(layer, x))
    assert_close(rows.scales, expected.scales, abs_tol=0, rel_tol=1e-5, what="scales")
    assert_close(rows.offsets, expected.offsets, abs_tol=1e-5, what="offsets")
    differ = (rows.codes.int() - expected.codes.int()).abs()
    assert int(differ.max()) <= 1 and float(differ.float().mean()) < 0.01


def test_rows_are_cut_like_a_tensor():
    rows = InputFormat(shifted=True).quantise(normal(4, 3, 8).clamp(min=-0.17))
    half = rows[:2]
    assert len(rows) == 4 and len(half) == 2 and half.shape == (2, 3, 8)
    assert torch.equal(half.codes, rows.codes[:2]) and torch.equal(half.offsets, rows.offsets[:2])


def test_a_producer_follows_moves_and_keeps_its_format():
    part, _ = producer("norm")
    fused = FUSED[RMSNorm](part, input_format("both", 64)).to(torch.bfloat16)
    assert fused.weight.dtype == torch.bfloat16 and fused.input_format.smooth_K.dtype == torch.float32
    assert fused.to("meta").input_format.signs_K.device.type == "meta"


def test_formats_are_equal_when_their_numbers_are():
    smooth, signs = smoothing(8), rotation_signs(8, 0)
    assert InputFormat(smooth, signs).equals(InputFormat(smooth.clone(), signs.clone()))
    for other in (InputFormat(smooth), InputFormat(None, signs), InputFormat(2 * smooth, signs), InputFormat(smooth, -signs)):
        assert not InputFormat(smooth, signs).equals(other) and not other.equals(InputFormat(smooth, signs))
    assert not InputFormat(shifted=True).equals(InputFormat())


# -- simulation ---------------------------------------------------------------------------------------------------------------


def test_a_simulated_layer_rounds_both_sides_in_floating_point():
    weight_NK, bias_N, x = normal(40, 64), normal(40, seed=1), normal(2, 5, 64, seed=2)
    layer = SimulatedLinear(litevar.quantize_weight(weight_NK, 4), bias_N, lambda x: litevar.quantize_tokens(x, 8))
    expected = litevar.fake_quantize(x, 8, -1) @ litevar.fake_quantize(weight_NK, 4, 1).T + bias_N
    assert_close(layer(x), expected, abs_tol=1e-4, what="product")
    assert_close(layer(x, outputs=slice(8, 24), bias=bias_N[8:24]), expected[..., 8:24], abs_tol=1e-4, what="some outputs")
    assert_close(layer(x, gelu=True), F.gelu(expected, approximate="tanh"), abs_tol=1e-4, what="GELU")
    assert_close(layer(x, residual=2 * expected), 3 * expected, abs_tol=1e-4, what="residual")
    assert not layer.weight.requires_grad and layer.weight.numel() == 40 * 64  # nothing is smaller


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits,group", FORMATS)
@pytest.mark.parametrize("K", [64, 12])
def test_the_floating_layer_that_integers_stand_for_takes_inputs_as_they_are(bits, group, kind, K):
    layer, (weight, bias_N, _) = layer_of(bits, group if K == 64 else CHANNEL, kind, K=K)
    floating = layer.floating()
    x = normal(50, K, seed=2).clamp(min=-0.17)
    assert tiny_quant.sqnr_db(floating(x), layer(x)) > 35  # 8-bit inputs are all that differs
    assert torch.equal(floating.bias, bias_N) and not floating.weight.requires_grad
    if kind in ("plain", "shifted"):
        assert torch.equal(floating.weight, dequantise(weight))
    assert layer_of(bits, CHANNEL, bias=False)[0].floating().bias is None
