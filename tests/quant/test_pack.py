"""Packed layouts equal compressed-tensors and QServe byte for byte, give back what was packed, and refuse what does not fit."""

import pytest
import torch

from arsp.errors import ConfigError, InputError
from arsp.quant.pack import from_tensors, pack_int4, pack_qserve, packed_bytes, qserve_group_order, to_tensors, unpack_int4
from arsp.quant.quantiser import CHANNEL, QuantisedWeight, dequantise, integer_linear, quantise_weight
from arsp.testing.golden import find_cases
from arsp.testing.tolerance import assert_close, assert_same


def weight_of(num_rows=16, num_inputs=96, bits=4, group=32, **settings):
    return quantise_weight(torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(0)), bits, group, **settings)


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="ct_pack"), ids=str)
def test_files_equal_those_of_compressed_tensors(case):
    io, config = case.io, case.config
    recorded = {key: value for key, value in io.items() if key.startswith("proj.")}
    codes, zeros = ((io[key].int() + 8).to(torch.uint8) for key in ("q_signed", "zero_signed"))
    weight = QuantisedWeight(codes, io["proj.weight_scale"], zeros, config["bits"], config["group"])
    packed = to_tensors(weight, "proj")
    assert packed.keys() == recorded.keys()
    for key, value in packed.items():
        assert value.dtype == recorded[key].dtype and torch.equal(value, recorded[key]), key
    loaded = from_tensors(recorded, "proj")
    assert loaded.group_size == config["group"] and loaded.bits == config["bits"]
    assert_close(dequantise(loaded), io["dequant"], abs_tol=0, rel_tol=1e-6, what="values")


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="qserve_pack"), ids=str)
def test_the_order_of_qserve_is_met_byte_for_byte(case):
    io = case.io
    for form in ("chn", "grp"):
        assert_same(pack_qserve(io[f"{form}.q4"]), io[f"{form}.qweight"], f"{form} codes")
    step, zero = io["grp.s2"].int(), io["grp.zero"].int()
    assert_same(qserve_group_order(step), io["grp.s2_scales"], "second-level scales")
    assert_same(qserve_group_order(-zero * step).to(torch.int8), io["grp.s2_zeros"], "second-level zero points")


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="qserve_pack"), ids=str)
def test_the_integer_product_equals_that_of_qserve(case):
    """Per group their steps are integers times one float16 scale: the same numbers as one float32 scale a group. Per channel they subtract
    zero point times scale rounded to float16, ours exactly: the difference is added here."""
    io, group = case.io, case.config["group"]
    s1_N1 = {form: io[f"{form}.s1_scales"].float()[:, None] for form in ("chn", "grp")}
    channel = QuantisedWeight(io["chn.q4"].to(torch.uint8), s1_N1["chn"], io["chn.zero"].to(torch.uint8)[:, None], 4, CHANNEL)
    groups = QuantisedWeight(io["grp.q4"].to(torch.uint8), s1_N1["grp"] * io["grp.s2"].float(), io["grp.zero"].to(torch.uint8), 4, group)
    sums_M1 = io["x_scale"].float()[:, None] * io["x_q"].float().sum(1, keepdim=True)
    rounding_N = io["chn.zero"].float() * io["chn.s1_scales"].float() - io["chn.s1_szeros"].float()
    for form, weight, theirs in (("chn", channel, sums_M1 * rounding_N), ("grp", groups, 0)):
        expected = io[f"{form}.y_ref"]
        got = integer_linear(io["x_q"], io["x_scale"].float(), weight) + theirs
        assert_close(got, expected, abs_tol=1e-4 * float(expected.abs().max()), what=f"{form} product")
        fake = io[f"{form}.w_fake"]
        assert_close(dequantise(weight), fake, abs_tol=1e-3 * float(fake.abs().max()), what=f"{form} weight")


@pytest.mark.parametrize("num_rows,num_inputs", [(16, 96), (13, 100), (1, 32), (9, 7)])
@pytest.mark.parametrize("bits,symmetric,group", [(4, False, 32), (4, False, CHANNEL), (4, True, 32), (8, True, CHANNEL)])
def test_what_is_packed_comes_back_exactly_and_has_the_bytes_that_were_foretold(num_rows, num_inputs, bits, symmetric, group):
    weight = weight_of(num_rows, num_inputs, bits, group, symmetric=symmetric)
    packed = to_tensors(weight, "a.b")
    loaded = from_tensors(packed, "a.b")
    assert (loaded.bits, loaded.group_size, loaded.symmetric) == (bits, weight.group_size, symmetric)
    assert torch.equal(loaded.codes_NK, weight.codes_NK) and loaded.codes_NK.dtype == weight.codes_NK.dtype
    assert torch.equal(loaded.scales_NG, weight.scales_NG)
    assert symmetric or torch.equal(loaded.zeros_NG, weight.zeros_NG)
    if bits == 8 or not symmetric:
        assert sum(tensor.nbytes for tensor in packed.values()) == packed_bytes(num_rows, num_inputs, bits, weight.group_size)


def test_nibbles_lie_lowest_first_and_negative_words_are_whole():
    assert pack_int4(torch.tensor([1, 2, 3])).tolist() == [0x321]
    assert pack_int4(torch.full((8,), 15)).tolist() == [-1]
    assert pack_int4(torch.tensor([0] * 7 + [8])).tolist() == [-(2**31)]
    assert unpack_int4(torch.tensor([-1, 0x21], dtype=torch.int32), 10).tolist() == [15] * 8 + [1, 2]


def test_w4_is_more_than_three_and_a_half_times_smaller_than_float16():
    assert 2 * 768 * 2304 / packed_bytes(2304, 768, 4, 128) > 3.5


def test_formats_without_a_layout_are_refused():
    for bits, symmetric in ((3, True), (8, False)):
        with pytest.raises(ConfigError, match="a.b"):
            to_tensors(weight_of(bits=bits, symmetric=symmetric), "a.b")
    with pytest.raises(ConfigError):
        packed_bytes(8, 8, 2, CHANNEL)
    with pytest.raises(InputError, match="32"):
        pack_qserve(torch.zeros(40, 32))


@pytest.mark.parametrize("bits", [4, 8])
def test_damaged_files_are_named(bits):
    packed = to_tensors(weight_of(bits=bits, group=32 if bits == 4 else CHANNEL), "a.b")
    for key in packed.keys() - {"a.b.weight_zero_point"}:
        with pytest.raises(InputError, match="a.b"):
            from_tensors({k: v for k, v in packed.items() if k != key}, "a.b")
    for key, value in packed.items():
        for damaged in (value[:-1], value.double()):
            with pytest.raises(InputError, match="a.b"):
                from_tensors(packed | {key: damaged}, "a.b")
    with pytest.raises(InputError, match="do not fit"):
        from_tensors(packed | {"a.b.weight_scale": torch.ones(16, 5)}, "a.b")
    with pytest.raises(InputError, match="finite"):
        from_tensors(packed | {"a.b.weight_scale": packed["a.b.weight_scale"] * float("nan")}, "a.b")
