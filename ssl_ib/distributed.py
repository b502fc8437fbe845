"""What a loss and a run need of torch.distributed; all of it does nothing in a single process.

The processes of a run each hold an equal share of the batch, and DDP averages their gradients. The collectives here
are differentiable with respect to the sum of all ranks' losses: their backward adds up what every rank's loss has to
say about this rank's tensor. The average over R ranks then equals the gradient of the mean loss on the whole batch,
with no factor of R left over.

Shapes: R ranks, b rows a rank.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_logger = logging.getLogger(__name__)


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


#: Whether this process is for the moment on its own; see `alone`.
_alone = False


def _several() -> bool:
    return not _alone and dist.is_available() and dist.is_initialized()


@contextmanager
def alone() -> Iterator[None]:
    """While entered, this process counts as the only one, so that it can evaluate a loss the others do not."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


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


def with_common_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with batch norms whose statistics are those of all processes' rows; parameters and names stay.

    torch has such on GPUs only: elsewhere each process's rows count alone, which is said once where there are any.
    """
    if device.type == "cuda":
        # Here, because the ops, which use this module, need torch alone. timm knows its own kinds of batch norm.
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(module)
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
        _logger.info("batch norm: the statistics are each process's own; torch shares them between GPUs only")
    return module


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shares: tuple[int, ...]) -> Tensor:
        ctx.shares = shares
        gathered = x.new_empty(sum(shares), *x.shape[1:])
        if len(set(shares)) == 1:
            dist.all_gather_into_tensor(gathered, x.contiguous())
        else:
            for source, part in enumerate(gathered.split(shares)):
                dist.broadcast(part.copy_(x) if source == rank() else part, source)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        # What every rank's loss says about this rank's rows comes here and is added up.
        return _exchanged(gradient, ctx.shares).sum(dim=0), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shares: tuple[int, ...]) -> Tensor:
        ctx.shares = shares
        return _exchanged(x, shares)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        back = gradient.new_empty(sum(ctx.shares), *gradient.shape[2:])
        mine = [gradient.shape[1]] * len(ctx.shares)
        dist.all_to_all_single(back, gradient.flatten(0, 1).contiguous(), list(ctx.shares), mine)
        return back, None


def _exchanged(x: Tensor, shares: tuple[int, ...]) -> Tensor:
    mine = shares[rank()]
    received = x.new_empty(len(shares) * mine, *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), [mine] * len(shares), list(shares))
    return received.unflatten(0, (len(shares), mine))


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _AllReduceSum.apply(gradient)


def shares(rows: int) -> tuple[int, ...]:
    """How many rows each rank has; a GPU is waited for."""
    if world_size() == 1:
        return (rows,)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    counts = torch.empty(world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([rows], device=device))
    return tuple(counts.tolist())


def gather_rows(x: Tensor, shares: tuple[int, ...]) -> Tensor:
    """The rows of all ranks, in rank order, where ranks have `shares` of them: x [b, ...] -> [sum(shares), ...].

    Differentiable.
    """
    return x if world_size() == 1 else _GatherRows.apply(x, shares)


def gather(x: Tensor) -> Tensor:
    """`gather_rows` where every rank has as many rows: x [b, ...] -> [R*b, ...]; differentiable."""
    return gather_rows(x, (len(x),) * world_size())


def exchange_rows(x: Tensor, shares: tuple[int, ...]) -> Tensor:
    """What every rank has to say about this rank's rows: x [sum(shares), ...] -> [R, b, ...]; differentiable."""
    return x[None] if world_size() == 1 else _Exchange.apply(x, shares)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of the ranks' tensors, on each of them; differentiable."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean of the ranks' tensors, on each of them; differentiable."""
    return all_reduce_sum(x) / world_size()


def largest_of(x: Tensor) -> Tensor:
    """The ranks' elementwise maximum, on each of them; not differentiable."""
    if _several():
        x = x.clone()
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def broadcast(x: Tensor) -> Tensor:
    """The main process's tensor, on each rank, in place of `x`."""
    if _several():
        dist.broadcast(x, 0)
    return x


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
