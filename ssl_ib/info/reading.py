"""What an estimator of mutual information answers, and the pairs of samples that it is given.

Shapes: n pairs, dx and dy dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError

Kind = Literal["lower bound", "upper bound", "estimate"]
#: Groups of pairs of which `jackknife` leaves out one after the other.
GROUPS = 10


@dataclass(frozen=True)
class Reading:
    """A number of nats, and what it is worth.

    kind:     whether its expectation is below the mutual information, above it, or neither is known.
    nats:     as read, on samples that nothing was fitted to; not clipped, neither at 0 nor at the ceiling.
    trained:  the same on the samples that the critic was trained on, in nats; None where nothing is trained.
    ceiling:  the largest value that n pairs can give, in nats; infinite where there is none.
    n:        pairs that `nats` was read on.
    spread:   standard error of `nats` over these pairs, in nats, for the critic as it is; NaN where it is unknown.
    bias:     the known bias that was taken off `nats`; 0 where none is known.
    remark:   what a reader must know besides, or nothing.
    """

    name: str
    kind: Kind
    nats: float
    trained: float | None
    ceiling: float
    n: int
    spread: float
    bias: float = 0.0
    remark: str = ""

    def __str__(self) -> str:
        trained = "" if self.trained is None else f", {self.trained:.2f} on its training part"
        ceiling = "no ceiling" if math.isinf(self.ceiling) else f"ceiling {self.ceiling:.2f}"
        line = (
            f"{self.name} ({self.kind}): {self.nats:.2f} ± {self.spread:.2f} nats{trained}, {ceiling}, n = {self.n:,}"
        )
        return f"{line}; {self.remark}" if self.remark else line


def remarks(nats: float, ceiling: float, n: int, *more: str) -> str:
    """What is to be said of a reading that cannot be the mutual information, and `more`."""
    said = []
    if nats < 0:
        said.append("negative, which mutual information is not: nothing was found")
    if nats > ceiling:
        said.append(f"above its ceiling of {ceiling:.2f}")
    elif math.isinf(ceiling) and nats > math.log(n):
        # McAllester and Stratos, "Formal limitations on the measurement of mutual information", AISTATS 2020.
        said.append(f"above log n = {math.log(n):.2f}, which no sample of this size can confirm")
    return "; ".join([*said, *filter(None, more)])


def checked(x: Tensor, y: Tensor, least: int = 4) -> tuple[Tensor, Tensor]:
    """Pairs x [n, dx] and y [n, dy] (or [n], for one dimension) as [n, dx] and [n, dy].

    Raises UserError where they are no pairs of finite samples, fewer than `least`, or one side never varies.
    """
    x, y = (side[:, None] if side.ndim == 1 else side for side in (x, y))
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise UserError(f"mutual information: expected x [n, dx] and y [n, dy], got {[*x.shape]} and {[*y.shape]}")
    if len(x) < least:
        raise UserError(f"mutual information: expected at least {least} pairs, got {len(x)}")
    for name, side in (("x", x), ("y", y)):
        if not side.isfinite().all():
            raise UserError(f"mutual information: {name} holds values that are not finite")
        if (side == side[0]).all():
            raise UserError(f"mutual information: {name} is constant, it is the same in all {len(x)} pairs")
    return x, y


def standardised(side: Tensor, by: Tensor | None = None) -> Tensor:
    """Each dimension less its mean over the samples `by`, divided by its deviation there; a constant one becomes 0.

    The mutual information stays what it is.
    """
    by = side if by is None else by
    deviation = by.std(dim=0, correction=0)
    return (side - by.mean(dim=0)) / torch.where(deviation > 0, deviation, torch.inf)


def jackknife(statistic: Callable[[Tensor], float], n: int) -> float:
    """Standard error of a statistic of n pairs, by leaving out one of 10 groups after the other (fewer below 10 pairs).

    statistic: takes the numbers of the pairs to use, int64. Efron and Stein, Annals of Statistics 9 (1981).
    """
    groups, number = min(GROUPS, n), torch.arange(n)
    values = torch.tensor([statistic(number[number % groups != g]) for g in range(groups)], dtype=torch.float64)
    return ((groups - 1) * values.var(correction=0)).sqrt().item()
