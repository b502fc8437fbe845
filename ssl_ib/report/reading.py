"""What a run has left in its folder, read for a page: nothing of it is needed, and what is damaged is said."""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config.outside import NotYaml, json_object, parse_yaml
from ..errors import UserError
from ..record.about import ABOUT
from ..record.log import NON_FINITE, with_numbers
from ..run import FIRST

#: What a folder has one of, if it holds a run.
RUN_FILES = ("config.yaml", "metrics.jsonl")


@dataclass
class RunData:
    """A run's folder.

    name:        what the page calls it.
    config, environment, about, results: what these files hold; empty where there is none.
    step, epoch: of each logged training step, [n]; columns: the numbers logged there by key, [n], nan where missing.
    evaluations: the rows that evaluations have logged, oldest first.
    plane, probe: the rows of `info/plane.csv` and `info/probe.csv`.
    evals:       the results of `evals.jsonl`.
    problems:    what of the folder could not be read, a sentence each.
    """

    path: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    step: np.ndarray = field(default_factory=lambda: np.empty(0))
    epoch: np.ndarray = field(default_factory=lambda: np.empty(0))
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    plane: list[dict[str, str]] = field(default_factory=list)
    probe: list[dict[str, str]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def first(self) -> str:
        """The name of the evaluation before the first step: `untrained` or `initial`."""
        return next((name for name in FIRST if name in self.results), FIRST[0])

    @property
    def last_step(self) -> int:
        """The last step that is logged; 0 where none is."""
        return int(self.step[-1]) if len(self.step) else 0

    @property
    def status(self) -> str:
        """How far the run is, in a sentence."""
        if self.results:
            return "Finished."
        if (self.path / "bad_batch.txt").is_file():
            return f"Ended at step {self.last_step:,}: its loss or its gradient was no longer finite."
        if not len(self.step) and not self.evaluations:
            return "Nothing is logged yet: the run has not begun, or it ended before its first step."
        return f"Not finished: its last logged step is {self.last_step:,}. It is at work, was stopped, or has crashed."

    def number(self, evaluation: str, key: str) -> float | None:
        """A finite number of `results.json`, such as ("trained", "knn/top1"); None where there is none."""
        found = self.results.get(evaluation)
        value = found.get(key) if isinstance(found, dict) else None
        return value if is_number(value) and math.isfinite(value) else None

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, epochs and finite values of a number that evaluations log."""
        rows = [row for row in self.evaluations if is_number(row.get(key)) and math.isfinite(row[key])]
        return tuple(np.array([row[name] for row in rows], dtype=float) for name in ("step", "epoch", key))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_run(path: Path, name: str) -> RunData:
    """Reads a run's folder. Raises UserError where it holds no run."""
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder; expected the folder of a run or of a sweep")
    if not any((path / file).is_file() for file in RUN_FILES):
        raise UserError(f"{path} holds no run: it has neither {' nor '.join(RUN_FILES)}")
    run = RunData(path, name)
    run.config = _data(run, "config.yaml", parse_yaml)
    run.environment, run.about, run.results = (
        _data(run, file, json_object) for file in ("environment.json", ABOUT, "results.json")
    )
    _metrics(run)
    run.evals = [line for line in _lines(run, "evals.jsonl") if isinstance(line.get("protocol"), str)]
    run.plane, run.probe = (_table(run, f"info/{file}") for file in ("plane.csv", "probe.csv"))
    return run


def _data(run: RunData, file: str, parse: Any) -> dict[str, Any]:
    path = run.path / file
    if not path.is_file():
        return {}
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, NotYaml):
        found = None
    if not isinstance(found, dict):
        run.problems.append(f"{file} could not be read.")
        return {}
    return with_numbers(found)


def _lines(run: RunData, file: str) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, one at a time; how many lines are broken is added to the problems.

    A last line without its end is being written, or was when the run was killed, and is left out.
    """
    path, broken = run.path / file, 0
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                row = json_object(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            elif line.endswith(b"\n") and line.strip():
                broken += 1
    if broken:
        run.problems.append(f"{broken:,} line{'s' * (broken > 1)} of {file} could not be read.")


def _metrics(run: RunData) -> None:
    """Training steps as columns, evaluations as rows."""
    columns: dict[str, array] = {"step": array("d"), "epoch": array("d")}
    count = 0
    for row in _lines(run, "metrics.jsonl"):
        if not (is_number(row.get("step")) and is_number(row.get("epoch"))):
            continue
        if "loss" not in row:
            run.evaluations.append(with_numbers(row))
            continue
        for key, value in row.items():
            kind = value.__class__
            if kind is not float and kind is not int:
                if (value := NON_FINITE.get(value) if kind is str else None) is None:
                    continue
            if (column := columns.get(key)) is None:
                column = columns[key] = array("d")
            if len(column) < count:
                column.extend([math.nan] * (count - len(column)))
            column.append(value)
        count += 1
    for column in columns.values():
        column.extend([math.nan] * (count - len(column)))
    run.columns = {key: np.array(column) for key, column in columns.items()}
    run.step, run.epoch = run.columns.pop("step"), run.columns.pop("epoch")


def _table(run: RunData, file: str) -> list[dict[str, str]]:
    path = run.path / file
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as opened:
            return [row for row in csv.DictReader(opened) if None not in row and None not in row.values()]
    except (OSError, UnicodeDecodeError, csv.Error):
        run.problems.append(f"{file} could not be read.")
        return []
