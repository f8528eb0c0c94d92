"""The choice of windows on maps whose answer is known, for layouts and head counts that the official tables do not cover."""

import numpy as np
import pytest
import torch

from arsp.sparse.litevar import CANDIDATES, GENERIC_DROP_BELOW, MassHistogram, candidates, choose_windows
from arsp.sparse.window import DENSE, DROPPED, OFFICIAL_SIDES, reach

SIDES = (1, 2, 3, 4, 6)
T = sum(side**2 for side in SIDES)
S = len(SIDES) - 1
STARTS = {u: sum(side**2 for side in SIDES[:u]) for u in range(len(SIDES))}


def map_with(shares, distances, geometry="2d", rows=2, heads=1):
    """Every query spreads ``shares[u]`` of its mass evenly over the keys of scale u within ``distances[u]``."""
    attention = torch.zeros(rows, heads, SIDES[S] ** 2, T)
    for u, share in shares.items():
        kept = (reach(SIDES[S], SIDES[u], geometry) <= distances[u]).float()
        attention[..., STARTS[u] : STARTS[u] + SIDES[u] ** 2] = share * kept / kept.sum(1, keepdim=True)
    return attention


def choose(attention, tau=0.95, geometry="2d", **more):
    histogram = MassHistogram(attention.shape[1], SIDES, S, geometry, **{"cut": 0.0, **more})
    histogram.add(attention)
    return histogram.choose(tau, blocks=[4, 3])


@pytest.mark.parametrize("geometry", ["1d", "2d"])
def test_the_smallest_window_that_holds_the_mass_is_taken(geometry):
    attention = map_with({0: 0.2, 4: 0.4, 3: 0.4}, {0: 1, 4: 2, 3: 1}, geometry)
    assert choose(attention, geometry=geometry).tolist() == [[DENSE, DENSE, DENSE, 1, 2]]
    assert choose(attention, tau=0.3, geometry=geometry)[0, 4] == 1


def test_light_blocks_are_dropped_and_what_is_cut_leaves_the_total():
    light = map_with({0: 1 - 2 * 0.9 * GENERIC_DROP_BELOW, 4: 0.9 * GENERIC_DROP_BELOW, 3: 0.9 * GENERIC_DROP_BELOW}, {0: 1, 4: 1, 3: 1})
    assert choose(light)[0, 3:].tolist() == [DROPPED, DROPPED]
    # scale 3 holds 4.9 % of everything, but more than 5 % once half of scale 4 is cut off
    later = map_with({0: 0.451, 4: 0.5, 3: 0.049}, {0: 1, 4: 5, 3: 1})
    assert choose(later, tau=0.95)[0, 3] == DROPPED and choose(later, tau=0.5)[0, 3] == 1


def test_batches_are_added_up_before_the_choice():
    near, far = map_with({0: 0.5, 4: 0.5}, {0: 1, 4: 1}), map_with({0: 0.5, 4: 0.5}, {0: 1, 4: 4})
    histogram = MassHistogram(1, SIDES, S, "2d", cut=0.0)
    for attention in (near, far, far):
        histogram.add(attention)
    both = histogram.choose(0.6, blocks=[4])[0, 4]
    assert choose(near, tau=0.6)[0, 4] < both < choose(far, tau=0.6)[0, 4] and histogram.rows == 6


def test_entries_below_the_cut_count_nothing_and_a_head_without_mass_keeps_everything():
    uniform = torch.full((2, 1, SIDES[S] ** 2, T), 1 / T)
    assert (choose(uniform, cut=1.01 / T) == DENSE).all()
    assert choose(uniform, cut=0.99 / T)[0, 4] > 0


def test_head_counts_without_a_list_try_every_window():
    assert candidates(16, OFFICIAL_SIDES, 9, 8) is CANDIDATES[16][9][1]
    assert candidates(20, OFFICIAL_SIDES, 9, 8) == list(range(1, 170))
    assert candidates(16, SIDES, 4, 4) == list(range(1, 37))
    assert candidates(16, OFFICIAL_SIDES, 9, 9, "2d") == list(range(1, 16))
    assert all(trial == sorted(trial) for table in CANDIDATES.values() for lists in table.values() for trial in lists)


def test_windows_of_a_model_leave_the_oldest_tokens_dense():
    histogram = MassHistogram(1, SIDES, S, "2d", cut=0.0)
    histogram.add(map_with({0: 0.2, 2: 0.2, 3: 0.3, 4: 0.3}, {0: 1, 2: 1, 3: 1, 4: 1}))
    windows = choose_windows({(1, S): histogram}, 3, 1, SIDES, "2d")
    assert windows.shape == (3, 1, 5, 5) and windows.dtype == np.int16
    assert (windows[[0, 2]] == DENSE).all() and windows[1, 0, S].tolist() == [DENSE, DENSE, DENSE, 1, 1]
