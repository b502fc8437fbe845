"""Linear classifiers on frozen features, one a learning rate, trained together on the same batches.

Their weights lie in one matrix, so that R heads cost one matrix product and not R.

Shapes: R heads, B rows a batch, n rows in all, D feature dimensions, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Shape = Literal["cosine", "cosine_by_epoch", "step", "constant"]

#: Of LARS: the share of a weight's norm that a step of rate 1 moves (MAE, MoCo v3, Barlow Twins).
TRUST = 0.001


@dataclass(frozen=True)
class Training:
    """How heads are trained.

    optimiser:    SGD with momentum, or LARS: the gradient of a head's weight is scaled to TRUST times the weight's
                  norm, whatever the weight decay.
    epochs, warmup_epochs: the rate rises linearly from 0 over the warm-up.
    shape:        then it falls to 0 as a cosine, at each step or at each epoch; or is multiplied by `gamma` at each of
                  the epochs `milestones`; or stays.
    weight_decay: on the weights, not on the biases.
    batch_norm:   each feature is normalised over the batch first, without an affine map (MAE's protocol).
    """

    optimiser: Literal["sgd", "lars"] = "sgd"
    epochs: int = 100
    warmup_epochs: float = 0.0
    shape: Shape = "cosine"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_norm: bool = False

    def share(self, epoch: float) -> float:
        """The rate after `epoch` epochs, a fraction counting, over the highest one."""
        epoch = math.floor(epoch) if self.shape == "cosine_by_epoch" else epoch
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        if self.shape == "constant":
            return 1.0
        if self.shape == "step":
            return self.gamma ** sum(epoch >= milestone for milestone in self.milestones)
        return 0.5 * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)))


class Heads:
    """R linear heads with cross-entropy, each with its own learning rate; all start alike.

    rates: the highest learning rate of each.
    seed:  of the initial weights, normal with a deviation of 0.01; biases start at 0.
    """

    def __init__(
        self, width: int, classes: int, rates: Sequence[float], training: Training, seed: int, device: torch.device
    ):
        self.training, self.classes = training, classes
        self.rates = torch.tensor(list(rates), device=device)
        # On the CPU whatever the device, so that heads start alike everywhere.
        start = 0.01 * torch.randn(classes, 1, width, generator=torch.Generator().manual_seed(seed))
        # Classes first, so that the softmax goes over many numbers that lie side by side: on a CPU six times as fast.
        self.weight = start.repeat(1, len(rates), 1).to(device)
        self.bias = torch.zeros(classes, len(rates), device=device)
        self._moved = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        # Its statistics are of the features alone, so that one serves all heads.
        self.norm = nn.BatchNorm1d(width, eps=1e-6, affine=False, device=device) if training.batch_norm else None

    def state_dict(self) -> dict[str, Any]:
        """Where the training stands."""
        norm = None if self.norm is None else self.norm.state_dict()
        return {"weight": self.weight, "bias": self.bias, "moved": self._moved, "norm": norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        for own, value in zip(
            (self.weight, self.bias, *self._moved), (state["weight"], state["bias"], *state["moved"]), strict=True
        ):
            own.copy_(value)
        if self.norm is not None:
            self.norm.load_state_dict(state["norm"])

    @torch.no_grad()
    def step(self, rows: Tensor, labels: Tensor, epoch: float) -> None:
        """One step on features [B, D] and labels int64 [B], after `epoch` epochs, a fraction counting."""
        share = self.training.share(epoch)
        rows = rows if self.norm is None else self.norm.train()(rows)
        residual = self._scores(rows).softmax(dim=0)
        residual[labels, :, torch.arange(len(rows), device=rows.device)] -= 1
        residual /= len(rows)
        weight = (residual.flatten(0, 1) @ rows).view_as(self.weight)
        self._update(weight, residual.sum(dim=2), share)

    def _update(self, weight: Tensor, bias: Tensor, share: float) -> None:
        """Moves the heads by their gradients, [C, R, D] and [C, R]."""
        if self.training.weight_decay:
            weight = weight + self.training.weight_decay * self.weight
        if self.training.optimiser == "lars":
            size, length = self.weight.norm(dim=(0, 2)), weight.norm(dim=(0, 2))
            adapted = torch.where((size > 0) & (length > 0), TRUST * size / length, 1.0)
            weight = weight * adapted[:, None]
        rates = share * self.rates
        for parameter, moved, gradient in zip((self.weight, self.bias), self._moved, (weight, bias), strict=True):
            moved.mul_(self.training.momentum).add_(gradient)
            parameter.sub_(moved * rates.view(-1, *[1] * (parameter.ndim - 2)))

    def _scores(self, rows: Tensor) -> Tensor:
        """[C, R, B]."""
        return (self.weight.flatten(0, 1) @ rows.T).view(*self.bias.shape, len(rows)) + self.bias[:, :, None]

    @torch.no_grad()
    def scores(self, rows: Tensor) -> Tensor:
        """What the heads give features [B, D], with the statistics of the training: [R, B, C]."""
        rows = rows if self.norm is None else self.norm.eval()(rows)
        return self._scores(rows).permute(1, 2, 0)

    def named(self, rows: Tensor, chunk: int = 4096) -> Tensor:
        """The classes that the heads name: features [n, D] -> int64 [R, n], on the CPU."""
        device = self.weight.device
        return torch.cat([self.scores(part.to(device)).argmax(dim=2).cpu() for part in rows.split(chunk)], dim=1)

    @property
    def finite(self) -> Tensor:
        """Which heads are still finite: bool [R], on the CPU. What the others name means nothing."""
        return (self.weight.isfinite().all(dim=2) & self.bias.isfinite()).all(dim=0).cpu()
