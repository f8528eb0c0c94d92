"""The policy inside a whole VAR decode: nothing changes where nothing is saved, and the counter counts what is really run."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import arsp.kernels  # noqa: F401 - registers the custom operators
from arsp.bench.cost_var import Savings, attention_cost, cache_bytes, count_parts
from arsp.decode.ar import sample_ar
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import RampGuidance
from arsp.decode.next_scale import NextScaleDecoder
from arsp.decode.schedule import ScaleStep
from arsp.models.var import VAR, VARConfig
from arsp.protocols import Request
from arsp.sparse.policy import CalibrationPolicy, LiteVARPolicy
from arsp.sparse.profile import Profile, uniform_share
from arsp.sparse.window import empty_windows, pairs_per_scale
from arsp.testing.tolerance import assert_close
from arsp.tokenizers.var_vqvae import MultiScaleQuantizer, VQVAEConfig

SIDES, HEADS, DEPTH = (1, 2, 3, 5), 2, 2
K = len(SIDES)
CONFIG = VARConfig(depth=DEPTH, embed_dim=24, num_heads=HEADS, num_classes=3, vocab_size=11, code_dim=4, patch_nums=SIDES)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = VAR(CONFIG).eval()
    model.init_weights(torch.Generator().manual_seed(1), adaln_gamma=1.0)
    return model


@pytest.fixture(scope="module")
def quantizer():
    torch.manual_seed(1)
    return MultiScaleQuantizer(VQVAEConfig(z_channels=4, vocab_size=11, patch_nums=SIDES)).eval()


def profile_of(share="none", windows=True):
    win = empty_windows(K, DEPTH, HEADS)
    if windows:
        win[:, 0, 3, 1:], win[:, 1, 3, 1:] = 1, (0, 1, 1)
    return Profile("tiny", None, SIDES, win, uniform_share(share, DEPTH, K))


def decoder_of(model, quantizer, policy=None, cfg=1.5):
    steps = None if policy is None else [ScaleStep(model, policy=policy)] * K
    return NextScaleDecoder(model, quantizer, RampGuidance(cfg, K), steps)


def request_of(batch):
    return Request(torch.arange(batch), 5, labels_B=torch.arange(batch) % 3)


def test_a_profile_without_savings_gives_the_same_logits(model, quantizer):
    codes = torch.randint(11, (2, sum(s * s for s in SIDES)), generator=torch.Generator().manual_seed(0))
    plain = decoder_of(model, quantizer).teacher_forced(request_of(2), codes)
    dense = decoder_of(model, quantizer, LiteVARPolicy(profile_of(windows=False))).teacher_forced(request_of(2), codes)
    windowed = decoder_of(model, quantizer, LiteVARPolicy(profile_of())).teacher_forced(request_of(2), codes)
    assert torch.equal(plain, dense)
    assert torch.equal(plain[:, :14], windowed[:, :14]) and not torch.allclose(plain[:, 14:], windowed[:, 14:], atol=1e-3)


@pytest.mark.parametrize("share", ["none", "map", "output"])
def test_the_counter_counts_what_a_decode_runs(model, quantizer, share, monkeypatch):
    monkeypatch.setattr("arsp.sparse.policy.skips_windows", lambda *tensors: True)  # also where nothing can be compiled
    profile = profile_of(share)
    policy = LiteVARPolicy(profile)
    linear = lambda x, weight, *_, **__: 2 * int(np.prod(x)) * weight[0]  # noqa: E731 - shapes: two FLOP a MAC
    ops = {torch.ops.aten.linear: linear, torch.ops.arsp.small_linear: linear}
    with FlopCounterMode(display=False, custom_mapping=ops) as counter:
        result = sample_ar(decoder_of(model, quantizer, policy), request_of(1), pipeline=LogitsPipeline())
    flops = {str(op): num for op, num in counter.get_flop_counts()["Global"].items()}
    linears = sum(num for op, num in flops.items() if "linear" in op) // 2

    pairs = pairs_per_scale(profile.win, SIDES, "2d").mean(1)
    savings = Savings(pairs, profile.share.astype(int))
    parts = {part.name: part.macs for part in count_parts(CONFIG, savings)}
    assert linears == sum(macs for name, macs in parts.items() if name != "attention")
    cost, report = attention_cost(CONFIG, savings), policy.report()["pairs"]
    in_macs = {name: pairs * CONFIG.head_dim for name, pairs in report.items()}
    assert in_macs == {"dense": cost.dense, "windowed": cost.windowed, "executed": cost.shared}
    assert result.stats["kv_bytes"] == cache_bytes(CONFIG, savings, dtype=torch.float32)


def test_without_guidance_nothing_is_shared(model, quantizer):
    policy = LiteVARPolicy(profile_of("output", windows=False))
    shared = sample_ar(decoder_of(model, quantizer, policy, cfg=0.0), request_of(2), pipeline=LogitsPipeline())
    assert torch.equal(shared.codes_BL, sample_ar(decoder_of(model, quantizer, cfg=0.0), request_of(2), pipeline=LogitsPipeline()).codes_BL)
    assert policy.report()["executed_share"] == 1.0


def test_calibration_sees_every_layer_and_changes_nothing(model, quantizer):
    policy = CalibrationPolicy(SIDES, HEADS, [2, 3], "2d", cut=0.0)
    codes = torch.randint(11, (2, sum(s * s for s in SIDES)), generator=torch.Generator().manual_seed(0))
    got = decoder_of(model, quantizer, policy).teacher_forced(request_of(2), codes)
    assert_close(got, decoder_of(model, quantizer).teacher_forced(request_of(2), codes), abs_tol=1e-4, what="logits")
    assert set(policy.histograms) == {(layer, s) for layer in range(DEPTH) for s in (2, 3)}
    assert policy.histograms[1, 3].rows == 4
    for kind in ("map", "output"):
        assert policy.errors(kind).shape == (DEPTH, K)
    assert policy.errors("map")[0, 0] == 0 < policy.errors("map")[1, 3]  # scale 0 has one key
