"""Bounds on mutual information from a critic's scores of all pairs, in nats.

scores[i, j] is the critic's score of x_i with y_j. The diagonal holds the pairs that belong together; all others are
independent. Each bound is tight for a critic that is log p(x, y) / p(x) p(y), some up to a constant.

Shapes: scores [n, n] -> a scalar, differentiable.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def i_nce(scores: Tensor) -> Tensor:
    """I_NCE, a lower bound whose ceiling is log n: mean_i [s_ii - log mean_j exp(s_ij)].

    Van den Oord et al., "Representation learning with contrastive predictive coding", 2018; Poole et al., "On
    variational bounds of mutual information", ICML 2019, equation 10. Low variance; biased down as the information
    nears log n. What depends on x alone in a score cancels.
    """
    return (scores.diagonal() - scores.logsumexp(dim=1)).mean() + math.log(len(scores))


def nwj(scores: Tensor) -> Tensor:
    """I_NWJ, a lower bound without a ceiling: mean_i s_ii - mean_{i != j} exp(s_ij - 1).

    Nguyen, Wainwright and Jordan, IEEE Transactions on Information Theory 56 (2010); Poole et al. 2019, equation 5.
    Unbiased for its bound, but its variance grows as exp(information). It is tight at 1 + log p(x, y) / p(x) p(y).
    """
    return scores.diagonal().mean() - (log_mean_exp_off(scores) - 1).exp()


def mine(scores: Tensor) -> Tensor:
    """The Donsker-Varadhan bound as MINE reads it: mean_i s_ii - log mean_{i != j} exp(s_ij).

    Belghazi et al., "Mutual information neural estimation", ICML 2018, equation 5. An estimate without a ceiling. For
    infinite samples it is a lower bound, but the logarithm of a finite mean is too small on average, which biases it
    up. Its plain gradient is biased as well: train with `Mine`.
    """
    return scores.diagonal().mean() - log_mean_exp_off(scores)


def smile(scores: Tensor, tau: float = 5.0) -> Tensor:
    """SMILE, an estimate without a ceiling: mean_i s_ii - log mean_{i != j} exp(s_ij clipped to [-tau, tau]).

    Song and Ermon, "Understanding the limitations of variational mutual information estimators", ICLR 2020, equation
    12 (tau = infinity is MINE's reading). Clipping bounds the variance and takes away the bound. The critic is trained
    with `jensen_shannon`. tau: in nats.
    """
    return scores.diagonal().mean() - log_mean_exp_off(scores.clamp(-tau, tau))


def jensen_shannon(scores: Tensor) -> Tensor:
    """The objective that trains SMILE's critic: mean_i -softplus(-s_ii) - mean_{i != j} softplus(s_ij).

    It is greatest for s = log p(x, y) / p(x) p(y), and says nothing in nats itself. Nowozin, Cseke and Tomioka, NeurIPS
    2016; Poole et al. 2019, section 2.2.
    """
    rest = F.softplus(scores)
    rest = (rest.sum() - rest.diagonal().sum()) / (rest.numel() - len(rest))
    return -F.softplus(-scores.diagonal()).mean() - rest


class Mine:
    """MINE's objective, whose gradient is that of the Donsker-Varadhan bound without the bias of small batches.

    The gradient of log mean exp(s_ij) divides by this batch's mean; here it divides by a moving average over batches
    (Belghazi et al. 2018, section 3.2). Its value is no reading: take that with `mine`.

    decay: of the moving average, in [0, 1).
    """

    def __init__(self, decay: float = 0.9):
        self.decay, self.average = decay, None

    def __call__(self, scores: Tensor) -> Tensor:
        rest = log_mean_exp_off(scores)
        now = rest.detach()
        if self.average is None:
            self.average = now
        # The average is kept as a logarithm, so that large scores do not overflow.
        self.average = torch.logaddexp(self.average + math.log(self.decay), now + math.log1p(-self.decay))
        return scores.diagonal().mean() - (rest - self.average).exp()


def log_mean_exp_off(scores: Tensor) -> Tensor:
    """log of the mean of exp(s_ij) over all i != j."""
    n = len(scores)
    diagonal = torch.eye(n, dtype=torch.bool, device=scores.device)
    return scores.masked_fill(diagonal, -math.inf).logsumexp(dim=(0, 1)) - math.log(n * (n - 1))
