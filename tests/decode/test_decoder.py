"""Behaviour of the raster decoder: ragged rows, rewinding, several codes a pass, guidance intervals, compaction, cache bytes."""

from __future__ import annotations

import pytest
import torch

from arsp.decode.ar import sample_ar
from arsp.decode.decoder import RasterDecoder
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import Guidance
from arsp.errors import ArspError, ConfigError
from arsp.models.llamagen import GPT, GPTConfig
from arsp.protocols import Decoder, Request
from arsp.testing.tolerance import assert_close, assert_same

CONFIG = GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=40, block_size=16, num_classes=5, multiple_of=16)


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def request(n: int = 3) -> Request:
    return Request(torch.arange(n), 5, labels_B=torch.arange(n) % 5)


def codes(n: int = 3) -> torch.Tensor:
    return torch.randint(40, (n, 16), generator=torch.Generator().manual_seed(1))


def test_it_is_a_decoder(gpt):
    assert isinstance(RasterDecoder(gpt), Decoder)


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0), Guidance(2.0, 3)])
def test_one_or_many_codes_a_pass_give_the_teacher_forced_logits(gpt, guidance):
    decoder, tokens = RasterDecoder(gpt, guidance), codes()
    expected = decoder.teacher_forced(request(), tokens)
    for widths in ([1] * 15, [4, 1, 7, 3], [15]):
        state, parts, at = decoder.start(request()), [], 0
        parts.append(decoder.step(state, None))
        for width in widths:
            parts.append(decoder.step(state, tokens[:, at : at + width]))
            at += width
        assert_close(torch.cat(parts, 1), expected, abs_tol=2e-4, what=f"logits for widths {widths}")


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0), Guidance(2.0, 3)])
def test_rows_may_stand_at_different_lengths_after_a_rewind(gpt, guidance):
    decoder, tokens = RasterDecoder(gpt, guidance), codes()
    expected = decoder.teacher_forced(request(), tokens)
    state = decoder.start(request())
    decoder.step(state, tokens[:, :9])
    lengths = torch.tensor([2, 9, 5])
    decoder.rewind(state, lengths)
    fed = torch.stack([tokens[b, n : n + 4] for b, n in enumerate(lengths.tolist())])
    got = decoder.step(state, fed)
    for b, n in enumerate(lengths.tolist()):
        assert_close(got[b], expected[b, n + 1 : n + 5], abs_tol=2e-4, what=f"row {b} at length {n}")
    assert state.lengths_B.tolist() == [6, 13, 9]


def test_rewinding_to_equal_lengths_continues_on_the_uniform_path(gpt):
    decoder, tokens = RasterDecoder(gpt, Guidance(2.0)), codes()
    state = decoder.start(request())
    decoder.step(state, torch.zeros_like(tokens[:, :8]))
    decoder.rewind(state, torch.tensor([0, 0, 0]))
    assert_close(decoder.step(state, tokens[:, :6]), decoder.teacher_forced(request(), tokens)[:, 1:7], abs_tol=2e-4)


def test_selected_rows_continue_as_if_alone(gpt):
    decoder, tokens = RasterDecoder(gpt, Guidance(2.0)), codes()
    state = decoder.start(request())
    decoder.step(state, tokens[:, :5])
    rows = torch.tensor([2, 0])
    kept = decoder.select(state, rows)
    got = decoder.step(kept, tokens[rows, 5:7])
    assert_close(got, decoder.teacher_forced(request(), tokens)[rows, 6:8], abs_tol=2e-4)


def test_the_unconditional_half_is_not_run_once_guidance_has_ended(gpt):
    decoder, widths = RasterDecoder(gpt, Guidance(2.0, 3)), []
    hook = gpt.layers[0].register_forward_hook(lambda module, args, out: widths.append(out.shape[0]))
    sample_ar(decoder, request(), pipeline=LogitsPipeline())
    hook.remove()
    assert widths == [6] * 5 + [3] * 11, "tokens 0..4 are guided with interval 3: five passes with both halves"


def test_cache_bytes_are_those_of_the_valid_length(gpt):
    decoder = RasterDecoder(gpt, Guidance(2.0))
    result = sample_ar(decoder, request(), pipeline=LogitsPipeline())
    state = decoder.start(request())
    per_slot = 2 * CONFIG.n_layer * CONFIG.dim * 4 * 6
    assert result.stats["kv_bytes"] == 16 * per_slot == sum(x.nbytes for x in (*state.cache.k, *state.cache.v))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_image_i_depends_on_seed_and_i_only(gpt, batch):
    decoder = RasterDecoder(gpt, Guidance(2.0))
    whole = sample_ar(decoder, request(10), pipeline=LogitsPipeline(top_k=20)).codes_BL
    parts = [
        sample_ar(decoder, request(10).rows(slice(i, i + batch)), pipeline=LogitsPipeline(top_k=20)).codes_BL for i in range(0, 10, batch)
    ]
    assert_same(torch.cat(parts), whole, f"codes in batches of {batch}")
    other = sample_ar(decoder, Request(torch.arange(10), 6, labels_B=torch.arange(10) % 5), pipeline=LogitsPipeline(top_k=20)).codes_BL
    assert bool((other != whole).any(1).all()), "another seed gives other images"


def test_too_many_codes_and_impossible_rewinds_are_one_clear_error(gpt):
    decoder = RasterDecoder(gpt)
    state = decoder.start(request(), capacity=4)
    decoder.step(state, codes()[:, :3])
    with pytest.raises(ArspError, match="5 codes do not fit, the capacity is 4"):
        decoder.step(state, codes()[:, :2])
    with pytest.raises(ArspError, match="rewind"):
        decoder.rewind(state, torch.tensor([4, 0, 0]))


def test_a_model_without_null_class_cannot_be_guided():
    model = GPT(GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=8, block_size=4, num_classes=2, multiple_of=16, class_dropout_prob=0.0))
    with pytest.raises(ConfigError, match="no null class"):
        RasterDecoder(model, Guidance(2.0))


@pytest.mark.parametrize(
    "bad", [dict(dim=30, n_head=4), dict(dim=24, n_head=4), dict(block_size=15), dict(model_type="x2i"), dict(cls_token_num=2)]
)
def test_impossible_sizes_are_refused(bad):
    with pytest.raises(ConfigError):
        GPTConfig(**bad)
