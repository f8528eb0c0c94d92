"""Figures of a report: quality over latency with the Pareto front, metric bars, accuracy over the token grid, training curves.

Every function takes stacks (``arsp.report.tables``) and returns a matplotlib figure, or None when there is nothing to draw.
Figures are built without pyplot, so no global state and no display is touched. Colours: Okabe & Ito's palette for colour-blind
readers; a stack keeps its colour and marker through the whole report.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from arsp.report.tables import METRICS, MISSING, POSITION_METRIC, Column, Stack, format_value, metric_columns, number, speedup_text

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B0A000", "#7F7F7F")
MARKERS = "osD^vPX*"
FONT_SIZE = 10
CURVE_TITLES = {"heldout_ce": "Held-out cross-entropy (nats per token)", "loss": "Training loss"}


@contextmanager
def theme(dark: bool = False) -> Iterator[None]:
    """Fonts, grid and the ink colour for a light or a dark page; the page shows through the figure."""
    ink, faint = ("#e6e6e6", "#555a60") if dark else ("#222222", "#d0d0d0")
    settings = {
        "font.size": FONT_SIZE,
        "axes.titlesize": FONT_SIZE + 1,
        "axes.labelsize": FONT_SIZE,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.fontsize": 9,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "grid.color": faint,
        "grid.linewidth": 0.6,
        "axes.grid": False,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "svg.fonttype": "path",
        "text.parse_math": False,  # names may hold dollar signs
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty Agg figure, inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_svg(figure: Figure) -> bytes:
    """SVG bytes that depend on the content only (no date, stable ids)."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "arsp"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def to_png(figure: Figure, dpi: int = 150, background: str = "white") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=background)
    return buffer.getvalue()


