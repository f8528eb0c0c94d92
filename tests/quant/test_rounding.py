"""GPTQ and AWQ lower the error of the outputs on correlated inputs; their limits are round-to-nearest."""

import pytest
import torch

from arsp.errors import ConfigError, InputError, NumericalError
from arsp.quant.quantiser import CHANNEL, Grid, dequantise, quantise_weight
from arsp.quant.rounding import InputMoments, awq, gptq
from arsp.testing.tolerance import assert_close, assert_same


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def layer():
    """Weight, inputs of few directions and unequal channels, inputs that calibration did not see, moments."""
    mix = normal(24, 256, seed=1) * torch.logspace(-1, 0.7, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(5))]
    x, fresh = (normal(1024, 24, seed=s) @ mix + 0.1 * normal(1024, 256, seed=s + 1) for s in (2, 8))
    moments = InputMoments(256)
    for part in x.view(4, 2, 128, 256):
        moments.update(part)
    return normal(64, 256), x, fresh, moments


def output_error(weight, got, x):
    return float(((got - weight) @ x.T).square().sum())


def test_moments_are_those_of_all_rows(layer):
    _, x, _, moments = layer
    assert_close(moments.gram_KK, x.double().T @ x.double(), abs_tol=1e-2, rel_tol=1e-5, what="second moments")
    assert_close(moments.mean_abs_K, x.abs().mean(0), abs_tol=0, rel_tol=1e-5, what="magnitudes")
    assert moments.num_rows == 1024


@pytest.mark.parametrize("bits,group", [(4, CHANNEL), (4, 128), (4, 32), (8, CHANNEL)])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_lowers_the_error_of_unseen_outputs(layer, bits, group, act_order):
    weight, _, fresh, moments = layer
    plain = output_error(weight, dequantise(quantise_weight(weight, bits, group)), fresh)
    got = gptq(weight, moments.gram_KK, bits, group, act_order=act_order)
    error = output_error(weight, dequantise(got), fresh)
    assert error < 0.5 * plain, f"{error:.4g}, nearest {plain:.4g}"
    assert got.symmetric == (bits == 8) and got.group_size == group and int(got.codes_NK.max()) <= (127 if bits == 8 else 15)


@pytest.mark.parametrize("group", [CHANNEL, 32])
def test_gptq_on_uncorrelated_inputs_is_round_to_nearest(group):
    weight = normal(16, 256)
    expected, got = quantise_weight(weight, 4, group), gptq(weight, 3 * torch.eye(256), 4, group)
    assert_same(got.codes_NK, expected.codes_NK, "codes")
    assert_close(got.scales_NG, expected.scales_NG, abs_tol=0, what="scales")


@pytest.mark.parametrize("group", [CHANNEL, 32])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_follows_its_definition_without_blocks(group, act_order):
    """One column at a time with the inverse of what remains of H (optimal brain surgeon): no Cholesky factor, no blocks."""
    weight, x = normal(8, 160), normal(400, 160, seed=1) @ normal(160, 160, seed=2)
    gram = (x.T @ x).double()
    got = gptq(weight, gram, 4, group, act_order=act_order)
    inverse = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(160, dtype=torch.float64))
    w, size = weight.double(), 160 if group == CHANNEL else group
    order = gram.diagonal().argsort(descending=True).tolist() if act_order else range(160)
    for column in order:
        first = column - column % size
        if act_order:
            scales = Grid.of(weight[:, first : first + size], 1, 4, symmetric=False)
        elif column == first:
            scales = Grid.of(w[:, first : first + size].float(), 1, 4, symmetric=False)
        scale, zero = scales.scale[:, 0].double(), scales.zero[:, 0].double()
        codes = ((w[:, column] / scale).round() + zero).clamp(0, 15)
        assert_same(got.codes_NK[:, column], codes, f"column {column}")
        w = w - ((w[:, column] - (codes - zero) * scale) / inverse[column, column])[:, None] * inverse[column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]


def test_gptq_gives_channels_without_input_weight_zero():
    weight, x = normal(4, 64), normal(200, 64, seed=1)
    x[:, [3, 40]] = 0
    got = dequantise(gptq(weight, x.T @ x, 4, 32))
    assert not got[:, [3, 40]].any() and got.isfinite().all()
    assert not dequantise(gptq(weight, torch.zeros(64, 64), 4, 32)).any()


@pytest.mark.parametrize("bits,group", [(4, CHANNEL), (4, 64)])
def test_awq_lowers_the_error_of_unseen_outputs_and_clipping_lowers_it_further(layer, bits, group):
    weight, x, fresh, moments = layer
    plain = output_error(weight, dequantise(quantise_weight(weight, bits, group)), fresh)
    errors, seen = {}, {}
    for clip in (False, True):
        scale, rounded = awq(weight, moments, bits, group, clip=clip)
        errors[clip] = output_error(weight, dequantise(rounded) / scale, fresh)
        seen[clip] = output_error(weight, dequantise(rounded) / scale, x)
    assert errors[False] < 0.9 * plain, f"{errors[False]:.4g}, nearest {plain:.4g}"
    assert seen[True] < seen[False], f"{seen[True]:.4g}, without clipping {seen[False]:.4g}"
    inputs = x / scale
    searched = quantise_weight(weight * scale, bits, group, search="mse", gram_KK=inputs.T @ inputs)
    assert_close(dequantise(rounded), dequantise(searched), abs_tol=1e-5, what="ranges found with the inputs divided by the scale")


def test_awq_on_equal_channels_is_round_to_nearest():
    weight, moments = normal(8, 64), InputMoments(64)
    moments.update(torch.cat([torch.eye(64), -torch.eye(64)]))
    scale, rounded = awq(weight, moments, 4, 32, clip=False)
    assert_close(scale, torch.ones(64), abs_tol=1e-6, what="scale")
    assert_same(rounded.codes_NK, quantise_weight(weight, 4, 32).codes_NK, "codes")


def test_inputs_of_zeros_leave_awq_finite():
    moments = InputMoments(64)
    moments.update(torch.zeros(3, 64))
    scale, rounded = awq(normal(4, 64), moments, 4, 32)
    assert (scale == 1).all() and dequantise(rounded).isfinite().all()


def test_bad_calibration_and_weights_are_named():
    weight = normal(4, 64)
    with pytest.raises(InputError, match="no rows"):
        awq(weight, InputMoments(64), 4, 32)
    with pytest.raises(NumericalError, match="NaN"):
        InputMoments(64).update(torch.full((2, 64), float("nan")))
    with pytest.raises(NumericalError, match="layers.0.wo"):
        gptq(weight, -torch.eye(64), 4, 32, name="layers.0.wo")
    with pytest.raises(InputError, match="layers.0.wo"):
        gptq(weight / 0, torch.eye(64), 4, 32, name="layers.0.wo")
    with pytest.raises(ConfigError, match="48"):
        gptq(weight, torch.eye(64), 4, 48)
