"""The picture of a sweep: a panel a metric, as a curve, a heat map, or rows of dots, by what varies."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from ..record.figures import BLUE, FAINT, INK, MUTED, chart, tidy
from .points import Axis
from .report import Cell, Report, digits

#: Rows of dots that still make a picture.
MOST_ROWS = 40
#: How a single run and a mean with its deviation are drawn.
_SINGLE = {"color": BLUE, "linestyle": "none", "marker": "o", "alpha": 0.35, "markersize": 6, "markeredgewidth": 0}
_MEAN = {"color": BLUE, "marker": "o", "markersize": 4, "elinewidth": 1, "capsize": 3}
_REFERENCES = (
    ("untrained", "untrained", (0, (5, 3))),
    ("initial", "initial", (0, (5, 3))),
    ("raw_pixels", "raw pixels", (0, (1, 2))),
)


def draw(report: Report, path: Path) -> str | None:
    """Draws the points that have a finished run; returns why not, where there is no picture.

    One numeric axis: a curve with deviations, single runs faint. Two axes: a heat map. Anything else: a row of dots a
    point. An axis of one value is none.
    """
    metrics = [m for m in report.shown() if m != "minutes"] or report.shown()
    if not report.numbers or not metrics:
        return "no plot: no run is done"
    axes = [axis for axis in report.axes if len(axis.choices) > 1]
    if len(report.points) == 1:
        return "no plot: there is only one point"
    rows = len(report.points)
    flat = len(axes) == 2 or (len(axes) == 1 and is_numeric(axes[0]))
    if not flat and rows > MOST_ROWS:
        return f"no plot: {rows} points on {len(axes)} axes are too many for one picture"
    columns = min(len(metrics), 3)
    lines = math.ceil(len(metrics) / columns)
    height = 0.9 + 0.62 * len(axes[0].choices) if len(axes) == 2 else 3.2 if flat else 1.2 + 0.32 * rows
    figure = chart(4.6 * columns, max(height, 2.4) * lines)
    for place, metric in enumerate(metrics):
        panel = figure.add_subplot(lines, columns, place + 1)
        if len(axes) == 2:
            _heat_map(panel, report, axes, metric)
        elif flat:
            _curve(panel, report, axes[0], metric)
        else:
            _dots(panel, report, axes, metric)
    figure.savefig(path)
    return None


def is_numeric(axis: Axis) -> bool:
    """Whether all values are numbers."""
    values = [choice.value for choice in axis.choices]
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def is_log_spaced(values: list[float]) -> bool:
    """Whether numbers are spread by factors rather than by steps; of two, whether they are a factor of 10 apart."""
    values = sorted(values)
    if values[0] <= 0 or len(values) < 2:
        return False
    if len(values) == 2:
        return values[1] >= 10 * values[0]
    steps, factors = np.diff(values), np.diff(np.log(values))
    return bool(factors.std() / factors.mean() < steps.std() / steps.mean())


def _curve(panel: Axes, report: Report, axis: Axis, metric: str) -> None:
    place = [choice.label for choice in axis.choices]
    number = [a.name for a in report.axes].index(axis.name)
    found = []
    for point in report.points:
        x, values = axis.choices[place.index(point.labels[number])].value, report.values(point, metric)
        if values:
            found.append((x, Cell.of(values)))
            panel.plot([x] * len(values), values, **_SINGLE)
    found.sort(key=lambda pair: pair[0])
    means, bars = [cell.mean for _, cell in found], [_bar(cell) for _, cell in found]
    panel.errorbar([x for x, _ in found], means, yerr=bars, linewidth=1.6, **_MEAN)
    _references(panel, report, metric, panel.axhline)
    tidy(panel, metric, axis.name, small=True)
    values = sorted(choice.value for choice in axis.choices)
    if is_log_spaced(values):
        panel.set_xscale("log")
    if len(values) <= 8:
        panel.set_xticks(values, [c.label for c in sorted(axis.choices, key=lambda c: c.value)])
        panel.minorticks_off()
    elif panel.get_xscale() == "linear":
        panel.xaxis.get_major_locator().set_params(integer=False)


def _heat_map(panel: Axes, report: Report, axes: list[Axis], metric: str) -> None:
    """Means by colour and number; how many runs n each is of stands in the title, or in the cells where they differ."""
    shape = tuple(len(axis.choices) for axis in axes)
    means, counts = np.full(shape, np.nan), np.zeros(shape, dtype=int)
    names = [axis.name for axis in report.axes]
    for point in report.points:
        i, j = ([choice.label for choice in axis.choices].index(point.labels[names.index(axis.name)]) for axis in axes)
        cell = Cell.of(report.values(point, metric))
        means[i, j], counts[i, j] = cell.mean, cell.n
    known = np.unique(counts[counts > 0])
    tidy(panel, f"{metric} (n = {known[0]})" if len(known) == 1 else metric, axes[1].name, small=True)
    shown = panel.imshow(np.ma.masked_invalid(means), cmap="Blues", aspect="auto")
    panel.grid(False)
    if np.isfinite(means).any():
        bar = panel.figure.colorbar(shown, ax=panel)
        bar.ax.tick_params(colors=MUTED, labelsize=7, length=2)
        bar.outline.set_visible(False)
    panel.set_ylabel(axes[0].name, fontsize=8, color=MUTED)
    for axis, ticks in ((axes[1], panel.set_xticks), (axes[0], panel.set_yticks)):
        ticks(range(len(axis.choices)), [choice.label for choice in axis.choices])
    finite = means[np.isfinite(means)]
    dark = finite.min() + 0.6 * np.ptp(finite) if finite.size else 0
    for (i, j), mean in np.ndenumerate(means):
        if np.isfinite(mean):
            color = "white" if mean > dark else INK
            text = digits(mean) if len(known) == 1 else f"{digits(mean)}\nn = {counts[i, j]}"
            panel.text(j, i, text, ha="center", va="center", color=color, fontsize=8)


def _dots(panel: Axes, report: Report, axes: list[Axis], metric: str) -> None:
    names = [axis.name for axis in report.axes]
    wanted = [names.index(axis.name) for axis in axes]
    labels = []
    for row, point in enumerate(report.points):
        labels.append(", ".join(point.labels[i] for i in wanted))
        values = report.values(point, metric)
        if values:
            cell = Cell.of(values)
            panel.plot(values, [row] * len(values), **_SINGLE)
            panel.errorbar(
                [cell.mean], [row], xerr=[_bar(cell)], color=BLUE, elinewidth=1, marker="o", markersize=4, capsize=3
            )
    _references(panel, report, metric, panel.axvline)
    tidy(panel, metric, ", ".join(axis.name for axis in axes), small=True)
    panel.set_xlabel("")
    panel.xaxis.get_major_locator().set_params(integer=False)
    panel.grid(axis="x", color=FAINT, linewidth=0.6)
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.5, -0.5)


def _bar(cell: Cell) -> float:
    return cell.deviation if math.isfinite(cell.deviation) else 0.0


def _references(panel: Axes, report: Report, metric: str, line) -> None:
    drawn = False
    for name, label, style in _REFERENCES:
        value = report.reference(name, metric)
        if value is not None and math.isfinite(value):
            line(value, color=MUTED, linewidth=1, linestyle=style, label=label, zorder=1)
            drawn = True
    if drawn:
        panel.legend(fontsize=7, frameon=False, labelcolor=MUTED)
