"""What a loss and a run need of torch.distributed; all of it does nothing in a single process.

The processes of a run each hold an equal share of the batch, and DDP averages their gradients. The collectives here
are differentiable with respect to the sum of all ranks' losses: their backward adds up what every rank's loss has to
say about this rank's tensor. The average over R ranks then equals the gradient of the mean loss on the whole batch,
with no factor of R left over.

Work other than training is divided item by item (`shared`, `shared_rows`). An item, such as a batch to encode, is one
process's alone, so that its answer does not depend on how many processes there are.

Shapes: R ranks, b rows a rank.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import heartbeat
from .errors import EndedElsewhere, UserError

T = TypeVar("T")
A = TypeVar("A")

#: How long a process may wait for another. Where that one is dead, the wait ends at once (gloo), or torchrun ends it.
TIMEOUT = timedelta(hours=3)

#: The dimension of the mesh of processes over which tensors are sharded.
SHARDS = "shard"

_logger = logging.getLogger(__name__)


def initialise(device: torch.device | str, timeout: float = 600.0) -> None:
    """Joins the processes that torchrun started (its environment says which); does nothing for a single one, or again.

    timeout: seconds within which all of them have to come. Raises UserError where they do not.

    Tensors on a CUDA device go through NCCL, all others through gloo. Features and messages are on the CPU, so that a
    process that waits for another's share of an evaluation does so in gloo, which leaves its GPU alone.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The default of 10 minutes is less than one process may need for its share, such as a probe on a large set.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    except RuntimeError as error:
        raise UserError(f"the processes did not find one another: {str(error).splitlines()[0]}") from None
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun may keep one store over its restarts, with the addresses of the processes that have died. Agents on
        # several machines count restarts each for itself, so that there the number is no common name.
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    heartbeat.roll_call(store, number, count, timeout)
    # `Heartbeat` ends a run that hangs earlier.
    longest = max(TIMEOUT, timedelta(seconds=2 * timeout))
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=longest)
    if not is_main():
        # Every process finds the same; one says it.
        logging.getLogger("ssl_ib").setLevel(logging.ERROR)


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
    """How many rows each rank has."""
    if world_size() == 1:
        return (rows,)
    counts = torch.empty(world_size(), dtype=torch.int64)
    dist.all_gather_into_tensor(counts, torch.tensor([rows]))
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


def largest(value: int) -> int:
    """The largest of the ranks' numbers, on each of them."""
    return int(largest_of(torch.tensor(value)))


# Sharded tensors


def is_sharded(x: Tensor) -> bool:
    """Whether a parameter or its gradient is one of `parallel=fsdp`, of which this process holds some rows alone."""
    return hasattr(x, "device_mesh")


def local(x: Tensor) -> Tensor:
    """The rows of a sharded tensor that this process holds, which share its memory; any other tensor itself.

    For hooks, which have no gradient: what is done to each row by itself needs nothing more.
    """
    return x.to_local() if is_sharded(x) else x


def assign(x: Tensor, value: Tensor) -> None:
    """Gives a tensor a value that every process has whole; of a sharded one each process keeps its own rows."""
    if is_sharded(x):
        # Here, because a run that shards nothing has no need of it.
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(x.device), x.device_mesh, x.placements, src_data_rank=None).to_local()
    local(x).copy_(value)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor, float [n]; of a sharded one that of all its rows. All processes ask at once.

    tensors: one at least, all of them sharded or none.
    """
    found = torch.stack(torch._foreach_norm([local(x) for x in tensors]))
    if is_sharded(tensors[0]):
        squares = found.double().square()
        dist.all_reduce(squares, group=tensors[0].device_mesh.get_group(SHARDS))
        found = squares.sqrt().to(found.dtype)
    return found


# Work that is divided


@dataclass
class Largest:
    """The largest of the processes' numbers, once all of them have come to the end of `together`."""

    value: int = 0


