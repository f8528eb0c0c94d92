import pytest
import torch

from arsp.data import shapes
from arsp.data.images import save_png
from arsp.errors import InputError
from arsp.train.data import load_pool


def folder(root, layout):
    """``layout``: class -> list of (height, width)."""
    for name, sizes in layout.items():
        for i, (height, width) in enumerate(sizes):
            save_png(torch.full((height, width, 3), 10 * i, dtype=torch.uint8), root / name / f"{i}.png")
    return str(root)


def test_a_folder_gives_images_classes_and_their_names_in_order(tmp_path):
    images, labels, names = load_pool(folder(tmp_path / "d", {"b": [(4, 4)], "a": [(4, 4)] * 2, ".hidden": [(9, 9)]}))
    assert images.shape == (3, 3, 4, 4) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 1] and names == ["a", "b"]


def test_the_embedded_sets_are_complete():
    images, labels, names = load_pool("shapes32-coarse", limit=50)
    assert images.shape == (50, 3, 32, 32) and names == list(shapes.CLASSES) and set(labels.tolist()) == set(range(10))


@pytest.mark.parametrize(
    ("layout", "words"),
    [({}, "no sub-folders"), ({"a": [(4, 4), (4, 5)]}, "differ in size"), ({"a": [(4, 4)], "b": [(5, 5)]}, "different sizes")],
)
def test_folders_that_are_no_training_set_are_refused(tmp_path, layout, words):
    (tmp_path / "d").mkdir()
    with pytest.raises(InputError, match=words):
        load_pool(folder(tmp_path / "d", layout))


def test_empty_classes_and_files_that_are_no_images_are_refused(tmp_path):
    root = folder(tmp_path / "d", {"a": [(4, 4)]})
    (tmp_path / "d" / "b").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        load_pool(root)
    (tmp_path / "d" / "b" / "x.png").write_text("no image")
    with pytest.raises(InputError, match=r"x\.png is not a readable image"):
        load_pool(root)


def test_a_name_that_is_nothing_is_refused_with_the_known_sets():
    with pytest.raises(InputError, match="shapes32-coarse"):
        load_pool("shapes23")
