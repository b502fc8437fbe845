"""Mutual information from distances to nearest neighbours: no model and no training, for a few dimensions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .reading import GROUPS, Reading, checked, remarks, standardised

#: Dimensions of x or of y above which KSG reads far too little.
MOST_DIMENSIONS = 8


def ksg(x: Tensor, y: Tensor, k: int = 3) -> Reading:
    """KSG's first estimator: psi(k) + psi(n) - mean[psi(n_x + 1) + psi(n_y + 1)], an estimate.

    Kraskov, Stögbauer and Grassberger, Physical Review E 69 (2004), equation 8, as npeet-plus computes it: distances
    are the largest over dimensions, each of which is brought to deviation 1 before. n_x and n_y count the samples that
    are nearer in x and in y alone than the k-th neighbour is in both.

    Its ceiling is psi(n) - psi(k), about log n. Near zero it is almost unbiased; strong dependence and many dimensions
    bias it down. Its spread is measured between ten parts of the pairs (Holmes and Nemenman, Physical Review E 100,
    2019). Above 8 dimensions the remark says that the number is not to be used.

    x [n, dx], y [n, dy]; k: neighbours. Raises UserError for fewer than k + 2 pairs.
    """
    x, y = checked(x, y, k + 2)
    x, y = (standardised(side.double()) for side in (x, y))
    n = len(x)
    nats = _npeet(x, y, k)
    ceiling = (torch.digamma(torch.tensor(float(n))) - torch.digamma(torch.tensor(float(k)))).item()
    spread = math.nan
    if n >= GROUPS * (k + 2):
        parts = [_npeet(x[g::GROUPS], y[g::GROUPS], k) for g in range(GROUPS)]
        spread = torch.tensor(parts).std().item() / math.sqrt(GROUPS)
    dimensions = max(x.shape[1], y.shape[1])
    warning = ""
    if dimensions > MOST_DIMENSIONS:
        # As `calibrate` measured it on Gaussians of 2,048 pairs (docs/information.md).
        warning = (
            f"{dimensions} dimensions: above {MOST_DIMENSIONS} KSG reads far too little, of 4 nats 27 % at 16 "
            f"dimensions and 2 % at 128 (here: ssl-ib-info calibrate --dim {dimensions} --samples {n} --estimators ksg)"
        )
    return Reading("ksg", "estimate", nats, None, ceiling, n, spread, remark=remarks(nats, ceiling, n, warning))


def _npeet(x: Tensor, y: Tensor, k: int) -> float:
    import numpy as np
    from npeet_plus import mi

    # npeet-plus breaks ties by noise of 1e-10 from numpy's global generator, which is put back as it was.
    state = np.random.get_state()
    np.random.seed(0)
    try:
        return float(mi(x.numpy(), y.numpy(), k=k, base=math.e))
    finally:
        np.random.set_state(state)
