"""A sweep's folder, read for a page: its axes, its runs with their status, and the numbers of those that are done."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .reading import RunData


@dataclass
class SweepRun:
    labels: tuple[str, ...]
    seed: str
    status: str
    numbers: dict[str, float]
    run: RunData | None


@dataclass
class SweepData:
    path: Path
    axes: list[str]
    metrics: list[str]
    runs: list[SweepRun] = field(default_factory=list)
    command: str = ""
    recipe: str = ""
