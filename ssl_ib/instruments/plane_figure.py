"""The picture of information planes: a panel a width of the noise, a path a run, and the limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from ..record.figures import FAINT, INK, MUTED, chart, tidy
from .plane_points import Trajectory

#: Colours that people with any kind of colour vision tell apart (Okabe and Ito), then shades of grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222", "#8c8c8c")
MARKERS = "osD^vPX*"


def draw(found: Sequence[Trajectory], sigmas: Sequence[float], file: Path) -> None:
    """Draws the runs' paths from the untrained encoder, an open mark, to the last, a large one.

    Of three widths or more there is a panel of the first and last encoders over the widths: features that are spread
    wider keep more at the same width, and only that panel compares what encoders say of Y at the same I(X;Z).
    """
    panels = len(sigmas) + (len(sigmas) >= 3)
    columns = min(panels, 3)
    lines = math.ceil(panels / columns)
    figure = chart(max(4.6 * columns, 6.5), 4.2 * lines + 0.7)
    for place, sigma in enumerate(sigmas, start=1):
        panel = figure.add_subplot(lines, columns, place)
        for number, path in enumerate(found):
            _path(panel, path, sigma, number)
        _limits(panel, found, [sigma], f"sigma = {sigma:g}")
    if panels > len(sigmas):
        panel = figure.add_subplot(lines, columns, panels)
        for number, path in enumerate(found):
            _over_widths(panel, path, number)
        _limits(panel, found, sigmas, f"first (dashed) and last, sigma {min(sigmas):g} to {max(sigmas):g}")
    between = " " if columns > 1 else "\n"
    title = f"Information kept of {found[0].images:,} held-out images and of their labels,{between}"
    title += "from the untrained encoder (open) to the last (large)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    if len(found) > 1:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(found), 6), fontsize=9, frameon=False)
    figure.savefig(file)


def _over_widths(panel: Axes, path: Trajectory, number: int) -> None:
    """The first encoder, dashed, and the last with noise of each width, the widest at the lower left."""
    color, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    for end in (0, -1):
        points = [point for point in path.points if point.state == path.points[end].state]
        points.sort(key=lambda point: point.kept)
        x, y = [point.kept for point in points], [point.label.nats for point in points]
        if end:
            errors = [point.label.error for point in points]
            panel.errorbar(x, y, yerr=errors, color=color, marker=marker, markersize=4, linewidth=1.2, elinewidth=0.8)
        else:
            panel.plot(x, y, color=color, linewidth=1, linestyle=(0, (4, 2)), alpha=0.6)


def _path(panel: Axes, path: Trajectory, sigma: float, number: int) -> None:
    points = path.of(sigma)
    color, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    x, y = [point.kept for point in points], [point.label.nats for point in points]
    errors = {"xerr": [point.error for point in points], "yerr": [point.label.error for point in points]}
    panel.errorbar(x, y, **errors, color=color, linewidth=1.2, elinewidth=0.8, alpha=0.8, zorder=2)
    panel.plot(x, y, color=color, linestyle="none", marker=marker, markersize=3.5, zorder=3)
    if points[0].state.step == 0:
        panel.plot(x[:1], y[:1], color=color, marker=marker, markersize=6, markerfacecolor="white", zorder=4)
    panel.plot(x[-1:], y[-1:], color=color, marker=marker, markersize=9, linestyle="none", zorder=5, label=path.name)


def _limits(panel: Axes, found: Sequence[Trajectory], sigmas: Sequence[float], title: str) -> None:
    """Axes with H(Y), log n, and the line that I(Z;Y) cannot be above: Z says no more of Y than of X."""
    most, label = found[0].most, found[0].points[0].label.ceiling
    low = min([0.0, *(point.label.nats for path in found for sigma in sigmas for point in path.of(sigma))])
    panel.set_xlim(-0.03 * most, 1.06 * most)
    high = max(point.label.nats for path in found for sigma in sigmas for point in path.of(sigma))
    # Encoders that say little of Y would all lie in a strip at the bottom: then H(Y) is named above the panel's top.
    near = high > label / 2
    top = 1.1 * label if near else 1.3 * max(high, 0.05 * label)
    panel.set_ylim(low - 0.05 * (top - low), top)
    dashed = {"color": MUTED, "linewidth": 1, "linestyle": (0, (5, 3)), "zorder": 1}
    panel.axhline(label, **dashed)
    panel.axvline(most, **dashed)
    panel.plot([0, label], [0, label], color=MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    said = f"H(Y) = {label:.2f}" if near else f"H(Y) = {label:.2f}, far above"
    panel.text(0.02 * most, label if near else top, said, va="bottom" if near else "top", fontsize=8, color=MUTED)
    panel.text(most, top, f"log n = {most:.2f} ", va="top", ha="right", rotation=90, fontsize=8, color=MUTED)
    tidy(panel, title, "I(X;Z), estimate (nats)")
    panel.set_ylabel("I(Z;Y), lower bound (nats)", fontsize=9, color=MUTED)
    panel.xaxis.get_major_locator().set_params(integer=False, min_n_ticks=3)
    panel.grid(axis="x", color=FAINT, linewidth=0.6)
