"""Parity of the VQ autoencoder with recorded official outputs."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from arsp.testing.golden import find_cases
from arsp.testing.tolerance import assert_close, assert_same
from arsp.tokenizers.llamagen_vq import VQConfig, VQModel
from arsp.tokenizers.pixels import resize_for_evaluation, to_uint8

pytestmark = pytest.mark.golden
CASES = find_cases(kind="vq")


def tokenizer_of(case) -> VQModel:
    sizes = {f.name: case.config[f.name] for f in fields(VQConfig) if f.name in case.config}
    model = VQModel(VQConfig(**{**sizes, "ch_mult": tuple(sizes["ch_mult"])})).eval()
    weights = dict(case.weights)
    weights.setdefault("quantize.codebook_used", torch.zeros(65536))
    model.load_state_dict(weights, strict=True)
    return model


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_encoder_latents_and_indices(case):
    model, io, tol = tokenizer_of(case), case.io, case.meta["tolerance"]["activations_abs"]
    assert_close(model.encoder(io["x"]), io["enc.h"], abs_tol=tol, what="encoder output")
    assert_close(model.latents(io["x"]), io["enc.z"], abs_tol=tol, what="latents")
    assert_same(model.encode(io["x"]).flatten(), io["enc.indices"], "indices")
    quantised, vq_loss, commit_loss, _ = model.quantize(io["enc.z"])
    assert_close(quantised, io["enc.quant"], abs_tol=1e-5, what="quantised map")
    assert_close(vq_loss.reshape(1), io["train.vq_loss"], abs_tol=1e-5, what="codebook loss")
    assert_close(commit_loss.reshape(1), io["train.commit_loss"], abs_tol=1e-5, what="commitment loss")


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_decoder_pixels_uint8_and_evaluation_resize(case):
    model, io, tol = tokenizer_of(case), case.io, case.meta["tolerance"]["pixels_abs"]
    grid = tuple(io["dec.codebook_entry"].shape[2:])
    pixels = model.decode_codes(io["dec.codes"], grid)
    assert_close(pixels, io["dec.pixels"], abs_tol=tol, what="pixels")
    recon = model.decode_codes(io["enc.indices"].view(len(io["x"]), -1), tuple(io["enc.z"].shape[2:]))
    assert_close(recon, io["dec.recon"], abs_tol=tol, what="reconstruction")
    for name, value in (("dec.uint8", pixels), ("dec.resized_uint8", resize_for_evaluation(pixels, io["dec.resized"].shape[-1]))):
        difference = (to_uint8(value).permute(0, 2, 3, 1).int() - io[name].int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3, (
            f"{name}: {int((difference > 0).sum())} of {difference.numel()} differ"
        )
    assert_close(resize_for_evaluation(pixels, io["dec.resized"].shape[-1]), io["dec.resized"], abs_tol=tol, what="resized pixels")
