"""Parity of the multi-scale VQVAE with recorded official outputs."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from arsp.errors import ConfigError, InputError
from arsp.testing.golden import find_cases
from arsp.testing.tolerance import assert_close, assert_same
from arsp.tokenizers.var_vqvae import VQVAE, VQVAEConfig, phi_index

pytestmark = pytest.mark.golden
CASES = find_cases(kind="vqvae")


def config_of(values: dict, **more) -> VQVAEConfig:
    values = {**values, **more}
    sizes = {f.name: values[f.name] for f in fields(VQVAEConfig) if f.name in values}
    return VQVAEConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in sizes.items()})


def tokenizer_of(case) -> VQVAE:
    model = VQVAE(config_of(case.config)).eval()
    model.load_state_dict(case.weights, strict=True)
    return model


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_encode_residuals_and_reconstructions(case):
    model, io, tol = tokenizer_of(case), case.io, case.meta["tolerance"]
    atol, rtol = tol["float_atol"], tol["float_rtol"]
    close = lambda found, name: torch.testing.assert_close(found, io[name], atol=atol, rtol=rtol, msg=lambda m: f"{name}: {m}")  # noqa: E731
    close(model.latents(io["img"]), "f")
    ids, maps = model.quantize.encode(io["f"])
    for k, (codes, f_hat) in enumerate(zip(ids, maps, strict=True)):
        assert_same(codes, io[f"idx_{k}"], f"codes of scale {k}")
        if f"fhat_{k}" in io:
            close(f_hat, f"fhat_{k}")
        if f"rec_{k}" in io:
            close(model.decode_map(f_hat).clamp(-1, 1), f"rec_{k}")
    codes_BL = torch.cat(ids, dim=1)
    assert_same(model.encode(io["img"]), codes_BL, "codes from pixels")
    close(model.decode_codes(codes_BL).clamp(-1, 1), "img_from_idx")
    close(model.quantize.inputs(codes_BL), "var_input")
    assert list(model.quantize.phi_index) == io["phi_index"].tolist()


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_one_scale_at_a_time_equals_the_official_next_scale_input(case):
    model, io = tokenizer_of(case), case.io
    quantizer, last = model.quantize, len(case.config["patch_nums"]) - 1
    f_hat = quantizer.start(len(io["img"]))
    for k in range(last + 1):
        f_hat = f_hat + quantizer.contribution(quantizer.embedding(io[f"idx_{k}"]), k)
        if f"nai_fhat_{k}" in io:
            assert_close(f_hat, io[f"nai_fhat_{k}"], abs_tol=case.meta["tolerance"]["float_atol"], what=f"f_hat {k}")
            assert_close(quantizer.next_map(f_hat, k), io[f"nai_next_{k}"], abs_tol=case.meta["tolerance"]["float_atol"], what=f"map {k}")


def test_phi_table_with_its_exact_ties():
    tables = {
        3: "023", 4: "0123", 5: "01223", 6: "001233", 7: "0012233", 8: "00112233", 9: "001122233",
        10: "0011122333", 13: "0001112222333", 14: "00011112222333",
    }  # fmt: skip
    assert {n: "".join(map(str, phi_index(n, 4))) for n in tables} == tables
    assert phi_index(5, 0) == (0, 1, 2, 3, 4) and phi_index(5, 1) == (0,) * 5


def test_other_phi_sharing_keeps_the_official_keys():
    for share, key in (
        (0, "quantize.quant_resi.3.weight"),
        (1, "quantize.quant_resi.qresi.weight"),
        (2, "quantize.quant_resi.qresi_ls.1.bias"),
    ):
        assert key in VQVAE(VQVAEConfig(ch=32, ch_mult=(1, 1), patch_nums=(1, 2, 3, 4), share_quant_resi=share, vocab_size=8)).state_dict()


def test_leading_scales_decode_and_cut_scales_are_refused():
    model = VQVAE(VQVAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, patch_nums=(1, 2, 4), vocab_size=8, z_channels=8)).eval()
    with torch.no_grad():
        codes = model.encode(torch.rand(2, 3, 8, 8) * 2 - 1)
        assert_close(
            model.decode_codes(codes[:, :5]), model.decode_map(model.quantize.sum_scales(model.codebook_VE[codes[:, :5]])), abs_tol=0
        )
        for bad in (codes[:, :4], torch.cat((codes, codes[:, :1]), dim=1)):
            with pytest.raises(InputError, match="whole number of the scales"):
                model.decode_codes(bad)
        with pytest.raises(InputError, match="expected"):
            model.encode(torch.rand(1, 3, 16, 16))
    with pytest.raises(ConfigError, match="rising"):
        VQVAEConfig(patch_nums=(1, 2, 2))