@contextmanager
def together(number: int = 0) -> Iterator[Largest]:
    """What is done inside succeeds in all processes or ends all of them; at its end they wait for one another.

    number: any number of at least 0; what is yielded has the largest of all processes afterwards.

    Where it fails, the first process that failed raises its error, and the others raise EndedElsewhere. Inside there
    may be `together`, `shared` and `shared_rows`, where nobody goes on waiting for one that failed before it came
    there, but no other collective.
    """
    failed, of_all = None, Largest()
    try:
        yield of_all
    except Exception as error:
        if isinstance(error, EndedElsewhere) or getattr(error, "known_to_all", False):
            raise  # From inside another `together`.
        failed = error
    told = largest_of(torch.tensor([0 if failed is None else world_size() - rank(), number]))
    first, of_all.value = world_size() - int(told[0]), int(told[1])
    if failed is not None and first == rank():
        failed.known_to_all = True
        raise failed
    if first < world_size():
        raise EndedElsewhere(f"process {first} has failed, and shows the error") from failed


def share(items: Sequence[T]) -> Sequence[T]:
    """Those of the items that are this process's: neighbours, and as many as the others have, or one more."""
    count, processes = len(items), world_size()
    return items[count * rank() // processes : count * (rank() + 1) // processes]


def shared(work: Callable[[T], A], items: Sequence[T]) -> list[A]:
    """What `work` answers for each item, in their order, on every process, of which each does its share, `alone`.

    The answers are small and plain data. An error ends all processes, as in `together`.
    """
    with together():
        answers = _done(work, share(items))
    return [answer for part in _gather_objects(answers) for answer in part]


def shared_rows(
    work: Callable[[T], tuple[Tensor, ...]],
    items: Sequence[T],
    show: Callable[[Sequence[T]], Iterable[T]] = iter,
) -> tuple[Tensor, ...]:
    """`shared` for tensors: those that `work` answers, each put together over all items along its first dimension.

    work:  gives tensors on the CPU, always as many and, but for the first dimension, of the same shapes.
    items: one at least.
    show:  is given this process's share, and gives its items as they are wanted: a progress bar.
    """
    with together():
        mine = tuple(map(torch.cat, zip(*_done(work, show(share(items))), strict=True)))
    if world_size() == 1:
        return mine
    # A process without an item learns from the others what there is.
    found = _gather_objects([(x.shape, x.dtype) for x in mine])
    answers = next(filter(None, found))
    mine = mine or tuple(torch.empty(0, *shape[1:], dtype=dtype) for shape, dtype in answers)
    return tuple(gather_rows(x, tuple(part[k][0][0] if part else 0 for part in found)) for k, x in enumerate(mine))


def _done(work: Callable[[T], A], items: Iterable[T]) -> list[A]:
    answers = []
    for item in items:
        with alone():
            answers.append(work(item))
        heartbeat.alive()
    return answers


def _gather_objects(value: A) -> list[A]:
    """The values of all ranks, in rank order; small and plain data."""
    if not _several():
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def union(values: set[T]) -> set[T]:
    """What any rank has, on each of them; small and plain data."""
    return set().union(*_gather_objects(values))


def from_main(value: A) -> A:
    """The main process's value, plain data, on each rank."""
    values = [value]
    if _several():
        dist.broadcast_object_list(values, 0)
    return values[0]


@contextmanager
def as_main(tensors: Iterable[Tensor]) -> Iterator[None]:
    """While entered, the tensors hold on every rank what they hold on the main one; afterwards their own values.

    tensors: the same on every rank, but for their values.
    """
    own = []
    for tensor in tensors if _several() else ():
        mains = broadcast(tensor.clone(memory_format=torch.contiguous_format))
        if not torch.equal(mains, tensor):
            own.append((tensor, tensor.clone()))
            tensor.copy_(mains)
    try:
        yield
    finally:
        for tensor, value in own:
            tensor.copy_(value)
