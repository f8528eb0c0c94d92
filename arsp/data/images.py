"""Images in and out: folders of image files, ADM-style ``.npz`` (``arr_0`` uint8 NHWC), grids. Tensors are uint8 NCHW."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from arsp.errors import InputError, ResourceError
from arsp.runs import atomic_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "F")  # more than 8 bits a channel: converting would clip silently


def load_images(source: str | Path | Sequence[str | Path]) -> Tensor:
    """uint8 ``(N, 3, H, W)`` from a folder (its image files by name), one image file, a ``.npz``, or a list of files.

    InputError (exit 4): nothing there, no image in the folder, a file that is no image, sizes that differ, a foreign ``.npz``.
    """
    if not isinstance(source, str | Path):
        return _load_files([Path(path) for path in source])
    path = Path(source)
    if path.is_dir():
        return _load_files(image_files(path))
    if not path.exists():
        raise InputError(f"{path} does not exist.", "Give a folder of images or a .npz with arr_0 (uint8, N x H x W x 3).")
    if path.suffix.lower() == ".npz":
        return images_from_array(read_npz(path, need=("arr_0",))["arr_0"], path)
    return _load_files([path])


def image_files(folder: str | Path) -> list[Path]:
    """The image files directly in ``folder``, sorted by name; InputError when there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder.", "Give a folder of images.")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())
    if not files:
        raise InputError(f"{folder} holds no image ({', '.join(SUFFIXES)}).", "Give the folder that the images lie in directly.")
    return files


def _load_files(files: list[Path]) -> Tensor:
    if not files:
        raise InputError("The list of images is empty.")
    first = _read_image(files[0])
    out_NHW3 = np.empty((len(files), *first.shape), dtype=np.uint8)
    for i, file in enumerate(files):
        pixels = first if i == 0 else _read_image(file)
        if pixels.shape != first.shape:
            sizes = " and ".join(f"{p.name} is {a.shape[1]}x{a.shape[0]}" for p, a in ((files[0], first), (file, pixels)))
            raise InputError(f"{file.parent}: the images differ in size: {sizes}.", "Bring them to one size first.")
        out_NHW3[i] = pixels
    return torch.from_numpy(out_NHW3).permute(0, 3, 1, 2)


def _read_image(path: Path) -> np.ndarray:
    """uint8 ``(H, W, 3)``."""
    try:
        with Image.open(path) as image:
            if image.mode in _WIDE_MODES:
                raise InputError(f"{path} has more than 8 bits a channel (mode {image.mode}).", "Convert it to 8-bit RGB first.")
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error
    except (OSError, ValueError, SyntaxError, EOFError, zlib.error, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a readable image: {str(error) or type(error).__name__}", "Remove or replace the file.") from error


def read_npz(path: str | Path, need: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz`` (never unpickled). InputError if it is missing, corrupt, or lacks a key of ``need``."""
    path = Path(path)
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"{path} is not a .npz archive.", "Write it with numpy.savez.")
        with archive:
            arrays = {key: archive[key] for key in archive.files}
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error
    except MemoryError as error:
        raise ResourceError(f"{path} does not fit in memory.", "Evaluate a smaller archive.") from error
    except (OSError, ValueError, EOFError, KeyError, AttributeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is not a readable .npz: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    for key in need:
        if key not in arrays:
            raise InputError(f"{path} has no array '{key}'; it holds: {', '.join(arrays) or 'nothing'}.", "Expected the ADM layout.")
    return arrays


def images_from_array(array_NHW3: np.ndarray, source: str | Path) -> Tensor:
    """uint8 NHWC numpy -> uint8 NCHW tensor (a view); ``source`` is named in the InputError of a wrong dtype or shape."""
    if array_NHW3.dtype != np.uint8 or array_NHW3.ndim != 4 or array_NHW3.shape[-1] != 3 or 0 in array_NHW3.shape[1:]:
        raise InputError(f"{source}: arr_0 must be uint8 (N, H, W, 3), got {array_NHW3.dtype} {array_NHW3.shape}.")
    if not len(array_NHW3):
        raise InputError(f"{source}: arr_0 holds no image.")
    return torch.from_numpy(array_NHW3).permute(0, 3, 1, 2)


def _check_u8(images_N3HW: Tensor) -> None:
    if images_N3HW.dtype != torch.uint8 or images_N3HW.ndim != 4 or images_N3HW.shape[1] != 3:
        raise ValueError(f"images: expected uint8 (N, 3, H, W), got {images_N3HW.dtype} {tuple(images_N3HW.shape)}")


def save_png(pixels_HW3: np.ndarray | Tensor, path: str | Path) -> Path:
    """Write one uint8 ``(H, W, 3)`` picture atomically."""
    with atomic_file(path, flush=False) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels_HW3)).save(temporary, format="PNG")
    return Path(path)


def save_png_dir(images_N3HW: Tensor, folder: str | Path, ids: Sequence[int] | None = None) -> list[Path]:
    """Write ``folder/{id:06d}.png`` for each image (ids default to 0, 1, ...), each file atomically."""
    _check_u8(images_N3HW)
    ids = range(len(images_N3HW)) if ids is None else ids
    pixels_NHW3 = images_N3HW.cpu().permute(0, 2, 3, 1).numpy()
    return [save_png(pixels, Path(folder) / f"{int(i):06d}.png") for i, pixels in zip(ids, pixels_NHW3, strict=True)]


def save_npz(images_N3HW: Tensor, path: str | Path, labels: Sequence[int] | None = None) -> Path:
    """Write the ADM layout atomically: ``arr_0`` uint8 NHWC, and ``arr_1`` int64 class ids when ``labels`` is given."""
    _check_u8(images_N3HW)
    arrays = {"arr_0": np.ascontiguousarray(images_N3HW.cpu().permute(0, 2, 3, 1).numpy())}
    if labels is not None:
        arrays["arr_1"] = np.asarray(labels, dtype=np.int64)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
    return Path(path)


def make_grid(images_N3HW: Tensor, columns: int | None = None, gap: int = 2, scale: int = 1) -> np.ndarray:
    """One uint8 ``(H, W, 3)`` picture: images in reading order, ``gap`` white pixels between, each enlarged ``scale`` times."""
    _check_u8(images_N3HW)
    num, _, height, width = images_N3HW.shape
    if num == 0:
        raise InputError("A grid needs at least one image.")
    columns = min(num, columns or math.ceil(math.sqrt(num)))
    height, width = height * scale, width * scale
    rows = math.ceil(num / columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, pixels in enumerate(images_N3HW.cpu().permute(0, 2, 3, 1).numpy()):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        grid[y : y + height, x : x + width] = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    return grid
