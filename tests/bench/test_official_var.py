"""The baseline loop must compute the same model: the codes of our decoder under the same draws, and the same images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_var
import torch

from arsp.bench import official_var
from arsp.decode.ar import sample_ar
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import RampGuidance
from arsp.decode.next_scale import NextScaleDecoder
from arsp.protocols import Request
from arsp.testing.tolerance import assert_close, assert_same
from arsp.tokenizers.var_vqvae import VQVAE

LABELS = torch.tensor([2, 0, 1, 1])


@pytest.fixture(scope="module")
def tokenizer() -> VQVAE:
    return tiny_var.tokenizer_model()


def ours(model, tokenizer, cfg: float, pipeline: LogitsPipeline, generator=None):
    decoder = NextScaleDecoder(model, tokenizer.quantize, RampGuidance(cfg, len(tiny_var.SIDES)))
    request = Request(torch.arange(len(LABELS)), 0, labels_B=LABELS)
    return sample_ar(decoder, request, pipeline=pipeline, rng="torch", generator=generator)


@pytest.mark.parametrize("cfg", [0.0, 1.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (5, 0.0), (0, 0.8), (9, 0.9)])
@pytest.mark.parametrize("options", [{}, {"shared_aln": True}, {"attn_l2_norm": False}], ids=["l2", "shared aln", "no l2"])
def test_codes_under_the_same_draws(tokenizer, options, top_k, top_p, cfg):
    model = tiny_var.var_model(replace(tiny_var.CONFIG, **options))
    for seed in range(4):
        draws = lambda seed=seed: torch.Generator().manual_seed(seed)  # noqa: E731
        codes, _ = official_var.sample_official(model, tokenizer.quantize, LABELS, cfg=cfg, top_k=top_k, top_p=top_p, generator=draws())
        expected = ours(model, tokenizer, cfg, LogitsPipeline(top_k=top_k, top_p=top_p or 1.0), draws())
        assert_same(codes, expected.codes_BL, f"codes of seed {seed}")


def test_greedy_codes_need_no_draws(tokenizer):
    model = tiny_var.var_model()
    codes, f_hat = official_var.sample_official(model, tokenizer.quantize, LABELS, cfg=1.5, top_k=1)
    assert_same(codes, ours(model, tokenizer, 1.5, LogitsPipeline(temperature=0.0)).codes_BL)
    expected = (tokenizer.decode_codes(codes).clamp(-1, 1) + 1) / 2
    assert_close(official_var.to_pixels(tokenizer, f_hat), expected, abs_tol=1e-5, what="image")


def test_all_scales_are_cached_for_both_halves(tokenizer):
    kept = ours(tiny_var.var_model(), tokenizer, 1.5, LogitsPipeline()).stats["kv_bytes"]
    assert official_var.cache_bytes(tiny_var.var_model(), batch_size=len(LABELS)) == kept * 21 // 5, (
        "ours leaves out the last 16 of 21 slots"
    )


def test_the_baseline_is_float32_and_plain_whatever_the_stack_runs(tokenizer):
    model = tiny_var.var_model()
    assert official_var.eager_copy(model, tokenizer) == (model, tokenizer), "nothing to convert, nothing copied"
    low, last = tiny_var.var_model().to(torch.bfloat16), tiny_var.tokenizer_model().to(memory_format=torch.channels_last)
    copies = official_var.eager_copy(low, last)
    assert all(p.dtype == torch.float32 and p.is_contiguous() for copied in copies for p in copied.parameters())
    assert low.head.weight.dtype == torch.bfloat16, "the stack's own weights stay"
