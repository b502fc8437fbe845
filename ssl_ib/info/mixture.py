"""I(X;Z) where X is one of n points, all as likely, and Z is that point plus Gaussian noise: a mixture's information.

With N(0, sigma^2 I) about each of the points m_1, ..., m_n, all in nats,

    I(X;Z) = log n - E log sum_j exp((|z - m_x|^2 - |z - m_j|^2) / (2 sigma^2)),    z = m_x + sigma u.

The mean over x is over all n points, the one over the noise u is by Monte Carlo. No summand exceeds log n, because the
sum has a 1 for j = x. Without noise a deterministic encoder's I(X;Z) is infinite for images from a continuum, and log n
for n distinct images: the noise says how fine a difference counts.

Shapes: n points, D dimensions, S widths of the noise, R draws, b rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError

#: Numbers of the largest matrix that is made: rows are taken b at a time, so that b x n stays below this.
NUMBERS = 1 << 21


@torch.no_grad()
def mixture_information(
    points: Tensor, sigmas: Sequence[float], draws: int = 4, seed: int = 0, numbers: int = NUMBERS
) -> tuple[Tensor, Tensor]:
    """I(X;Z) in nats for each width of the noise, an unbiased estimate, and its standard error: float64 [S] each.

    points:  float [n, D], finite, n >= 1.
    sigmas:  standard deviations of the noise in each dimension, above 0. All use the same draws, scaled, so that their
             answers can be compared more exactly than their errors say.
    draws:   of the noise for each point, 2 at least. The error is that of the noise alone: the points are given.
    numbers: bounds the memory: no matrix of more numbers is made, but for a row.

    Raises UserError for arguments out of their range.
    """
    if min(sigmas) <= 0:
        raise UserError(f"sigma: expected widths above 0, got {min(sigmas):g}")
    if draws < 2:
        raise UserError(f"draws: expected 2 at least, to know the error, got {draws}")
    points = points.double()
    n, squares = len(points), points.square().sum(dim=1)
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(len(sigmas), draws, n, dtype=torch.float64)
    size = max(numbers // n, 1)
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        own = points[rows]
        distances = (squares[rows, None] + squares - 2 * own @ points.T).clamp_min_(0)
        distances[:, rows].fill_diagonal_(0)
        for draw in range(draws):
            noise = torch.randn(own.shape, generator=generator, dtype=torch.float64).to(points.device)
            # |z - m_x|^2 - |z - m_j|^2 = -|m_x - m_j|^2 - 2 sigma u.(m_x - m_j): the large |u|^2 is in neither.
            along = (noise * own).sum(dim=1, keepdim=True) - noise @ points.T
            for number, sigma in enumerate(sigmas):
                exponents = distances / (-2 * sigma**2) - along / sigma
                values[number, draw, rows] = (math.log(n) - exponents.logsumexp(dim=1)).cpu()
    error = (values.var(dim=1).mean(dim=1) / (draws * n)).sqrt()
    return values.mean(dim=(1, 2)), error
