import json

import numpy as np
import torch

from arsp.data.images import save_npz, save_png, save_png_dir
from arsp.report import samples, tables


def write_run(folder, labels, shade=0):
    """A run directory whose image i is filled with the grey value 10 * label + shade."""
    images = torch.stack([torch.full((3, 4, 4), 10 * label + shade, dtype=torch.uint8) for label in labels])
    save_png_dir(images, folder / "images")
    (folder / "labels.json").write_text(json.dumps(labels))
    return {"run_dir": str(folder), "artifacts": [{"path": "images", "kind": "image-dir"}]}


def collect(records):
    warnings = []
    return samples.collect_grids(tables.collect(records), warnings.append), warnings


def cells(grid, columns):
    """Grey value at the centre of each image of a grid of 4x4 images."""
    return [int(v) for v in grid.pixels[2::6, 2::6, 0].reshape(-1)][: columns * 99]


def test_grids_show_the_same_classes_in_the_same_order(tmp_path, record):
    one = record("a", **write_run(tmp_path / "a", [0, 1, 2, 3, 0, 1, 2, 3]))
    other = record("b", **write_run(tmp_path / "b", [9, 3, 3, 2, 2, 1, 1, 0, 0], shade=1))
    grids, warnings = collect([one, other])
    assert warnings == []
    assert cells(grids["a"], 4) == [0, 10, 20, 30] * 2
    assert cells(grids["b"], 4) == [1, 11, 21, 31] * 2
    assert all(grid.matched for grid in grids.values())


def test_runs_without_common_classes_show_their_own_images_and_say_so(tmp_path, record):
    grids, warnings = collect([record("a", **write_run(tmp_path / "a", [0, 0])), record("b", **write_run(tmp_path / "b", [1, 1]))])
    assert not any(grid.matched for grid in grids.values())
    assert any("classes may differ" in text for text in warnings)


def test_a_single_run_shows_the_grid_it_wrote(tmp_path, record):
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    save_png(pixels, tmp_path / "grid.png")
    grids, _ = collect([record(run_dir=str(tmp_path), artifacts=[{"path": "grid.png", "kind": "grid"}])])
    assert np.array_equal(grids["llamagen"].pixels, pixels)


def test_an_npz_outside_the_run_directory_is_found_by_its_absolute_path(tmp_path, record):
    path = save_npz(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), tmp_path / "elsewhere" / "x.npz", labels=[0, 1, 2])
    grids, warnings = collect([record(run_dir=str(tmp_path), artifacts=[{"path": str(path), "kind": "npz"}])])
    assert "first 3 images" in grids["llamagen"].how and warnings == []


def test_large_images_are_shown_reduced(tmp_path, record):
    save_png_dir(torch.zeros(1, 3, 300, 200, dtype=torch.uint8), tmp_path / "images")
    grids, _ = collect([record(run_dir=str(tmp_path), artifacts=[{"path": "images", "kind": "image-dir"}])])
    assert grids["llamagen"].pixels.shape == (128, 85, 3)


def test_missing_changed_and_unreadable_pictures_are_warnings(tmp_path, record):
    (tmp_path / "broken.png").write_bytes(b"no image")
    artifacts = [{"path": "gone", "kind": "image-dir"}, {"path": "broken.png", "kind": "grid", "sha256": "0" * 64}]
    grids, warnings = collect([record(run_dir=str(tmp_path), artifacts=artifacts)])
    assert grids == {}
    assert [word in text for word, text in zip(("missing", "changed", "not a readable image"), warnings, strict=True)] == [True] * 3, (
        warnings
    )
