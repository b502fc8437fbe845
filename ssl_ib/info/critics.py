"""Networks that estimators of mutual information train: critics that score pairs, and a conditional Gaussian for CLUB.

Each has a linear part beside its hidden layers, since most of what two views share can be seen by a product alone, and
each starts at "nothing is shared": all scores 0, or q(y|x) standard normal. What was never learnt reads 0 nats.

Shapes: n and m samples, dx and dy dimensions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .club import FLOOR

#: Share of a critic's hidden units left out of each training step: without it, few pairs are soon learnt by heart.
DROPOUT = 0.3


def _bend(dropout: float) -> tuple[nn.Module, nn.Module]:
    return nn.ReLU(), nn.Dropout(dropout)


class Perceptron(nn.Module):
    """Two hidden layers with ReLU, and a linear map beside them: [n, width_in] -> [n, width_out]."""

    def __init__(self, width_in: int, hidden: int, width_out: int, dropout: float = DROPOUT):
        super().__init__()
        self.straight = nn.Linear(width_in, width_out)
        self.bent = nn.Sequential(
            *(nn.Linear(width_in, hidden), *_bend(dropout)),
            *(nn.Linear(hidden, hidden), *_bend(dropout)),
            nn.Linear(hidden, width_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.straight(x) + self.bent(x)

    def begin_at_zero(self) -> None:
        """Makes all outputs 0, to be learnt from there."""
        for layer in (self.straight, self.bent[-1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


class Separable(nn.Module):
    """score(x, y) = g(x) . h(y) / sqrt(width): a network for each side. All pairs cost one matrix product."""

    #: Pairs that a training step, and a look at the stopping part, compare with each other.
    batch, block = 256, 2048

    def __init__(self, dx: int, dy: int, hidden: int = 128, width: int = 128):
        super().__init__()
        self.g, self.h = Perceptron(dx, hidden, width), Perceptron(dy, hidden, width)
        # With many dimensions and few pairs, what is learnt first is all that is learnt: g begins by keeping distances.
        nn.init.orthogonal_(self.g.straight.weight)
        self.h.begin_at_zero()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [n, dx] and y [m, dy] -> scores [n, m]."""
        g = self.g(x)
        return g @ self.h(y).T / math.sqrt(g.shape[1])


class Joint(nn.Module):
    """score(x, y) = a network of both together, evaluated for each pair: more expressive, and n m times as costly.

    It finds a few coordinates that matter among many sooner than `Separable` does, and all of many later.
    """

    batch, block = 16, 64
    #: Rows of the scores that are computed at a time.
    rows = 64

    def __init__(self, dx: int, dy: int, hidden: int = 128):
        super().__init__()
        # The first layer of [x, y] is the sum of one of x and one of y, which no pair needs to repeat.
        self.of_x, self.of_y = nn.Linear(dx, hidden), nn.Linear(dy, hidden)
        self.rest = nn.Sequential(*_bend(DROPOUT), nn.Linear(hidden, hidden), *_bend(DROPOUT), nn.Linear(hidden, 1))
        nn.init.zeros_(self.rest[-1].weight)
        nn.init.zeros_(self.rest[-1].bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [n, dx] and y [m, dy] -> scores [n, m]."""
        from_y = self.of_y(y)
        return torch.cat([self.rest(part[:, None] + from_y)[..., 0] for part in self.of_x(x).split(self.rows)])


class Conditional(nn.Module):
    """q(y|x) = N(mean(x), variance(x)), diagonal: what CLUB fits. For y with means 0 and deviations 1.

    `club.ConditionalGaussian` is MI-MAE's network for sets of tokens; its mean ends in a LeakyReLU, which makes
    negative means hard to reach.
    """

    batch, block = 256, 2048

    def __init__(self, dx: int, dy: int, hidden: int = 128):
        super().__init__()
        # Dropout would blur the mean, which the variance takes for noise.
        self.mean, self.variance = (Perceptron(dx, hidden, dy, dropout=0.0) for _ in range(2))
        self.mean.begin_at_zero()
        self.variance.begin_at_zero()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, dx] -> mean and variance of y, each [n, dy]; the variance starts at 1 and is at least 0.001."""
        return self.mean(x), F.softplus(self.variance(x) + math.log(math.e - 1)) + FLOOR
