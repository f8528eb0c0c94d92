"""Next-scale decoding: what an image depends on, what is run and kept, and two models, fewer rows or less depth in one image."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace

import pytest
import tiny_var
import torch

from arsp.decode import next_scale
from arsp.decode.ar import decode_blocks, keyed_choice, sample_ar
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import RampGuidance
from arsp.decode.next_scale import NextScaleDecoder
from arsp.decode.schedule import ScaleStep, plain_steps
from arsp.errors import ConfigError, UsageError
from arsp.models.attention import DensePolicy
from arsp.models.var import VAR
from arsp.protocols import Request
from arsp.testing.tolerance import assert_close, assert_same
from arsp.tokenizers.var_vqvae import PATCH_NUMS, MultiScaleQuantizer

pytestmark = pytest.mark.usefixtures("one_thread")
SIDES = (1, 2, 3, 4)
K, ENDS = len(SIDES), (1, 5, 14, 30)
CFG, PIPELINE = 1.5, LogitsPipeline(top_p=0.95)


def model_of(sides: tuple[int, ...] = SIDES, seed: int = 2, **sizes) -> VAR:
    return tiny_var.var_model(replace(tiny_var.CONFIG, patch_nums=sides, **sizes), seed)


def quantizer_of(sides: tuple[int, ...] = SIDES) -> MultiScaleQuantizer:
    torch.manual_seed(1)
    return MultiScaleQuantizer(replace(tiny_var.VQ, patch_nums=sides)).eval()


@pytest.fixture(scope="module")
def model() -> VAR:
    return model_of()


@pytest.fixture(scope="module")
def quantizer() -> MultiScaleQuantizer:
    return quantizer_of()


@pytest.fixture
def decoder_of(model, quantizer):
    """A decoder of the model, or of given steps."""

    def build(steps: list[ScaleStep] | None = None, cfg: float = CFG, **options) -> NextScaleDecoder:
        return NextScaleDecoder(model, quantizer, RampGuidance(cfg, K), steps, **options)

    return build


def request(*ids: int, seed: int = 7) -> Request:
    ids = torch.tensor(ids)
    return Request(ids, seed, labels_B=ids % 3)


def sample(decoder: NextScaleDecoder, asked: Request) -> torch.Tensor:
    return sample_ar(decoder, asked, pipeline=PIPELINE).codes_BL


def logits_of(decoder: NextScaleDecoder, asked: Request, codes_BL: torch.Tensor) -> list[torch.Tensor]:
    """Guided logits of every scale, fed with given codes one scale at a time."""
    state, found, start = decoder.start(asked), [], 0
    for end in (0, *decoder.layout.ends[:-1]):
        found.append(decoder.step(state, codes_BL[:, start:end] if end else None))
        start = end
    return found


def codes(rows: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(16, (rows, ENDS[-1]), generator=torch.Generator().manual_seed(seed))


def rows_of_each_pass(module: VAR, work) -> list[int]:
    """Rows of the batch in the first block, pass by pass."""
    seen = []
    hook = module.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(len(args[0])))
    work()
    hook.remove()
    return seen


# -- the plain sampler ------------------------------------------------------------------------------------------------------


def test_an_image_depends_on_its_seed_and_id_alone(decoder_of):
    decoder = decoder_of()
    together = sample(decoder, request(3, 5, 9))
    for row, i in enumerate((3, 5, 9)):
        assert_same(sample(decoder, request(i)), together[row : row + 1], f"codes of image {i} alone")
    assert not torch.equal(sample(decoder, request(3, seed=8)), together[:1]), "another seed is another image"


def test_several_scales_at_once_equal_one_after_another(decoder_of):
    decoder, known, asked = decoder_of(), codes(), request(0, 1, 2)
    one_by_one = logits_of(decoder, asked, known)
    for k in range(1, K):
        state = decoder.start(asked)
        assert_close(decoder.step(state, known[:, : ENDS[k - 1]]), one_by_one[k], abs_tol=1e-4, what=f"{k} scales at once")
    forced = decoder.teacher_forced(asked, known)
    assert_close(forced, torch.cat(one_by_one, dim=1), abs_tol=1e-4, what="teacher forced")


def test_a_known_prefix_is_continued_as_it_would_have_been(decoder_of):
    decoder, asked = decoder_of(), request(4, 2)
    whole = sample(decoder, asked)
    for end in ENDS[:-1]:
        found = decode_blocks(decoder, asked, keyed_choice(asked), PIPELINE, prefix_Bp=whole[:, :end])
        assert_same(found.codes_BL, whole, f"codes behind a prefix of {end}")


@pytest.mark.parametrize("cfg", [0.0, CFG])
def test_selected_rows_go_on_alone(decoder_of, cfg):
    decoder, known, asked = decoder_of(cfg=cfg), codes(), request(0, 1, 2)
    expected, rows = logits_of(decoder, asked, known), torch.tensor([2, 0])
    state = decoder.start(asked)
    decoder.step(state, None)
    decoder.step(state, known[:, :1])
    state = decoder.select(state, rows)
    assert_close(decoder.step(state, known[rows, 1:5]), expected[2][rows], abs_tol=1e-5)
    assert_close(decoder.step(state, known[rows, 5:14]), expected[3][rows], abs_tol=1e-5)


def test_without_guidance_no_null_half_is_run_or_kept(decoder_of, model):
    asked = request(0, 1, 2)
    plain, guided = decoder_of(cfg=0.0), decoder_of()
    assert rows_of_each_pass(model, lambda: sample(plain, asked)) == [3] * K
    assert rows_of_each_pass(model, lambda: sample(guided, asked)) == [6] * K, "the first scale's null keys are read by later scales"
    kept = [sample_ar(decoder, asked, pipeline=PIPELINE).stats["kv_bytes"] for decoder in (plain, guided)]
    assert kept[1] == 2 * kept[0]


def test_guidance_is_a_ramp_over_the_scales(decoder_of, model, quantizer):
    known, labels = codes(), torch.tensor([0, 1, 2])
    guided = logits_of(decoder_of(), request(0, 1, 2), known)
    inputs = quantizer.inputs(known)
    with torch.inference_mode():
        cond, null = (model(y, inputs).split((1, 4, 9, 16), dim=1) for y in (labels, torch.full((3,), 3)))
    for k in range(K):
        t = CFG * k / (K - 1)
        assert_close(guided[k], (1 + t) * cond[k] - t * null[k], abs_tol=1e-4, what=f"scale {k}")


def test_refused_requests_and_steps(decoder_of, model):
    decoder = decoder_of()
    with pytest.raises(ConfigError, match="no labels"):
        decoder.start(Request(torch.arange(2), 0))
    with pytest.raises(UsageError, match="no whole scales"):
        decoder.step(decoder.start(request(0)), codes(1)[:, :3])
    with pytest.raises(UsageError, match="all 4 scales"):
        decoder.step(decoder.start(request(0)), codes(1))
    with pytest.raises(UsageError, match="rewound"):
        decoder.rewind(decoder.start(request(0)), torch.tensor([1]))
    with pytest.raises(ConfigError, match="its tokenizer"):
        NextScaleDecoder(model, quantizer_of((1, 2, 4)))


# -- the cache --------------------------------------------------------------------------------------------------------------


def test_keeping_the_last_scale_changes_nothing_but_the_bytes(decoder_of):
    known, asked = codes(), request(0, 1, 2)
    found, full = (logits_of(decoder_of(cache_last=last), asked, known) for last in (False, True))
    for k in range(K):
        assert torch.equal(found[k], full[k]), f"scale {k}: logits differ by {(found[k] - full[k]).abs().max():.2e}"


@pytest.mark.parametrize(("size", "ratio"), [(256, 0.62), (512, 0.54)])
def test_bytes_of_the_cache_at_the_official_scales(size, ratio):
    sides = PATCH_NUMS[size]
    tiny = model_of(sides, depth=1, embed_dim=4, num_heads=1)
    decoders = [NextScaleDecoder(tiny, quantizer_of(sides), RampGuidance(CFG, len(sides)), cache_last=last) for last in (False, True)]
    kept, full = (sample_ar(decoder, request(0), pipeline=PIPELINE).stats["kv_bytes"] for decoder in decoders)
    assert full == 2 * 2 * 4 * 4 * sum(pn * pn for pn in sides), "keys and values, two halves, width 4, float32"
    assert round(kept / full, 2) == ratio


# -- two models (CoDe) ------------------------------------------------------------------------------------------------------


def collab(big: VAR, small: VAR, num: int) -> list[ScaleStep]:
    return [ScaleStep(big, "big")] * num + [ScaleStep(small, "small")] * (K - num)


@pytest.mark.parametrize("num", range(1, K))
def test_a_refiner_that_equals_the_drafter_gives_the_plain_image(decoder_of, model, num):
    asked = request(*range(8))
    plain = sample(decoder_of(), asked)
    assert_same(sample(decoder_of(collab(model, copy.deepcopy(model), num)), asked), plain, f"codes with a hand-over at {num}")


@pytest.mark.parametrize("num", range(1, K))
def test_each_model_makes_its_scales_as_if_it_had_made_all_before(decoder_of, model, num):
    small = model_of(seed=5, depth=1, embed_dim=12, num_heads=3)
    known, asked = codes(), request(0, 1, 2)
    found = logits_of(decoder_of(collab(model, small, num)), asked, known)
    alone = {"big": logits_of(decoder_of(), asked, known), "small": logits_of(decoder_of(plain_steps(small)), asked, known)}
    for k in range(K):
        assert_close(found[k], alone["big" if k < num else "small"][k], abs_tol=1e-4, what=f"scale {k}, hand-over at {num}")


def test_the_first_cache_is_freed_at_the_hand_over(decoder_of, model):
    small = model_of(seed=5, depth=1, embed_dim=12, num_heads=3)
    decoder, known = decoder_of(collab(model, small, 2)), codes(1)
    state = decoder.start(request(0))
    decoder.step(state, None)
    decoder.step(state, known[:, :1])
    assert state.cache.capacity == 5 and len(state.cache.k) == 2, "the drafter's cache holds its own two scales"
    decoder.step(state, known[:, 1:5])
    assert [x.shape for x in state.cache.k] == [(2, 3, 14, 4)], "one layer of three heads, without the last scale"
    decoder.step(state, known[:, 5:14])
    assert state.passes == 4, "the refiner reads the known scales together with its first own one"
    held = sum(x.numel() * x.element_size() for x in (*state.cache.k, *state.cache.v))
    assert state.last_kv_bytes == held == 2 * 2 * 14 * 12 * 4, "keys and values, two halves, 14 slots, width 12, float32"
    assert state.peak_kv_bytes == max(held, 2 * 2 * 2 * 5 * 16 * 4), "or what two layers of the drafter held"


def test_the_cache_of_the_big_model_is_gone_before_the_small_one_makes_its_own(decoder_of, model, monkeypatch):
    small = model_of(seed=5, depth=1, embed_dim=12, num_heads=3)
    decoder = decoder_of(collab(model, small, 2))
    state = decoder.start(request(0))
    decoder.step(state, None)
    decoder.step(state, codes(1)[:, :1])
    former, alive = [weakref.ref(x) for x in (*state.cache.k, *state.cache.v)], []
    make = next_scale.KVCache
    monkeypatch.setattr(next_scale, "KVCache", lambda *a, **k: alive.append([ref() is not None for ref in former]) or make(*a, **k))
    decoder.step(state, codes(1)[:, 1:5])
    assert alive == [[False] * 4]


# -- fewer rows, less depth, another precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("first", range(K))
def test_guidance_off_for_the_tail(decoder_of, model, quantizer, first):
    steps = [ScaleStep(model, guided=k < first) for k in range(K)]
    known, asked = codes(), request(0, 1, 2)
    decoder, full = decoder_of(steps), logits_of(decoder_of(), asked, known)
    found = logits_of(decoder, asked, known)
    with torch.inference_mode():
        cond = model(asked.labels_B, quantizer.inputs(known)).split((1, 4, 9, 16), dim=1)
    for k in range(K):
        assert_close(found[k], full[k] if k < first else cond[k], abs_tol=1e-4, what=f"scale {k}, off from {first}")
    assert rows_of_each_pass(model, lambda: sample(decoder, asked)) == [6] * first + [3] * (K - first)


class MapOfTheConditionalHalf(DensePolicy):
    """Computes everything and then lets the null half use the queries and keys of the conditional one."""

    def __init__(self, first: int):
        self.first = first

    def attend(self, q, k, v, layer, ctx):
        if ctx.scales[1] >= self.first:
            q, k = (torch.cat((x[: len(x) // 2],) * 2) for x in (q, k))
        return super().attend(q, k, v, layer, ctx)


def test_a_shared_map_is_what_the_null_half_computes_with_the_conditional_queries_and_keys(decoder_of, model):
    known, asked = codes(), request(0, 1, 2)
    found = logits_of(decoder_of([ScaleStep(model, shared=True)] * K), asked, known)
    expected = logits_of(decoder_of([ScaleStep(model, policy=MapOfTheConditionalHalf(0))] * K), asked, known)
    plain = logits_of(decoder_of(), asked, known)
    for k in range(K):
        assert_close(found[k], expected[k], abs_tol=1e-4, what=f"scale {k}")
    assert max((a - b).abs().max() for a, b in zip(found, plain, strict=True)) > 1e-2, "sharing must be seen"


def test_sharing_from_a_later_scale_on(decoder_of, model):
    known, asked = codes(), request(0, 1, 2)
    found = logits_of(decoder_of([ScaleStep(model, shared=k >= 2) for k in range(K)]), asked, known)
    plain = logits_of(decoder_of(), asked, known)
    for k in range(2):
        assert_close(found[k], plain[k], abs_tol=1e-5, what=f"scale {k}")
    assert (found[3] - plain[3]).abs().max() > 1e-2, "sharing must be seen"


def test_less_depth_is_the_model_of_the_first_blocks(decoder_of, model, quantizer):
    known, asked = codes(), request(0, 1, 2)
    shallow = model_of(depth=1)
    shallow.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("blocks.1.")}, strict=True)
    found = logits_of(decoder_of([ScaleStep(model, depth=1)] * K), asked, known)
    for k, expected in enumerate(logits_of(decoder_of(plain_steps(shallow)), asked, known)):
        assert_close(found[k], expected, abs_tol=1e-5, what=f"scale {k}")
    tail = logits_of(decoder_of([ScaleStep(model, depth=None if k < 2 else 1) for k in range(K)]), asked, known)
    full = logits_of(decoder_of(), asked, known)
    assert_close(tail[1], full[1], abs_tol=1e-5, what="scale 1, full depth")
    assert_close(tail[2], found[2], abs_tol=1e-5, what="scale 2: the first block saw the same keys")


def test_another_precision_keeps_the_cache(decoder_of, model):
    known, asked = codes(), request(0, 1, 2)
    low = copy.deepcopy(model).to(torch.bfloat16)
    decoder = decoder_of([ScaleStep(model, "one")] * 2 + [ScaleStep(low, "one")] * 2)
    state = decoder.start(asked)
    decoder.step(state, None)
    decoder.step(state, known[:, :1])
    before = [x[:, :, :5].clone() for x in state.cache.k]
    logits = decoder.step(state, known[:, 1:5])
    for layer, (old, new) in enumerate(zip(before, state.cache.k, strict=True)):
        assert torch.equal(new[:, :, :5], old.to(torch.bfloat16)), (
            f"layer {layer}: the keys of the first scales are the float32 ones, rounded"
        )
    assert state.passes == 3 and logits.dtype == torch.float32
    expected = logits_of(decoder_of(), asked, known)[2]
    assert (logits - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_default_steps_are_bitwise_the_plain_sampler(decoder_of, model):
    known, asked = codes(), request(0, 1, 2)
    for found, expected in zip(
        logits_of(decoder_of([ScaleStep(model, "named")] * K), asked, known), logits_of(decoder_of(), asked, known), strict=True
    ):
        assert torch.equal(found, expected)
