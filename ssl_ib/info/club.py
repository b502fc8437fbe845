"""CLUB, an upper bound on mutual information learnt by fitting a conditional Gaussian (Cheng et al., ICML 2020).

With q(z|x) = N(mean(x), variance(x)), diagonal, the bound is the mean over pairs of

    log q(z_j | x_j) - mean over candidates k of log q(z_k | x_j),

in nats. Log-determinants cancel between the two, so that only squared distances are left.

Shapes: B images, N views of each, K tokens a view, G = B*N rows, Dx token width, D dimensions of z.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed

Variance = Literal["relu_floor", "softplus", "tanh_logvar"]
#: The smallest variance that "relu_floor" and "softplus" can reach.
FLOOR = 1e-3


def log_likelihood(z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log N(z; mean, variance) of every dimension, in nats; all of one shape."""
    return -0.5 * ((z - mean).square() / variance + variance.log() + math.log(2 * math.pi))


def club(
    z: Tensor,
    mean: Tensor,
    variance: Tensor,
    negatives: Literal["siblings", "batch"] = "siblings",
    gather: bool = True,
) -> Tensor:
    """The bound's summands: z, mean and variance [B, N, D] -> [B, N, D] in nats; their sum over D, averaged, bounds.

    negatives: the candidates, k = j among them: the N views of the same image (MI-MAE, equation 10), or all views of
               the batch (CLUB itself; over all processes where `gather`).

    The candidates' squared distances to a mean are their spread about their centre plus the centre's own distance, so
    no pair of views is ever formed.
    """
    over = 1 if negatives == "siblings" else (0, 1)
    everywhere = distributed.all_reduce_mean if negatives == "batch" and gather else lambda x: x
    centre = everywhere(z.mean(dim=over, keepdim=True))
    spread = everywhere((z - centre).square().mean(dim=over, keepdim=True))
    return (spread + (centre - mean).square() - (z - mean).square()) / (2 * variance)


def club_sampled(z: Tensor, mean: Tensor, variance: Tensor, other: Tensor) -> Tensor:
    """CLUB with one candidate a pair: log q(z_i | x_i) - log q(z_{other i} | x_i), an upper bound as far as q is right.

    Cheng et al. 2020, section 3.3 (vCLUB-S). z, mean and variance [n, D]; other: the candidates, int64 [n], drawn at
    random. Returns [n, D] in nats; their sum over D, averaged, estimates. No ceiling; more variance than `club`.
    """
    return ((z[other] - mean).square() - (z - mean).square()) / (2 * variance)


class ConditionalGaussian(nn.Module):
    """q(z|x) for an x that is a set of tokens: separate branches for mean and variance (MI-MAE, section 4.4).

    A branch is Linear, GELU, Linear on each token, the mean over tokens, and a last Linear; the mean ends in LeakyReLU.
    The mean over tokens is taken before the second Linear, with which it commutes: one product a row, not a token.

    pool_first: average the tokens before the first Linear, which leaves a branch nothing but the mean token.
    variance:   "relu_floor": ReLU + 1e-3; "softplus": softplus + 1e-3; "tanh_logvar": exp(tanh), in (1/e, e) as in
                CLUB's published code. Each starts near 1.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        hidden: int,
        variance: Variance = "relu_floor",
        pool_first: bool = False,
    ):
        super().__init__()
        self.variance_form, self.pool_first = variance, pool_first
        self.mean, self.variance = (
            nn.ModuleList([nn.Linear(in_width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out_width)])
            for _ in range(2)
        )
        #: The least variance that the form can reach.
        self.least = math.exp(-1) if variance == "tanh_logvar" else FLOOR
        start = {"relu_floor": 1.0, "softplus": math.log(math.e - 1), "tanh_logvar": 0.0}[variance]
        nn.init.constant_(self.variance[-1].bias, start)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [G, K, Dx] -> mean and variance, each [G, D], in float32 at least."""
        tokens = tokens.mean(dim=1, keepdim=True) if self.pool_first else tokens
        mean, raw = (self._branch(branch, tokens) for branch in (self.mean, self.variance))
        if self.variance_form == "relu_floor":
            variance = F.relu(raw) + FLOOR
        elif self.variance_form == "softplus":
            variance = F.softplus(raw) + FLOOR
        else:
            variance = raw.tanh().exp()
        return F.leaky_relu(mean), variance

    @staticmethod
    def _branch(layers: nn.ModuleList, tokens: Tensor) -> Tensor:
        first, second, last = layers
        out = last(second(F.gelu(first(tokens)).mean(dim=1)))
        return out.to(torch.promote_types(out.dtype, torch.float32))
