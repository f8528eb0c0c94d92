"""Windows, counts and outputs of the official LiteVAR code, bit for bit where they are integers."""

import numpy as np
import pytest
import torch

from arsp.sparse.litevar import MassHistogram, calibration_output, masked_attention
from arsp.sparse.window import DENSE, OFFICIAL_SIDES, kept_pairs, scale_mask, windowed_keys
from arsp.testing.golden import find_cases
from arsp.testing.tolerance import assert_close, assert_same

pytestmark = pytest.mark.golden
WINDOWS, MASKS = find_cases(kind="litevar_windows"), find_cases(kind="litevar_mask")


def sides_of(case):
    return tuple(case.meta.get("patch_nums", OFFICIAL_SIDES))


def scales_of(case):
    return sorted(int(key.removeprefix("windows_")) for key in case.io if key.startswith("windows_"))


def prefix(sides, s):
    return sum(side**2 for side in sides[: s + 1])


@pytest.mark.parametrize(("case", "s"), [(case, s) for case in WINDOWS for s in scales_of(case)], ids=str)
def test_calibration_chooses_the_official_windows(case, s):
    io, keys, sides = case.io, windowed_keys(s), sides_of(case)
    q, k, v = io[f"q_{s}"].float(), io["k_all"][:, :, : prefix(sides, s)].float(), io["v_all"][:, :, : prefix(sides, s)].float()
    attention = (q @ k.transpose(-1, -2)).softmax(-1)
    histogram = MassHistogram(case.meta["heads"], sides, s, "1d")
    for rows in attention.split(1):
        histogram.add(rows)
    windows = histogram.choose(case.meta["threshold"])
    assert (windows[:, [u for u in range(s + 1) if u not in keys]] == DENSE).all()

    counts = torch.tensor([[sides[u] ** 2] for u in keys])  # recorded where no candidate holds enough
    chosen = torch.from_numpy(windows[:, list(keys)].astype(np.int32)).T
    assert_same(torch.where(chosen == DENSE, counts, chosen), io[f"windows_{s}"], f"windows of scale {s}")
    kept = [sum(kept_pairs(sides[s], sides[u], int(w), "1d") for w in windows[:, u]) for u in keys]
    assert_same(torch.tensor(kept), io[f"kept_{s}"], f"kept pairs of scale {s}")
    out = calibration_output(attention, v, windows, sides, s)
    assert_close(out, io[f"out_{s}"], abs_tol=case.meta["tolerance"]["out_atol"], what=f"calibration output of scale {s}")


@pytest.mark.parametrize("case", MASKS, ids=str)
def test_inference_with_masks(case):
    io, s = case.io, case.meta["query_scale"]
    windows = np.full((case.meta["heads"], s + 1), DENSE)
    for d, row in enumerate(io["windows"].numpy()):
        windows[:, s - d] = row
    kept = scale_mask(windows, sides_of(case), s, "1d")
    assert_same(kept, io["mask_allowed"].bool(), "mask")

    q, k, v, half = io["q"], io["k"], io["v"], len(io["q"]) // 2
    shared = (q[:half], k[:half], v, kept)  # official mode 2: the map of the first half serves both
    cases = {
        "out_neginf": masked_attention(q, k, v, kept),
        "out_logit_mode1": masked_attention(q, k, v, kept, "official-logit0"),
        "out_logit_mode2": masked_attention(*shared, "official-logit0"),
        "out_postsoftmax_mode1": masked_attention(q, k, v, kept, "official-post"),
        "out_postsoftmax_mode2": masked_attention(*shared, "official-post"),
    }
    for name, got in cases.items():
        assert_close(got, io[name], abs_tol=case.meta["tolerance"]["atol"], what=name)
