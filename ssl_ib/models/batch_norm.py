"""Batch norm as MoCo runs it: over the images of one GPU, with the keys shuffled over all GPUs first.

A query and its key that share a batch can be told from the batch's statistics, which makes the task too easy (He et
al., "Momentum Contrast", 2020, section 3.3). One process can do as several GPUs do: it cuts its batch into groups, and
each of them is normalised by itself.

Shapes: b images of this process, D width of a network's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .. import distributed
from ..errors import UserError
from ..part import RunInfo


class BatchNormGroups:
    """How a batch goes through networks that may have batch norm: in groups, each normalised by itself.

    bn_groups: how many groups a step has over all processes; each process has at least one.
    networks:  those that may have batch norm. Where none has, one pass reads all images, in their own order.

    Raises UserError where the processes cannot share the groups out, or a group would have less than two images. In a
    dry run, whose batch is small, there are fewer groups.
    """

    def __init__(self, bn_groups: int, info: RunInfo, networks: Iterable[nn.Module]):
        modules = (module for network in networks for module in network.modules())
        self.normalises = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)
        self.groups = self._of_process(bn_groups, info) if self.normalises else 1

    @staticmethod
    def _of_process(bn_groups: int, info: RunInfo) -> int:
        groups, rest = divmod(bn_groups, info.world_size)
        if rest and groups:
            raise UserError(f"bn_groups={bn_groups}: expected a multiple of the {info.world_size} processes, or 1")
        groups = max(groups, 1)
        if info.cap is not None:
            groups = min(groups, max(info.batch_size // 2, 1))
        if groups > 1 and (info.batch_size % groups or info.batch_size < 2 * groups):
            raise UserError(
                f"bn_groups={bn_groups}: the {info.batch_size} images of a process cannot be cut into {groups} equal "
                "groups of two or more"
            )
        return groups

    def queries(self, network: Callable[[Tensor], Tensor], images: Tensor, training: bool) -> Tensor:
        """The network's answers for a batch [b, ...], which it reads a group at a time in training: [b, ...].

        Running statistics move once a group, so they forget faster than with one pass for all images.
        """
        if self.groups == 1 or not training:
            return network(images)
        return torch.cat([network(part) for part in images.chunk(self.groups)])

    def keys(self, network: Callable[[Tensor], Tensor], images: Tensor, training: bool) -> Tensor:
        """The same for images that change places first in training, over all processes, and whose answers change back.

        Without gradient. All processes use the main one's order.
        """
        if not training or not self.normalises or self.groups * distributed.world_size() == 1:
            return network(images)
        everyones = distributed.gather(images)
        order = distributed.broadcast(torch.randperm(len(everyones), device=images.device))
        mine = slice(distributed.rank() * len(images), (distributed.rank() + 1) * len(images))
        answers = distributed.gather(self.queries(network, everyones[order[mine]], training))
        return answers[order.argsort()[mine]]
