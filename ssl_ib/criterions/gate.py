"""A gate that lets a term into the loss once another has fallen below a threshold."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from .. import distributed
from ..types import Progress

GateMode = Literal["latch", "instant", "none"]


class Gate(nn.Module):
    """Open (1) or closed (0), by a loss that is watched; its state is in the checkpoint.

    mode:      "latch": opens for good once the loss's running mean, over all processes, is below `threshold`;
               "instant": open in the steps where the loss itself, over all processes, is; "none": always open (an
               "off" would be a boolean to YAML).
    momentum:  of the running mean, which starts at the first loss and moves once a micro-batch.
    max_epoch: a closed gate opens at this epoch (None: it waits for the loss alone).

    opened_at: the step at which a latch opened, or -1.
    """

    def __init__(self, mode: GateMode, threshold: float, momentum: float, max_epoch: int | None):
        super().__init__()
        self.mode, self.threshold, self.momentum, self.max_epoch = mode, threshold, momentum, max_epoch
        self.register_buffer("running_mean", torch.tensor(math.inf))
        self.register_buffer("opened_at", torch.tensor(-1))

    def _late(self, progress: Progress) -> bool:
        return self.max_epoch is not None and progress.epoch >= self.max_epoch

    def forward(self, loss: Tensor | None, progress: Progress) -> Tensor:
        """0 or 1, as float32; `loss` is this step's, and may be None where there is no gate."""
        if self.mode == "none" or self._late(progress):
            return torch.ones_like(self.running_mean)
        if self.mode == "instant":
            opened = distributed.all_reduce_mean(loss.detach()) < self.threshold
        else:
            # Not in the rest of the step whose first micro-batches opened it.
            opened = (self.opened_at >= 0) & (self.opened_at < progress.step)
        return opened.to(torch.float32)

    def update(self, loss: Tensor, progress: Progress) -> None:
        """Takes in a step's loss, after its forward; what it opens counts from the next step on."""
        if self.mode != "latch":
            return
        loss = distributed.all_reduce_mean(loss).to(self.running_mean.dtype)
        before = torch.where(self.running_mean.isfinite(), self.running_mean, loss)
        self.running_mean.copy_(self.momentum * before + (1 - self.momentum) * loss)
        opens = (self.opened_at < 0) & ((self.running_mean < self.threshold) | self._late(progress))
        self.opened_at.copy_(torch.where(opens, progress.step, self.opened_at))

    def opened_in(self, progress: Progress) -> bool:
        """Whether a latch opened in the current epoch."""
        return int(self.opened_at) >= 0 and int(self.opened_at) // progress.steps_per_epoch == progress.epoch
