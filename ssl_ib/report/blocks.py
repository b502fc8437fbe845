"""What panels are made of: charts, tables, bars, pictures and notes, as plain data that the templates turn into HTML.

Texts are texts everywhere: the templates escape them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..record.figures import smooth, smoothing

#: Points that a curve of a single run keeps, and those that one of very many runs keeps at least.
MOST_POINTS, LEAST_POINTS = 1000, 120
#: Rows of the table below a chart, and lines from which on it has a row a line instead.
TABLE_ROWS, TABLE_LINES = 16, 5
#: Names of lines that say nothing where there is no other line.
ALONE = ("training", "this run", "each run", "mean")


@dataclass(frozen=True)
class Line:
    """A curve: x and y [n], finite; error [n] or none.

    color: the number of its colour, -1 for grey. faint: drawn thin, and not read out. marks: with its points.
    joined: whether the points are joined. listed: whether the legend has it.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    color: int = 0
    error: np.ndarray | None = None
    faint: bool = False
    marks: bool = False
    dashed: bool = False
    joined: bool = True
    listed: bool = True


@dataclass(frozen=True)
class Level:
    """A horizontal line that curves are compared with; one without a name is only drawn."""

    name: str
    y: float


@dataclass
class Chart:
    """Curves over one axis, with a sentence that says how to read them.

    unit: of y. x_name: what x is. log, log_x: whether an axis has powers of ten. span: columns of three that it takes.
    """

    title: str
    lines: list[Line]
    unit: str = ""
    text: str = ""
    x_name: str = "epoch"
    levels: Sequence[Level] = ()
    log: bool = False
    log_x: bool = False
    span: int = 1
    kind: str = "chart"

    @property
    def data(self) -> dict[str, Any]:
        """What the script draws. Curves that share their x share one list."""
        xs: dict[tuple[float, ...], int] = {}
        lines = []
        for line in self.lines:
            place = xs.setdefault(tuple(_short(line.x, 6)), len(xs))
            told = {"name": line.name, "x": place, "y": _short(line.y), "color": line.color}
            told |= {"error": _short(line.error)} if line.error is not None else {}
            flags = ("faint", "marks", "dashed")
            told |= {flag: True for flag in flags if getattr(line, flag)} | ({} if line.joined else {"loose": True})
            lines.append(told)
        levels = [{"name": level.name, "y": level.y} for level in self.levels]
        shown = {"x": self.x_name, "unit": self.unit, "log": self.log, "log_x": self.log_x, "range": self.range}
        return {**shown, "xs": [list(x) for x in xs], "lines": lines, "levels": levels}

    @property
    def range(self) -> list[float]:
        """From where to where y goes, with room to both sides."""
        found = [np.asarray([level.y for level in self.levels], dtype=float)]
        for line in self.lines:
            error = 0 if line.error is None else line.error
            found += [line.y - error, line.y + error]
        values = np.concatenate(found)
        if self.log:
            values = values[values > 0]
            low, high = (float(values.min()), float(values.max())) if len(values) else (0.1, 1.0)
            return [low / 1.3, high * 1.3]
        low, high = float(values.min()), float(values.max())
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        return [low - room, high + room]

    @property
    def read(self) -> list[Line]:
        """The lines that are named and read out."""
        return [line for line in self.lines if not line.faint]

    @property
    def legend(self) -> list[tuple[int, Line]]:
        """The lines that the legend has, each with its number; none where a single line needs no name."""
        found = [(place, line) for place, line in enumerate(self.lines) if line.listed and not line.faint]
        lone = len(found) == 1 and found[0][1].name in ALONE and not self.levels
        return [] if lone else found

    @property
    def table(self) -> Table:
        """The numbers for those who cannot see the curves: at a few places, or of many lines the ends and extremes."""
        lines = self.read
        if len(lines) > TABLE_LINES:
            head = ["", f"last {self.x_name}", "first", "lowest", "highest", "last"]
            rows = [
                [line.name, number(line.x[-1]), *map(number, (line.y[0], line.y.min(), line.y.max(), line.y[-1]))]
                for line in lines
            ]
            return Table(head, rows)
        x = max((line.x for line in lines), key=len)
        x = x[np.unique(np.linspace(0, len(x) - 1, min(len(x), TABLE_ROWS)).round().astype(int))]
        rows = [[number(at), *(_before(line, at) for line in lines)] for at in x]
        return Table([self.x_name, *(line.name for line in lines)], rows)


def _before(line: Line, x: float) -> str:
    """The value of a line at x, or the last one before."""
    place = int(np.searchsorted(line.x, x + 1e-9 * max(abs(x), 1), side="right")) - 1
    return "" if place < 0 else number(line.y[place])


