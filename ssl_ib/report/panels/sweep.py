"""A sweep: its table, each metric against what varies with every seed as a point, and the runs behind each point."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np

from ...sweep.plot import is_log_spaced
from ...sweep.points import CASE
from ...sweep.report import DEFAULT_METRICS, Cell, digits
from ..blocks import Chart, Facts, Group, Level, Line, Link, Panel, Table
from ..names import title, unit, words
from ..page import Page
from ..sweeps import SweepData
from .knn import KEY, references

#: Curves that one figure tells apart; with more, each point is a row of dots.
MOST_CURVES = 8


@dataclass(frozen=True)
class Row:
    """A point of the sweep: the place of each seed's value and of their mean on the track, in [0, 1], and in words."""

    name: str
    places: list[float]
    mean: float
    text: str


@dataclass
class Dots:
    """A metric at each point as a row of dots on one track, from the lowest to the highest value."""

    title: str
    rows: list[Row]
    text: str = ""
    kind: str = "dots"

    @property
    def letters(self) -> int:
        """Of the longest value."""
        return max(len(row.text) for row in self.rows)


def build(page: Page) -> Panel | None:
    sweep = page.sweep
    if sweep is None:
        return None
    main = [metric for metric in sweep.wanted or DEFAULT_METRICS if metric in sweep.metrics]
    others = [metric for metric in sweep.metrics if metric not in (*main, "seconds")]
    figures = [_figure(page, sweep, metric) for metric in main]
    further = [_figure(page, sweep, metric) for metric in others if any(sweep.values(p, metric) for p in sweep.points)]
    blocks = [Facts(_facts(sweep)), _means(sweep, main)]
    if len(sweep.points) > 1:
        blocks += figures
        blocks += [Group(f"{len(further)} further metrics", further, folded=True)] if further else []
    text = (
        "What varies, and what came of it. Every seed is a point, and a curve or a bold dot is the mean over seeds. "
        "A track of dots goes from the lowest value to the highest. Differences smaller than the scatter of the seeds "
        "say nothing; with one seed the scatter is not known."
    )
    return Panel("The sweep", text, [*blocks, _runs(page, sweep, main)])


def _facts(sweep: SweepData) -> list[tuple[str, str]]:
    done = sum(run.status == "done" for run in sweep.runs)
    facts = [
        ("Recipe", sweep.record.get("recipe")),
        ("Varies", " × ".join(sweep.axes)),
        ("Runs", f"{done} of {len(sweep.runs)} done"),
    ]
    return [(name, str(value)) for name, value in [*facts, ("Command", sweep.record.get("command"))] if value]


def _means(sweep: SweepData, metrics: list[str]) -> Table:
    rows = []
    for labels in sweep.points:
        cells = [Cell.of(list(sweep.values(labels, metric).values())) for metric in metrics]
        done = sum(run.labels == labels and run.status == "done" for run in sweep.runs)
        rows.append([", ".join(labels) or "base", *map(str, cells), str(done)])
    title = "Mean ± standard deviation over seeds"
    return Table([", ".join(sweep.axes) or "point", *metrics, "n"], rows, title=title)


def _runs(page: Page, sweep: SweepData, metrics: list[str]) -> Table:
    rows = []
    for run in sweep.runs:
        there = run.run is not None and page.out is not None and (run.run.path / "report.html").is_file()
        name = f"{', '.join(run.labels) or 'base'}, seed {run.seed}"
        rows.append(
            [
                Link(name, _relative(page, run.run.path / "report.html")) if there else name,
                run.status,
                *(digits(run.numbers[m]) if m in run.numbers else "" for m in metrics),
            ]
        )
    return Table(["run", "status", *metrics], rows, title="The runs behind the points")


def _relative(page: Page, path: os.PathLike) -> str:
    return quote(os.path.relpath(path, page.out.parent), safe="/.,")


def _figure(page: Page, sweep: SweepData, metric: str) -> Chart | Dots:
    numeric = [n for n in range(len(sweep.axes)) if all(_float(labels[n]) is not None for labels in sweep.points)]
    numeric = [n for n in numeric if len({labels[n] for labels in sweep.points}) > 1]
    if len(numeric) == 1:
        groups = list(dict.fromkeys(_without(labels, numeric[0]) for labels in sweep.points))
        if len(groups) <= MOST_CURVES:
            return _curves(page, sweep, metric, numeric[0], groups)
    return _dots(sweep, metric)


def _without(labels: tuple[str, ...], axis: int) -> tuple[str, ...]:
    return labels[:axis] + labels[axis + 1 :]


def _curves(page: Page, sweep: SweepData, metric: str, axis: int, groups: list[tuple[str, ...]]) -> Chart:
    lines, seeds = [], list(dict.fromkeys(run.seed for run in sweep.runs))
    values = sorted({_float(labels[axis]) for labels in sweep.points})
    for color, group in enumerate(groups):
        points = sorted((_float(p[axis]), sweep.values(p, metric)) for p in sweep.points if _without(p, axis) == group)
        for seed in seeds if len(seeds) > 1 else ():
            one = [(x, found[seed]) for x, found in points if seed in found]
            if one:
                lines.append(
                    Line(f"seed {seed}", *map(np.array, zip(*one, strict=True)), color, faint=True, joined=False)
                )
        cells = [(x, Cell.of(list(found.values()))) for x, found in points if found]
        if cells:
            error = np.array([np.nan_to_num(cell.deviation) for _, cell in cells])
            x, mean = np.array([x for x, _ in cells]), np.array([cell.mean for _, cell in cells])
            name = ", ".join(group) or ("mean" if len(seeds) > 1 else "each run")
            lines.append(Line(name, x, mean, color, error if error.any() else None, marks=True))
    levels = []
    if metric == KEY and CASE not in sweep.axes:
        levels = [Level(name, value) for name, value in references(page.runs).items()]
    log = is_log_spaced(values)
    return Chart(_title(metric), lines, unit(metric), "", sweep.axes[axis], levels, log_x=log)


def _dots(sweep: SweepData, metric: str) -> Dots:
    found = {labels: list(sweep.values(labels, metric).values()) for labels in sweep.points}
    every = [value for values in found.values() for value in values]
    low, high = min(every), max(every)
    width = (high - low) or 1.0
    rows = [
        Row(
            ", ".join(labels),
            [(value - low) / width for value in values] if len(values) > 1 else [],
            (float(np.mean(values)) - low) / width,
            str(Cell.of(values)),
        )
        for labels, values in found.items()
        if values
    ]
    said = unit(metric)
    return Dots(_title(metric) + (f" ({said})" if said else ""), rows)


def _title(metric: str) -> str:
    room, _, name = metric.rpartition("/")
    rooms = {"held_out": "held out: ", "knn": "kNN ", "linear": "linear probe ", "untrained": "untrained: "}
    said = rooms.get(room, "") + words(name).replace("top1", "top-1")
    return title(said)


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
