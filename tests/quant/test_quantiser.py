"""Uniform quantisers against recorded outputs of ViDiT-Q and MixDQ, their edge cases, and the exact integer product."""

import logging

import pytest
import torch
import torch.nn.functional as F

from arsp.errors import ConfigError, InputError
from arsp.quant.quantiser import (
    CHANNEL,
    TENSOR,
    Grid,
    MovingRange,
    dequantise,
    fitting_group,
    fold_shift,
    integer_linear,
    quantise_activation,
    quantise_shifted,
    quantise_weight,
)
from arsp.testing.golden import find_cases
from arsp.testing.tolerance import assert_close, assert_same


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sqnr(exact, got):
    exact, got = exact.double(), got.double()
    return float(10 * torch.log10(exact.square().sum() / (exact - got).square().sum()))


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="viditq_weight"), ids=str)
def test_weights_equal_the_official_ones(case):
    io = case.io
    tags = sorted(key.removesuffix(".int") for key in io if key.endswith(".int"))
    assert tags
    for tag in tags:
        bits, kind, granularity = tag.split("_")
        got = quantise_weight(io["w"], int(bits[1:]), CHANNEL if granularity == "channel" else TENSOR, symmetric=kind == "sym")
        assert_same(got.codes_NK, io[f"{tag}.int"], f"{tag} codes")
        assert_close(got.scales_NG, io[f"{tag}.delta"].expand_as(got.scales_NG), abs_tol=0, rel_tol=1e-6, what=f"{tag} scales")
        if got.zeros_NG is not None:
            assert_same(got.zeros_NG, io[f"{tag}.zero_point"].expand_as(got.zeros_NG), f"{tag} zero points")
        assert_close(dequantise(got), io[f"{tag}.dequant"], abs_tol=1e-12, rel_tol=1e-6, what=f"{tag} values")


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="viditq_weight"), ids=str)
def test_a_row_of_zeros_does_not_harm_the_others_as_it_does_officially(case):
    w = case.io["zero_row.w"]
    zero_N = w.abs().amax(1) == 0
    got = quantise_weight(w, 4, symmetric=False)
    alone = quantise_weight(w[~zero_N], 4, symmetric=False)
    assert zero_N.any() and (case.io["zero_row.official_delta"] == 1e-6).all()
    assert_close(dequantise(got)[~zero_N], dequantise(alone), abs_tol=0, what="other rows")
    assert not dequantise(got)[zero_N].any() and (got.scales_NG[zero_N] == 1).all() and not got.codes_NK[zero_N].any()


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="viditq_act_dynamic"), ids=str)
def test_activations_equal_the_official_ones(case):
    io = case.io
    for tag in sorted({key.split(".")[0] for key in io} - {"x"}):
        for form, dims in (("per_sample", -1), ("batched", (0, 2))):
            grid, what = Grid.of(io["x"], dims, int(tag[1]), symmetric=tag.endswith("_sym")), f"{tag}.{form}"
            assert_close(grid.scale, io[f"{what}.delta"], abs_tol=0, rel_tol=1e-6, what=f"{what} scales")
            assert_same(grid.zero, io[f"{what}.zero_point"], f"{what} zero points")
            assert_close(grid.fake_quantise(io["x"]), io[f"{what}.dequant"], abs_tol=1e-12, rel_tol=1e-6, what=what)
    xq, sx = quantise_activation(io["x"])
    assert_close(xq * sx[..., None], io["b8_sym.per_sample.dequant"], abs_tol=1e-12, rel_tol=1e-6, what="8 bits a token")


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="mixdq_quant"), ids=str)
def test_mixdq_static_ranges_weights_and_first_token_equal_the_official_ones(case):
    io = case.io
    moving = MovingRange()
    for x in io["calib"]:
        moving.update(x)
    grid = moving.grid(symmetric=False)
    assert_close(torch.stack([moving.low, moving.high]), torch.stack([io["x.ema_min"], io["x.ema_max"]]), abs_tol=0, rel_tol=1e-5)
    assert_close(grid.fake_quantise(io["x"]), io["x.dequant"], abs_tol=1e-6, rel_tol=1e-5, what="static input")
    for bits in (2, 4, 8):
        got = dequantise(quantise_weight(io["w"], bits, symmetric=True))
        assert_close(got, io[f"w.b{bits}.dequant"], abs_tol=1e-7, rel_tol=1e-5, what=f"weight, {bits} bits")
    weight = dequantise(quantise_weight(io["w"], 8))
    first, rest = io["bos.emb"].split([1, io["bos.emb"].shape[1] - 1], 1)
    aware = torch.cat([first @ io["w"].T, Grid.of(rest, (0, 1, 2), 8, symmetric=False).fake_quantise(rest) @ weight.T], 1)
    naive = Grid.of(io["bos.emb"], (0, 1, 2), 8, symmetric=False).fake_quantise(io["bos.emb"]) @ weight.T
    assert_close(aware, io["bos.out_aware"], abs_tol=1e-4, rel_tol=1e-5, what="first token in full precision")
    assert_close(naive, io["bos.out_naive"], abs_tol=1e-4, rel_tol=1e-5, what="all tokens quantised")