def looks(stacks: Sequence[Stack]) -> dict[str, tuple[str, str]]:
    """label -> (colour, marker)."""
    return {stack.label: (PALETTE[i % len(PALETTE)], MARKERS[(i + i // len(PALETTE)) % len(MARKERS)]) for i, stack in enumerate(stacks)}


# ---------------------------------------------------------------- quality over cost


def quality_column(stacks: Sequence[Stack]) -> Column | None:
    """The quality axis: the FID column most stacks have a value for, else the first other known metric."""
    columns = [column for column in metric_columns(stacks) if column.name in METRICS]
    if not columns:
        return None
    first = [column for column in columns if column.name == columns[0].name]
    return max(first, key=lambda column: sum(stack.value(column) is not None for stack in stacks))


def cost_axis(stacks: Sequence[Stack], column: Column) -> tuple[str, dict[str, float]]:
    """Axis title and label -> cost: ms an image where two or more stacks were timed, else passes an image."""
    scored = [stack for stack in stacks if stack.value(column) is not None and stack.role != "reference"]
    timed = {stack.label: stack.ms_per_image for stack in scored if stack.ms_per_image}
    counted = {stack.label: stack.passes for stack in scored if stack.passes and stack.passes > 0}
    if len(timed) >= 2 or (timed and not counted):
        return "milliseconds an image", timed
    return "network passes an image", counted


def pareto_front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[int]:
    """Indices of the points that no other point beats in both cost (less) and quality, by rising cost."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1] if higher_is_better else points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or (points[i][1] > points[front[-1]][1] if higher_is_better else points[i][1] < points[front[-1]][1]):
            front.append(i)
    return front


def quality_latency(stacks: Sequence[Stack]) -> Figure | None:
    column = quality_column(stacks)
    if column is None or not cost_axis(stacks, column)[1]:
        return None
    figure = new_figure(7.2, 4.2)
    draw_quality_latency(figure.subplots(), stacks)
    return figure


def draw_quality_latency(axes: Axes, stacks: Sequence[Stack]) -> None:
    """Labelled points, a line through the Pareto front (real methods only), and the references as horizontal lines."""
    column = quality_column(stacks)
    title, costs = cost_axis(stacks, column)
    style = looks(stacks)
    shown = [stack for stack in stacks if stack.label in costs]
    points = [(costs[stack.label], stack.value(column)) for stack in shown]
    real = [point for stack, point in zip(shown, points, strict=True) if stack.role != "control" and not stack.simulated] or points
    front = [real[i] for i in pareto_front(real, bool(column.higher_is_better))]
    axes.plot(*zip(*front, strict=True), color="#999999", linewidth=1.2, linestyle="--", zorder=1)
    for stack, (x, y) in zip(shown, points, strict=True):
        color, marker = style[stack.label]
        face = "none" if stack.simulated else color
        axes.plot(x, y, marker, color=color, markersize=9, markerfacecolor=face, markeredgewidth=1.6, zorder=3)
    axes.set_xscale("log")
    _readable_log(axes, "x", [x for x, _ in points])
    references = [(stack.label, stack.value(column)) for stack in stacks if stack.role == "reference" and stack.value(column) is not None]
    values = [y for _, y in points] + [value for _, value in references]
    if min(values) > 0 and max(values) > 8 * min(values) and column.higher_is_better is not True:
        axes.set_yscale("log")
        _readable_log(axes, "y", values)
    else:
        axes.margins(y=0.18)
    for label, value in references:
        axes.axhline(value, color="#999999", linewidth=1, linestyle=":")
        axes.annotate(label, (0, value), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=9)
    axes.grid(True, which="major")
    axes.set_xlabel(f"{title} (log scale)")
    axes.set_ylabel(" ".join(filter(None, [column.title, column.arrow, f"({', '.join(column.details)})" if column.details else ""])))
    axes.set_title("Quality over cost; dashed: Pareto front of the measured methods", loc="left")
    names = [stack.label + (" (simulated)" if stack.simulated else "") for stack in shown]
    _place_labels(axes, [(name, x, y) for name, (x, y) in zip(names, points, strict=True)], front)


def _readable_log(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Plain numbers on a log axis: decades over a wide range, 1-2-5 steps over a narrow one, with room around the points."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = min(values), max(values)
    pad = max((high / low) ** 0.12, 1.35)
    (axes.set_xlim if which == "x" else axes.set_ylim)(low / pad, high * pad)
    axis.set_major_locator(LogLocator(base=10, subs=(1,) if high / low > 3000 else (1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _place_labels(axes: Axes, labels: Sequence[tuple[str, float, float]], line: Sequence[tuple[float, float]]) -> None:
    """Put each label beside its point, at the place around it that covers least of points, labels, line and border."""
    figure = axes.get_figure(root=True)
    figure.draw_without_rendering()
    renderer, frame = figure.canvas.get_renderer(), axes.get_window_extent()
    scale = figure.dpi / 72
    centres = [axes.transData.transform((x, y)) for _, x, y in labels]
    strokes = [text.get_window_extent(renderer).extents for text in axes.texts] + _line_boxes(axes, line)
    taken = [(cx - 6 * scale, cy - 6 * scale, cx + 6 * scale, cy + 6 * scale) for cx, cy in centres]
    places = [(9, 0, "left", "center"), (-9, 0, "right", "center"), (0, 9, "center", "bottom"), (0, -9, "center", "top")]
    places += [(7, 7, "left", "bottom"), (-7, 7, "right", "bottom"), (7, -7, "left", "top"), (-7, -7, "right", "top")]
    places += [(dx * 3, dy * 3, ha, va) for dx, dy, ha, va in places[4:]]
    for index, (text, x, y) in enumerate(labels):
        tried = []
        for dx, dy, ha, va in places:
            note = axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=9)
            note.set_in_layout(False)
            box = note.get_window_extent(renderer).extents
            others = [other for i, other in enumerate(taken) if i != index] + strokes
            cost = sum(_overlap(box, other) for other in others) + _outside(box, frame.extents)
            tried.append((cost, note, box))
            if cost == 0:
                break
        best = min(tried, key=lambda item: item[0])
        for _, note, _ in tried:
            if note is not best[1]:
                note.remove()
        taken.append(tuple(best[2]))


def _line_boxes(axes: Axes, line: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """Small boxes along a line, in display coordinates."""
    corners = axes.transData.transform(np.asarray(line))
    boxes = []
    for start, end in itertools.pairwise(corners):
        for x, y in np.linspace(start, end, max(2, int(np.hypot(*(end - start)) / 4))):
            boxes.append((x - 2, y - 2, x + 2, y + 2))
    return boxes


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


def _outside(box: Sequence[float], frame: Sequence[float]) -> float:
    area = (box[2] - box[0]) * (box[3] - box[1])
    return area - _overlap(box, frame)


# ---------------------------------------------------------------- metric bars


def bar_columns(stacks: Sequence[Stack], limit: int = 4) -> list[Column]:
    """Known metrics that at least two stacks share, one column for each metric name."""
    order = ("fid", "class_accuracy", "color_accuracy", "precision", "recall", "is", "kid")
    chosen: dict[str, Column] = {}
    for column in metric_columns(stacks):
        count = sum(stack.value(column) is not None for stack in stacks)
        best = chosen.get(column.name)
        if column.name in METRICS and count >= 2 and (best is None or count > sum(stack.value(best) is not None for stack in stacks)):
            chosen[column.name] = column
    return [chosen[name] for name in order if name in chosen][:limit]


def draw_bars(axes: Axes, stacks: Sequence[Stack], column: Column, show_names: bool) -> None:
    """One horizontal bar for each stack with its value written at the end; log scale when values span decades."""
    style = looks(stacks)
    values = [stack.value(column) for stack in stacks]
    known = [value for value in values if value is not None]
    is_log = column.higher_is_better is False and min(known) > 0 and max(known) > 30 * min(known)
    rows = range(len(stacks))
    axes.barh(rows, [value or 0 for value in values], height=0.62, color=[style[stack.label][0] for stack in stacks], log=is_log)
    for row, value in zip(rows, values, strict=True):
        text = "not measured" if value is None else format_value(column.name, value)
        position = min(known) if is_log and value is None else max(value or 0, 0)
        axes.annotate(text, (position, row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    low, high = min(min(known), 0), max(max(known), 0) or 1
    axes.set_xlim((min(known) / 2, high * 6) if is_log else (low * 1.25, high * 1.32))
    axes.set_ylim(len(stacks) - 0.4, -0.6)
    axes.set_yticks(list(rows), [stack.label for stack in stacks] if show_names else [])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    count = f", n = {column.n}" if column.n is not None else ""
    axes.set_title(f"{column.title} {column.arrow}{count}{', log scale' if is_log else ''}", loc="left")


# ---------------------------------------------------------------- accuracy over the token grid


def token_grid(stack: Stack, num_tokens: int) -> tuple[int, int]:
    """Latent grid (height, width): as the record says, else the square of that many tokens, else one row."""
    described = [record.get("stack") or {} for record in stack.records]
    for grid in (description.get("grid") for description in described):
        if isinstance(grid, list) and len(grid) == 2 and all(isinstance(side, int) for side in grid) and grid[0] * grid[1] == num_tokens:
            return grid[0], grid[1]
    side = math.isqrt(num_tokens)
    return (side, side) if side * side == num_tokens else (1, num_tokens)


def position_map(stack: Stack) -> np.ndarray | None:
    """Accuracy over the latent grid, (h, w) float with NaN for unknown positions; None without such a curve."""
    points = [(number(point["x"]), number(point["y"])) for point in stack.curves.get(POSITION_METRIC) or []]
    known = [(int(x), y) for x, y in points if x is not None and x >= 0 and y is not None]
    if not known:
        return None
    values = np.full(max(x for x, _ in known) + 1, np.nan)
    for x, y in known:
        values[x] = y
    return values.reshape(token_grid(stack, values.size))


def position_maps(stacks: Sequence[Stack]) -> Figure | None:
    """Heat maps side by side with one colour bar from 0 to 1 and the mean in each title."""
    maps = [(stack, grid) for stack in stacks if (grid := position_map(stack)) is not None]
    if not maps:
        return None
    columns = min(len(maps), 4)
    rows = math.ceil(len(maps) / columns)
    figure = new_figure(2.4 * columns + 1.0, 2.75 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat[len(maps) :]:
        panel.set_axis_off()
    for panel, (stack, grid) in zip(axes.flat, maps, strict=False):
        image = _draw_map(panel, grid)
        panel.set_title(f"{_shortened(stack.label)}\nmean {np.nanmean(grid):.3f}", fontsize=FONT_SIZE)
    figure.colorbar(image, ax=axes, shrink=0.85, label="accuracy")
    return figure


def _draw_map(panel: Axes, grid: np.ndarray) -> AxesImage:
    """Shares over the token grid, written into the cells of a small one."""
    image = panel.imshow(grid, vmin=0, vmax=1, cmap="cividis")
    panel.set_xticks([])
    panel.set_yticks([])
    for spine in panel.spines.values():
        spine.set_visible(False)
    if max(grid.shape) <= 8:
        _write_cells(panel, grid)
    return image


def _write_cells(panel: Axes, grid: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            color = "white" if value < 0.55 else "black"
            panel.text(column, row, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=9, color=color)


def _shortened(label: str, width: int = 26) -> str:
    """Both ends of a long name: what tells stacks apart is often at its end."""
    half = (width - 1) // 2
    return label if len(label) <= width else f"{label[:half]}…{label[-half:]}"


# ---------------------------------------------------------------- tokens a pass and accepted drafts

DECODING_HEIGHT = 2.6  # inches of a stack


def decoding(stacks: Sequence[Stack]) -> Figure | None:
    """Modes of the verify family, one a row: how many tokens a pass committed, and where in the image drafts stood."""
    shown = [stack for stack in stacks if stack.decoding is not None]
    if not shown:
        return None
    figure = new_figure(7.6, DECODING_HEIGHT * len(shown))
    draw_decoding(figure, shown, looks(stacks))
    return figure


def draw_decoding(view: FigureBase, shown: Sequence[Stack], style: dict[str, tuple[str, str]]) -> None:
    """A row for each of the stacks, whose ``decoding`` is known."""
    panels = view.subplots(len(shown), 2, squeeze=False, gridspec_kw={"width_ratios": (2.2, 1)})
    for (left, right), stack in zip(panels, shown, strict=True):
        _draw_committed(left, stack, style[stack.label][0])
        grid = acceptance_map(stack)
        if grid is None:
            right.set_axis_off()
            continue
        view.colorbar(_draw_map(right, grid), ax=right, shrink=0.9)
        mean = number(stack.decoding.get("acceptance"))
        right.set_title("accepted drafts" + ("" if mean is None else f", {mean:.3f} in all"), fontsize=FONT_SIZE, loc="left")


def _draw_committed(axes: Axes, stack: Stack, color: str) -> None:
    report = stack.decoding
    pairs = [(int(tokens), number(count)) for tokens, count in report["committed"].items() if str(tokens).isdigit()]
    tokens, counts = zip(*(pair for pair in pairs if pair[1]), strict=True) if any(count for _, count in pairs) else ((1,), (0.0,))
    axes.bar(tokens, [100 * count / max(sum(counts), 1) for count in counts], color=color, width=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("tokens committed by a pass")
    axes.set_ylabel("% of passes")
    mean = number(report.get("tokens_per_pass"))
    facts = [stack.exactness, None if mean is None else f"{mean:.2f} tokens a pass"]
    facts += [f"speed-up {text}" for text in [speedup_text(stack)] if text != MISSING]
    axes.set_title(f"{_shortened(stack.label, 48)}\n{', '.join(fact for fact in facts if fact)}", loc="left", fontsize=FONT_SIZE)


def acceptance_map(stack: Stack) -> np.ndarray | None:
    """Share of accepted drafts over the latent grid, (h, w) float with NaN where none was tested; None where none was anywhere."""
    rows = (stack.decoding or {}).get("acceptance_map")
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
        return None
    known = [[number(value) for value in row] for row in rows]
    values = np.array([[np.nan if value is None else value for value in row] for row in known])
    return values if values.ndim == 2 and np.isfinite(values).any() else None


# ---------------------------------------------------------------- training curves


def curve_names(stacks: Sequence[Stack]) -> list[str]:
    """Curves that at least one stack has two points of."""
    names = {name for stack in stacks for name in stack.curves if name != POSITION_METRIC and len(_points(stack, name)) >= 2}
    order = [*CURVE_TITLES, *METRICS]
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def training_curves(stacks: Sequence[Stack]) -> Figure | None:
    """One panel for each curve name with all stacks in it; a stack without that curve but with the metric is a dashed line."""
    names = curve_names(stacks)
    if not names:
        return None
    columns = min(len(names), 2)
    rows = math.ceil(len(names) / columns)
    figure = new_figure(4.9 * columns, 3.3 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat[len(names) :]:
        panel.set_axis_off()
    for panel, name in zip(axes.flat, names, strict=False):
        _draw_curve(panel, stacks, name)
    return figure


def _draw_curve(axes: Axes, stacks: Sequence[Stack], name: str) -> None:
    style = looks(stacks)
    title, higher, _ = METRICS.get(name, (CURVE_TITLES.get(name, name), None, 3))
    seen: list[float] = []
    times = [x for stack in stacks for x, _ in _points(stack, name)]
    for stack in stacks:
        color, marker = style[stack.label]
        points = _points(stack, name)
        level = final_level(stack, name)
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker=marker if len(points) <= 40 else "", markersize=5, label=stack.label)
            seen += [y for _, y in points]
        elif level is not None and stack.role in ("teacher", "student"):
            axes.axhline(level, color=color, linestyle="--", linewidth=1.3, label=f"{stack.label} ({format_value(name, level)})")
            seen.append(level)
    if min(seen) > 0 and max(seen) > 8 * min(seen) and higher is not True:
        axes.set_yscale("log")
        _readable_log(axes, "y", seen)
    elif higher is True and min(seen) >= 0 and max(seen) <= 1:
        axes.set_ylim(0, 1.02)
    if min(times) > 0 and max(times) > 30 * min(times):
        axes.set_xscale("log")
        _readable_log(axes, "x", times)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(True, which="major")
    axes.set_xlabel("minutes of training")
    axes.set_title(f"{title} {'' if higher is None else '↑' if higher else '↓'}".strip(), loc="left")
    axes.legend(loc="best")


def _points(stack: Stack, name: str) -> list[tuple[float, float]]:
    pairs = [(number(point["x"]), number(point["y"])) for point in stack.curves.get(name) or []]
    return sorted((x, y) for x, y in pairs if x is not None and y is not None)


def final_level(stack: Stack, name: str) -> float | None:
    """The stack's final value of a metric, for a horizontal line beside other stacks' curves."""
    values = [stack.value(column) for column in metric_columns([stack]) if column.name == name]
    return next((value for value in values if value is not None), None)


# ---------------------------------------------------------------- everything in one picture


def overview(stacks: Sequence[Stack], grids: dict[str, np.ndarray], title: str) -> Figure:
    """Grids side by side, then metric bars, quality over cost, and passes of speculative decoding. ``grids``: label -> uint8 (H, W, 3)."""
    bars = bar_columns(stacks)
    column = quality_column(stacks)
    has_plot = column is not None and bool(cost_axis(stacks, column)[1])
    shown = [stack for stack in stacks if stack.label in grids]
    across = max(min(len(shown), 4), 1)
    grid_rows = math.ceil(len(shown) / across)
    width = 13.0
    panel_width = width / across
    tallest = max((grids[stack.label].shape[0] / grids[stack.label].shape[1] for stack in shown), default=0)
    parts = []
    if shown:
        parts.append(("grids", grid_rows * (min(panel_width * tallest, 6.0) + 0.45)))
    if bars:
        parts.append(("bars", 0.8 + 0.34 * len(stacks)))
    if has_plot:
        parts.append(("plot", 4.4))
    speculative = [stack for stack in stacks if stack.decoding is not None]
    if speculative:
        parts.append(("decoding", DECODING_HEIGHT * len(speculative)))
    figure = new_figure(width, sum(height for _, height in parts) + 0.6 if parts else 1.2)
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    if not parts:
        return figure
    views = np.atleast_1d(figure.subfigures(len(parts), 1, height_ratios=[height for _, height in parts]))
    for (part, _), view in zip(parts, views, strict=True):
        if part == "grids":
            _draw_grids(view.subplots(grid_rows, across, squeeze=False), shown, grids)
        elif part == "bars":
            for index, (panel, metric) in enumerate(zip(view.subplots(1, len(bars), squeeze=False).flat, bars, strict=True)):
                draw_bars(panel, stacks, metric, show_names=index == 0)
        elif part == "decoding":
            draw_decoding(view, speculative, looks(stacks))
        else:
            draw_quality_latency(view.subplots(), stacks)
    return figure


def _draw_grids(axes: np.ndarray, stacks: Sequence[Stack], grids: dict[str, np.ndarray]) -> None:
    for panel in axes.flat:
        panel.set_axis_off()
    for panel, stack in zip(axes.flat, stacks, strict=False):
        panel.imshow(grids[stack.label], interpolation="nearest")
        passes = stack.passes
        detail = "" if passes is None else f"  ({passes:g} {'pass' if passes == 1 else 'passes'})"
        panel.set_title(_shortened(stack.label, 34) + detail, loc="left", fontsize=FONT_SIZE)
