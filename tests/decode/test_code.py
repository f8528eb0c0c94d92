"""Two models in one image (CoDe, arXiv 2411.17787): a refiner that equals the drafter changes nothing, whatever else is in the schedule,
and what the drafter kept is gone before the refiner starts."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace

import pytest
import tiny_var
import torch

from arsp.decode import next_scale
from arsp.decode.ar import sample_ar
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import RampGuidance
from arsp.decode.next_scale import NextScaleDecoder
from arsp.decode.schedule import ScaleStep
from arsp.models.attention import DensePolicy
from arsp.protocols import Request
from arsp.sparse.policy import LiteVARPolicy
from arsp.sparse.profile import Profile, uniform_share
from arsp.sparse.window import empty_windows
from arsp.testing.tolerance import assert_same
from arsp.tokenizers.var_vqvae import MultiScaleQuantizer

pytestmark = pytest.mark.usefixtures("one_thread")
SIDES = (1, 2, 3, 4, 6)
K, ENDS = len(SIDES), (1, 5, 14, 30, 66)
CONFIG = replace(tiny_var.CONFIG, patch_nums=SIDES)
IMAGES = torch.arange(24)


@pytest.fixture(scope="module")
def quantizer():
    torch.manual_seed(1)
    return MultiScaleQuantizer(replace(tiny_var.VQ, patch_nums=SIDES)).eval()


@pytest.fixture(scope="module")
def pair():
    """A model and a copy of it, which nothing connects with the first."""
    model = tiny_var.var_model(CONFIG)
    return model, copy.deepcopy(model)


def windows(share: str) -> LiteVARPolicy:
    """Windows of radius 1 at the last scale, which keep little enough to be applied, and sharing everywhere."""
    win = empty_windows(K, CONFIG.depth, CONFIG.num_heads)
    win[:, :, -1, 1:] = 1
    policy = LiteVARPolicy(Profile("any", None, SIDES, win, uniform_share(share, CONFIG.depth, K)))
    assert policy.windowed[:, -1].all()
    return policy


def sample(decoder: NextScaleDecoder, ids: torch.Tensor, batch: int = 24, **filters):
    pipeline = LogitsPipeline(**(filters or {"top_p": 0.95}))
    parts = [sample_ar(decoder, Request(part, 7, labels_B=part % 3), pipeline=pipeline) for part in ids.split(batch)]
    return torch.cat([part.codes_BL for part in parts]), parts[0].stats


def rows(models, num: int, **cells) -> list[ScaleStep]:
    """The first model makes the first ``num`` scales, the second the rest."""
    first, second = (ScaleStep(model, owner, **cells) for model, owner in zip(models, "ab", strict=True))
    return [first] * num + [second] * (K - num)


@pytest.mark.parametrize("num", range(1, K))
@pytest.mark.parametrize("cfg", [0.0, 1.5], ids=["unguided", "guided"])
@pytest.mark.parametrize("share", [None, "none", "map", "output"])
def test_a_refiner_that_equals_the_drafter_makes_the_plain_codes(quantizer, pair, num, cfg, share):
    """Dense attention (None), or windows with each kind of sharing on both models."""
    policy, guidance = DensePolicy() if share is None else windows(share), RampGuidance(cfg, K)
    plain, _ = sample(NextScaleDecoder(pair[0], quantizer, guidance, rows((pair[0],) * 2, K, policy=policy)), IMAGES)
    collab = NextScaleDecoder(pair[1], quantizer, guidance, rows(pair, num, policy=policy))
    assert_same(sample(collab, IMAGES)[0], plain, f"codes, hand-over at {num}")
    for batch in (1, 7):
        assert_same(sample(collab, IMAGES[:8], batch)[0], plain[:8], f"codes of {batch} at a time")


@pytest.mark.parametrize("num", range(1, K))
@pytest.mark.parametrize("cells", [{"guided": False}, {"shared": True}, {"depth": 1}], ids=str)
def test_other_columns_do_not_change_that(quantizer, pair, num, cells):
    plain = NextScaleDecoder(pair[0], quantizer, RampGuidance(1.5, K), rows((pair[0],) * 2, K, **cells))
    collab = NextScaleDecoder(pair[1], quantizer, RampGuidance(1.5, K), rows(pair, num, **cells))
    assert_same(sample(collab, IMAGES)[0], sample(plain, IMAGES)[0], f"codes, hand-over at {num}, {cells}")


@pytest.mark.parametrize("num", range(1, K))
def test_greedy_codes_are_the_plain_ones(quantizer, pair, num):
    plain = NextScaleDecoder(pair[0], quantizer, RampGuidance(1.5, K))
    collab = NextScaleDecoder(pair[1], quantizer, RampGuidance(1.5, K), rows(pair, num))
    assert_same(sample(collab, IMAGES, temperature=0.0)[0], sample(plain, IMAGES, temperature=0.0)[0], f"codes, hand-over at {num}")


def test_another_refiner_keeps_the_drafters_codes_and_makes_its_own(quantizer, pair):
    small = tiny_var.var_model(replace(CONFIG, depth=1, embed_dim=12, num_heads=3), seed=5)
    big = sample(NextScaleDecoder(pair[0], quantizer, RampGuidance(1.5, K)), IMAGES)[0]
    for num in range(1, K):
        made = sample(NextScaleDecoder(small, quantizer, RampGuidance(1.5, K), rows((pair[0], small), num)), IMAGES)[0]
        assert_same(made[:, : ENDS[num - 1]], big[:, : ENDS[num - 1]], f"codes before the hand-over at {num}")
        assert (made[:, ENDS[num - 1] :] != big[:, ENDS[num - 1] :]).any()


@pytest.mark.parametrize("num", range(1, K))
def test_the_drafters_cache_is_gone_before_the_refiners_is_made(quantizer, pair, num, monkeypatch):
    alive, made = [], []
    real = next_scale.KVCache

    def recorded(*arguments, **options):
        alive.append([ref() is not None for ref in made])
        cache = real(*arguments, **options)
        made.extend(weakref.ref(x) for x in (*cache.k, *cache.v))
        return cache

    monkeypatch.setattr(next_scale, "KVCache", recorded)
    small = tiny_var.var_model(replace(CONFIG, depth=1, embed_dim=12, num_heads=3), seed=5)
    decoder = NextScaleDecoder(small, quantizer, RampGuidance(1.5, K), rows((pair[0], small), num))
    _, stats = sample(decoder, IMAGES[:2])
    assert alive == [[], [False] * 2 * CONFIG.depth], "tensors of the first cache that were alive when the second was made"
    token = lambda config: 2 * 2 * 2 * config.depth * config.embed_dim * 4  # two images, halves, keys and values, float32  # noqa: E731
    assert stats["kv_bytes"] == max(token(CONFIG) * ENDS[num - 1], token(small.config) * ENDS[-2])
