"""Pairs whose mutual information is known, on which estimators are calibrated.

Shapes: n pairs, d dimensions a side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError

#: Nats that one pair of coordinates can carry: beyond, its noise is lost in float32.
MOST_OF_A_PAIR = 10.0


def gaussian_pairs(n: int, d: int, nats: float, seed: int, pairs: int | None = None) -> tuple[Tensor, Tensor]:
    """Standard normal x and y, float32 [n, d] each, that share `nats` in equal parts among their first coordinates.

    x_i and y_i have the correlation r with -log(1 - r^2) / 2 = nats / pairs; everything else is independent.

    pairs: coordinates that share (default: all d). Raises UserError where so much cannot be shared.
    """
    pairs = min(d, pairs or d)
    if not 0 <= nats <= MOST_OF_A_PAIR * pairs:
        raise UserError(
            f"{nats:g} nats cannot be shared by {pairs} pair{'s' * (pairs > 1)} of coordinates: "
            f"expected 0 to {MOST_OF_A_PAIR * pairs:g}"
        )
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    share = torch.zeros(d, dtype=torch.float64)
    share[:pairs] = nats / pairs
    y = (-torch.expm1(-2 * share)).sqrt() * x + torch.exp(-share) * noise
    return x.float(), y.float()


def cubic_pairs(n: int, d: int, nats: float, seed: int) -> tuple[Tensor, Tensor]:
    """The cubes of Gaussian pairs: what is shared stays, what correlation shows of it does not."""
    x, y = gaussian_pairs(n, d, nats, seed)
    return x**3, y**3


def sparse_pairs(n: int, d: int, nats: float, seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian pairs of which two coordinates a side share everything (benchmark-mi's "2-pair" tasks)."""
    return gaussian_pairs(n, d, nats, seed, pairs=2)


#: What `ssl-ib-info calibrate` measures on: functions of n, d, nats and a seed.
KNOWN: dict[str, Callable[[int, int, float, int], tuple[Tensor, Tensor]]] = {
    "gaussian": gaussian_pairs,
    "cubic": cubic_pairs,
    "sparse": sparse_pairs,
}


def most_nats(d: int) -> float:
    """The most that every kind of known pairs of d dimensions can share."""
    return MOST_OF_A_PAIR * min(d, 2)
