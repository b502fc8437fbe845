"""What the run says of information, in nats, each number with its ceiling and what it is worth."""

from __future__ import annotations

import numpy as np

from ...part import Nats
from ...record.information import Reading, readings
from ..blocks import Chart, Level, Line, Panel
from ..curves import drawn
from ..page import Page
from ..reading import RunData

_MEANS = {
    "lower bound": "A lower bound: the truth lies between the curve and the ceiling.",
    "upper bound": "An upper bound: the truth lies between 0 and the curve.",
    "estimate": "An estimate: the truth may lie to either side.",
}


def build(page: Page) -> Panel | None:
    found: dict[tuple[str, str], list[tuple[RunData, np.ndarray, Reading]]] = {}
    for run in page.runs:
        nats = {name: Nats(**told) for name, told in run.about.get("nats", {}).items()}
        rows = [
            row
            for row in run.evaluations
            if "information/labels" in row or any(f"held_out/{name}" in row for name in nats)
        ]
        x = np.array([row[page.x_name] for row in rows], dtype=float)
        for reading in readings(rows, nats):
            found.setdefault((reading.title, f"{reading.what}. {_MEANS[reading.kind]}"), []).append((run, x, reading))
    if not found:
        return None
    blocks = [_chart(page, title, text, shown) for (title, text), shown in found.items()]
    text = (
        "What the features keep and drop, on held-out images. A bound says on which side of it the truth lies, and a "
        "ceiling is the most that the number can reach, by the number of classes or of images that are compared. A "
        "number near its ceiling, or below 0, says only that."
    )
    return Panel("Information", text, drawn(blocks))


def _chart(page: Page, title: str, text: str, shown: list[tuple[RunData, np.ndarray, Reading]]) -> Chart:
    alone, lines, ceilings = len(page.runs) == 1, [], set()
    for run, x, reading in shown:
        name, color = "this run" if alone else run.name, page.color(run)
        finite = np.isfinite(reading.nats)
        error = np.nan_to_num(reading.error[finite]) if np.isfinite(reading.error).any() else None
        if finite.any():
            lines.append(Line(name, x[finite], reading.nats[finite], color, error, marks=True))
        for other, value in reading.more.items():
            if not np.isfinite(value):
                continue
            lines.append(Line(f"{name}, {other}", x[-1:], np.array([value]), color + alone, marks=True, joined=False))
        known = reading.ceiling[np.isfinite(reading.ceiling)]
        ceilings |= {round(float(value), 6) for value in (known.min(), known.max())} if len(known) else set()
    levels = [Level("ceiling", ceiling) for ceiling in sorted(ceilings)] if len(ceilings) == 1 else []
    if len(ceilings) > 1:
        text += f" The runs' ceilings lie between {min(ceilings):.2f} and {max(ceilings):.2f}."
    return Chart(title, lines, "nats", text, page.x_name, levels)
