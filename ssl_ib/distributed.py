"""What a loss and a run need of torch.distributed; all of it does nothing in a single process.

The processes of a run each hold an equal share of the batch, and DDP averages their gradients. The collectives here
are differentiable with respect to the sum of all ranks' losses: their backward adds up what every rank's loss has to
say about this rank's tensor. The average over R ranks then equals the gradient of the mean loss on the whole batch,
with no factor of R left over.

Shapes: R ranks, b rows a rank.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def initialise(device: torch.device | str) -> None:
    """Joins the processes that torchrun started (its environment says which); does nothing for a single one.

    Uses NCCL on a CUDA device, gloo elsewhere.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The others wait while the main process evaluates, which on a large set outlasts the default of 10 minutes.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=3))


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def shutdown() -> None:
    """Leaves the group of processes, if there is one."""
    if _several():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 in a single process."""
    return dist.get_rank() if _several() else 0


def world_size() -> int:
    """How many processes share the batch, 1 in a single process."""
    return dist.get_world_size() if _several() else 1


def is_main() -> bool:
    """Whether this is the process that writes logs and checkpoints."""
    return rank() == 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        gathered = x.new_empty(world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.rows :][: ctx.rows]


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _AllReduceSum.apply(gradient)


def gather(x: Tensor) -> Tensor:
    """The rows of all ranks, in rank order: x [b, ...] -> [R*b, ...]; differentiable. b must be the same everywhere."""
    return x if world_size() == 1 else _Gather.apply(x)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of the ranks' tensors, on each of them; differentiable."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean of the ranks' tensors, on each of them; differentiable."""
    return all_reduce_sum(x) / world_size()


def barrier() -> None:
    """Waits until every process has come here."""
    if _several():
        dist.barrier()


def largest(value: int) -> int:
    """The largest of the ranks' numbers, on each of them."""
    if not _several():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    number = torch.tensor(value, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)
