"""Neighbours, clusters and distances of codebooks, and the files they are kept in."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from arsp.errors import ConfigError, InputError
from arsp.testing.golden import find_cases
from arsp.testing.tolerance import assert_close, assert_same
from arsp.tokenizers import geometry
from arsp.tokenizers.geometry import CodebookGeometry


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARSP_CACHE", str(tmp_path))
    return tmp_path / "geometry"


def codebook(V: int = 97, E: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(V, E, generator=torch.Generator().manual_seed(seed))


def by_definition(codebook_VE: torch.Tensor) -> torch.Tensor:
    """All other codes by distance, in the order of their ids where it is the same."""
    distance = (codebook_VE.double()[:, None] - codebook_VE.double()).square().sum(-1).sqrt().float().fill_diagonal_(torch.inf)
    return distance.sort(dim=1, stable=True).indices[:, :-1]


def never(*_):
    raise AssertionError("computed although it is on the disk")


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="lantern"), ids=str)
def test_all_neighbours_equal_the_recorded_ones(case):
    assert_same(CodebookGeometry(case.io["codebook"]).nearest(10**6), case.io["nearest"], "nearest")


@pytest.mark.parametrize("V, k", [(97, 96), (97, 13), (97, 1), (97, 500), (2, 1)])
def test_neighbours_are_those_of_the_definition(V, k):
    got = CodebookGeometry(codebook(V)).nearest(k)
    assert got.dtype == torch.int64
    assert_same(got, by_definition(codebook(V))[:, :k], "nearest")


def test_blocks_of_rows_change_nothing(monkeypatch):
    monkeypatch.setattr(geometry, "_BLOCK_ELEMENTS", 10 * 97)
    assert_same(CodebookGeometry(codebook()).nearest(30), by_definition(codebook())[:, :30], "nearest")


def test_equally_far_codes_come_in_the_order_of_their_ids():
    square = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1], [1, 0], [0, 1]])
    expected = [[4, 1, 3, 5, 2], [5, 0, 2, 4, 3], [1, 3, 5, 0, 4], [0, 2, 4, 1, 5], [0, 1, 3, 5, 2], [1, 0, 2, 4, 3]]
    assert CodebookGeometry(square).nearest(5).tolist() == expected
    repeated = codebook(8, 3).repeat(40, 1)  # every distance 40 times
    assert_same(CodebookGeometry(repeated).nearest(100), by_definition(repeated)[:, :100], "nearest")


@pytest.mark.parametrize("V, kept", [(97, torch.uint16), (65_536, torch.uint16), (65_537, torch.int32)])
def test_ids_are_kept_in_as_few_bytes_as_they_need(cache, monkeypatch, V, kept):
    highest = torch.full((V, 1), V - 1)
    monkeypatch.setattr(CodebookGeometry, "_nearest", lambda self, k, dtype: highest.to(dtype))
    assert_same(CodebookGeometry(codebook(V, 1)).nearest(1), highest, "nearest")
    (file,) = cache.iterdir()
    assert load_file(file)["nearest_Vk"].dtype == kept


def test_a_second_geometry_of_the_same_codebook_reads_the_file(cache, monkeypatch):
    neighbours, clusters = CodebookGeometry(codebook()).nearest(9), CodebookGeometry(codebook()).clusters(4, 1)
    monkeypatch.setattr(CodebookGeometry, "_nearest", never)
    monkeypatch.setattr(CodebookGeometry, "_clusters", never)
    again = CodebookGeometry(codebook().double())
    assert_same(again.nearest(9), neighbours, "nearest")
    for got, expected in zip(again.clusters(4, 1), clusters, strict=True):
        assert torch.equal(got, expected)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("ask", [lambda: CodebookGeometry(codebook(seed=1)).nearest(9), lambda: CodebookGeometry(codebook()).nearest(8)])
def test_another_codebook_or_question_is_computed(monkeypatch, ask):
    CodebookGeometry(codebook()).nearest(9)
    monkeypatch.setattr(CodebookGeometry, "_nearest", never)
    with pytest.raises(AssertionError, match="computed"):
        ask()


def test_the_same_numbers_in_another_shape_are_another_codebook():
    wide, tall = CodebookGeometry(codebook(12, 4)), CodebookGeometry(codebook(12, 4).reshape(24, 2))
    assert wide.nearest(3).shape == (12, 3)
    assert_same(tall.nearest(3), by_definition(tall.codebook_VE)[:, :3], "nearest")


def _cut(file):
    file.write_bytes(file.read_bytes()[:-5])


def _flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def _replace(file):
    save_file({"nearest_Vk": torch.zeros(97, 8, dtype=torch.uint16)}, file)


@pytest.mark.parametrize("damage", [_cut, _flip_a_bit, _replace])
def test_a_damaged_file_is_named_with_what_to_do(cache, damage):
    CodebookGeometry(codebook()).nearest(9)
    (file,) = cache.iterdir()
    damage(file)
    with pytest.raises(InputError) as raised:
        CodebookGeometry(codebook()).nearest(9)
    assert str(file) in raised.value.message and f"Delete {file}" in raised.value.hint


def test_a_file_that_was_not_written_to_its_end_is_not_left_behind(cache, monkeypatch):
    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(geometry, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        CodebookGeometry(codebook()).nearest(9)
    assert not list(cache.iterdir())


def test_clusters_find_separate_groups_and_label_by_the_nearest_centre():
    middles = torch.tensor([[0.0, 0], [9, 0], [0, 9]])
    points = middles.repeat(20, 1) + 0.3 * codebook(60, 2)
    labels, centres = CodebookGeometry(points).clusters(3, seed=5)
    assert labels.shape == (60,) and centres.shape == (3, 2)
    assert_same(labels, torch.cdist(points, centres).argmin(1), "labels")
    assert len(labels[:3].unique()) == 3
    assert_same(labels, labels[:3].repeat(20), "labels of the groups")
    assert_close(centres[labels[:3]], points.reshape(20, 3, 2).mean(0), abs_tol=1e-5, what="centres")


def test_more_clusters_than_different_codes_leave_some_empty():
    labels, _ = CodebookGeometry(codebook(2, 3).repeat(4, 1)).clusters(5)
    assert_same(labels, labels[:2].repeat(4), "labels")


def test_squared_distances_of_broadcast_pairs():
    table, a, b = codebook(), torch.tensor([[3], [7]]), torch.tensor([[3, 4, 5], [6, 7, 8]])
    expected = torch.tensor([[float((table[int(x)] - table[int(y)]).square().sum()) for y in row] for x, row in zip(a, b, strict=True)])
    assert_close(CodebookGeometry(table).squared_distance(a, b), expected, abs_tol=1e-5, what="squared distance")


def test_impossible_questions_are_refused():
    with pytest.raises(InputError, match="finite matrix"):
        CodebookGeometry(torch.full((3, 2), torch.nan))
    with pytest.raises(InputError, match="finite matrix"):
        CodebookGeometry(torch.zeros(3))
    with pytest.raises(ConfigError, match="nearest"):
        CodebookGeometry(codebook()).nearest(0)
    with pytest.raises(ConfigError, match="clusters"):
        CodebookGeometry(codebook()).clusters(98)
