"""Parity of GPT, decoder and guidance with recorded official outputs; every size and setting comes from golden.json."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arsp.decode.ar import sample_ar
from arsp.decode.decoder import RasterDecoder
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import Guidance
from arsp.models.llamagen import GPT, GPTConfig, left_pad, prefix_mask
from arsp.protocols import Request
from arsp.testing.golden import GoldenCase, find_cases
from arsp.testing.tolerance import assert_close, assert_same

pytestmark = pytest.mark.golden
C2I, T2I = find_cases(kind="gpt_c2i"), find_cases(kind="gpt_t2i")


def model_of(case: GoldenCase) -> GPT:
    gpt = GPT(GPTConfig.from_dict(case.config)).eval()
    gpt.load_state_dict(case.weights, strict=True)
    return gpt


def request_of(case: GoldenCase, labels=None, masked: bool = True) -> Request:
    if case.kind == "gpt_c2i":
        labels = case.io["kv.cond"][: len(case.io["kv.tokens"])] if labels is None else labels
        return Request(torch.arange(len(labels)), 0, labels_B=labels)
    captions = case.io["cap.cond"]
    return Request(torch.arange(len(captions)), 0, captions_BPE=captions, caption_mask_BP=case.io["cap.mask_left"] if masked else None)


def tolerances(case: GoldenCase) -> dict:
    return {"abs_tol": case.meta["tolerance"]["logits_abs"], "rel_tol": case.meta["tolerance"]["logits_rel"]}


@pytest.mark.parametrize("case", C2I + T2I, ids=str)
def test_rope_table_has_zero_rows_for_the_prefix(case):
    table, P = model_of(case).rope_table(), case.config["cls_token_num"]
    assert_close(table, case.io["rope.freqs_cis"], abs_tol=1e-6, what="rope table")
    assert float(table[:P].abs().max()) == 0.0


@pytest.mark.parametrize("case", C2I, ids=str)
def test_teacher_forced_logits_hidden_states_loss_and_gradients(case):
    gpt, io = model_of(case), case.io
    hidden = []
    for layer in gpt.layers:
        layer.register_forward_hook(lambda module, args, out: hidden.append(out))
    logits = gpt(io["tf.idx"], io["tf.cls"])
    assert_close(logits, io["tf.logits"], **tolerances(case), what="teacher-forced logits")
    for i, got in enumerate(hidden):
        assert_close(got, io[f"tf.hidden.{i}"], **tolerances(case), what=f"hidden {i}")
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), io["tf.idx"].flatten())
    assert_close(loss.reshape(1), io["tf.loss"], abs_tol=1e-5, what="loss")
    loss.backward()
    gradients = {name: p.grad for name, p in gpt.named_parameters()}
    for key in (k for k in io if k.startswith("tf.grad.")):
        assert_close(gradients[key.removeprefix("tf.grad.")], io[key], abs_tol=case.meta["tolerance"]["grads_abs"], rel_tol=1e-4, what=key)


@pytest.mark.parametrize("case", T2I, ids=str)
def test_text_conditional_teacher_forcing_with_caption_mask_and_weighted_loss(case):
    gpt, io = model_of(case), case.io
    with torch.no_grad():
        logits = gpt(io["kv.tokens"], io["cap.cond"], io["cap.mask_left"])[:, :-1]
        caption = gpt.cls_embedding(io["cap.cond"])
    assert_close(logits, io["tf.logits"], **tolerances(case), what="teacher-forced logits")
    rows = io["tf.cap_proj"].shape[1]
    assert_close(caption[:, -rows:], io["tf.cap_proj"], abs_tol=1e-5, what="caption projection")
    ce = F.cross_entropy(logits.flatten(0, 1), io["kv.tokens"].flatten(), reduction="none").view(io["kv.tokens"].shape)
    weights = io["tf.valid"].float()[:, None].expand_as(ce)
    assert_close(((ce * weights).sum() / weights.sum().clamp_min(1)).reshape(1), io["tf.loss"], abs_tol=1e-5, what="loss")


@pytest.mark.parametrize("case", C2I + T2I, ids=str)
def test_cached_guided_logits_at_every_step_and_the_cache_itself(case):
    decoder, io, tokens = RasterDecoder(model_of(case), Guidance(case.meta["cfg_scale"])), case.io, case.io["kv.tokens"]
    request = request_of(case)
    state = decoder.start(request)
    steps = [decoder.step(state, None)] + [decoder.step(state, tokens[:, i : i + 1]) for i in range(tokens.shape[1] - 1)]
    scale = {"abs_tol": 3 * tolerances(case)["abs_tol"] * case.meta["cfg_scale"], "rel_tol": tolerances(case)["rel_tol"]}
    assert_close(torch.cat(steps, 1).transpose(0, 1), io["kv.cfg_logits"], **scale, what="guided logits")
    assert_close(
        decoder.teacher_forced(request, tokens).transpose(0, 1), io["kv.cfg_logits"], **scale, what="guided logits without a cache"
    )
    kept, rows = state.cache.capacity, io["kv.k_cache.0"].shape[0]
    assert_close(state.cache.k[0][:rows], io["kv.k_cache.0"][:, :, :kept], abs_tol=5e-5, what="layer-0 keys")
    if "kv.v_cache.0" in io:
        assert_close(state.cache.v[0], io["kv.v_cache.0"][:, :, :kept], abs_tol=5e-5, what="layer-0 values")


@pytest.mark.parametrize("case", C2I + T2I, ids=str)
def test_unguided_halves_through_the_cache(case):
    """The recorded raw logits hold both halves: conditional rows first."""
    decoder, io, tokens = RasterDecoder(model_of(case)), case.io, case.io["kv.tokens"]
    B = len(tokens)
    if case.kind == "gpt_c2i":
        request = Request(torch.arange(2 * B), 0, labels_B=io["kv.cond"])
    else:
        request = Request(torch.arange(2 * B), 0, captions_BPE=io["kv.cond"], caption_mask_BP=io["cap.mask_left"].repeat(2, 1))
    state = decoder.start(request)
    both = tokens.repeat(2, 1)
    steps = [decoder.step(state, None)] + [decoder.step(state, both[:, i : i + 1]) for i in range(tokens.shape[1] - 1)]
    assert_close(torch.cat(steps, 1).transpose(0, 1), io["kv.logits"], **tolerances(case), what="raw logits")


@pytest.mark.parametrize(("case", "name"), [(c, n) for c in C2I + T2I for n in c.meta["gen"]], ids=str)
def test_greedy_tokens(case, name):
    setting = case.meta["gen"][name]
    decoder = RasterDecoder(model_of(case), Guidance(setting["cfg_scale"], setting.get("cfg_interval", -1)))
    request = request_of(case, case.io.get("gen.cls"), masked=bool(setting.get("emb_masks", True)))
    result = sample_ar(decoder, request, pipeline=LogitsPipeline(temperature=0.0))
    assert_same(result.codes_BL, case.io[f"gen.{name}"], f"greedy tokens of {name}")
    assert result.stats["passes"] == case.config["block_size"]


@pytest.mark.parametrize("case", [c for c in C2I if "sampled" in c.meta], ids=str)
def test_torch_stream_reproduces_the_official_multinomial_tokens(case):
    setting = case.meta["sampled"]
    decoder = RasterDecoder(model_of(case), Guidance(setting["cfg_scale"]))
    pipeline = LogitsPipeline(setting["temperature"], setting["top_k"], setting["top_p"])
    generator = torch.Generator().manual_seed(setting["manual_seed"])
    result = sample_ar(decoder, request_of(case, case.io[setting["cls"]]), pipeline=pipeline, rng="torch", generator=generator)
    assert_same(result.codes_BL, case.io["sampled.tokens"], "multinomial tokens")


@pytest.mark.parametrize("case", C2I, ids=str)
def test_bfloat16_stays_within_four_percent_rms(case):
    decoder, io, tokens = RasterDecoder(model_of(case).bfloat16(), Guidance(case.meta["cfg_scale"])), case.io, case.io["kv.tokens"]
    got = decoder.teacher_forced(request_of(case), tokens).transpose(0, 1)
    expected = io["kv.cfg_logits"]
    relative = float((got - expected).square().mean().sqrt() / expected.std())
    assert relative <= 0.04 * case.meta["cfg_scale"], f"relative RMS error {relative:.3%}"


@pytest.mark.parametrize("case", T2I, ids=str)
def test_left_padding_and_the_attention_mask_of_captions(case):
    io = case.io
    condition, mask = left_pad(io["cap.emb_right"], io["cap.mask_right"])
    assert_same(mask, io["cap.mask_left"].bool(), "left-padded mask")
    assert_close(condition, io["cap.cond"], abs_tol=0.0, what="left-padded condition")
    total = case.config["cls_token_num"] + case.config["block_size"]
    expected = io["kv.causal_mask"][: len(mask), :total, :total]
    assert_same(prefix_mask(mask, total)[:, 0], expected, "attention mask")
