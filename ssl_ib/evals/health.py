"""Signs of life in a representation, read without labels: its rank, its spread, and the geometry of its pairs.

Everything is computed in float64 (a collapse shows in the last digits) and stays finite on collapsed features. Features
that are not finite give nan.

Shapes: n rows, D feature dimensions, q views of an image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def rankme(features: Tensor) -> float:
    """Effective rank of features [n, D], in [1, min(n, D)]: 1 when all rows are alike, D when no direction is favoured.

    The exponential of the entropy of the singular values, normalised to sum to 1 (Garrido et al., ICML 2023, eq. 1;
    their epsilon of 1e-7 in the logarithm is not needed with 0 log 0 = 0). Costs n D min(n, D); a few thousand rows do.
    """
    if not features.isfinite().all():
        return float("nan")
    return _effective_rank(torch.linalg.svdvals(features.double()))


def _effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of a spectrum [D], not negative, normalised to sum to 1; 1 where all of it is 0."""
    total = spectrum.sum()
    if total == 0:
        return 1.0
    return torch.special.entr(spectrum / total).sum().exp().item()


@torch.no_grad()
def dimension_std(features: Tensor) -> float:
    """Spread of features [n, D] in [0, 1]: 0 when all rows point one way, 1 when every dimension varies alike.

    The mean over dimensions of the standard deviation of the L2-normalised rows, times sqrt(D) (Chen and He, CVPR 2021,
    section 4.1).
    """
    unit = F.normalize(features.double(), dim=1)
    return (unit.std(dim=0, unbiased=False).mean() * unit.shape[1] ** 0.5).item()


@torch.no_grad()
def alignment(x: Tensor, y: Tensor) -> float:
    """Mean squared distance of paired rows x, y [n, D] on the unit sphere, in [0, 4]; 0 when the pairs agree.

    Wang and Isola (ICML 2020), with exponent 2. Rows are L2-normalised here.
    """
    difference = F.normalize(x.double(), dim=1) - F.normalize(y.double(), dim=1)
    return difference.square().sum(dim=1).mean().item()


@torch.no_grad()
def uniformity(x: Tensor, t: float = 2.0, chunk: int = 1024) -> float:
    """Log of the mean of exp(-t |a - b|^2) over pairs of rows of x [n, D]: 0 when all agree, and lower is better.

    Wang and Isola (ICML 2020). Rows are L2-normalised here; `chunk` rows at a time bound the memory to chunk x n.
    A single row has no pair, and gives nan.
    """
    unit = F.normalize(x.double(), dim=1)
    n, norms = len(unit), unit.square().sum(dim=1)
    potential = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, n, chunk):
        rows = slice(start, start + chunk)
        distances = norms[rows, None] + norms - 2 * unit[rows] @ unit.T
        # Rounding can leave a distance just below 0.
        energies = (-t * distances.clamp_min(0)).exp()
        energies.diagonal(start).zero_()
        potential += energies.sum()
    return (potential / (n * (n - 1))).log().item()


@torch.no_grad()
def lidar(views: Tensor, delta: float = 1e-4) -> float:
    """Effective rank of what tells images apart, against what tells views of one image apart: in [1, D].

    views: features [q, n, D] of q >= 2 views of each of n images. Thilak et al., "LiDAR: sensing linear probing
    performance in joint embedding SSL architectures", ICLR 2024, eq. 1 to 4: with the covariance B of the images'
    means and W within an image, exp of the entropy of the eigenvalues of (W + delta I)^-1/2 B (W + delta I)^-1/2,
    normalised to sum to 1. Directions that only the augmentation moves do not count, which in `rankme` they do.

    The paper draws 50 views. With fewer the means hold W / q of the views' chance, which would count as a signal in
    every direction; it is taken off B here, and eigenvalues that fall below 0 count as 0. W needs n (q - 1) well above
    D. Costs n D^2 + D^3.
    """
    if not views.isfinite().all():
        return float("nan")
    views = views.double()
    q, n, d = views.shape
    means = views.mean(dim=0)
    within = (views - means).flatten(0, 1)
    within = within.T @ within / (n * (q - 1))
    between = means.T.cov().view(d, d) - within / q
    root = torch.linalg.cholesky(within + delta * torch.eye(d, dtype=views.dtype, device=views.device))
    half = torch.linalg.solve_triangular(root, between, upper=False)
    spectrum = torch.linalg.eigvalsh(torch.linalg.solve_triangular(root, half.T, upper=False))
    return _effective_rank(spectrum.clamp_min(0))
