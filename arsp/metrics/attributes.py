"""Attribute accuracy on the embedded set: does an image show the requested shape, cleanly, in one of the palette's colours?

The feature network names shape, colour, background, centre and radius; centre and radius are snapped to the variant's legal grid
and the image these attributes describe is drawn again. Then

- ``class_accuracy``: share of images whose predicted shape is the requested label;
- ``color_accuracy``: share of images whose mean RGB over the redrawn foreground (coverage > 0.9) is nearest to the predicted
  palette colour and at most ``COLOR_RADIUS`` (Euclidean, 0..255 per channel) away from it;
- ``render_error``: mean absolute difference between the image and its redrawing, on a 0..1 scale.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from arsp.data import shapes
from arsp.errors import InputError
from arsp.metrics.features import FEATNET_NAME, IMAGE_SIZE, FeatNet, extract, weights_sha256

COLOR_RADIUS = 64.0  # the two nearest palette colours (red and orange) are 98 apart
SOLID_COVERAGE = 0.9


def _legal_centres(variant: str) -> Tensor:
    """Legal centre coordinates by radius index, ``(3, most)``, padded with infinity."""
    grids = [torch.tensor(shapes.centres(i, variant), dtype=torch.float32) for i in range(len(shapes.RADII))]
    return torch.nn.utils.rnn.pad_sequence(grids, batch_first=True, padding_value=float("inf"))


def snap_position(pos_N3: Tensor, variant: str) -> tuple[Tensor, Tensor]:
    """Network positions (cx / 16 - 1, cy / 16 - 1, r / 8 - 1) -> nearest legal radius index (N,) and, for x and y, the two nearest
    legal centres in pixels (N, 2, 2), nearest first."""
    legal = torch.tensor(shapes.radius_ids(variant))
    radii = torch.tensor(shapes.RADII, dtype=torch.float32)[legal]
    ri = legal[((pos_N3[:, 2:] + 1) * 8 - radii).abs().argmin(1)]
    table_N2G = _legal_centres(variant)[ri][:, None].expand(-1, 2, -1)
    distance_N2G = ((pos_N3[:, :2, None] + 1) * 16 - table_N2G).abs()
    return ri, table_N2G.gather(2, distance_N2G.topk(2, largest=False).indices)


def predict_attributes(net: FeatNet, images_u8_N3HW: Tensor, variant: str, batch_size: int = 256) -> tuple[shapes.Attributes, Tensor]:
    """The legal attributes of ``variant`` that the network sees in each image, and their redrawing's error (N,).

    The network is good to a pixel, the grid is two pixels wide: of the two nearest centres per axis the best fitting one is taken.
    """
    out = extract(net, images_u8_N3HW, batch_size)
    attrs = {key: out[key].argmax(1) for key in ("shape", "color", "bg")}
    attrs["ri"], near_N22 = snap_position(out["pos"], variant)
    best_N = torch.full((len(images_u8_N3HW),), float("inf"))
    best_N2 = near_N22[:, :, 0]
    for i, j in itertools.product((0, 1), repeat=2):
        centre_N2 = torch.stack((near_N22[:, 0, i], near_N22[:, 1, j]), 1)
        error_N = _in_batches(redraw_error, images_u8_N3HW, attrs | {"cx": centre_N2[:, 0], "cy": centre_N2[:, 1]}, batch_size)
        better_N = error_N < best_N
        best_N, best_N2 = torch.where(better_N, error_N, best_N), torch.where(better_N[:, None], centre_N2, best_N2)
    return attrs | {"cx": best_N2[:, 0], "cy": best_N2[:, 1]}, best_N


def _in_batches(fn: Callable[[Tensor, shapes.Attributes], Tensor], images_N3HW: Tensor, attrs: shapes.Attributes, size: int) -> Tensor:
    rows = torch.arange(len(images_N3HW)).split(size)
    return torch.cat([fn(images_N3HW[i].cpu().float(), shapes.select(attrs, i)) for i in rows])


def redraw_error(x_N3HW: Tensor, attrs: shapes.Attributes) -> Tensor:
    """Mean absolute difference (N,), 0..1, between float images on 0..255 and the images that ``attrs`` describe."""
    return (x_N3HW - shapes.render(attrs).float()).abs().mean((1, 2, 3)) / 255


def shows_color(x_N3HW: Tensor, attrs: shapes.Attributes) -> Tensor:
    """Whether each float image on 0..255 shows the palette colour of ``attrs`` where they place the foreground (N, bool)."""
    solid_N1HW = (shapes.coverage(attrs) > SOLID_COVERAGE)[:, None]
    mean_N3 = (x_N3HW * solid_N1HW).sum((2, 3)) / solid_N1HW.sum((2, 3)).clamp(min=1)
    distance, nearest = torch.cdist(mean_N3, torch.tensor(shapes.COLOR_RGB, dtype=torch.float32)).min(1)
    return (nearest == attrs["color"]) & (distance <= COLOR_RADIUS)


def check_size(images_u8_N3HW: Tensor) -> None:
    """InputError unless the images have the size of the embedded set."""
    if tuple(images_u8_N3HW.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
        size = f"{images_u8_N3HW.shape[3]}x{images_u8_N3HW.shape[2]}"
        raise InputError(
            f"acc is defined on the embedded set ({IMAGE_SIZE}x{IMAGE_SIZE}); these images are {size}.", "Leave acc out of --metric."
        )


def measure_attributes(
    images_u8_N3HW: Tensor, labels: Sequence[int] | None, net: FeatNet, variant: str = "shapes32", batch_size: int = 256
) -> list[dict]:
    """Metric entries ``class_accuracy`` (only with ``labels``), ``color_accuracy`` and ``render_error``. InputError on a mismatch."""
    check_size(images_u8_N3HW)
    num = len(images_u8_N3HW)
    if labels is not None and len(labels) != num:
        raise InputError(f"{len(labels)} labels for {num} images.", "The labels must belong to these images, one each.")
    attrs, error = predict_attributes(net, images_u8_N3HW, variant, batch_size)
    color_ok = _in_batches(shows_color, images_u8_N3HW, attrs, batch_size)
    values = {"color_accuracy": color_ok.double().mean().item(), "render_error": error.double().mean().item()}
    if labels is not None:
        hits = attrs["shape"] == torch.as_tensor(list(labels), dtype=torch.int64)
        values = {"class_accuracy": hits.double().mean().item()} | values
    shared = {"n": num, "reference_sha256": None, "comparable": False, "features": FEATNET_NAME, "features_sha256": weights_sha256(net)}
    return [{"name": key, "value": value, "protocol": f"{key}/{FEATNET_NAME}/{variant}", **shared} for key, value in values.items()]
