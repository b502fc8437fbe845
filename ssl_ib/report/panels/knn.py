"""kNN accuracy over the run, beside what it has to beat."""

from __future__ import annotations

import numpy as np

from ...record.figures import REFERENCES, standard_error
from ..blocks import Bar, Bars, Chart, Level, Line, Panel, Part, percent
from ..page import Page
from ..reading import RunData

KEY = "knn/top1"


def build(page: Page) -> Panel | None:
    runs = [run for run in page.runs if len(run.series(KEY)[0])]
    if not runs:
        return None
    text = (
        "The share of held-out images whose class the nearest training images name rightly, by frozen features; higher "
        "is better. Training has helped where it is above the untrained encoder, and it is worth more than the images "
        "themselves where it is above raw pixels. Whiskers are one standard error for this number of test images: "
        "differences within them say nothing."
    )
    blocks = [Bars("Now, and what it has to beat", _bars(page, runs))]
    lines = [line for run in runs for line in _line(page, run)]
    if any(len(line.x) > 1 for line in lines):
        levels = [Level(name, 100 * value) for name, value in references(runs).items()]
        blocks.append(Chart("kNN top-1 over training", lines, "%", x_name=page.x_name, levels=levels, span=2))
    return Panel("kNN accuracy", text, blocks)


def _images(run: RunData) -> int:
    return int(run.number("chance", "images") or 0)


def _line(page: Page, run: RunData) -> list[Line]:
    step, epoch, value = run.series(KEY)
    error = 100 * standard_error(value, _images(run)) if _images(run) else None
    x = epoch if page.x_name == "epoch" else step
    return [Line(run.name if len(page.runs) > 1 else "this run", x, 100 * value, page.color(run), error, marks=True)]


def references(runs: list[RunData]) -> dict[str, float]:
    """What all runs are compared with, in words; of several runs, only what they agree on."""
    found = {}
    for key, name in REFERENCES.items():
        values = {run.number(key, KEY) for run in runs} - {None}
        if len(values) == 1:
            found[name] = values.pop()
    return found


def _bars(page: Page, runs: list[RunData]) -> list[Bar]:
    rows = []
    for run in runs:
        value, images = float(run.series(KEY)[2][-1]), _images(run)
        error = float(standard_error(np.float64(value), images)) if images else 0.0
        said = percent(value) + (f" ± {100 * error:.1f}" if images else "")
        rows.append(Bar(run.name if len(page.runs) > 1 else "this run", [Part(value, said, page.color(run), error)]))
    return rows + [Bar(name, [Part(value, percent(value), -1)]) for name, value in references(runs).items()]
