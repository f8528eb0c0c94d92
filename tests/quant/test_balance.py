"""Channel balancing and rotation against recorded outputs, and what both promise: the same product, smaller error."""

import pytest
import torch

from arsp.errors import InputError
from arsp.kernels.reference import hadamard, rotate, rotation_block
from arsp.quant.balance import ChannelRange, balance_scale, rotation_signs
from arsp.quant.quantiser import Grid, dequantise, quantise_activation, quantise_weight
from arsp.testing.golden import find_cases
from arsp.testing.tolerance import assert_close


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="viditq_balance"), ids=str)
def test_statistics_scales_and_product_equal_the_official_ones(case):
    io, weight, bias = case.io, case.weights["weight"], case.weights["bias"]
    ranges = case.config["timerange"]
    for r, calib in enumerate(io["calib"].chunk(len(ranges))):
        seen = ChannelRange(case.config["momentum"])
        for x_BTK in calib:
            seen.update(x_BTK)
        scale = balance_scale(seen.range_K, weight, case.config["alpha"][r])
        assert_close(seen.range_K[None], io[f"range{r}.act_scale"], abs_tol=0, rel_tol=1e-5, what=f"range {r} statistic")
        assert_close(scale[None], io[f"range{r}.scale"], abs_tol=0, rel_tol=1e-5, what=f"range {r} scale")
        w, x = weight * scale, io["x"] / scale
        w = Grid.of(w, 1, case.config["w_bits"], symmetric=False).fake_quantise(w)
        x = Grid.of(x, -1, case.config["a_bits"], symmetric=False).fake_quantise(x)
        assert_close(w, io[f"range{r}.wq"], abs_tol=1e-6, rel_tol=1e-5, what=f"range {r} weight")
        assert_close(x, io[f"range{r}.xq"], abs_tol=1e-6, rel_tol=1e-5, what=f"range {r} input")
        assert_close(x @ w.T + bias, io[f"range{r}.y"], abs_tol=1e-4, rel_tol=1e-5, what=f"range {r} output")


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="rotate_scale"), ids=str)
def test_scaling_then_rotation_equals_the_published_formulas(case):
    io = case.io
    x, w = rotate(io["x"] * io["channel_mask"], io["sign"]), rotate(io["w"] / io["channel_mask"], io["sign"])
    assert_close(x, io["x_rot"], abs_tol=1e-14, rel_tol=1e-10, what="input")
    assert_close(w, io["w_rot"], abs_tol=1e-14, rel_tol=1e-10, what="weight")
    assert_close(x @ w.T, io["y_fp"], abs_tol=1e-9, what="exact product")
    scale = balance_scale(io["x"].abs().amax(0), io["w"], case.config["alpha"])
    assert_close(1 / scale, io["channel_mask"], abs_tol=0, rel_tol=1e-12, what="mask")
    for name, (inputs, weight) in {"y_w4a8": (x, w), "y_w4a8_plain": (io["x"], io["w"])}.items():
        inputs = Grid.of(inputs, -1, case.config["a_bits"], symmetric=True).fake_quantise(inputs)
        weight = Grid.of(weight, 1, case.config["w_bits"], symmetric=False).fake_quantise(weight)
        assert_close(inputs @ weight.T, io[name], abs_tol=1e-9, what=name)


@pytest.mark.parametrize("num_inputs,block", [(768, 256), (1920, 128), (2816, 256), (4096, 4096), (96, 32), (7, 1)])
def test_both_forms_leave_the_product_as_it_is(num_inputs, block):
    x, w = normal(5, num_inputs, dtype=torch.float64), normal(6, num_inputs, seed=1, dtype=torch.float64)
    x[:, ::31] *= 30
    w[:, 3] = 0
    scale, signs = balance_scale(x.abs().amax(0), w, 0.5), rotation_signs(num_inputs, 7)
    assert rotation_block(num_inputs) == block
    got = rotate(x / scale, signs) @ rotate(w * scale, signs).T
    assert_close(got, x @ w.T, abs_tol=1e-10, what=f"{num_inputs} inputs")


@pytest.mark.parametrize("block", [1, 2, 8, 64])
def test_the_fast_transform_is_the_hadamard_matrix_in_sylvesters_order(block):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    x = normal(3, 4, 2 * block, dtype=torch.float64)
    expected = (x.unflatten(-1, (2, block)) @ matrix / block**0.5).flatten(-2)
    assert_close(hadamard(x, block), expected, abs_tol=1e-12, what=f"block {block}")
    assert_close(hadamard(hadamard(x, block), block), x, abs_tol=1e-12, what="inverse")


def test_signs_depend_on_the_seed_alone_and_are_balanced():
    signs = rotation_signs(1024, 0)
    assert torch.equal(signs, rotation_signs(1024, 0)) and not torch.equal(signs, rotation_signs(1024, 1))
    assert set(signs.tolist()) == {-1, 1} and abs(int(signs.sum())) < 160  # five standard deviations


def test_outliers_of_channels_are_met_by_scaling_and_better_by_scaling_and_rotation():
    x, w = normal(256, 768), normal(256, 768, seed=1)
    x[:, ::97] *= 30
    exact, scale, signs = x @ w.T, balance_scale(x.abs().amax(0), w, 0.5), rotation_signs(768, 0)

    def sqnr(x, w):
        xq, sx = quantise_activation(x)
        error = (xq * sx[:, None]) @ dequantise(quantise_weight(w, 4, 128)).T - exact
        return float(10 * torch.log10(exact.square().sum() / error.square().sum()))

    plain, scaled, both = sqnr(x, w), sqnr(x / scale, w * scale), sqnr(rotate(x / scale, signs), rotate(w * scale, signs))
    assert plain + 3 < scaled < both and both >= 27, f"plain {plain:.1f} dB, scaled {scaled:.1f}, scaled and rotated {both:.1f}"


def test_channels_without_input_or_weight_stay_finite():
    w = normal(4, 8)
    w[:, 2] = 0
    seen = ChannelRange()
    seen.update(torch.zeros(1, 3, 8))
    assert (balance_scale(seen.range_K, w, 0.5) > 0).all() and balance_scale(seen.range_K, w, 0.5).isfinite().all()
    x = normal(2, 3, 8, seed=1)
    seen.update(x)  # after nothing but zeros the next call counts as it is
    assert_close(seen.range_K, x.abs().amax(1).mean(0), abs_tol=0, what="restart")
    assert balance_scale(seen.range_K, w, 0.5)[2] == 1
    with pytest.raises(InputError, match="NaN"):
        balance_scale(torch.full((8,), float("nan")), w, 0.5)