def test_a_static_range_without_calibration_is_an_error():
    with pytest.raises(InputError, match="calibration"):
        MovingRange().grid()


@pytest.mark.parametrize("value", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_constant_rows_are_exact(value, bits):
    weight = torch.full((3, 64), value)
    for group in (CHANNEL, TENSOR, 32):
        assert_close(dequantise(quantise_weight(weight, bits, group)), weight, abs_tol=0, rel_tol=1e-7, what=f"{value}, group {group}")


def test_zero_is_exact_in_every_row_and_zero_points_fit_four_bits():
    weight = normal(16, 128) + torch.linspace(-4, 4, 16)[:, None]  # from all negative to all positive
    weight[:, ::7] = 0
    got = quantise_weight(weight, 4, 32)
    assert not dequantise(got)[:, ::7].any()
    assert int(got.zeros_NG.min()) == 0 and int(got.zeros_NG.max()) == 15 and int(got.codes_NK.max()) == 15


@pytest.mark.parametrize("tiny", [1e-38, 1e-44, 3.1e-44])
def test_denormal_ranges_stay_finite(tiny):
    weight = torch.full((2, 32), tiny)
    assert dequantise(quantise_weight(weight, 4)).isfinite().all() and dequantise(quantise_weight(weight, 8)).isfinite().all()
    assert int(quantise_weight(-weight, 4).zeros_NG.max()) <= 15


def test_what_is_outside_of_a_grid_gets_its_outermost_codes():
    low, high = -torch.ones(1), torch.ones(1)
    assert Grid.of_range(low, high, 4, symmetric=True).encode(torch.tensor([-10.0, 10.0])).tolist() == [-8, 7]
    assert Grid.of_range(low, high, 4, symmetric=False).encode(torch.tensor([-10.0, 10.0])).tolist() == [0, 15]


def test_one_outlier_spoils_its_own_group_only():
    weight = normal(8, 256)
    spoilt = weight.clone()
    spoilt[0, 3] = 1000.0
    clean, got = dequantise(quantise_weight(weight, 4, 128)), dequantise(quantise_weight(spoilt, 4, 128))
    changed = (clean != got).nonzero()
    assert len(changed) > 64 and (changed[:, 0] == 0).all() and int(changed[:, 1].max()) < 128


def test_group_sizes_that_do_not_divide_fall_back_and_say_so(caplog):
    assert [fitting_group(k, 128) for k in (256, 192, 96, 100)] == [128, 64, 32, CHANNEL]
    with caplog.at_level(logging.WARNING, logger="arsp.quant.quantiser"):
        got = quantise_weight(normal(4, 96), 4, 128, name="blocks.0.fc1")
    assert got.group_size == 32 and got.scales_NG.shape == (4, 3) and "blocks.0.fc1" in caplog.text
    assert quantise_weight(normal(4, 100), 4, 64).group_size == CHANNEL


def test_bad_weights_and_settings_are_named():
    weight = normal(4, 64)
    for bad in (float("nan"), float("inf")):
        weight[1, 2] = bad
        with pytest.raises(InputError, match=r"layers\.3\.wo.*NaN"):
            quantise_weight(weight, 4, name="layers.3.wo")
    with pytest.raises(InputError, match="matrix"):
        quantise_weight(torch.ones(4, 4, 3), 4)
    for settings in ({"bits": 4, "group_size": 48}, {"bits": 1}, {"bits": 9}, {"bits": 4, "search": "best"}):
        with pytest.raises(ConfigError):
            quantise_weight(normal(4, 64), **settings)


def test_gaussian_weights_reach_the_signal_to_noise_ratio_of_their_format():
    weight, x = normal(256, 768), normal(256, 768, seed=1)
    got = {g: sqnr(weight, dequantise(quantise_weight(weight, 4, g))) for g in (CHANNEL, 128, 64)}
    assert got[CHANNEL] >= 17.8 and got[128] >= 19.5 and got[64] >= 20.4, got
    assert sqnr(weight, dequantise(quantise_weight(weight, 8))) >= 41
    xq, sx = quantise_activation(x)
    assert sqnr(x, xq * sx[:, None]) >= 41


def test_the_scale_search_lowers_the_error_of_every_group():
    weight = normal(16, 256)
    gram = normal(300, 256, seed=1) @ normal(256, 256, seed=2)
    gram = gram.T @ gram

    def errors(got, metric):
        d = (dequantise(got) - weight).unflatten(1, (-1, 64))
        blocks = torch.stack([metric[g : g + 64, g : g + 64] for g in range(0, 256, 64)])
        return torch.einsum("ngk,gkj,ngj->ng", d, blocks, d)

    for metric, settings in ((torch.eye(256), {}), (gram, {"gram_KK": gram})):
        plain = errors(quantise_weight(weight, 4, 64), metric)
        found = errors(quantise_weight(weight, 4, 64, search="mse", **settings), metric)
        assert (found <= plain * (1 + 1e-4)).all() and found.sum() < 0.95 * plain.sum(), (float(found.sum()), float(plain.sum()))


def reference(x, weight, bias):
    """The contract with Python integers and loops over outputs and groups."""
    (xq, sx), size = x, weight.codes_NK.shape[1] // weight.scales_NG.shape[1]
    y = torch.zeros(xq.shape[0], weight.codes_NK.shape[0])
    for m in range(y.shape[0]):
        for n in range(y.shape[1]):
            total = torch.zeros(())
            for g in range(weight.scales_NG.shape[1]):
                part = slice(g * size, (g + 1) * size)
                zero = 0 if weight.zeros_NG is None else int(weight.zeros_NG[n, g])
                inner = sum(q * v for q, v in zip(weight.codes_NK[n, part].tolist(), xq[m, part].tolist(), strict=True))
                total = total + torch.tensor(float(inner - zero * sum(xq[m, part].tolist()))) * weight.scales_NG[n, g]
            y[m, n] = total * sx[m] + bias[n]
    return y


@pytest.mark.parametrize("bits,group,symmetric", [(4, 32, False), (4, CHANNEL, False), (4, 32, True), (8, CHANNEL, True)])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_the_integer_product_is_the_contract(bits, group, symmetric, rows):
    weight = quantise_weight(normal(5, 96), bits, group, symmetric=symmetric)
    x, bias = quantise_activation(normal(rows, 96, seed=1)), normal(5, seed=2)
    assert_close(integer_linear(*x, weight, bias), reference(x, weight, bias), abs_tol=0, what="integer product")
    assert integer_linear(*x, weight, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_integer_product_is_close_to_the_dequantised_one():
    weight = quantise_weight(normal(64, 256), 4, 128)
    xq, sx = quantise_activation(normal(16, 256, seed=1))
    exact = (xq.double() * sx[:, None].double()) @ dequantise(weight).double().T
    assert_close(integer_linear(xq, sx, weight), exact, abs_tol=1e-5 * float(exact.abs().max()), what="integer product")


def test_tokens_of_zeros_and_single_values_are_exact():
    x = torch.zeros(3, 8)
    x[1, 2], x[2] = -5.0, 0.25
    xq, sx = quantise_activation(x)
    assert_close(xq * sx[:, None], x, abs_tol=0, rel_tol=1e-6, what="edge tokens")
    assert sx[0] == 1 and int(xq[1, 2]) == -127 and xq.dtype == torch.int8


def test_static_scales_are_kept_and_saturate():
    x = torch.tensor([[[0.5, 10.0, -10.0]], [[0.5, 1.0, 0.0]]])
    xq, sx = quantise_activation(x, torch.tensor(0.01))
    assert xq.tolist() == [[[50, 127, -128]], [[50, 100, 0]]] and sx.shape == (2, 1)
    xq, sx = quantise_activation(x, torch.tensor([[0.1], [0.01]]))
    assert xq.tolist() == [[[5, 100, -100]], [[50, 100, 0]]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_has_no_finite_scale(bad):
    x = normal(3, 8)
    x[1, 2] = bad
    for _, sx in (quantise_activation(x), quantise_activation(x, torch.tensor(0.1)), quantise_shifted(x)):
        assert sx.isfinite().tolist() == [True, False, True]


def test_the_shifted_format_fits_inputs_after_a_gelu_and_its_bias_undoes_the_shift():
    x = F.gelu(1.5 * normal(64, 768), approximate="tanh")
    xq, sx = quantise_shifted(x)
    signed, signed_scale = quantise_activation(x)
    gain = sqnr(x, xq * sx[:, None] - 0.17) - sqnr(x, signed * signed_scale[:, None])
    assert xq.dtype == torch.uint8 and gain > 5, f"{gain:.2f} dB"
    weight, bias = quantise_weight(normal(32, 768, seed=1), 4, 128), normal(32, seed=2)
    exact = (xq.double() * sx[:, None].double() - 0.17) @ dequantise(weight).double().T + bias.double()
    got = integer_linear(xq, sx, weight, fold_shift(weight, bias))
    assert_close(got, exact, abs_tol=1e-5 * float(exact.abs().max()), what="product of shifted inputs")
    assert_close(fold_shift(weight, None) + bias, fold_shift(weight, bias), abs_tol=1e-5, what="bias")
