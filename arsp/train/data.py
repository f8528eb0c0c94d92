"""Training images: the embedded procedural set (no file needed) or a folder with one sub-folder a class."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from arsp.data import shapes
from arsp.errors import InputError


def load_pool(source: str, limit: int = 0) -> tuple[Tensor, Tensor, list[str]]:
    """All images (uint8 NCHW), their class ids and the class names of ``source``: a variant name or a folder.

    ``limit`` > 0 takes that many images spread evenly over the pool.
    """
    if source in shapes.VARIANTS:
        attrs = shapes.all_attributes(source)
        rows = _spread(len(attrs["shape"]), limit)
        attrs = shapes.select(attrs, rows)
        images = torch.cat([shapes.render(shapes.select(attrs, part)) for part in torch.arange(len(rows)).split(4096)])
        return images, attrs["shape"], list(shapes.CLASSES)
    root = Path(source)
    if not root.is_dir():
        raise InputError(
            f"training data '{source}' is neither a folder nor one of: {', '.join(shapes.VARIANTS)}.",
            "Give --data FOLDER with one sub-folder of images a class.",
        )
    from arsp.data.images import load_images

    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise InputError(
            f"{root} has no sub-folders; expected one folder of images a class.", "Images without classes: put them into one sub-folder."
        )
    parts = [load_images(root / name) for name in names]
    if len({part.shape[1:] for part in parts}) != 1:
        raise InputError(
            f"{root}: images of different sizes: {sorted({tuple(p.shape[2:]) for p in parts})} (height, width).",
            "Bring them to one size first.",
        )
    labels = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])
    images = torch.cat(parts)
    rows = _spread(len(images), limit)
    return images[rows], labels[rows], names


def _spread(total: int, limit: int) -> Tensor:
    if limit <= 0 or limit >= total:
        return torch.arange(total)
    return torch.linspace(0, total - 1, limit, dtype=torch.float64).round().long()
