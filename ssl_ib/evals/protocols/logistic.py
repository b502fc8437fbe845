"""Logistic regression by scikit-learn: what a linear classifier reads off the features when it is fitted to the end."""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch

from ...config.hints import PositiveInt
from ...record import eval_figures
from ..protocol import Job, Positives, Settings, register_protocol


class LogisticSettings(Settings):
    """Multinomial logistic regression of scikit-learn (L-BFGS), on cached features.

    c: inverse strengths of the L2 penalty, each a result. standardise: features get mean 0 and deviation 1 over the
    training images. iterations: at most so many; it is said where they were not enough.
    """

    varied: ClassVar = {"c": "c"}

    c: Positives = (1.0,)
    standardise: bool = True
    iterations: PositiveInt = 1000

    def shareable(self) -> bool:
        return True


@register_protocol("logistic")
def logistic(job: Job, settings: LogisticSettings) -> None:
    """Top-1 accuracy of scikit-learn's logistic regression on frozen features."""
    todo = job.todo({"c": c} for c in settings.c)
    for variant in todo:
        (train, train_labels), (test, labels) = job.features(job.train), job.features(job.val)
        named, converged = fit_logistic(
            train, train_labels, test, variant["c"], settings.standardise, settings.iterations
        )
        if not converged:
            job.say(f"c={variant['c']:g}: {settings.iterations} iterations did not suffice: raise iterations")
        job.record_accuracy(variant, named, labels, converged=converged)
        if (path := job.figure("confusion")) and variant is todo[0]:
            eval_figures.confusion(labels, named, job.val.classes, path, f"logistic regression, c={variant['c']:g}")


def fit_logistic(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    c: float,
    standardise: bool = True,
    iterations: int = 1000,
) -> tuple[torch.Tensor, bool]:
    """The classes that scikit-learn's logistic regression names, int64 [m], and whether it converged.

    train [n, D], test [m, D]: features; train_labels int64 [n]; the other arguments as in `LogisticSettings`.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    steps = [StandardScaler()] if standardise else []
    model = make_pipeline(*steps, LogisticRegression(C=c, max_iter=iterations))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train.numpy(), train_labels.numpy())
    named = torch.from_numpy(model.predict(test.numpy()))
    return named, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
