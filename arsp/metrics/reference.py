"""Reference sets to compare samples with: an embedded set by name, a folder of images, or an ADM-style ``.npz``."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from arsp.data import shapes
from arsp.data.images import images_from_array, load_images, read_npz
from arsp.errors import ConfigError, InputError, nearest

EMBEDDED_IMAGES = 10_000
EMBEDDED_SEED = 999


@dataclass(frozen=True, eq=False)
class Reference:
    """Images (uint8 NCHW), stored feature statistics (``mu`` (D,), ``sigma`` (D, D), float64), or both, with their SHA-256."""

    name: str
    images_N3HW: Tensor | None = None
    images_sha256: str | None = None
    mu_D: np.ndarray | None = None
    sigma_DD: np.ndarray | None = None
    statistics_sha256: str | None = None

    @property
    def num_images(self) -> int | None:
        return None if self.images_N3HW is None else len(self.images_N3HW)


def images_sha256(images_N3HW: Tensor) -> str:
    """SHA-256 of the uint8 bytes in NHWC order, so a folder and the npz made of it agree."""
    digest = hashlib.sha256()
    for chunk in images_N3HW.split(256):
        digest.update(chunk.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def load_reference(spec: str) -> Reference:
    """The reference called ``spec``: an embedded set (10 000 images, seed 999), else a folder, else an ADM npz.

    InputError: a path that is missing or unusable, fewer than 2 images. ConfigError: an unknown name.
    """
    if spec in shapes.VARIANTS:
        return _embedded(spec)
    path = Path(spec)
    if not path.exists():
        if path.suffix or len(path.parts) > 1:
            raise InputError(f"The reference {spec} does not exist.", f"Give a folder, a .npz, or one of: {', '.join(shapes.VARIANTS)}.")
        raise ConfigError(f"unknown reference '{spec}' (no such folder either).", nearest(spec, shapes.VARIANTS))
    if path.suffix.lower() == ".npz":
        return _from_npz(path)
    return _with_images(str(path), load_images(path))


@functools.cache
def _embedded(variant: str) -> Reference:
    return _with_images(variant, shapes.draw(EMBEDDED_IMAGES, EMBEDDED_SEED, variant)[0])


def _with_images(name: str, images_N3HW: Tensor, **statistics) -> Reference:
    if len(images_N3HW) < 2:
        raise InputError(f"The reference {name} holds {len(images_N3HW)} image; at least 2 are needed.")
    return Reference(name, images_N3HW, images_sha256(images_N3HW), **statistics)


def _from_npz(path: Path) -> Reference:
    arrays = read_npz(path)
    statistics = _statistics(arrays, path) if "mu" in arrays or "sigma" in arrays else {}
    if "arr_0" in arrays:
        return _with_images(str(path), images_from_array(arrays["arr_0"], path), **statistics)
    if not statistics:
        raise InputError(
            f"{path} holds neither arr_0 nor mu and sigma; it holds: {', '.join(arrays) or 'nothing'}.", "Expected the ADM layout."
        )
    return Reference(str(path), **statistics)


def _statistics(arrays: dict[str, np.ndarray], path: Path) -> dict:
    shapes_found = {key: arrays[key].shape for key in ("mu", "sigma") if key in arrays}
    size = shapes_found.get("mu", (0,))[0] if shapes_found.get("mu") else 0
    if shapes_found != {"mu": (size,), "sigma": (size, size)} or not size:
        raise InputError(f"{path}: expected mu (D,) and sigma (D, D), got {shapes_found}.", "Expected the ADM layout.")
    try:
        mu_D, sigma_DD = (np.ascontiguousarray(arrays[key], dtype=np.float64) for key in ("mu", "sigma"))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: mu and sigma must be numbers, got {arrays['mu'].dtype} and {arrays['sigma'].dtype}.") from error
    if not (np.isfinite(mu_D).all() and np.isfinite(sigma_DD).all()):
        raise InputError(f"{path}: mu or sigma holds NaN or infinity.")
    return {"mu_D": mu_D, "sigma_DD": sigma_DD, "statistics_sha256": hashlib.sha256(mu_D.tobytes() + sigma_DD.tobytes()).hexdigest()}
