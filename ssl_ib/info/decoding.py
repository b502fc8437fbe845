"""What a representation Z holds of a factor F with a few values, such as the class: a lower bound in nats.

I(F;Z) = H(F) - H(F|Z), and the cross-entropy of any classifier that reads F off Z is at least H(F|Z) on the
distribution that it is scored on. So H(F) less the held-out cross-entropy of a trained classifier bounds I(F;Z) from
below, up to the chance of which images are held out, and what another classifier would find more of is missing.

Shapes: n training rows, m held-out rows, R draws of the noise, D feature dimensions, K values.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .labels import entropy

#: Strengths of the L2 penalty that are tried, as scikit-learn's C; a fifth of the training rows chooses.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
ITERATIONS = 200


#: How many errors of their difference two readings must be apart to count as different.
ERRORS = 2


def verdict(change: float, error: float) -> str:
    """`gained`, `dropped`, or `as before` where a change, in nats, is within two of its errors."""
    return "as before" if abs(change) <= ERRORS * error else "gained" if change > 0 else "dropped"


@dataclass(frozen=True)
class Decoded:
    """What a classifier read of a factor.

    nats:     H(F) - held-out cross-entropy: a lower bound on I(F;Z), negative where the classifier does worse than the
              shares of the values alone.
    error:    its standard error over the held-out rows.
    ceiling:  H(F) of the held-out rows, in nats: no bound can exceed it.
    accuracy: of naming the value, in [0, 1].
    chance:   the accuracy of always naming the most frequent value.
    strength: the C that was chosen.
    """

    nats: float
    error: float
    ceiling: float
    accuracy: float
    chance: float
    strength: float


def decode(
    train: Tensor,
    train_values: Tensor,
    test: Tensor,
    test_values: Tensor,
    draws: int = 1,
    strengths: Sequence[float] = STRENGTHS,
) -> Decoded:
    """A lower bound on I(F;Z) by multinomial logistic regression (scikit-learn's L-BFGS), on standardised features.

    train [R n, D], test [R m, D]: features, finite; with noise of R `draws` there are R blocks of the same rows.
    train_values int64 [n], test_values int64 [m]. The penalty with the least cross-entropy on a fifth of the training
    rows is taken, and the classifier fitted again to all.

    Raises UserError where the held-out rows have one value only, or one that no training row has.
    """
    strange = sorted(set(test_values.unique().tolist()) - set(train_values.unique().tolist()))
    if strange:
        raise UserError(f"no training image has the value {strange[0]}, which a held-out image has")
    ceiling = entropy(test_values)
    if ceiling == 0:
        raise UserError("the held-out images all have one value, so that H = 0: there is nothing to know of it")
    held_back = _a_fifth(train_values).repeat(draws)
    values = train_values.repeat(draws)
    # With one row of each value there is nothing to choose on.
    strength = strengths[len(strengths) // 2]
    if len(strengths) > 1 and held_back.any():
        kept = train[~held_back], values[~held_back], train[held_back], values[held_back]
        losses = [-_log_shares(*kept, c)[0].mean().item() for c in strengths]
        strength = min(zip(losses, strengths, strict=True))[1]
    found, named = _log_shares(train, values, test, test_values.repeat(draws), strength)
    # Draws of one image's noise are no further images.
    found, right = (x.view(draws, -1).double().mean(dim=0) for x in (found, named == test_values.repeat(draws)))
    _, where, counts = test_values.unique(return_inverse=True, return_counts=True)
    gains = found - (counts.double() / len(test_values)).log()[where]
    return Decoded(
        nats=gains.mean().item(),
        error=(gains.std() / len(gains) ** 0.5).item(),
        ceiling=ceiling,
        accuracy=right.mean().item(),
        chance=counts.max().item() / len(test_values),
        strength=strength,
    )


def _a_fifth(values: Tensor) -> Tensor:
    """About a fifth of the rows of each value, of two or more one at least: bool [n]."""
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(len(values), dtype=torch.bool)
    for value in values.unique():
        rows = order[values[order] == value]
        chosen[rows[: max(len(rows) // 5, min(len(rows) - 1, 1))]] = True
    return chosen


def _log_shares(
    train: Tensor, train_values: Tensor, test: Tensor, test_values: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    """Fits to training rows; the log-probability of each other row's value, and the value it names: [m] each."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, deviation = train.double().mean(dim=0), train.double().std(dim=0, unbiased=False)
    # A dimension that does not vary but for rounding says nothing.
    scale = torch.where(deviation > 1e-9 * mean.abs().clamp_min(1e-3), 1 / deviation.clamp_min(1e-30), 0.0)
    train, test = ((x.double() - mean) * scale for x in (train, test))
    model = LogisticRegression(C=strength, max_iter=ITERATIONS, tol=1e-3)
    with warnings.catch_warnings():
        # Where the iterations do not suffice the bound is a little lower, and still a bound.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train.numpy(), train_values.numpy())
    known = torch.from_numpy(model.classes_)
    found = torch.from_numpy(model.predict_log_proba(test.numpy()))
    return found[torch.arange(len(test)), torch.searchsorted(known, test_values)], known[found.argmax(dim=1)]
