"""Attribute accuracy on the embedded set: does an image show the requested shape, cleanly, in one of the palette's colours?

The feature network names shape, colour, background, centre and radius; the position is snapped to the variant's legal grid and
the image these attributes describe is drawn again. Then

- ``class_accuracy``: share of images whose predicted shape is the requested label;
- ``color_accuracy``: share of images whose mean RGB over the redrawn foreground (coverage > 0.9) is nearest to the predicted
  palette colour and at most ``COLOR_RADIUS`` (Euclidean, 0..255 per channel) away from it;
- ``render_error``: mean absolute difference between the image and its redrawing, on a 0..1 scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arsp.data import shapes
from arsp.errors import InputError
from arsp.metrics.features import FEATNET_NAME, IMAGE_SIZE, FeatNet, extract, weights_sha256

COLOR_RADIUS = 64.0  # the two nearest palette colours (red and orange) are 98 apart
SOLID_COVERAGE = 0.9


def snap_position(pos_N3: Tensor, variant: str) -> dict[str, Tensor]:
    """Network positions (cx / 16 - 1, cy / 16 - 1, r / 8 - 1) -> nearest legal radius index ``ri`` and centre ``cx``, ``cy``."""
    legal = torch.tensor(shapes.radius_ids(variant))
    radii = torch.tensor(shapes.RADII, dtype=torch.float32)[legal]
    ri = legal[((pos_N3[:, 2:] + 1) * 8 - radii).abs().argmin(1)]
    centre_N2 = (pos_N3[:, :2] + 1) * 16
    for i in legal.tolist():
        grid = torch.tensor(shapes.centres(i, variant), dtype=torch.float32)
        rows = ri == i
        centre_N2[rows] = grid[(centre_N2[rows][..., None] - grid).abs().argmin(-1)]
    return {"ri": ri, "cx": centre_N2[:, 0], "cy": centre_N2[:, 1]}


def predict_attributes(net: FeatNet, images_u8_N3HW: Tensor, variant: str, batch_size: int = 256) -> shapes.Attributes:
    """The legal attributes of ``variant`` that the network sees in each image."""
    out = extract(net, images_u8_N3HW, batch_size)
    return {key: out[key].argmax(1) for key in ("shape", "color", "bg")} | snap_position(out["pos"].clone(), variant)


def compare_with_redrawn(images_u8_N3HW: Tensor, attrs: shapes.Attributes) -> tuple[Tensor, Tensor]:
    """Per image: does the foreground show the colour of ``attrs`` (bool), and the mean absolute error of the redrawing (0..1)."""
    x_N3HW = images_u8_N3HW.cpu().float()
    solid_N1HW = (shapes.coverage(attrs) > SOLID_COVERAGE)[:, None]
    mean_N3 = (x_N3HW * solid_N1HW).sum((2, 3)) / solid_N1HW.sum((2, 3)).clamp(min=1)
    palette_distance = torch.cdist(mean_N3, torch.tensor(shapes.COLOR_RGB, dtype=torch.float32))
    distance, nearest = palette_distance.min(1)
    error_N = (x_N3HW - shapes.render(attrs).float()).abs().mean((1, 2, 3)) / 255
    return (nearest == attrs["color"]) & (distance <= COLOR_RADIUS), error_N


def measure_attributes(
    images_u8_N3HW: Tensor, labels: Sequence[int] | None, net: FeatNet, variant: str = "shapes32", batch_size: int = 256
) -> list[dict]:
    """Metric entries ``class_accuracy`` (only with ``labels``), ``color_accuracy`` and ``render_error``. InputError on a mismatch."""
    if tuple(images_u8_N3HW.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
        size = f"{images_u8_N3HW.shape[3]}x{images_u8_N3HW.shape[2]}"
        raise InputError(
            f"acc is defined on the embedded set ({IMAGE_SIZE}x{IMAGE_SIZE}); these images are {size}.", "Leave acc out of --metric."
        )
    num = len(images_u8_N3HW)
    if labels is not None and len(labels) != num:
        raise InputError(f"{len(labels)} labels for {num} images.", "The labels must belong to these images, one each.")
    attrs = predict_attributes(net, images_u8_N3HW, variant, batch_size)
    parts = [
        compare_with_redrawn(images, shapes.select(attrs, rows))
        for images, rows in zip(images_u8_N3HW.split(batch_size), torch.arange(num).split(batch_size), strict=True)
    ]
    color_ok, error = (torch.cat(column) for column in zip(*parts, strict=True))
    values = {"color_accuracy": color_ok.double().mean().item(), "render_error": error.double().mean().item()}
    if labels is not None:
        hits = attrs["shape"] == torch.as_tensor(list(labels), dtype=torch.int64)
        values = {"class_accuracy": hits.double().mean().item()} | values
    shared = {"n": num, "reference_sha256": None, "comparable": False, "features": FEATNET_NAME, "features_sha256": weights_sha256(net)}
    return [{"name": key, "value": value, "protocol": f"{key}/{FEATNET_NAME}/{variant}", **shared} for key, value in values.items()]
