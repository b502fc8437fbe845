"""What a run says of information, in nats: kept and dropped of the classes, and what its criterion bounds or estimates.

Every number is shown with what it is worth and with its ceiling; one that no information can have is shown as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ..part import Nats
from .figures import BLUE, MUTED, TEAL, chart, clock, column, save, tidy

_WORDS = {"lower bound": "at least", "upper bound": "at most", "estimate": "about"}


@dataclass(frozen=True)
class Reading:
    """A number over the run.

    nats, error, ceiling: over the rows, in nats; the error and the ceiling are nan where there is none.
    more: further readings of the same at the end, by name.
    """

    title: str
    what: str
    kind: str
    nats: np.ndarray
    error: np.ndarray
    ceiling: np.ndarray
    more: Mapping[str, float]


def summary(row: Mapping[str, Any], nats: Mapping[str, Nats]) -> list[str]:
    """The information of an evaluation in lines; none where it says nothing of it.

    row: the evaluation's metrics. nats: of the criterion.
    """
    lines = []
    if "information/labels" in row:
        readers = {"the linear probe": "information/labels_linear", "kNN": "information/labels"}
        found = {name: (row[key], row[f"{key}_error"]) for name, key in readers.items() if key in row}
        best, ceiling = max(value for value, _ in found.values()), row["information/labels_ceiling"]
        said = ", ".join(f"{value:.2f} ± {error:.2f} by {name}" for name, (value, error) in found.items())
        dropped = "" if best < 0 else f"; so dropped at most {ceiling - best:.2f}"
        lines.append(f"kept of the classes: at least {said}, of {ceiling:.2f} nats{_remark(best, ceiling)}{dropped}")
    for name, told in nats.items():
        if (value := row.get(f"held_out/{name}")) is not None:
            ceiling = _ceiling(told, row)
            of = f" of {ceiling:.2f}" if math.isfinite(ceiling) else ""
            shown = f"{_WORDS[told.kind]} {value:.2f}{of} nats{_remark(value, ceiling)}"
            lines.append(f"{told.of}: {shown} ({name}, held out, {_article(told.kind)})")
    return lines


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'eu' else 'a'} {kind}"


def _ceiling(told: Nats, row: Mapping[str, Any]) -> float:
    if isinstance(told.ceiling, str):
        return row.get(f"held_out/{told.ceiling}", math.nan)
    return math.nan if told.ceiling is None else told.ceiling


def _remark(value: float, ceiling: float) -> str:
    """What is to be said of a number that no information has."""
    if value < 0:
        return ", which is below 0 and says nothing"
    return ", which is above its ceiling" if value > ceiling * (1 + 1e-6) else ""


def draw(rows: Sequence[dict[str, Any]], nats: Mapping[str, Nats], path: Path | str) -> None:
    """Draws each number over the run with its ceiling, and shades where the information lies by it.

    rows: as in `metrics.jsonl`. nats: of the criterion. Without any such number, nothing is drawn.
    """
    rows = [row for row in rows if "information/labels" in row or any(f"held_out/{name}" in row for name in nats)]
    panels = readings(rows, nats)
    if not panels:
        return
    x, unit = clock(rows)
    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    figure = chart(max(4.1 * columns, 5), 3.6 * lines)
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, place)
        _draw(axes, x, panel)
        tidy(axes, f"{panel.title}\n{panel.what}, {panel.kind}", unit, small=True)
        axes.set_ylabel("nats", fontsize=8, color=MUTED)
    save(figure, path)


def readings(rows: Sequence[dict[str, Any]], nats: Mapping[str, Nats]) -> list[Reading]:
    """What evaluations say of information, each with its ceiling. rows and nats: as in `draw`."""
    panels, last, nothing = [], rows[-1] if rows else {}, np.full(len(rows), np.nan)
    if "information/labels" in last:
        kept, error, ceiling = (column(rows, f"information/labels{end}") for end in ("", "_error", "_ceiling"))
        probe = last.get("information/labels_linear")
        linear = {} if probe is None else {"linear probe": probe}
        panels.append(Reading("Kept of the classes", "I(Z; Y), by kNN", "lower bound", kept, error, ceiling, linear))
        left = {name: ceiling[-1] - value for name, value in linear.items()}
        dropped = ceiling - kept
        panels.append(Reading("Dropped of the classes", "H(Y|Z), by kNN", "upper bound", dropped, error, ceiling, left))
    for name, told in nats.items():
        if f"held_out/{name}" in last:
            title, ceiling = told.of[0].upper() + told.of[1:], np.array([_ceiling(told, row) for row in rows])
            values = column(rows, f"held_out/{name}")
            panels.append(Reading(title, f"{name}, held out", told.kind, values, nothing, ceiling, {}))
    return panels


def _draw(axes: Axes, x: np.ndarray, panel: Reading) -> None:
    y = panel.nats
    axes.axhline(0, color=MUTED, linewidth=1)
    if panel.kind == "lower bound":
        axes.fill_between(x, y, panel.ceiling, color=BLUE, alpha=0.1, linewidth=0)
    elif panel.kind == "upper bound":
        axes.fill_between(x, 0, y, color=BLUE, alpha=0.1, linewidth=0)
    axes.errorbar(x, y, yerr=np.nan_to_num(panel.error), color=BLUE, linewidth=1.8, marker="o", markersize=4, capsize=2)
    _say(axes, x[-1], y[-1], f"{y[-1]:.2f}", BLUE)
    if np.isfinite(panel.ceiling).any():
        axes.plot(x, panel.ceiling, color=MUTED, linewidth=1.2, linestyle=(0, (5, 3)))
        _say(axes, x[0], panel.ceiling[0], f"ceiling {panel.ceiling[-1]:.2f}", MUTED)
    for name, value in panel.more.items():
        axes.plot(x[-1], value, color=TEAL, marker="D", markersize=6)
        _say(axes, x[-1], value, f"{name} {value:.2f}", TEAL)
    axes.margins(x=0.12, y=0.12)


def _say(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    """Beside a point: to its right at the left edge, otherwise to its left, and above it."""
    at_left = color == MUTED
    axes.annotate(
        text,
        (x, y),
        xytext=(0 if at_left else -4, 4),
        textcoords="offset points",
        ha="left" if at_left else "right",
        fontsize=8,
        color=color,
    )
