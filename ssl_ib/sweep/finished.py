"""The finished runs of a sweep, read from its folder or from a `results.csv` alone."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.outside import read_yaml
from ..errors import UserError
from .folder import RECORD
from .points import CASE, folder_name
from .report import read_metrics

RESULTS = "results.csv"
KNN, LINEAR = "knn/top1", "linear/top1"


@dataclass(frozen=True)
class Finished:
    """A run that is done: where it is from, its place in the grid, and its numbers.

    labels: the value on each axis, as the table shows it.
    config: its configuration; None where only a `results.csv` is known.
    place:  its folder, or the file that has it.
    """

    sweep: Path
    labels: dict[str, str]
    seed: str
    numbers: dict[str, float]
    config: dict[str, Any] | None
    place: Path

    @property
    def point(self) -> str:
        """The values on the axes, in one line."""
        return ", ".join(f"{name} {label}" for name, label in self.labels.items()) or "base"

    @property
    def identity(self) -> str:
        """What runs of one point share: the configuration but for the seed; without one the place in the table."""
        if self.config is None:
            return f"{self.sweep}: {self.point}"
        return json.dumps({key: value for key, value in self.config.items() if key != "seed"}, default=str)

    @property
    def title(self) -> str:
        return f"{self.point} seed {self.seed}"

    @property
    def method(self) -> str:
        """Model and criterion of the configuration, with those inside them; without one the case, or the file."""
        if self.config is not None:
            return f"{_named(self.config.get('model'))} + {_named(self.config.get('criterion'))}"
        return self.labels.get(CASE, self.sweep.stem)


def read(path: Path) -> list[Finished]:
    """The runs that are done, in the order of the table; all seeds that lie there, also those of earlier calls.

    path: a sweep's folder, or a CSV file as `ssl-ib-sweep` writes it.

    Raises UserError where that is neither, a column is missing, or no run is done.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such folder or file; expected the folder of a sweep, or its {RESULTS}")
    if path.is_dir() and not (path / RECORD).is_file():
        raise UserError(f"{path} is no sweep: it has no {RECORD}")
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path}: no run has ended there (no {RESULTS})")
    axes, rows = table(file)
    found = _of_folder(path, axes, rows) if path.is_dir() else _of_table(path, axes, rows)
    if not found:
        raise UserError(f"{path}: none of its {len(rows)} runs is done")
    return found


def table(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The names of the axes, which stand before `seed`, and the rows. Raises UserError for another table."""
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            reader = csv.DictReader(opened)
            rows, columns = list(reader), list(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as a table: {error}") from None
    missing = [name for name in ("seed", "status") if name not in columns]
    if missing:
        raise UserError(
            f"{file}: expected the columns of ssl-ib-sweep's {RESULTS}, and it has no {' and no '.join(missing)}; "
            f"it has {', '.join(columns[:8]) or 'none'}"
        )
    return columns[: columns.index("seed")], rows


def _of_table(path: Path, axes: Sequence[str], rows: Sequence[dict[str, str]]) -> list[Finished]:
    found = []
    for row in rows:
        if row["status"] != "done":
            continue
        numbers = {}
        for key, text in row.items():
            if key in (*axes, "seed", "status") or key is None or not text:
                continue
            try:
                numbers[key] = float(text)
            except ValueError:
                raise UserError(f"{path}: expected a number in the column {key}, got {text!r}") from None
        found.append(Finished(path, {axis: row[axis] for axis in axes}, row["seed"], numbers, None, path))
    return found


def _of_folder(path: Path, axes: Sequence[str], rows: Sequence[dict[str, str]]) -> list[Finished]:
    found = []
    for labels in dict.fromkeys(tuple(row[axis] for axis in axes) for row in rows):
        folder = path / folder_name(axes, labels)
        seeds = [place for place in folder.glob("seed_*") if (place / "results.json").is_file()]
        for place in sorted(seeds, key=lambda place: (len(place.name), place.name)):
            try:
                numbers, _ = read_metrics(place)
                config = read_yaml(place / "config.yaml")
            except UserError as error:
                raise UserError(f"{place}: {error}") from None
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(f"{place}: its results.json or config.yaml cannot be read: {error!r}") from None
            numbers = {key: float(value) for key, value in numbers.items() if isinstance(value, (int, float))}
            seed = place.name.removeprefix("seed_")
            found.append(Finished(path, dict(zip(axes, labels, strict=True)), seed, numbers, config, place))
    return found


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration as dotted keys."""
    found = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def known(runs: Sequence[Finished], *names: str) -> list[Finished]:
    """The runs that have all these numbers, finite."""
    return [run for run in runs if all(math.isfinite(run.numbers.get(name, math.nan)) for name in names)]


def _named(part: Any) -> str:
    """A part's name, and in brackets those of the parts inside it."""
    if not isinstance(part, dict):
        return str(part)
    inner = [_named(value) for value in part.values() if isinstance(value, dict) and "name" in value]
    return f"{part.get('name')}({', '.join(inner)})" if inner else str(part.get("name"))
