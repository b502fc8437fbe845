"""How well one number ranks runs as another does: Spearman's rho, with an interval from the bootstrap.

Runs of one point of a sweep (the same settings, other seeds) are alike. So the bootstrap draws whole points: five
points of three seeds are five draws, not fifteen.

Shapes: n runs, P points, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

#: Fewer runs than this are not scored, and fewer points than this get no interval.
LEAST = 4
#: From so many points on, an interval is wide enough to be believed: the bootstrap's are too narrow for a few.
ENOUGH = 8
RESAMPLES = 2000


@dataclass(frozen=True)
class Group:
    """Runs that may be compared with each other: a number of each, what it is to predict, and the run's point."""

    x: Sequence[float]
    y: Sequence[float]
    points: Sequence[Hashable]


@dataclass(frozen=True)
class Rho:
    """Spearman's rho in [-1, 1] over n runs of so many points, with its 95 % interval (nan where there is none)."""

    value: float
    low: float
    high: float
    n: int
    points: int

    @property
    def doubts(self) -> list[str]:
        """Why this is not to be trusted; empty where nothing speaks against it."""
        found = []
        if math.isnan(self.low):
            found.append(f"{_counted(self.points, 'point')}: no interval below {LEAST}")
        elif self.low <= 0:
            found.append("the interval includes 0" if self.high >= 0 else "it ranks the runs the wrong way round")
        if LEAST <= self.points < ENOUGH:
            found.append(f"only {self.points} points, where the interval is too narrow; {ENOUGH} are enough")
        return found

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:+.2f} (no interval)"
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def why_not(group: Group) -> str | None:
    """Why a group has no rho: too few runs, or no spread in one of its numbers; None where it has one."""
    if len(group.x) < LEAST:
        return f"too few runs: {len(group.x)}, and {LEAST} are needed"
    if np.ptp(group.x) == 0:
        return "no spread: it is the same for all runs"
    if np.ptp(group.y) == 0:
        return "no spread in the accuracy"
    return None


def spearman(*groups: Group, resamples: int = RESAMPLES, seed: int = 0) -> Rho:
    """Rho within each group, averaged over the groups by their numbers of runs: runs of two groups are never compared.

    The interval is the 2.5 to 97.5 percentile over resamples of each group's points. A resample in which a number has
    no spread says nothing, and is left out. The same input gives the same interval. All numbers have to be finite.

    Raises ValueError where a group has no rho (`why_not`).
    """
    rng = np.random.default_rng(seed)
    values, draws = [], []
    for group in groups:
        if reason := why_not(group):
            raise ValueError(reason)
        x, y = (np.asarray(numbers, dtype=float) for numbers in (group.x, group.y))
        values.append(float(spearmanr(x, y).statistic))
        names = {name: i for i, name in enumerate(dict.fromkeys(group.points))}
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
        draws.append(_weighted_rho(x, y, counts[:, [names[name] for name in group.points]]))
    sizes = np.array([len(group.x) for group in groups], dtype=float)
    points = [len(set(group.points)) for group in groups]
    low = high = math.nan
    if min(points) >= LEAST:
        stacked = np.stack(draws)
        known = np.isfinite(stacked)
        weights = sizes[:, None] * known
        total = weights.sum(axis=0)
        mean = (weights * np.where(known, stacked, 0)).sum(axis=0)[total > 0] / total[total > 0]
        low, high = map(float, np.quantile(mean, (0.025, 0.975)))
    return Rho(float(np.average(values, weights=sizes)), low, high, int(sizes.sum()), sum(points))


def _weighted_rho(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rho of resamples [R] in which run i is drawn counts[:, i] times; nan where a number has no spread."""
    ranks = []
    for numbers in (x, y):
        # A run's rank is the share of runs below it, and half of those beside it.
        below = (numbers < numbers[:, None]) + 0.5 * (numbers == numbers[:, None])
        ranks.append(counts @ below.T)
    total = counts.sum(axis=1, keepdims=True)
    a, b = (rank - (counts * rank).sum(axis=1, keepdims=True) / total for rank in ranks)
    shared, first, second = ((counts * product).sum(axis=1) for product in (a * b, a * a, b * b))
    with np.errstate(invalid="ignore", divide="ignore"):
        # Ranks are halves, so that a spread of 0 is one up to rounding.
        return np.where((first > 1e-9) & (second > 1e-9), shared / np.sqrt(first * second), np.nan)


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"
