"""The fake quantisers of LiteVAR against recorded outputs, and their documented oddities."""

import pytest
import torch
import torch.nn.functional as F

from arsp.quant.litevar import fake_quantize, quantize_map, quantize_tokens, quantize_values, quantize_weight
from arsp.testing.golden import find_cases
from arsp.testing.tolerance import assert_close


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="litevar_mask"), ids=str)
def test_quantisers_equal_the_official_ones(case):
    io, tolerance = case.io, case.meta["tolerance"]["quant_atol"]
    for bits in sorted(int(key.removeprefix("w_dq_")) for key in io if key.startswith("w_dq_")):
        weight, x = quantize_weight(io["qw"], bits), quantize_tokens(io["qx"], bits)
        assert_close(weight, io[f"w_dq_{bits}"], abs_tol=tolerance, what=f"weight, {bits} bits")
        assert_close(x, io[f"x_dq_{bits}"], abs_tol=tolerance, what=f"tokens, {bits} bits")
        assert_close(F.linear(x, weight, io["qb"]), io[f"linear_{bits}"], abs_tol=tolerance, what=f"linear layer, {bits} bits")
    for key in (key for key in io if key.startswith(("val_dq_", "map_dq_"))):
        name, _, bits = key.split("_")
        quantise = quantize_values if name == "val" else quantize_map
        assert_close(quantise(io[name], int(bits)), io[key], abs_tol=tolerance, what=key)


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="litevar_quant"), ids=str)
def test_quantisers_equal_the_official_ones_with_constant_groups(case):
    io = case.io
    quantisers = {"pc": (quantize_weight, io["w"]), "act": (quantize_tokens, io["x"]), "attn": (quantize_map, io["attn"])}
    for key in (key for key in io if key.endswith(".dequant")):
        kind, bits, _ = key.split(".")
        quantise, x = quantisers[kind]
        assert_close(quantise(x, int(bits[1:])), io[key], abs_tol=1e-6, rel_tol=1e-5, what=key)


def test_the_largest_value_of_a_group_falls_one_step_short():
    x = torch.arange(17.0)[None] / 16
    got = fake_quantize(x, 4, 1)
    assert got[0, 0] == 0 and got[0, -1] == pytest.approx(15 / 16) and len(got.unique()) == 16


def test_constant_groups_stay_finite_and_single_tokens_are_left_alone():
    assert_close(fake_quantize(torch.full((2, 3), 0.5), 8, 1), torch.full((2, 3), 0.5), abs_tol=2e-4, what="constant group")
    value = torch.randn(1, 2, 1, 4, generator=torch.Generator().manual_seed(0))
    assert quantize_values(value) is value
    assert float(quantize_map(torch.ones(1, 1, 1, 1))) == 1.0 and float(quantize_map(torch.ones(1, 1, 1, 2)).max()) == 255 / 256
