"""The embedded procedural image set: one coloured shape on a shaded background, 32x32 RGB, 10 classes. Needs no file.

Two variants share the renderer: ``shapes32`` (3 radii, centres on every even pixel that fits: 74 400 distinct images) and
``shapes32-coarse`` (radii 8 and 10, 3x3 centres: 8 640 distinct images, all of them members of ``shapes32``).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from arsp.errors import ConfigError, nearest

SIZE = 32
CLASSES = ("circle", "ring", "square", "frame", "triangle", "wedge", "diamond", "plus", "cross", "star")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
BACKGROUNDS = ("black", "navy", "forest", "maroon", "slate", "sand")
RADII = (6, 8, 10)
COLOR_RGB = (
    (225, 45, 45), (245, 140, 30), (245, 225, 60), (50, 185, 75), (60, 205, 215), (55, 90, 225), (150, 65, 200), (240, 240, 240),
)  # fmt: skip
BACKGROUND_RGB = ((20, 20, 24), (22, 34, 80), (20, 66, 44), (82, 22, 36), (84, 92, 104), (150, 132, 98))
VARIANTS = ("shapes32", "shapes32-coarse")

Attributes = dict[str, Tensor]  # shape, color, bg, ri: int64 (n,); cx, cy: float32 pixels (n,)


def centres(ri: int, variant: str = "shapes32") -> list[int]:
    """Legal centre coordinates (pixels, either axis) for radius index ``ri``."""
    lo = RADII[ri] + 2
    every = list(range(lo, SIZE - lo + 1, 2))
    return every if variant == "shapes32" else [every[0], every[len(every) // 2], every[-1]]


def radius_ids(variant: str = "shapes32") -> tuple[int, ...]:
    """Radius indices that the variant uses."""
    if variant not in VARIANTS:
        raise ConfigError(f"unknown image set '{variant}'.", nearest(variant, VARIANTS))
    return (0, 1, 2) if variant == "shapes32" else (1, 2)


def attributes(n: int, seed: int, variant: str = "shapes32") -> Attributes:
    """Random attributes of ``n`` images from one CPU generator seeded with ``seed``; same order of draws in both variants."""
    radii = radius_ids(variant)
    gen = torch.Generator().manual_seed(seed)
    draw = lambda high: torch.randint(0, high, (n,), generator=gen)  # noqa: E731
    shape, color, bg = draw(len(CLASSES)), draw(len(COLORS)), draw(len(BACKGROUNDS))
    ri = torch.tensor(radii)[draw(len(radii))]
    u_n2 = torch.rand(n, 2, generator=gen)
    grids = [centres(i, variant) for i in range(len(RADII))]
    table = torch.tensor([g + [0] * (max(map(len, grids)) - len(g)) for g in grids], dtype=torch.float32)
    counts = torch.tensor([len(g) for g in grids])[ri]
    cell_n2 = torch.minimum((u_n2 * counts[:, None]).long(), counts[:, None] - 1)
    return {"shape": shape, "color": color, "bg": bg, "ri": ri, "cx": table[ri, cell_n2[:, 0]], "cy": table[ri, cell_n2[:, 1]]}


def all_attributes(variant: str = "shapes32") -> Attributes:
    """Attributes of every distinct image of the variant, in a fixed order."""
    rows = [
        (s, c, b, ri, x, y)
        for s, c, b, ri in itertools.product(range(len(CLASSES)), range(len(COLORS)), range(len(BACKGROUNDS)), radius_ids(variant))
        for x in centres(ri, variant)
        for y in centres(ri, variant)
    ]
    columns = torch.tensor(rows).T
    ids = dict(zip(("shape", "color", "bg", "ri"), columns[:4], strict=True))
    return {**ids, "cx": columns[4].float(), "cy": columns[5].float()}


def select(attrs: Attributes, index: Tensor) -> Attributes:
    """The rows ``index`` of a dictionary of attributes."""
    return {key: value[index] for key, value in attrs.items()}


def coverage(attrs: Attributes) -> Tensor:
    """Foreground coverage in [0, 1], ``(n, 32, 32)``: the signed inside-distance of the shape, clamped to one pixel."""
    grid = torch.arange(SIZE) + 0.5
    x = grid[None, None, :] - attrs["cx"][:, None, None]
    y = grid[None, :, None] - attrs["cy"][:, None, None]
    r = torch.tensor(RADII, dtype=torch.float32)[attrs["ri"]][:, None, None]
    signed = torch.empty(x.shape[0], SIZE, SIZE)
    for i, name in enumerate(CLASSES):
        rows = attrs["shape"] == i
        if rows.any():
            signed[rows] = _SIGNED_DISTANCE[name](x[rows], y[rows], r[rows])
    return (signed + 0.5).clamp(0, 1)


def render(attrs: Attributes) -> Tensor:
    """uint8 ``(n, 3, 32, 32)``."""
    alpha = coverage(attrs)[:, None]
    shade = 1.15 - 0.55 * (torch.arange(SIZE) + 0.5) / SIZE
    back = torch.tensor(BACKGROUND_RGB, dtype=torch.float32)[attrs["bg"]][:, :, None, None] / 255 * shade[None, None, :, None]
    front = torch.tensor(COLOR_RGB, dtype=torch.float32)[attrs["color"]][:, :, None, None] / 255
    return ((back * (1 - alpha) + front * alpha) * 255).round().clamp(0, 255).to(torch.uint8)


def draw(n: int, seed: int, variant: str = "shapes32") -> tuple[Tensor, Attributes]:
    """``n`` random images (uint8, NCHW) and their attributes."""
    attrs = attributes(n, seed, variant)
    chunks = (
        [render(select(attrs, rows)) for rows in torch.arange(n).split(4096)] if n else [torch.empty(0, 3, SIZE, SIZE, dtype=torch.uint8)]
    )
    return torch.cat(chunks), attrs


def caption(attrs: Attributes, i: int) -> str:
    """One sentence about image ``i``."""
    cell = lambda c: min(2, int(3 * float(c) / SIZE))  # noqa: E731
    row, column = ("top", "middle", "bottom")[cell(attrs["cy"][i])], ("left", "center", "right")[cell(attrs["cx"][i])]
    color, shape = COLORS[int(attrs["color"][i])], CLASSES[int(attrs["shape"][i])]
    return f"a {color} {shape} at the {row} {column} on a {BACKGROUNDS[int(attrs['bg'][i])]} background"


def _wedge_up(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.minimum(0.8 * r - y, (y + r - 1.8 * x.abs()) / math.sqrt(4.24))


def _frame(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    h = torch.maximum(x.abs(), y.abs())
    return torch.minimum(0.9 * r - h, h - 0.5 * r)


def _ring(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    rho = torch.sqrt(x * x + y * y + 1e-9)
    return torch.minimum(r - rho, rho - 0.55 * r)


def _bars(u: Tensor, v: Tensor, half_width: Tensor, length: Tensor) -> Tensor:
    first = torch.minimum(half_width - u.abs(), length - v.abs())
    return torch.maximum(first, torch.minimum(half_width - v.abs(), length - u.abs()))


def _star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    rho = torch.sqrt(x * x + y * y + 1e-9)
    fifth = math.pi / 5
    angle = (torch.remainder(torch.atan2(x.expand_as(rho), -y.expand_as(rho)) + fifth, 2 * fifth) - fifth).abs()
    px, py = rho * torch.sin(angle), rho * torch.cos(angle)
    ex, ey = 0.5 * r * math.sin(fifth), 0.5 * r * math.cos(fifth) - 1.15 * r  # edge vector from the tip (0, 1.15 r)
    return (ey * px - ex * (py - 1.15 * r)) / torch.sqrt(ex * ex + ey * ey)


_SIGNED_DISTANCE = {
    "circle": lambda x, y, r: r - torch.sqrt(x * x + y * y + 1e-9),
    "ring": _ring,
    "square": lambda x, y, r: 0.85 * r - torch.maximum(x.abs(), y.abs()),
    "frame": _frame,
    "triangle": _wedge_up,
    "wedge": lambda x, y, r: _wedge_up(x, -y, r),
    "diamond": lambda x, y, r: (r - x.abs() - y.abs()) / math.sqrt(2.0),
    "plus": lambda x, y, r: _bars(x, y, 0.32 * r, r),
    "cross": lambda x, y, r: _bars((x + y) / math.sqrt(2.0), (x - y) / math.sqrt(2.0), 0.32 * r, 1.1 * r),
    "star": _star,
}
