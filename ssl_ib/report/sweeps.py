"""A sweep's folder, read for a page: its axes, its runs with their status, and their numbers."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..config.outside import read_yaml
from ..errors import UserError
from ..sweep.finished import RESULTS, table
from ..sweep.folder import RECORD
from ..sweep.points import folder_name
from .reading import RUN_FILES, RunData, read_run


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep: its value on each axis, its seed and status as the table has them, and its numbers.

    run: its folder, where it has begun.
    """

    labels: tuple[str, ...]
    seed: str
    status: str
    numbers: dict[str, float]
    run: RunData | None


@dataclass(frozen=True)
class SweepData:
    """A sweep's folder: axes by name, runs in the order of the table, and what `sweep.yaml` says."""

    path: Path
    axes: Sequence[str]
    runs: Sequence[SweepRun]
    record: dict[str, Any]

    @property
    def points(self) -> list[tuple[str, ...]]:
        """The values on the axes, each combination once."""
        return list(dict.fromkeys(run.labels for run in self.runs))

    @property
    def metrics(self) -> list[str]:
        """Every metric that some run has."""
        return list(dict.fromkeys(key for run in self.runs for key in run.numbers))

    @property
    def wanted(self) -> list[str]:
        """The metrics that the command asked for (`--metric`); none where it left them open."""
        words = shlex.split(str(self.record.get("command") or ""))
        if "--metric" not in words:
            return []
        return list(takewhile(lambda word: not word.startswith("--"), words[words.index("--metric") + 1 :]))

    def values(self, labels: tuple[str, ...], metric: str) -> dict[str, float]:
        """A metric of the runs of a point that have it, by seed."""
        found = {run.seed: run.numbers.get(metric) for run in self.runs if run.labels == labels}
        return {seed: value for seed, value in found.items() if value is not None}


def is_sweep(path: Path) -> bool:
    return (path / RECORD).is_file()


def read_sweep(path: Path) -> SweepData:
    """Reads a sweep's folder. Raises UserError where no run of it has ended."""
    if not (path / RESULTS).is_file():
        raise UserError(f"{path} is a sweep of which no run has ended yet (no {RESULTS})")
    try:
        record = read_yaml(path / RECORD)
    except UserError:
        record = None
    axes, rows = table(path / RESULTS)
    seeds = {row["seed"] for row in rows}
    runs = []
    for row in rows:
        labels = tuple(row[axis] or "" for axis in axes)
        folder = path / folder_name(axes, labels) / f"seed_{row['seed']}"
        name = ", ".join(labels) or "base"
        name += f", seed {row['seed']}" if len(seeds) > 1 else ""
        begun = any((folder / file).is_file() for file in RUN_FILES)
        numbers = {
            key: value
            for key, text in row.items()
            if key not in (*axes, "seed") and (value := _number(text)) is not None
        }
        if "seconds" in numbers:
            numbers.setdefault("minutes", numbers["seconds"] / 60)
        runs.append(SweepRun(labels, row["seed"], row["status"], numbers, read_run(folder, name) if begun else None))
    return SweepData(path, axes, runs, record if isinstance(record, dict) else {})


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
