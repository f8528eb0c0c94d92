"""The policy computes what the masks say, skips what it claims to skip, and reads shared rows from a cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from arsp.errors import ConfigError
from arsp.models.attention import AttentionContext, DensePolicy, KVCache
from arsp.sparse.litevar import masked_attention
from arsp.sparse.policy import CalibrationPolicy, LiteVARPolicy
from arsp.sparse.profile import Profile, uniform_share
from arsp.sparse.window import empty_windows, pairs_per_scale, scale_mask, uniform_2d
from arsp.testing.tolerance import assert_close

SIDES, HEADS, WIDTH = (1, 2, 3, 5), 3, 8
ENDS = np.cumsum([side**2 for side in SIDES]).tolist()


def profile_of(geometry="2d", mask="neginf", share="none"):
    """Head 0 is narrow, head 1 drops a key scale, head 2 keeps the newest scales whole; layer 1 is dense."""
    win = empty_windows(len(SIDES), 2, HEADS)
    win[0, 0, 3, 1:], win[0, 1, 3, 1:], win[0, 2, 3, 1:] = 1, (0, 1, 1), (1, 0, 1)
    return Profile("var", None, SIDES, win, uniform_share(share, 2, len(SIDES)), geometry, mask)


def qkv(rows, first, last, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = ENDS[last] - (ENDS[first - 1] if first else 0)
    return [torch.randn(rows, HEADS, n, WIDTH, generator=generator) for _ in range(3)]


def context(first, last, share="none", **more):
    return AttentionContext(
        ENDS[last],
        shares=[share] * 2 if share else (),
        start=ENDS[first - 1] if first else 0,
        scale=0.7,
        scales=(first, last),
        sides=SIDES,
        **more,
    )


def expected(q, k, v, profile, layer, first, last, scale=0.7):
    parts, start = [], 0
    for s in range(first, last + 1):
        n = SIDES[s] ** 2
        kept = scale_mask(profile.win[layer, :, s], SIDES, s, profile.geometry)
        parts.append(masked_attention(scale * q[:, :, start : start + n], k[:, :, : ENDS[s]], v[:, :, : ENDS[s]], kept, profile.mask))
        start += n
    return torch.cat(parts, 2)


@pytest.mark.parametrize(
    ("geometry", "mask", "simulated"),
    [("2d", "neginf", False), ("1d", "neginf", True), ("2d", "official-logit0", True), ("2d", "official-post", True)],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_pass_over_several_scales_equals_the_masks(geometry, mask, simulated, layer):
    profile = profile_of(geometry, mask)
    policy, (q, k, v) = LiteVARPolicy(profile), qkv(2, 0, 3)
    assert policy.masked == simulated == policy.simulated and policy.windowed[0, 3] and not policy.dense_instead
    got = policy.attend(q, k, v, layer, context(0, 3))
    assert_close(got, expected(q, k, v, profile, layer, 0, 3), abs_tol=2e-5, what="attention")


def test_scale_by_scale_through_the_cache_with_a_shared_map():
    profile = profile_of(share="map")
    policy, B = LiteVARPolicy(profile), 2
    q, k, v = qkv(B, 0, 3)
    v = torch.cat((v, qkv(B, 0, 3, seed=1)[2]))
    cache = KVCache(2, 2 * B, HEADS, ENDS[2], WIDTH, dtype=q.dtype, device="cpu", key_rows=[B, B])
    got, start = [], 0
    for s, end in enumerate(ENDS):
        ctx = context(s, s, "map", cache=cache, keep=s < 3)
        got.append(policy.attend(q[:, :, start:end], k[:, :, start:end], v[:, :, start:end], 0, ctx))
        start = end
    assert policy.share(0, 3) == "map"
    assert_close(torch.cat(got, 2), expected(q, k, v, profile, 0, 0, 3), abs_tol=2e-5, what="attention")


def test_counts_say_what_was_run(monkeypatch):
    monkeypatch.setattr("arsp.sparse.policy.skips_windows", lambda *tensors: True)  # also where nothing can be compiled
    profile = profile_of(share="map")
    q, k, v = qkv(2, 3, 3)
    k, v = (torch.randn(2, HEADS, ENDS[3], WIDTH) for _ in range(2))
    v = torch.cat((v, v))
    dense, kept = HEADS * 25 * ENDS[3], int(pairs_per_scale(profile.win, SIDES, "2d")[0, :, 3].sum())
    for masked, executed in ((profile, 6 * kept), (replace(profile, geometry="1d"), 6 * dense)):
        policy = LiteVARPolicy(masked)
        policy.attend(q, k, v, 0, replace(context(3, 3, "map"), cache=None))
        count = policy.counts[3]
        assert count.dense == 2 * 4 * dense and count.executed == executed  # two products, four rows; maps of two of them
    assert LiteVARPolicy(profile).report()["pairs"] == {"dense": 0, "windowed": 0, "executed": 0}
    policy = LiteVARPolicy(profile)
    policy.attend(q, k, v, 0, context(3, 3, "map"))
    report = policy.report()
    assert report["executed_share"] == pytest.approx(6 * kept / (8 * dense)) and report["pairs"]["windowed"] == 8 * kept
    assert [entry["scale"] for entry in report["scales"]] == [3] and not report["simulated"]


def test_without_the_kernel_nothing_is_skipped_and_said_so(monkeypatch):
    monkeypatch.setattr("arsp.sparse.policy.skips_windows", lambda *tensors: False)
    policy = LiteVARPolicy(profile_of())
    assert not policy.simulated
    policy.attend(*qkv(1, 0, 3), 0, context(0, 3))
    assert policy.simulated and policy.counts[3].executed == policy.counts[3].dense > policy.counts[3].windowed


def test_sharing_the_output_counts_the_half_that_is_not_there():
    profile = profile_of(share="output")
    q, k, v = qkv(2, 3, 3)
    k, v = (torch.randn(2, HEADS, ENDS[3], WIDTH) for _ in range(2))
    policy = LiteVARPolicy(profile)
    policy.attend(q, k, v, 1, context(3, 3, "output"))
    assert policy.counts[3].executed * 2 == policy.counts[3].dense
    unguided = LiteVARPolicy(profile)
    unguided.attend(q, k, v, 1, context(3, 3, share=""))
    assert unguided.counts[3].executed == unguided.counts[3].dense


def test_wide_windows_are_computed_dense_and_said_so():
    win = empty_windows(len(SIDES), 1, HEADS)
    win[0, :, 3] = uniform_2d(SIDES, 2)[3]
    profile = Profile("var", None, SIDES, win, uniform_share("none", 1, len(SIDES)))
    assert profile.kept()[0, 3] > 0.4
    policy, (q, k, v) = LiteVARPolicy(profile), qkv(1, 0, 3)
    assert policy.dense_instead == [(0, 3)] and policy.report()["dense_instead"] == [[0, 3]]
    assert_close(policy.attend(q, k, v, 0, context(0, 3)), DensePolicy().attend(q, k, v, 0, context(0, 3)), abs_tol=1e-6, what="attention")
    assert policy.counts[3].executed == policy.counts[3].dense > policy.counts[3].windowed


def test_a_pass_over_other_scales_is_refused():
    q, k, v = qkv(1, 0, 3)
    with pytest.raises(ConfigError, match="raster"):
        LiteVARPolicy(profile_of()).attend(q, k, v, 0, AttentionContext(ENDS[3]))


def test_calibration_is_dense_attention_and_measures_the_halves():
    q, k, v = qkv(2, 0, 3)
    policy = CalibrationPolicy(SIDES, HEADS, [3], "2d", cut=0.0)
    for batch in (qkv(2, 0, 3, seed=7), (q, k, v)):
        got = policy.attend(*batch, 0, context(0, 3))
    assert_close(got, DensePolicy().attend(q, k, v, 0, context(0, 3)), abs_tol=2e-6, what="attention")
    assert set(policy.histograms) == {(0, 3)}
    mass = sum(float(h.sum()) for h in policy.histograms[0, 3].mass_u)
    assert mass == pytest.approx(2 * 2 * HEADS * 25, rel=1e-5)  # two batches of two rows, every query's weights sum to one
    same = CalibrationPolicy(SIDES, HEADS, [3], "2d")
    same.attend(*(torch.cat((x[:1], x[:1])) for x in (q, k, v)), 0, context(0, 3))
    assert (same.errors("map") == 0).all() and (policy.errors("map")[0] >= 0).all() and policy.errors("output")[0, 3] > 0.5
