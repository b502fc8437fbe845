"""The protocols of `ssl-ib-eval`, one a file."""

from . import detection, finetune, knn, linear, logistic, lowshot, robustness, segmentation  # noqa: F401