@dataclass(frozen=True)
class Link:
    """A cell of a table that leads to a file beside the page."""

    text: str
    href: str


@dataclass
class Table:
    """Texts or links in rows; the first column names the row. folded: shown on demand."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    text: str = ""
    folded: bool = False
    kind: str = "table"

    @property
    def right(self) -> list[bool]:
        """Of each column, whether it has numbers, which stand at the right."""
        numeric = re.compile(r"[-+−–]?[\d.,]*( ?%|e[-+]?\d+)?( ±.*)?")
        return [n > 0 and all(numeric.fullmatch(str(row[n])) for row in self.rows) for n in range(len(self.head))]


@dataclass(frozen=True)
class Part:
    """A bar: its share of the track in [0, 1], what it says, and its number of colour (-1: grey)."""

    share: float
    text: str
    color: int = 0
    error: float = 0.0


@dataclass(frozen=True)
class Bar:
    """A row of one or more bars on one track, and what is to be said of them."""

    name: str
    parts: Sequence[Part]
    note: str = ""


@dataclass
class Bars:
    """Rows of bars."""

    title: str
    rows: Sequence[Bar]
    text: str = ""
    legend: Sequence[tuple[str, int]] = ()
    span: int = 1
    kind: str = "bars"

    @property
    def letters(self) -> int:
        """Of the longest value: all tracks end where it begins, so that bars can be compared."""
        return max(len(part.text) for bar in self.rows for part in bar.parts)


@dataclass(frozen=True)
class Picture:
    """An image file, and what it shows."""

    path: Path
    caption: str


@dataclass
class Pictures:
    """Image files below each other, each as wide as it is."""

    pictures: Sequence[Picture]
    title: str = ""
    text: str = ""
    kind: str = "pictures"


@dataclass
class Facts:
    """Names with their values, as a list of terms."""

    rows: Sequence[tuple[str, str]]
    span: int = 3
    kind: str = "facts"


@dataclass
class Tiles:
    """Numbers that matter most, large: name, value, and what it is compared with."""

    rows: Sequence[tuple[str, str, str]]
    kind: str = "tiles"


@dataclass
class Note:
    """A sentence of its own, which stands out unless it is `plain`."""

    text: str
    plain: bool = False
    kind: str = "note"


@dataclass
class Text:
    """Text as it is in a file, folded away."""

    title: str
    text: str
    kind: str = "text"


@dataclass
class Group:
    """Blocks below a heading of their own. folded: they are shown on demand."""

    title: str
    blocks: Sequence[Any]
    text: str = ""
    folded: bool = False
    kind: str = "group"


@dataclass
class Panel:
    """A section of the page: its heading, one sentence on what is seen and how it is read, and its blocks."""

    title: str
    text: str
    blocks: Sequence[Any] = field(default_factory=list)


def number(value: float) -> str:
    """A number with four significant digits, thousands apart where it is a whole one."""
    value = float(value)
    if not np.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _short(values: np.ndarray, digits: int = 5) -> list[float]:
    """Numbers with few digits, for a small file."""
    short = (float(f"{value:.{digits}g}") for value in values)
    return [int(value) if value.is_integer() and abs(value) < 1e15 else value for value in short]


def thin(y: np.ndarray, most: int) -> np.ndarray:
    """The numbers of at most `most` points of y [n] that a drawn curve needs: the ends, and the smallest and the
    largest value of equal stretches between them. int64, rising."""
    if len(y) <= most:
        return np.arange(len(y))
    edges = np.linspace(1, len(y) - 1, (most - 2) // 2 + 1).astype(int)
    found = [0, len(y) - 1]
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        found += [start + int(y[start:end].argmin()), start + int(y[start:end].argmax())]
    return np.unique(found)


def points_for(runs: int) -> int:
    """How many points a curve keeps on a page of so many runs."""
    return max(MOST_POINTS // runs, LEAST_POINTS)


def curve(name: str, x: np.ndarray, y: np.ndarray, color: int, most: int, raw: bool = True) -> list[Line]:
    """A noisy curve, thinned: its smoothed course, and the values themselves faint behind it.

    Values that are not finite are left out. Few points are shown as they are. Empty where none is left.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(y) < 30:
        return [Line(name, x, y, color, marks=True)] if len(y) else []
    places, course = thin(y, most), smooth(y, smoothing(len(y)))
    behind = [Line(f"{name}, each value", x[places], y[places], color, faint=True)] if raw else []
    return [*behind, Line(name, x[places], course[places], color)]
