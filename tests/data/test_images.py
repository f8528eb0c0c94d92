import numpy as np
import pytest
import torch
from PIL import Image

from arsp.data.images import load_images, make_grid, read_npz, save_npz, save_png, save_png_dir
from arsp.errors import InputError


def some_images(n=5, size=8, seed=0):
    return torch.randint(0, 256, (n, 3, size, size + 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_png_folder_round_trips_bit_for_bit_in_name_order(tmp_path):
    x = some_images()
    paths = save_png_dir(x, tmp_path, ids=[10, 2, 7, 1, 0])
    assert [p.name for p in paths] == ["000010.png", "000002.png", "000007.png", "000001.png", "000000.png"]
    assert torch.equal(load_images(tmp_path), x[[4, 3, 1, 2, 0]]), "images must come back sorted by file name"


def test_one_picture_may_be_an_array_or_a_tensor(tmp_path):
    x = some_images(1)[0]
    save_png(x.permute(1, 2, 0), tmp_path / "a.png")
    save_png(x.permute(1, 2, 0).numpy(), tmp_path / "b.png")
    assert torch.equal(load_images(tmp_path / "a.png")[0], x) and torch.equal(load_images(tmp_path / "b.png")[0], x)


def test_npz_round_trips_with_labels_in_the_adm_layout(tmp_path):
    x = some_images()
    save_npz(x, tmp_path / "a.npz", labels=[3, 1, 4, 1, 5])
    arrays = read_npz(tmp_path / "a.npz")
    assert arrays["arr_0"].shape == (5, 8, 10, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [3, 1, 4, 1, 5]
    assert torch.equal(load_images(tmp_path / "a.npz"), x)


def test_same_images_give_the_same_npz_bytes(tmp_path):
    save_npz(some_images(), tmp_path / "a.npz")
    save_npz(some_images(), tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_grey_palette_and_transparent_files_become_rgb_and_other_files_are_ignored(tmp_path):
    Image.new("L", (4, 4), 7).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (9, 8, 7, 255)).save(tmp_path / "b.png")
    Image.new("P", (4, 4)).save(tmp_path / "c.png")
    (tmp_path / "labels.json").write_text("[0, 1, 2]")
    x = load_images(tmp_path)
    assert tuple(x.shape) == (3, 3, 4, 4) and x[0].unique().tolist() == [7] and x[1, :, 0, 0].tolist() == [9, 8, 7]


def bad_folder(tmp_path, kind):
    """A path of the given defect and the words its message must hold."""
    if kind == "missing":
        return tmp_path / "none", "does not exist"
    if kind == "empty folder":
        return tmp_path, "holds no image"
    if kind == "text named png":
        (tmp_path / "a.png").write_text("hello")
        return tmp_path, "a.png is not a readable image"
    if kind == "truncated png":
        save_png_dir(some_images(2, 64), tmp_path)
        raw = (tmp_path / "000001.png").read_bytes()
        (tmp_path / "000001.png").write_bytes(raw[: len(raw) // 2])
        return tmp_path, "000001.png is not a readable image"
    if kind == "mixed sizes":
        save_png_dir(some_images(1, 8), tmp_path, [0])
        save_png_dir(some_images(1, 16), tmp_path, [1])
        return tmp_path, "000001.png is 18x16"
    if kind == "16 bit":
        Image.fromarray(np.full((4, 4), 4000, dtype=np.uint16)).save(tmp_path / "a.png")
        return tmp_path, "more than 8 bits"
    if kind == "not a zip":
        (tmp_path / "a.npz").write_bytes(b"PK not really")
        return tmp_path / "a.npz", "not a readable .npz"
    if kind == "npy named npz":
        with open(tmp_path / "a.npz", "wb") as file:
            np.save(file, np.zeros(3))
        return tmp_path / "a.npz", "not a .npz archive"
    if kind == "truncated npz":
        save_npz(some_images(50, 16), tmp_path / "a.npz")
        raw = (tmp_path / "a.npz").read_bytes()
        (tmp_path / "a.npz").write_bytes(raw[: len(raw) // 2])
        return tmp_path / "a.npz", "not a readable .npz"
    content = {"pickled": np.array([{}], dtype=object), "floats": np.zeros((2, 4, 4, 3)), "no image": np.zeros((0, 4, 4, 3), np.uint8)}
    if kind in content:
        np.savez(tmp_path / "a.npz", arr_0=content[kind])
        return tmp_path / "a.npz", {"pickled": "not a readable", "floats": "must be uint8", "no image": "holds no image"}[kind]
    np.savez(tmp_path / "a.npz", other=np.zeros(3))
    return tmp_path / "a.npz", "no array 'arr_0'; it holds: other"


KINDS = (
    "missing", "empty folder", "text named png", "truncated png", "mixed sizes", "16 bit", "not a zip", "npy named npz", "truncated npz",
    "pickled", "floats", "no image", "other key",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_one_message_that_names_the_file(tmp_path, kind):
    path, words = bad_folder(tmp_path, kind)
    with pytest.raises(InputError) as caught:
        load_images(path)
    assert words in caught.value.message, f"{kind}: {caught.value.message!r} lacks {words!r}"


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError):
        save_npz(some_images(), tmp_path / "a.npz", labels=["x"])
    with pytest.raises(TypeError):
        save_png(np.zeros((2, 2, 7), dtype=np.uint8), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == [], f"left behind: {list(tmp_path.iterdir())}"


def test_grid_places_images_in_reading_order_with_white_gaps():
    x = torch.stack([torch.full((3, 2, 3), i * 10, dtype=torch.uint8) for i in range(5)])
    grid = make_grid(x, columns=3, gap=1, scale=2)
    assert grid.shape == (2 * 4 + 1, 3 * 6 + 2, 3) and grid.dtype == np.uint8
    assert [int(grid[0, 7 * i, 0]) for i in range(3)] == [0, 10, 20] and [int(grid[5, 7 * i, 0]) for i in range(2)] == [30, 40]
    assert (grid[4] == 255).all() and (grid[:, 6] == 255).all() and (grid[5:, 14:] == 255).all()
