"""Mutual information of Gaussians: in closed form from a covariance, and from samples with its bias known.

Shapes: n pairs, dx and dy dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UserError
from .reading import Reading, checked, jackknife, remarks, standardised


def gaussian(covariance: Tensor, dx: int) -> float:
    """I(x; y) of Gaussians in nats: (log |S_x| + log |S_y| - log |S|) / 2, exact.

    covariance: S of (x, y), [dx + dy, dx + dy]; dx: dimensions of x. Raises UserError where S is not positive definite:
    where it is singular, the information is infinite or some dimensions are sums of others.
    """
    covariance = covariance.double()
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1] or not 0 < dx < len(covariance):
        raise UserError(f"gaussian: expected a covariance of x and y with 0 < dx, got {[*covariance.shape]}, dx = {dx}")
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed or not torch.allclose(covariance, covariance.T):
        raise UserError("gaussian: the covariance is not positive definite")
    halves = [torch.linalg.cholesky(block) for block in (covariance[:dx, :dx], covariance[dx:, dx:])]
    return sum(half.diagonal().log().sum().item() for half in halves) - factor.diagonal().log().sum().item()


def canonical_correlations(x: Tensor, y: Tensor) -> tuple[Tensor, int, int]:
    """Canonical correlations of the samples x [n, dx] and y [n, dy], in [0, 1], descending, and the two ranks.

    Dimensions that are sums of others are left out, which loses nothing. Björck and Golub, Mathematics of Computation
    27 (1973).
    """
    bases = []
    for side in (x, y):
        left, size, _ = torch.linalg.svd(standardised(side.double()), full_matrices=False)
        # Samples in float32 carry no more digits than these.
        bases.append(left[:, size > size[0] * max(side.shape) * torch.finfo(side.dtype).eps])
    return torch.linalg.svdvals(bases[0].T @ bases[1]).clamp(max=1), bases[0].shape[1], bases[1].shape[1]


def gaussian_bias(n: int, dx: int, dy: int) -> float:
    """What the closed form of n samples' covariance reads too much, in nats: exact for Gaussians, whatever they share.

    log |W| of a Wishart matrix with v = n - 1 degrees of freedom in d dimensions has the mean log |S| + d log 2 +
    sum_{i=1..d} digamma((v + 1 - i) / 2) (Goodman, Annals of Mathematical Statistics 34, 1963); needs n > dx + dy. For
    large n it is about dx dy / 2 n.
    """
    return 0.5 * (_mean_log_det(n - 1, dx) + _mean_log_det(n - 1, dy) - _mean_log_det(n - 1, dx + dy))


def _mean_log_det(v: int, d: int) -> float:
    return torch.digamma((v + 1 - torch.arange(1, d + 1, dtype=torch.float64)) / 2).sum().item()


def gaussian_of_samples(x: Tensor, y: Tensor) -> Reading:
    """The information of Gaussians with the samples' canonical correlations r: -sum log(1 - r^2) / 2, less its bias.

    An estimate, unbiased where x and y are jointly Gaussian, and otherwise what a Gaussian with these correlations
    would share: it sees correlation alone. There is no ceiling.

    x [n, dx], y [n, dy]. Raises UserError where n is not above dx + dy (their ranks).
    """
    x, y = checked(x, y)
    n = len(x)

    def read(index: Tensor) -> tuple[float, float]:
        correlations, rank_x, rank_y = canonical_correlations(x[index], y[index])
        if len(index) <= rank_x + rank_y:
            raise UserError(
                f"gaussian: expected more pairs than the {rank_x} + {rank_y} dimensions of x and y, got {len(index)}"
            )
        plain = -0.5 * torch.log1p(-correlations.square()).sum().item()
        return plain, gaussian_bias(len(index), rank_x, rank_y)

    plain, bias = read(torch.arange(n))
    nats = plain - bias
    # With fewer pairs left than dimensions there is nothing to jackknife.
    enough = n * 0.8 > x.shape[1] + y.shape[1] + 1
    spread = jackknife(lambda index: -torch.tensor(read(index)).diff().item(), n) if enough else math.nan
    return Reading("gaussian", "estimate", nats, None, math.inf, n, spread, bias, remarks(nats, math.inf, n))
