"""What panels are given: the runs of a page, what they differ in, and over what their curves are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..sweep.finished import flat
from .reading import RunData
from .sweeps import SweepData


@dataclass(frozen=True)
class Page:
    """The runs of a page, the sweep that they are of, where they are of one, and the file that the page goes to."""

    runs: Sequence[RunData]
    sweep: SweepData | None = None
    out: Path | None = None

    @cached_property
    def configs(self) -> list[dict[str, Any]]:
        """Each run's configuration as dotted keys."""
        return [flat(run.config) for run in self.runs]

    @cached_property
    def differing(self) -> list[str]:
        """The dotted keys in which the configurations differ."""
        keys = dict.fromkeys(key for config in self.configs for key in config)
        absent = object()
        return [
            key for key in keys if any(c.get(key, absent) != self.configs[0].get(key, absent) for c in self.configs)
        ]

    @cached_property
    def x_name(self) -> str:
        """What curves are drawn over: epochs, where every run's rise from row to row; otherwise steps."""
        return "epoch" if all((np.diff(run.epoch) > 0).all() for run in self.runs) else "step"

    def x(self, run: RunData) -> np.ndarray:
        """Of each logged training step of a run, its place on the axis."""
        return run.epoch if self.x_name == "epoch" else run.step

    def color(self, run: RunData) -> int:
        """The number of a run's colour."""
        return next(n for n, other in enumerate(self.runs) if other is run)

    def terms(self, trained: bool) -> list[str]:
        """The terms of the losses that are trained, or those that are only watched, in the order of the record.

        A term is trained where the record has it weighted.
        """
        found: dict[str, bool] = {}
        for run in self.runs:
            for key in run.columns:
                if key.startswith("loss/"):
                    term = key.removeprefix("loss/")
                    found[term] = found.get(term, False) or f"weighted/{term}" in run.columns
        return [term for term, weighted in found.items() if weighted is trained]

    @property
    def has_prototypes(self) -> bool:
        """Whether some run assigns its features to prototypes."""
        return any("loss/dead_prototypes" in run.columns for run in self.runs)

    def figures(self, run: RunData) -> list[Path]:
        """The pictures in a run's folder."""
        return sorted((run.path / "figures").glob("*.png"))

    def is_evaluation(self, name: str) -> bool:
        """Whether a picture of this name was drawn by an evaluation, whose protocol its name begins with: all but the
        run's own kNN curve."""
        return name != "knn_curve" and any(
            name.startswith(f"{line['protocol']}_") for run in self.runs for line in run.evals
        )
