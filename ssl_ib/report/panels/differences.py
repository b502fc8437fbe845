"""In what the configurations of several runs differ."""

from __future__ import annotations

from ..blocks import Note, Panel, Table
from ..page import Page


def build(page: Page) -> Panel | None:
    if len(page.runs) < 2:
        return None
    text = "The keys whose values differ between the runs; all others are the same. Colours are those of the curves."
    if not page.differing:
        return Panel("Differences", text, [Note("The configurations of these runs are the same.")])
    rows = [[key, *(_shown(config.get(key)) for config in page.configs)] for key in page.differing]
    return Panel("Differences", text, [Table(["key", *(run.name for run in page.runs)], rows)])


def _shown(value: object) -> str:
    return "–" if value is None else str(value)
