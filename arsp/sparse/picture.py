"""The picture of a profile: how much of the dense attention each layer keeps at each scale."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from arsp.report.plots import FONT_SIZE, new_figure
from arsp.sparse.profile import SHARES, Profile

_MOST_CELLS_WITH_NUMBERS = 400


def kept_figure(profile: Profile) -> Figure:
    """Heat map of the kept share, layers down and scales across."""
    kept = profile.kept()
    layers, scales = kept.shape
    figure = new_figure(0.62 * scales + 2.4, 0.34 * layers + 1.7)
    axes = figure.subplots()
    image = axes.imshow(kept, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    axes.set_xticks(range(scales), [f"{side}²" for side in profile.patch_nums])
    axes.set_yticks(range(layers))
    axes.set_xlabel("scale (positions)")
    axes.set_ylabel("layer")
    shared = ", ".join(SHARES[kind] for kind in np.unique(profile.share) if kind) or "nothing"
    axes.set_title(
        f"{profile.model}: {100 * profile.kept_total():.1f} % of the query-key pairs kept\n"
        f"{profile.geometry} windows, tau {profile.tau:g}, mask {profile.mask}; halves share: {shared}",
        fontsize=FONT_SIZE,
        loc="left",
    )
    if kept.size <= _MOST_CELLS_WITH_NUMBERS:
        for (layer, s), value in np.ndenumerate(kept):
            color = "white" if value < 0.55 else "black"
            axes.text(s, layer, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, ax=axes, label="kept share of the pairs")
    return figure
