"""Counts the memory of one process in a step of SVIB on a vision transformer, with DDP or sharded.

    python tools/count_memory.py --parallel ddp
    python tools/count_memory.py --parallel fsdp --processes 2

It runs one of the processes on the CPU, with real tensors, and a stand-in for the others that moves no data. So sizes
and lifetimes are those of a real step, and the numbers in the tensors mean nothing. Bytes are those of all tensors'
storages that are alive, looked up after every operation.
"""

from __future__ import annotations

import argparse
import json
import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_ib import Batch, Progress, RunInfo, distributed, ops, optim, sharding
from ssl_ib.config.config import OptimConfig
from ssl_ib.criterions.svib import SVIB
from ssl_ib.models.student_teacher import StudentTeacher
from ssl_ib.part import Context, Step, parts


class Live(TorchDispatchMode):
    """Follows the storages of all tensors that operations give: `now` and `peak` in bytes, and what a peak was of."""

    def __init__(self):
        super().__init__()
        self._storages: dict[int, weakref.ref] = {}
        self.peak = 0

    def add(self, tensor: torch.Tensor) -> None:
        for plain in (tensor._local_tensor,) if distributed.is_sharded(tensor) else (tensor,):
            storage = plain.untyped_storage()
            self._storages[storage._cdata] = weakref.ref(storage)

    def now(self) -> int:
        alive = {key: storage for key, ref in self._storages.items() if (storage := ref()) is not None}
        self._storages = {key: self._storages[key] for key in alive}
        return sum(storage.nbytes() for storage in alive.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, torch.Tensor):
                self.add(each)
        self.peak = max(self.peak, self.now())
        return found


def size(tensors) -> int:
    """Bytes of this process's part of the tensors, each counted once."""
    return sum({id(x): distributed.local(x.detach()).nbytes for x in tensors if x is not None}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--backbone", default="vit_large_patch16_224")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--images", type=int, default=1, help="of a process")
    parser.add_argument("--local-crops", type=int, default=2)
    options = parser.parse_args()
    dist.init_process_group("fake", rank=0, world_size=options.processes, store=FakeStore())
    ops.use_backend("reference")
    shapes = ((3, 224, 224),) * 2 + ((3, 96, 96),) * options.local_crops
    info = RunInfo(shapes, options.images, options.processes, num_global=2, width=lambda name: 256)
    model = StudentTeacher(info, options.backbone)
    criterion = SVIB(info, K=options.prototypes, reinit=False)
    model.select(criterion.requires)
    step = Step(model, criterion)
    if options.parallel == "fsdp":
        module = sharding.Sharded(step, sharding.mesh("fsdp", torch.device("cpu")), bf16=False, compiled=False).module
    else:
        module = nn.parallel.DistributedDataParallel(step, broadcast_buffers=False)
        # The stand-in has no gradients to sum.
        module.register_comm_hook(None, noop_hook)
    optimizer = optim.build_optimizer(OptimConfig(args={"foreach": False, "fused": False}), (model, criterion))
    optim.set_rates(optimizer, OptimConfig(), 1.0, 0.0, 1.0)
    views, index = [torch.randn(options.images, *shape) for shape in shapes], torch.arange(options.images)
    batch = Batch(views, [None] * len(shapes), index, torch.full_like(index, -1))
    live = Live()
    for tensor in (*step.parameters(), *step.buffers(), *batch.views):
        live.add(tensor)
    with live:
        # The optimiser has its moments from the second step on.
        for number in range(2):
            live.peak = 0
            progress = Progress(number, 0, 2, 1)
            optimizer.zero_grad(set_to_none=True)
            _, loss = module(batch, progress)
            loss.total.backward()
            del loss, _
            context = Context(progress, lambda *given: None, lambda parameter: None)
            with torch.no_grad():
                for part in parts(model, criterion):
                    part.before_step(context)
                optim.clip_gradients(optimizer, 3.0, "param")
            optimizer.step()
            with torch.no_grad():
                for part in parts(model, criterion):
                    part.after_step(context)
    states = [x for kept in optimizer.state.values() for x in kept.values() if isinstance(x, torch.Tensor)]
    trained = [p for p in step.parameters() if p.requires_grad]
    rest = [p for p in step.parameters() if not p.requires_grad]
    found = {
        "parameters": size(trained),
        "gradients": size(p.grad for p in trained),
        "optimiser": size(states),
        "teacher": size(rest),
        "held between steps": live.now(),
        "peak in a step": live.peak,
    }
    print(json.dumps({"parallel": options.parallel, **{name: round(b / 2**20) for name, b in found.items()}}), "MiB")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
