"""The picture of a mixed-precision run: what each layer would cost in quality in every format, and what it got."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from arsp.quant.sensitivity import Scores
from arsp.report.plots import FONT_SIZE, new_figure

_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")


def sensitivity_figure(scores: Scores, chosen: Mapping[str, str], title: str) -> Figure:
    """A row a layer: its KL in every format alone (logarithmic), the chosen format filled."""
    names = list(scores)
    figure = new_figure(7.0, 0.17 * len(names) + 1.6)
    axes = figure.subplots()
    formats = list(dict.fromkeys(key for found in scores.values() for key in found))
    floor = min((value["kl"] for found in scores.values() for value in found.values() if value["kl"] > 0), default=1e-9)
    for color, key in zip(_COLORS, formats, strict=False):
        rows = [row for row, name in enumerate(names) if key in scores[name]]
        values = [max(scores[names[row]][key]["kl"], floor) for row in rows]
        faces = [color if chosen[names[row]] == key else "none" for row in rows]
        axes.scatter(values, rows, s=26, facecolors=faces, edgecolors=color, label=key)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:.0e}")
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("KL to the unquantised model, this layer alone (nats)")
    axes.set_title(f"{title}; filled: chosen", fontsize=FONT_SIZE, loc="left")
    axes.legend(loc="best", fontsize=8)
    return figure
