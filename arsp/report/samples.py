"""Sample grids for a report: the same classes in the same order for every stack where the runs allow it.

Matched grids need the images and their class ids (``labels.json`` of a run directory, or ``arr_1`` of an npz) of every stack
shown. Otherwise each stack shows the grid its run wrote, else its first images.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from arsp.data.images import image_files, load_images, make_grid, read_npz
from arsp.errors import InputError
from arsp.report.tables import Record, Stack

PICTURE_KINDS = ("grid", "image-dir", "npz")
MAX_CLASSES, MAX_PER_CLASS, MAX_IMAGES = 10, 4, 40
MAX_SIDE = 128  # pixels; larger images are shown reduced
MAX_SHOWN = 1400  # pixels; smaller grids are enlarged up to this
MAX_NPZ_BYTES = 1 << 30


@dataclass(frozen=True)
class SampleGrid:
    """One picture of samples: PNG bytes (perhaps enlarged), pixels uint8 (H, W, 3), and how the images were picked."""

    png: bytes
    pixels: np.ndarray
    how: str
    matched: bool = False  # the same classes in the same order as the other grids


@dataclass(frozen=True)
class _Images:
    """Labelled images of one stack: ``load(ids)`` reads those only."""

    labels: list[int]
    load: Callable[[list[int]], Tensor]


def collect_grids(stacks: Sequence[Stack], warn: Callable[[str], None]) -> dict[str, SampleGrid]:
    """label -> grid, for the stacks with pictures. ``warn`` hears of every picture that is missing, changed or unreadable."""
    artifacts = {stack.label: _present(stack, warn) for stack in stacks}
    artifacts = {label: found for label, found in artifacts.items() if found}
    labelled = {label: images for label, found in artifacts.items() if (images := _labelled_images(found, warn)) is not None}
    if len(labelled) >= 2 and labelled.keys() == artifacts.keys():
        matched = _matched_grids(labelled, warn)
        if matched:
            return matched
    grids = {label: _own_grid(found, warn) for label, found in artifacts.items()}
    if len(artifacts) >= 2:
        warn("The grids show the images each run chose itself: not every run has images with class ids in common, so classes may differ.")
    return {label: grid for label, grid in grids.items() if grid is not None}


def artifact_path(record: Record, artifact: Record) -> Path:
    """Where an artifact lies; relative paths start at the run directory."""
    return Path(record.get("run_dir") or ".") / artifact["path"]


def _present(stack: Stack, warn: Callable[[str], None]) -> list[tuple[str, Path]]:
    """(kind, path) of the stack's pictures, newest record first; missing and changed files are reported."""
    found = []
    for record in reversed(stack.records):
        for artifact in record.get("artifacts") or []:
            kind, path = artifact.get("kind"), artifact_path(record, artifact)
            if kind not in PICTURE_KINDS:
                continue
            if not path.exists():
                warn(f"{stack.label}: the {kind} {path} of its record is missing.")
                continue
            digest = artifact.get("sha256")
            if kind == "grid" and digest and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                warn(f"{stack.label}: {path} has changed since its run wrote it.")
            found.append((kind, path))
    return found


# ---------------------------------------------------------------- the same classes for every stack


def _labelled_images(artifacts: Sequence[tuple[str, Path]], warn: Callable[[str], None]) -> _Images | None:
    for kind, path in artifacts:
        try:
            images = _from_folder(path) if kind == "image-dir" else _from_npz(path) if kind == "npz" else None
        except InputError as error:
            warn(error.message)
            continue
        if images is not None:
            return images
    return None


def _from_folder(folder: Path) -> _Images | None:
    labels = _read_labels(folder.parent / "labels.json") or _read_labels(folder / "labels.json")
    if labels is None:
        return None
    files = {int(file.stem): file for file in image_files(folder) if file.stem.isdigit()}
    known = [label if i in files else -1 for i, label in enumerate(labels)]
    return _Images(known, lambda ids: load_images([files[i] for i in ids]))


