"""What came of a sweep: the metrics of each run, a row a run as CSV, and a table of means over seeds."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ..config.outside import json_object
from ..errors import UserError
from ..record.log import with_numbers
from ..record.results import read_results
from ..run import FIRST
from .points import CASE, Axis, Point, Run

DEFAULT_METRICS = ("knn/top1", "linear/top1", "health/rankme", "minutes")
#: Bytes at the end of metrics.jsonl that surely hold the last training step and the last evaluation.
_TAIL = 1 << 16


#: The status of a run that is done, and whose numbers cannot be read.
DAMAGED = "damaged"


@cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass(frozen=True)
class Cell:
    """A metric at a point, over the runs that have it; the deviation (n - 1) is nan for a single one."""

    mean: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Cell:
        if not values:
            return cls(math.nan, math.nan, 0)
        with np.errstate(invalid="ignore"):
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
            return cls(float(np.mean(values)), deviation, len(values))

    def __str__(self) -> str:
        if not self.n:
            return "-"
        text = digits(self.mean)
        return text if self.n == 1 else f"{text} ± {digits(self.deviation, self.mean)}"


def digits(value: float, like: float | None = None) -> str:
    """A number with four digits, or with as many decimals as `like` has then."""
    like = value if like is None else like
    if not math.isfinite(like) or like == 0:
        return f"{value:.4f}"
    places = 3 - math.floor(math.log10(abs(like)))
    return f"{value:.2e}" if places > 6 else f"{value:.{max(places, 0)}f}"


def read_metrics(folder: Path) -> tuple[dict[str, float], list[str]]:
    """The numbers of a finished run, and which of them are metrics of `trained`.

    They are those of `trained`, `minutes`, `seconds` and `step`; `untrained/<name>` or `initial/<name>`,
    `raw_pixels/<name>` and `chance/<name>`; and what the last rows of metrics.jsonl have besides (`loss`,
    `loss/<term>`, ...), each as it was written last.

    Raises UserError where one of the files is damaged, which it names.
    """
    results = read_results(folder)
    found = _last_rows(folder / "metrics.jsonl")
    for name in (*FIRST, "raw_pixels", "chance"):
        found |= {f"{name}/{key}": value for key, value in results.get(name, {}).items()}
    trained, seconds = results.get("trained", {}), results["seconds"]
    return {**found, **trained, "seconds": seconds, "minutes": seconds / 60, "step": results["step"]}, list(trained)


def _last_rows(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        start = max(path.stat().st_size - _TAIL, 0)
        file.seek(start)
        lines = file.read().splitlines()[1 if start else 0 :]
    found: dict[str, float] = {}
    for line in lines:
        try:
            found |= with_numbers(json_object(line))
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from None
    found = {key: value for key, value in found.items() if key not in ("step", "epoch")}
    return {k: v for k, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


@dataclass(frozen=True)
class Report:
    """A sweep's runs with the numbers of those that are done, and which metrics are to be shown."""

    axes: Sequence[Axis]
    runs: Sequence[Run]
    statuses: dict[Run, str]
    numbers: dict[Run, dict[str, float]]
    trained: Sequence[str]
    metrics: Sequence[str]

    @classmethod
    def read(
        cls, out: Path, axes: Sequence[Axis], runs: Sequence[Run], statuses: dict[Run, str], metrics: Sequence[str]
    ) -> Report:
        """Reads what the runs that are done have left; one with a damaged file is `damaged`, and that is said."""
        numbers, trained, statuses = {}, {}, dict(statuses)
        for run in runs:
            if statuses[run] == "done":
                try:
                    numbers[run], keys = read_metrics(out / run.folder)
                except UserError as error:
                    # The others are worth their table.
                    statuses[run] = DAMAGED
                    _say_once(f"{error}; remove the file and call the sweep again to finish that run once more")
                    continue
                trained |= dict.fromkeys(keys)
        return cls(axes, runs, statuses, numbers, list(trained), metrics)

    @property
    def points(self) -> list[Point]:
        """The points of the grid, in order."""
        return list(dict.fromkeys(run.point for run in self.runs))

    def known(self) -> list[str]:
        """Every metric that some run has."""
        return list(dict.fromkeys(key for numbers in self.numbers.values() for key in numbers))

    def shown(self) -> list[str]:
        """The wanted metrics that some run has (all of them, as long as no run is done)."""
        known = self.known()
        return [metric for metric in self.metrics if metric in known or not known]

    def values(self, point: Point, metric: str) -> list[float]:
        """A metric of the runs of a point that are done and have it, in the order of the seeds."""
        found = (self.numbers.get(run, {}).get(metric) for run in self.runs if run.point == point)
        return [value for value in found if value is not None]

    def reference(self, name: str, metric: str) -> float | None:
        """The mean over all runs of a metric of `untrained`, `initial` or `raw_pixels`; None where cases may differ."""
        if any(axis.name == CASE for axis in self.axes):
            return None
        found = [n[f"{name}/{metric}"] for n in self.numbers.values() if f"{name}/{metric}" in n]
        return float(np.mean(found)) if found else None

    def csv(self) -> str:
        """A row a run: the axes, seed, status, then the metrics; empty where there is no number."""
        first = [f"{name}/knn/top1" for name in FIRST]
        # A run has one of them; where none has any yet, the usual one.
        first = [key for key in first if key in self.known()] or first[:1]
        columns = [*self.trained, *self.shown(), *first, "seconds"]
        header = [axis.name for axis in self.axes] + ["seed", "status"] + list(dict.fromkeys(columns))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        for run in self.runs:
            numbers = self.numbers.get(run, {})
            row = [*run.point.labels, run.seed, self.statuses[run]]
            writer.writerow([*row, *(numbers.get(key, "") for key in dict.fromkeys(columns))])
        return text.getvalue()

    def table(self) -> str:
        """A row a point, in Markdown: the axes, each metric as mean ± standard deviation over seeds, and n."""
        metrics = self.shown()
        rows = [[*(axis.name for axis in self.axes), *metrics, "n"]]
        for point in self.points:
            n = sum(run.point == point and run in self.numbers for run in self.runs)
            cells = [Cell.of(self.values(point, metric)) for metric in metrics]
            # A run may lack a metric (no labels, no probe): then its n is not that of the row.
            texts = [f"{cell} (n={cell.n})" if 0 < cell.n < n else str(cell) for cell in cells]
            rows.append([*(label.replace("|", "\\|") for label in point.labels), *texts, str(n)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
        return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]) + "\n"

    def line(self, run: Run) -> str:
        """A finished run's metrics in one line."""
        numbers = self.numbers[run]
        found = [(key, numbers[key]) for key in self.metrics if key in numbers]
        return ", ".join(f"{key} {digits(value)}" for key, value in found) or "none of the metrics"
