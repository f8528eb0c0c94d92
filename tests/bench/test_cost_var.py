"""The count of VAR against published figures, and against the operations that torch counts."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny_var
import torch

from arsp.bench.cost_var import (
    MAP,
    OUTPUT,
    attention_cost,
    cache_bytes,
    collab_cost,
    count_parts,
    count_steps,
    dense_savings,
    tokenizer_parts,
    total_macs,
)
from arsp.decode.guidance import RampGuidance
from arsp.decode.next_scale import NextScaleDecoder
from arsp.decode.schedule import ScaleStep
from arsp.errors import ConfigError
from arsp.models.var import VARConfig
from arsp.protocols import Request
from arsp.sparse.policy import LiteVARPolicy
from arsp.sparse.profile import uniform_profile
from arsp.tokenizers.var_vqvae import PATCH_NUMS, VQVAEConfig

SIDES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
PUBLISHED_KEPT = 0.2966  # the official script's figure for VAR-d30


def sizes_of(depth, patch_nums=PATCH_NUMS[256], shared_aln=False):
    return VARConfig(depth=depth, embed_dim=64 * depth, num_heads=depth, patch_nums=patch_nums, shared_aln=shared_aln)


@pytest.mark.parametrize(
    ("sizes", "attention", "linears", "head", "adaln", "both_tera"),
    [
        (sizes_of(16), 18.8, 273.8, 5.7, 2.1, 0.601),
        (sizes_of(20), 29.3, 534.8, 7.1, 4.0, 1.150),
        (sizes_of(24), 42.2, 924.1, 8.6, 6.9, 1.964),
        (sizes_of(30), 66.0, 1804.9, 10.7, 13.4, 3.790),
        (sizes_of(16, PATCH_NUMS[512]), 214.3, 901.9, 18.8, 2.1, 2.274),
        (sizes_of(36, PATCH_NUMS[512]), 1084.9, 10273.7, 42.3, 23.1, 22.85),
        (sizes_of(16, SIDES_1024), 3732.6, 3805.5, 79.3, 2.9, 15.24),
    ],
)
def test_the_table_of_official_sizes(sizes, attention, linears, head, adaln, both_tera):
    """Giga-FLOP (two per MAC) of one half of guidance, modulation at every scale as in the official code, without word_embed."""
    giga = {part.name: part.macs / 1e9 for part in count_parts(sizes, adaln_per_scale=True)}  # two halves x MAC = one half x FLOP
    got = [
        giga["attention"],
        sum(giga[name] for name in ("qkv", "proj", "fc1", "fc2")),
        giga["head"],
        giga["ada_lin"] + giga["head ada_lin"],
    ]
    assert [round(value, 1) for value in got] == [attention, linears, head, adaln]
    assert 2 * sum(got) / 1e3 == pytest.approx(both_tera, abs=6e-4 if both_tera < 10 else 6e-3)


def test_litevar_savings_and_the_papers_figure():
    cost = attention_cost(sizes_of(30), dense_savings(sizes_of(30), kept=PUBLISHED_KEPT, share=MAP))
    lines = {part.name: round(100 * saved, 1) for part, saved in cost.lines()}
    assert cost.pairs == 286_434
    assert lines == {
        "attention, dense": 0.0,
        "attention, windowed": 70.3,
        "attention, windowed and shared": 77.8,
        "attention, as the LiteVAR paper counts sharing": 85.2,
    }
    output = attention_cost(sizes_of(30), dense_savings(sizes_of(30), kept=PUBLISHED_KEPT, share=OUTPUT))
    assert output.shared == output.official_claim  # what the paper counts is what sharing the output would give


def test_sharing_saves_projections_and_cache():
    sizes = sizes_of(30)
    linears = lambda savings: sum(p.macs for p in count_parts(sizes, savings) if p.name in ("qkv", "proj", "fc1", "fc2"))
    for share, linear, cache in ((MAP, 1 / 12, 0.25), (OUTPUT, 1 / 6, 0.5)):
        savings = dense_savings(sizes, share=share)
        assert 1 - linears(savings) / linears(None) == pytest.approx(linear)
        assert 1 - cache_bytes(sizes, savings) / cache_bytes(sizes) == pytest.approx(cache)


def test_sharing_of_some_layers_and_scales_only():
    sizes = sizes_of(2, (1, 2))
    savings = dense_savings(sizes)
    savings.share_DK[1, 1] = MAP
    cost, C = attention_cost(sizes, savings), sizes.embed_dim
    assert cost.dense - cost.shared == 20 * C  # one Q K^T over the 20 pairs of scale 1
    qkv = lambda s: next(p.macs for p in count_parts(sizes, s) if p.name == "qkv")
    assert qkv(None) - qkv(savings) == 4 * 2 * C * C  # queries and keys of four positions


def test_without_guidance_there_is_one_half_and_nothing_to_share():
    sizes = sizes_of(16)
    halves, one = count_parts(sizes), count_parts(sizes, dense_savings(sizes, share=OUTPUT), guidance=False)
    assert [2 * p.macs for p in one if p.name != "word_embed"] == [p.macs for p in halves if p.name != "word_embed"]
    assert cache_bytes(sizes, guidance=False) * 2 == cache_bytes(sizes)


@pytest.mark.parametrize(
    ("sizes", "megabytes", "kept"),
    [(sizes_of(16), 89.1, 0.624), (sizes_of(30), 313.3, 0.624), (sizes_of(36, PATCH_NUMS[512]), 1486.4, 0.543)],
)
def test_cache_with_and_without_the_last_scale(sizes, megabytes, kept):
    full = cache_bytes(sizes, last_scale=True)
    assert round(full / 1e6, 1) == megabytes and round(cache_bytes(sizes) / full, 3) == kept


@pytest.mark.parametrize(("size", "giga_flop"), [(256, 393.7), (512, 1582.9)])
def test_tokenizer_decoder(size, giga_flop):
    macs = {part.name: part.macs for part in tokenizer_parts(VQVAEConfig(patch_nums=PATCH_NUMS[size]))}
    assert round(2 * macs["tokenizer decoder"] / 1e9, 1) == giga_flop


@pytest.mark.parametrize(("draft_scales", "ratio"), [(9, 1.29), (8, 1.90), (7, 2.63), (6, 3.47)])
def test_collaborative_decoding_of_d30_and_d16(draft_scales, ratio):
    assert collab_cost(sizes_of(30), sizes_of(16), draft_scales).ratio == pytest.approx(ratio, abs=0.01)


def test_scales_add_up():
    sizes, once = sizes_of(16), ("ada_lin", "head ada_lin")
    whole = {p.name: p.macs for p in count_parts(sizes)}
    halves = [{p.name: p.macs for p in count_parts(sizes, scales=scales)} for scales in (range(6), range(6, 10))]
    assert all(whole[name] == sum(half[name] for half in halves) for name in whole if name not in once)
    no_logits = {p.name: p.macs for p in count_parts(sizes, head_from=6)}
    assert (
        no_logits["head"] == halves[1]["head"]
        and total_macs(count_parts(sizes)) - whole["head"] == sum(no_logits.values()) - no_logits["head"]
    )


def test_impossible_collaborations_are_refused():
    with pytest.raises(ConfigError, match="1..9"):
        collab_cost(sizes_of(30), sizes_of(16), 10)
    with pytest.raises(ConfigError, match="one tokenizer"):
        collab_cost(sizes_of(36, PATCH_NUMS[512]), sizes_of(16), 8)


def test_kept_pairs_may_differ_by_layer_and_scale():
    sizes = sizes_of(2, (1, 2, 3))
    kept = np.array([[1, 1, 1], [1, 1, 0.5]])
    cost = attention_cost(sizes, dense_savings(sizes, kept=kept))
    assert cost.dense - cost.windowed == 2 * 2 * sizes.embed_dim * 63


# -- schedules ------------------------------------------------------------------------------------------------------------------


def step(size, owner="", **how):
    return ScaleStep(SimpleNamespace(config=sizes_of(size)), owner, **how)


@pytest.mark.parametrize("guidance", [True, False])
def test_a_schedule_of_defaults_costs_what_the_model_does(guidance):
    plain = {part.name: part.macs for part in count_parts(sizes_of(16), guidance=guidance)}
    assert {part.name: part.macs for part in count_steps([step(16)] * 10, guidance=guidance)} == plain


@pytest.mark.parametrize("num", [1, 6, 9])
def test_two_models_cost_what_collaborative_decoding_does(num):
    found = collab_cost(sizes_of(30), sizes_of(16), num)
    assert total_macs(count_steps([step(30)] * num + [step(16, "small")] * (10 - num))) == found.draft + found.refine


def test_less_depth_less_guidance_and_sharing_cost_less():
    parts = lambda steps: {part.name: part.macs for part in count_steps(steps)}  # noqa: E731
    plain = parts([step(16)] * 10)
    half = parts([step(16, depth=8)] * 10)
    assert half["fc1"] == plain["fc1"] / 2 and half["head"] == plain["head"] and half["ada_lin"] == plain["ada_lin"]
    last = parts([step(16)] * 9 + [step(16, guided=False)])
    assert plain["fc1"] - last["fc1"] == 256 * 1024 * 4096 * 16, "the null rows of the last scale"
    shared = parts([step(16, shared=True)] * 10)
    assert shared["qkv"] == plain["qkv"] * 2 / 3, "no queries and keys of the null half"
    assert shared["proj"] == plain["proj"]


def test_windows_cost_what_the_policy_counts_while_it_runs(monkeypatch, one_thread):
    monkeypatch.setattr("arsp.sparse.policy.skips_windows", lambda *tensors: True)  # also where nothing can be compiled
    sides = (1, 2, 3, 4, 6)
    model = tiny_var.var_model(VARConfig(**{**vars(tiny_var.CONFIG), "patch_nums": sides}))
    policy = LiteVARPolicy(uniform_profile("tiny", 1, patch_nums=sides, depth=2, heads=2))
    steps = [ScaleStep(model, policy=policy)] * 5
    tokenizer = tiny_var.tokenizer_model(type(tiny_var.VQ)(**{**vars(tiny_var.VQ), "patch_nums": sides}))
    decoder = NextScaleDecoder(model, tokenizer.quantize, RampGuidance(1.5, 5), steps)
    decoder.teacher_forced(Request(torch.arange(1), 0, labels_B=torch.tensor([1])), torch.zeros(1, 66, dtype=torch.int64))
    (attention,) = (part for part in count_steps(steps) if part.name == "attention")
    assert policy.windowed.any() and attention.macs == policy.report()["pairs"]["executed"] * model.config.head_dim
