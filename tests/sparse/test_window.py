"""Geometry of windows: every count is compared with the mask it counts, and with the published figures."""

import numpy as np
import pytest

from arsp.sparse.window import (
    DENSE,
    DROPPED,
    OFFICIAL_SIDES,
    block_mask,
    dense_pairs,
    empty_windows,
    first_windowed_scale,
    kept_pairs,
    pairs_per_scale,
    reach,
    scale_mask,
    tile_pairs,
    uniform_1d,
    uniform_2d,
    windowed_blocks,
    windowed_keys,
)

SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
SIDES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
BLOCKS = [(1, 1), (4, 1), (4, 4), (5, 3), (9, 6), (13, 10), (16, 13), (3, 2)]


def test_dense_pairs_of_the_official_grids():
    assert dense_pairs(OFFICIAL_SIDES) == [1, 20, 126, 480, 1375, 3276, 9920, 25500, 71656, 174080]
    assert [sum(dense_pairs(sides)) for sides in (OFFICIAL_SIDES, SIDES_512, SIDES_1024)] == [286_434, 3_269_850, 56_954_392]


@pytest.mark.parametrize("geometry", ["1d", "2d"])
@pytest.mark.parametrize(("side_s", "side_u"), BLOCKS)
def test_counts_equal_their_masks(side_s, side_u, geometry):
    for window in (DENSE, DROPPED, 1, 2, 3, 7, 40):
        kept, mask = kept_pairs(side_s, side_u, window, geometry), block_mask(side_s, side_u, window, geometry)
        assert mask.shape == (side_s**2, side_u**2) and kept == int(mask.sum()), (
            f"window {window}: {kept} counted, {int(mask.sum())} in the mask"
        )


@pytest.mark.parametrize(("side_s", "side_u"), BLOCKS)
def test_the_mask_is_the_written_formula(side_s, side_u):
    i, j = np.mgrid[: side_s**2, : side_u**2]
    y, x, row, col = i // side_s, i % side_s, j // side_u, j % side_u
    cy, cx = ((axis + 0.5) * side_u / side_s - 0.5 for axis in (y, x))
    for window in (1, 2, 3):
        band = np.abs(i * side_u**2 / side_s**2 - j) < window
        square = (np.abs(row - cy) <= window) & (np.abs(col - cx) <= window)
        assert (block_mask(side_s, side_u, window, "1d").numpy() == band).all()
        assert (block_mask(side_s, side_u, window, "2d").numpy() == square).all()


def test_every_query_reaches_some_key_with_the_smallest_2d_window():
    for side_s, side_u in BLOCKS:
        assert int(reach(side_s, side_u, "2d").amin(1).max()) == 1


@pytest.mark.parametrize(("rows", "share"), [(1, 0.221), (2, 0.387), (3, 0.526)])
def test_bands_keep_the_derived_share(rows, share):
    kept = int(pairs_per_scale(uniform_1d(OFFICIAL_SIDES, rows), OFFICIAL_SIDES, "1d").sum())
    assert round(kept / 286_434, 3) == share


@pytest.mark.parametrize(
    ("sides", "kept"),
    [(OFFICIAL_SIDES, [19_718, 55_386, 95_446, 133_242]), (SIDES_512, [71_354, 211_362, 386_426, 578_738])],
    ids=["256", "512"],
)
def test_2d_windows_keep_the_derived_pairs(sides, kept):
    assert [int(pairs_per_scale(uniform_2d(sides, r), sides, "2d").sum()) for r in (1, 2, 3, 4)] == kept


def test_dropping_every_windowed_block_leaves_3_2_percent():
    windows = empty_windows(10)
    for s, u in windowed_blocks(10, "1d"):
        windows[s, u] = DROPPED
    assert round(int(pairs_per_scale(windows, OFFICIAL_SIDES, "1d").sum()) / 286_434, 3) == 0.032


@pytest.mark.parametrize(
    ("sides", "tile", "percent"),
    [
        (OFFICIAL_SIDES, 2, [10.4, 24.3, 38.4]),
        (OFFICIAL_SIDES, 4, [19.0, 33.8, 48.5]),
        (OFFICIAL_SIDES, 8, [42.0, 54.8, 66.7]),
        (SIDES_512, 4, [5.9, 11.6, 18.0]),
        (SIDES_512, 8, [13.6, 20.2, 27.0]),
    ],
)
def test_what_query_tiles_compute(sides, tile, percent):
    blocks = [(sides[s], sides[u]) for s in range(len(sides)) for u in range(s + 1)]
    shares = [sum(tile_pairs(*block, r, tile) for block in blocks) / sum(dense_pairs(sides)) for r in (1, 2, 3)]
    assert [round(100 * share, 1) for share in shares] == percent


def test_tiles_of_one_query_compute_the_window_itself():
    assert all(tile_pairs(*block, r, 1) == kept_pairs(*block, r, "2d") for block in BLOCKS for r in (DENSE, DROPPED, 1, 2))


def test_the_official_code_windows_thirty_blocks():
    assert [windowed_keys(s) for s in range(5)] == [(), (), (), (3, 2), (4, 3, 2)]
    assert [len(windowed_keys(s)) for s in range(3, 10)] == [2, 3, 3, 4, 5, 6, 7]
    assert len(windowed_blocks(10, "1d")) == 30
    assert {u for s, u in windowed_blocks(10, "1d") if s >= 5} == set(range(3, 10))


def test_2d_windows_start_at_scale_five_of_ten_and_leave_fourteen_tokens_dense():
    assert [first_windowed_scale(count) for count in (4, 6, 10, 14)] == [3, 4, 5, 5]
    assert min(windowed_blocks(10, "2d")) == (5, 3) and {u for _, u in windowed_blocks(10, "2d")} == set(range(3, 10))


def test_scale_mask_joins_the_blocks_of_each_head():
    windows = np.array([[DENSE, 1, 2], [DENSE, DROPPED, DENSE]])
    mask = scale_mask(windows, (1, 2, 3), 2, "2d")
    assert mask.shape == (2, 9, 14)
    assert mask[:, :, :1].all() and (mask[0, :, 5:] == block_mask(3, 3, 2, "2d")).all()
    assert not mask[1, :, 1:5].any() and mask[1, :, 5:].all()
