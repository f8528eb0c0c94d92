"""From a model to its LiteVAR profile: the model samples its own images, their attention is summed up, windows are chosen once.

Training-free. The official code (arXiv 2411.17178) calibrates on a few batches and merges their masks in a way that is not published;
here the masses of all batches are added up before the choice, every batch has other images, and all maps are those of the dense
network (official: later layers see the output of earlier, already windowed ones).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from arsp.bench.cost_var import AttentionCost, Part, Savings, attention_cost
from arsp.decode.ar import ARGenerator
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import RampGuidance
from arsp.decode.schedule import ScaleStep
from arsp.models.var import VARConfig
from arsp.protocols import Request
from arsp.rng import keyed_labels
from arsp.sparse.litevar import CUT, choose_windows
from arsp.sparse.policy import DENSE_ABOVE, CalibrationPolicy, LiteVARPolicy
from arsp.sparse.profile import SHARES, Profile
from arsp.sparse.window import Geometry, pairs_per_scale, windowed_blocks
from arsp.zoo.load import LoadedModel


@torch.inference_mode()
def record_attention(
    model: LoadedModel,
    guidance: RampGuidance,
    pipeline: LogitsPipeline,
    *,
    num: int,
    batch_size: int,
    seed: int,
    geometry: Geometry,
    cut: float = CUT,
    callback: Callable[[int], None] = lambda images: None,
) -> CalibrationPolicy:
    """Sample ``num`` images densely and keep what the choice of windows needs. ``callback`` is told the images of every batch."""
    config, module = model.source.config, model.module
    sides = tuple(config["patch_nums"])
    scales = sorted({s for s, _ in windowed_blocks(len(sides), geometry)})
    policy = CalibrationPolicy(sides, config["num_heads"], scales, geometry, cut)
    generator = ARGenerator(model.decoder(guidance, [ScaleStep(module, policy=policy)] * len(sides)), pipeline)
    device = next(module.parameters()).device
    for ids in torch.arange(num).split(batch_size):
        labels = keyed_labels(seed, ids, config["num_classes"])
        generator.generate(Request(ids.to(device), seed, labels_B=labels.to(device)))
        callback(len(ids))
    return policy


def choose_share(kind: str, errors: np.ndarray, max_error: float | None = None) -> np.ndarray:
    """``share[layer, s]``: the rule ``kind`` everywhere, or, with ``max_error``, from the first scale on behind which the relative error
    ``errors[layer, s]`` of the layer never exceeds it (what is shared once stays shared)."""
    good = np.ones(errors.shape, bool) if max_error is None else errors <= max_error
    suffix = np.minimum.accumulate(good[:, ::-1], axis=1)[:, ::-1]
    return (suffix * SHARES.index(kind)).astype(np.int8)


def make_profile(
    model: LoadedModel, recorded: CalibrationPolicy, *, mask: str, tau: float, share: str, max_share_error: float | None, **facts: Any
) -> Profile:
    """The profile of a model from its recorded attention; ``facts`` go into its calibration block."""
    config = model.source.config
    sides = tuple(config["patch_nums"])
    win = choose_windows(recorded.histograms, config["depth"], config["num_heads"], sides, recorded.geometry, tau)
    errors = recorded.errors("output" if share == "output" else "map")
    return Profile(
        model.source.label, model.sha256, sides, win, choose_share(share, errors, max_share_error), recorded.geometry, mask, tau,
        recorded.cut, {**facts, "share_error": errors.round(4).tolist()},
    )  # fmt: skip


def attention_lines(config: VARConfig, policy: LiteVARPolicy, *, guidance: bool = True) -> tuple[list[tuple[Part, float]], AttentionCost]:
    """Attention of one image with a profile: the count's lines, then what is really run (dense where a window would keep too much, and
    everywhere where windows are only masked), each with the share saved; and the count of the latter."""
    profile = policy.profile
    share = profile.share.astype(int)
    pairs = pairs_per_scale(profile.win, profile.patch_nums, profile.geometry).mean(1)
    claimed = attention_cost(config, Savings(pairs, share), guidance=guidance)
    run = attention_cost(config, Savings(policy.executed_pairs(), share), guidance=guidance)
    why = (
        "windows are only masked"
        if policy.simulated
        else f"{len(policy.dense_instead)} (layer, scale) above {DENSE_ABOVE:.0%} kept run dense"
    )
    last = Part("attention, executed", run.shared, f"as above, {why}")
    return [*claimed.lines(), (last, 1 - run.shared / run.dense)], run
