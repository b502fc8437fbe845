"""The exponential moving average of a network: the teacher, target or key encoder of many methods."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .. import distributed


class MomentumCopy(nn.Module):
    """Copies of networks that receive no gradient and follow them by `update`.

    Batch-norm statistics are the copies' own: they are gathered by running them, not averaged.
    """

    def __init__(self, *networks: nn.Module):
        super().__init__()
        self.networks = nn.ModuleList(copy.deepcopy(network).requires_grad_(False) for network in networks)

    @torch.no_grad()
    def update(self, *networks: nn.Module, momentum: float) -> None:
        """p <- momentum * p + (1 - momentum) * source, for every parameter of the networks that were copied."""
        # A sharded copy and its source have the same rows in the same process.
        copies = [distributed.local(p) for p in self.networks.parameters()]
        sources = [distributed.local(p) for network in networks for p in network.parameters()]
        torch._foreach_lerp_(copies, sources, 1.0 - momentum)
