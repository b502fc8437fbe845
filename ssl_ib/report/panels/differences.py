"""In what the configurations of several runs differ."""

from __future__ import annotations

from ..blocks import Note, Panel, Table
from ..page import Page


def build(page: Page) -> Panel | None:
    if len(page.runs) < 2:
        return None
    text = "The keys whose values differ between the runs; all others are the same."
    if not page.differing:
        return Panel("Differences", text, [Note("The configurations of these runs are the same.")])
    head = ["key", *(run.name for run in page.runs)]
    shared, some = [], []
    for key in page.differing:
        row = [key, *(_shown(config[key]) if key in config else "" for config in page.configs)]
        (shared if all(key in config for config in page.configs) else some).append(row)
    blocks = [Table(head, shared)] if shared else []
    if some:
        title = f"{len(some)} keys that only some of the runs have"
        blocks.append(Table(head, some, title, folded=bool(shared)))
    return Panel("Differences", text, blocks)


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
