"""Parity of the VAR transformer, its decoder and its two-model schedule with recorded official outputs."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from arsp.decode.ar import decode_blocks
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import RampGuidance
from arsp.decode.next_scale import NextScaleDecoder
from arsp.decode.schedule import ScaleStep
from arsp.decode.smooth import smooth_vectors
from arsp.models.var import VAR, VARConfig, block_causal_mask
from arsp.protocols import Request
from arsp.testing.golden import find_cases
from arsp.testing.tolerance import assert_close, assert_same
from arsp.tokenizers.var_vqvae import VQVAE, VQVAEConfig

pytestmark = pytest.mark.golden
CASES, CODE_CASES = find_cases(kind="var"), find_cases(kind="code")


def part(case, prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{prefix}."): value for key, value in case.weights.items() if key.startswith(f"{prefix}.")}


def model_of(case, sizes: dict, prefix: str) -> VAR:
    vae = case.config["vae"]
    model = VAR(VARConfig.from_dict({**case.config, **sizes, "vocab_size": vae["vocab_size"], "code_dim": vae["z_channels"]})).eval()
    model.load_state_dict(part(case, prefix), strict=True)
    return model


def tokenizer_of(case) -> VQVAE:
    """The recorded weights hold no encoder."""
    values = {**case.config["vae"], "patch_nums": tuple(case.config["patch_nums"]), "ch_mult": tuple(case.config["vae"]["ch_mult"])}
    tokenizer = VQVAE(VQVAEConfig(**{f.name: values[f.name] for f in fields(VQVAEConfig) if f.name in values})).eval()
    missing, unexpected = tokenizer.load_state_dict(part(case, "vae"), strict=False)
    assert not unexpected and all(key.startswith(("encoder.", "quant_conv.")) for key in missing)
    return tokenizer


def close(found, io, name, tol, kind="logits"):
    torch.testing.assert_close(
        found, io[name], atol=tol[f"{kind}_atol"], rtol=tol.get(f"{kind}_rtol", 0.0), msg=lambda text: f"{name}: {text}"
    )


def request_of(labels: torch.Tensor) -> Request:
    return Request(torch.arange(len(labels)), 0, labels_B=labels)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_cached_decoding_scale_by_scale(case):
    model, tokenizer, io, tol = model_of(case, {}, "var"), tokenizer_of(case), case.io, case.meta["tolerance"]
    K = len(case.config["patch_nums"])
    guidance = RampGuidance(case.config["cfg"], K)
    decoder = NextScaleDecoder(model, tokenizer.quantize, guidance)
    state, codes = decoder.start(request_of(io["labels"])), None
    for k in range(K):
        raw = capture_raw(model, lambda codes=codes: decoder.step(state, codes))
        unguided = io[f"ar_logits_raw_{k}"][: len(raw[0])]  # recorded with the null half even where guidance is off
        close(raw[0], {f"ar_logits_raw_{k}": unguided}, f"ar_logits_raw_{k}", tol)
        close(raw[1], io, f"ar_logits_cfg_{k}", tol)
        codes = io[f"ar_idx_{k}"]
        assert_same(raw[1].argmax(-1), codes, f"codes of scale {k}")
        assert abs(case.config["cfg"] * k / (K - 1) - float(io["cfg_t"][k])) < 1e-12
        after = decoder.start(request_of(io["labels"]))
        decoder._add(after, tokenizer.codebook_VE[torch.cat([io[f"ar_idx_{j}"] for j in range(k + 1)], dim=1)])
        close(after.f_hat_BEhw, io, f"ar_fhat_{k}", tol, "fhat")
        assert_close(after.maps[-1].transpose(1, 2).reshape(io[f"ar_next_{k}"].shape), io[f"ar_next_{k}"], abs_tol=tol["fhat_atol"])


def capture_raw(model: VAR, work) -> tuple[torch.Tensor, torch.Tensor]:
    """The unguided logits of both halves that the head returned during ``work``, and its result."""
    seen = []
    hook = model.head.register_forward_hook(lambda module, args, out: seen.append(out.float()))
    try:
        result = work()
    finally:
        hook.remove()
    return seen[-1], result


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_images_of_the_sampler(case):
    model, tokenizer, io, tol = model_of(case, {}, "var"), tokenizer_of(case), case.io, case.meta["tolerance"]
    K, pipeline = len(case.config["patch_nums"]), LogitsPipeline(temperature=0)
    decoder = NextScaleDecoder(model, tokenizer.quantize, RampGuidance(case.config["cfg"], K))
    greedy = lambda logits, pipeline, positions: pipeline(logits).argmax(-1)  # noqa: E731
    for labels, name in ((io["labels"], "ar_image_01"), (torch.full_like(io["labels"], case.config["num_classes"]), "ar_null_image_01")):
        if name in io:
            codes = decode_blocks(decoder, request_of(labels), greedy, pipeline).codes_BL
            close((tokenizer.decode_codes(codes).clamp(-1, 1) + 1) / 2, io, name, tol, "image")


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_teacher_forcing_equals_the_official_forward_and_the_cached_decoder(case):
    model, tokenizer, io, tol = model_of(case, {}, "var"), tokenizer_of(case), case.io, case.meta["tolerance"]
    K = len(case.config["patch_nums"])
    codes = torch.cat([io[f"ar_idx_{k}"] for k in range(K)], dim=1)
    inputs = tokenizer.quantize.inputs(codes)
    assert_close(inputs, io["tf_input"], abs_tol=tol["fhat_atol"])
    cond = model(io["labels"], inputs)
    uncond = model(torch.full_like(io["labels"], case.config["num_classes"]), inputs)
    close(cond, io, "tf_logits_cond", tol)
    close(uncond, io, "tf_logits_uncond", tol)
    assert_same(block_causal_mask(model.config.patch_nums)[0, 0].byte(), io["attn_bias_allowed"], "mask")
    decoder = NextScaleDecoder(model, tokenizer.quantize, RampGuidance(case.config["cfg"], K))
    found = decoder.teacher_forced(request_of(io["labels"]), codes)
    expected = torch.cat([io[f"ar_logits_cfg_{k}"] for k in range(K)], dim=1)
    torch.testing.assert_close(found, expected, atol=tol["logits_atol"], rtol=tol["logits_rtol"])
    short = model(io["labels"], inputs[:, : model.config.patch_nums[1] ** 2])
    assert_close(short, cond[:, : short.shape[1]], abs_tol=1e-4, what="two leading scales")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_truncation_of_the_official_sampler(case):
    logits = case.io[f"ar_logits_cfg_{len(case.config['patch_nums']) - 1}"]
    for key in (key for key in case.io if key.startswith("probs_k")):
        k, p = (int(text[1:]) for text in key.split("_")[1:])
        law = LogitsPipeline(top_k=k, top_p=p / 100 or 1.0)(logits).exp()
        torch.testing.assert_close(law, case.io[key], atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("case", [case for case in CASES if "gumbel_y" in case.io], ids=str)
def test_smoothed_vectors(case):
    """Recorded: softmax((logits - log E) / tau) with E ~ Exp(1) at ratio 0.5, and its product with the codebook."""
    io, tol, book = case.io, case.meta["tolerance"], tokenizer_of(case).codebook_VE.detach()
    logits = io[f"ar_logits_cfg_{len(case.config['patch_nums']) - 1}"]
    found = smooth_vectors(logits, -io["gumbel_exp_noise"].log(), 0.5, book)
    assert_close(io["gumbel_y"] @ book, io["gumbel_h"], abs_tol=tol["fhat_atol"], what="product with the codebook")
    assert_close(found, io["gumbel_h"], abs_tol=tol["fhat_atol"], what="smoothed vectors")


@pytest.mark.parametrize("case", CODE_CASES, ids=str)
@torch.no_grad()
def test_two_models_hand_over_like_code(case):
    io, tol, tokenizer = case.io, case.meta["tolerance"], tokenizer_of(case)
    big, small = model_of(case, case.config["drafter"], "drafter"), model_of(case, case.config["refiner"], "refiner")
    K, N = len(case.config["patch_nums"]), case.config["N_draft_steps"]
    steps = [ScaleStep(big, "big")] * N + [ScaleStep(small, "small")] * (K - N)
    decoder = NextScaleDecoder(small, tokenizer.quantize, RampGuidance(case.config["cfg"], K), steps)
    state, codes, all_codes = decoder.start(request_of(io["labels"])), None, []
    for k in range(K):
        logits = decoder.step(state, codes)
        if k == N:
            close(torch.cat(state.maps[:N], dim=1), io, "draft_token_hub", tol, "fhat")
            close(state.f_hat_BEhw, io, "draft_fhat", tol, "fhat")
        stage = "draft" if k < N else "refine"
        close(logits, io, f"{stage}_logits_cfg_{k}", tol)
        codes = logits.argmax(-1)
        assert_same(codes, io[f"{stage}_idx_{k}"], f"codes of scale {k}")
        all_codes.append(codes)
    assert state.cache.k[0].shape[1] == small.config.num_heads, "the cache of the big model is freed at the hand-over"
    pixels = tokenizer.decode_codes(torch.cat(all_codes, dim=1)).clamp(-1, 1)
    close((pixels + 1) / 2, io, "image_01", tol, "image")