def _from_npz(path: Path) -> _Images | None:
    if path.stat().st_size > MAX_NPZ_BYTES:
        return None
    arrays = read_npz(path, need=("arr_0",))
    labels = arrays["arr_1"].tolist() if "arr_1" in arrays and arrays["arr_1"].ndim == 1 else _read_labels(path.parent / "labels.json")
    images = load_images(path)
    if labels is None or len(labels) != len(images):
        return None
    return _Images([int(label) for label in labels], lambda ids: images[ids])


def _read_labels(path: Path) -> list[int] | None:
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return labels if isinstance(labels, list) and labels and all(isinstance(label, int) for label in labels) else None


def _matched_grids(labelled: dict[str, _Images], warn: Callable[[str], None]) -> dict[str, SampleGrid]:
    """A column for each common class, a row for each further sample of it (few classes: a row for each class)."""
    by_class = {label: _ids_by_class(images.labels) for label, images in labelled.items()}
    classes = sorted(set.intersection(*(set(ids) for ids in by_class.values())))[:MAX_CLASSES]
    if not classes:
        return {}
    few = len(classes) < 4
    count = min(MAX_IMAGES // len(classes) if few else MAX_PER_CLASS, *(len(ids[c]) for ids in by_class.values() for c in classes))
    count = min(count, 8)
    names = ", ".join(map(str, classes))
    how = f"{'one row' if few else 'one column'} for each class: {names}" if len(classes) > 1 else f"class {names}"
    grids = {}
    for label, images in labelled.items():
        ids = by_class[label]
        order = [ids[c][k] for c in classes for k in range(count)] if few else [ids[c][k] for k in range(count) for c in classes]
        try:
            grids[label] = _to_grid(images.load(order), count if few else len(classes), how, matched=True)
        except InputError as error:
            warn(f"{label}: {error.message}")
    return grids


def _ids_by_class(labels: Sequence[int]) -> dict[int, list[int]]:
    ids: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        if label >= 0:
            ids.setdefault(label, []).append(i)
    return ids


# ---------------------------------------------------------------- the grid of one run


def _own_grid(artifacts: Sequence[tuple[str, Path]], warn: Callable[[str], None]) -> SampleGrid | None:
    """The run's own grid, else its first images."""
    for kind, path in sorted(artifacts, key=lambda artifact: PICTURE_KINDS.index(artifact[0])):
        try:
            if kind == "grid":
                pixels_3HW = load_images(path)[0]
                return _encode(pixels_3HW.permute(1, 2, 0).numpy(), "the grid written by its run")
            if kind == "npz" and path.stat().st_size > MAX_NPZ_BYTES:
                warn(f"{path} is larger than {MAX_NPZ_BYTES >> 30} GiB and is not opened for a grid.")
                continue
            images_N3HW = load_images(image_files(path)[:16] if kind == "image-dir" else path)[:16]
            return _to_grid(images_N3HW, None, f"its first {len(images_N3HW)} images")
        except InputError as error:
            warn(error.message)
    return None


def _to_grid(images_N3HW: Tensor, columns: int | None, how: str, matched: bool = False) -> SampleGrid:
    side = max(images_N3HW.shape[-2:])
    if side > MAX_SIDE:
        size = [max(1, round(edge * MAX_SIDE / side)) for edge in images_N3HW.shape[-2:]]
        reduced = interpolate(images_N3HW.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
        images_N3HW = reduced.round().clamp(0, 255).to(torch.uint8)
    return _encode(make_grid(images_N3HW, columns), how, matched)


def _encode(pixels_HW3: np.ndarray, how: str, matched: bool = False) -> SampleGrid:
    """Small pictures are enlarged by a whole factor, so that a browser shows their pixels evenly."""
    factor = max(1, min(4, MAX_SHOWN // max(pixels_HW3.shape[:2])))
    enlarged = pixels_HW3.repeat(factor, axis=0).repeat(factor, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(enlarged)).save(buffer, format="PNG", optimize=True)
    return SampleGrid(buffer.getvalue(), pixels_HW3, how, matched)
