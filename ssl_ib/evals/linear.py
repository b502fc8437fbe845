"""Linear probe on cached features: how much of the classes one linear layer can read off the frozen representation.

Shapes: n training rows, m test rows, D feature dimensions, C classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import heartbeat
from ..errors import UserError
from .features import num_classes


@torch.no_grad()
def linear_distance(
    train: Tensor, train_values: Tensor, test: Tensor, test_values: Tensor, weight_decay: float = 1e-4
) -> float:
    """Mean Euclidean distance of the values that a linear layer reads off the features from the true ones.

    The layer has the least squared error on the training rows, by ridge regression in float64 on standardised features:
    there is nothing to tune, and it repeats exactly.

    train [n, D], test [m, D]: features; train_values [n, d], test_values [m, d]: float, in any unit, which the answer
    has too. weight_decay: on the weights for standardised features, per row, not on the bias.

    Returns nan where a feature is not finite.
    """
    if not (train.isfinite().all() and test.isfinite().all()):
        return float("nan")
    train, values = train.double(), train_values.double()
    mean, scale = train.mean(dim=0), (train.var(dim=0, unbiased=False) + 1e-6).rsqrt()
    train, test = (train - mean) * scale, (test.double() - mean) * scale
    offset = values.mean(dim=0)
    gram = train.T @ train / len(train) + weight_decay * torch.eye(train.shape[1], dtype=train.dtype)
    weight = torch.linalg.solve(gram, train.T @ (values - offset) / len(train))
    return (test @ weight + offset - test_values.double()).norm(dim=1).mean().item()


def linear_top1(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, **settings: Any) -> float:
    """Top-1 accuracy in [0, 1] of the layer of `linear_logits`; nan where a feature is not finite."""
    logits = linear_logits(train, train_labels, test, test_labels, **settings)
    return float("nan") if logits.isnan().any() else (logits.argmax(dim=1) == test_labels).double().mean().item()


@torch.enable_grad()
def linear_logits(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    epochs: int = 100,
    lr: float = 0.2,
    batch_size: int = 1024,
    lr_scale: Literal["raw", "linear"] = "raw",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """The answers float32 [m, C] for `test` of one linear layer trained on `train` with SGD and a cosine rate.

    Features are standardised with the training set's statistics, as by MAE's BatchNorm without affine before the head
    (He et al., CVPR 2022, appendix A.1), so that one rate suits features of any scale.

    train [n, D], test [m, D]: features; train_labels [n], test_labels [m]: int64.
    lr:           the rate itself (`lr_scale="raw"`), or per 256 rows (`"linear"`: multiplied by batch_size / 256).
    batch_size:   no more than n; the last batch of an epoch may be smaller.
    weight_decay: on the weights, not on the bias.
    seed:         of the initial weights and the order of rows; torch's global generator is neither read nor moved.

    They are nan where a feature is not finite. Raises UserError where a label is unknown, or for an unknown `lr_scale`.
    """
    if lr_scale not in ("raw", "linear"):
        raise UserError(f"lr_scale: expected 'raw' or 'linear', got {lr_scale!r}")
    classes = num_classes(train_labels, test_labels)
    if not (train.isfinite().all() and test.isfinite().all()):
        return torch.full((len(test), classes), float("nan"), device=test.device)
    mean = train.float().mean(dim=0)
    scale = (train.float().var(dim=0, unbiased=False) + 1e-6).rsqrt()
    train, test = (train.float() - mean) * scale, (test.float() - mean) * scale

    n, dim = train.shape
    batch_size = min(batch_size, n)
    rate = lr * batch_size / 256 if lr_scale == "linear" else lr
    # On the CPU whatever the device, so that the probe starts and shuffles alike everywhere.
    generator = torch.Generator().manual_seed(seed)
    # skip_init, because the layer's own initialisation would draw from the global generator.
    head = nn.utils.skip_init(nn.Linear, dim, classes)
    nn.init.normal_(head.weight, std=0.01, generator=generator)
    nn.init.zeros_(head.bias)
    head.to(train.device)
    groups = [{"params": [head.weight], "weight_decay": weight_decay}, {"params": [head.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=momentum)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * -(-n // batch_size))
    full_precision = torch.autocast(train.device.type, enabled=False)
    for _ in range(epochs):
        for rows in torch.randperm(n, generator=generator).to(train.device).split(batch_size):
            # In float32 also where the caller encodes in less, as are the weights.
            with full_precision:
                loss = F.cross_entropy(head(train[rows]), train_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
        heartbeat.alive()
    with torch.no_grad(), full_precision:
        return head(test)
