"""Figures that several panels draw alike: a logged number over training, with its held-out values."""

from __future__ import annotations

from dataclasses import replace

from .blocks import Bar, Bars, Chart, Line, Part, curve, number, points_for
from .page import Page


def charts(
    page: Page, key: str, held_out: str | None, title: str, unit: str = "", text: str = "", span=1, raw=True
) -> list[Chart | Bars]:
    """A number of the training steps, and with it its held-out values, which are dashed where there are several runs.

    raw: whether a run's single values are drawn behind the smoothed course.
    """
    most, alone = points_for(len(page.runs)), len(page.runs) == 1
    lines = []
    for run in page.runs:
        if key in run.columns:
            name = "training" if alone else run.name
            lines += curve(name, page.x(run), run.columns[key], page.color(run), most, raw and alone)
    held = _held_out(page, held_out) if held_out else []
    if not alone:
        known = {line.name for line in lines}
        held = [
            replace(line, name=f"{line.name}, held out", dashed=True, listed=line.name not in known) for line in held
        ]
    if not lines and not held:
        return []
    return drawn([Chart(title, [*lines, *held], unit, text, page.x_name, span=span)])


def evaluated(page: Page, key: str, title: str, unit: str = "", text: str = "") -> list[Chart | Bars]:
    """A number of the evaluations."""
    lines = _held_out(page, key, "this run")
    return drawn([Chart(title, lines, unit, text, page.x_name)]) if lines else []


def _held_out(page: Page, key: str, alone: str = "held out") -> list[Line]:
    lines = []
    for run in page.runs:
        step, epoch, y = run.series(key)
        if len(y):
            x = epoch if page.x_name == "epoch" else step
            name, color = (
                (alone, 1 if alone == "held out" else 0) if len(page.runs) == 1 else (run.name, page.color(run))
            )
            lines.append(Line(name, x, y, color, marks=True))
    return lines


def drawn(found: list[Chart]) -> list[Chart | Bars]:
    """Charts, but where no line has two points: there bars say the numbers, as one point is no curve."""
    return [chart if any(len(line.x) > 1 for line in chart.lines) else bars_of(chart) for chart in found]


def bars_of(chart: Chart) -> Bars:
    """The last value of each line as a bar, from 0 on."""
    values = [(line.name, float(line.y[-1]), line.color) for line in chart.read]
    values += [(level.name, level.y, -1) for level in chart.levels]
    most = max(abs(value) for _, value, _ in values) or 1.0
    unit = f" {chart.unit}" if chart.unit else ""
    rows = [Bar(name, [Part(abs(value) / most, number(value) + unit, color)]) for name, value, color in values]
    return Bars(chart.title, rows, chart.text)
