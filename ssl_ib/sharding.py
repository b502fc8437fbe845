"""Model and criterion sharded over processes by torch's FSDP2 (`parallel=fsdp`, `parallel=hybrid`).

Each process holds some rows of every parameter, of its gradient and of the optimiser's state, and all of them are
ordinary tensors to the trainer (DTensor). The weights of a block come together while it runs; those of no block from
the beginning of a step's forward to the end of its backward. Buffers are whole in every process, as with DDP.

Work that each process does alone, such as an evaluation, needs all weights in it: `Sharded.gathered`.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

from . import distributed
from .errors import EndedElsewhere, UserError
from .part import Step, parts
from .record import shards

_logger = logging.getLogger(__name__)


def mesh(parallel: str, device: torch.device) -> DeviceMesh | None:
    """The processes as `parallel` has them share the weights; None where nothing is sharded. All ask at once.

    "fsdp" shards over all processes. "hybrid" shards over those of a machine, and each machine has the whole.
    Raises UserError where the machines have not as many processes each, or one each.
    """
    world = distributed.world_size()
    if parallel not in ("fsdp", "hybrid"):
        return None
    if world == 1:
        _logger.info("parallel=%s: there is one process, so nothing is sharded; torchrun starts several", parallel)
        return None
    local = world if parallel == "fsdp" else int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if local == 1 or world % local:
        raise UserError(
            f"parallel=hybrid shards over the processes of a machine: expected as many on each machine, and at least "
            f"2, got {local} of {world} on this one: use parallel=fsdp"
        )
    if local == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=(distributed.SHARDS,))
    return init_device_mesh(device.type, (world // local, local), mesh_dim_names=("replicas", distributed.SHARDS))


class Sharded:
    """Shards a step's parameters, in place, and knows where they are to be whole.

    module: the step, to be called as before.
    units:  the modules whose weights come together only while they run, as their parts' `shards` say.
    """

    def __init__(self, step: Step, mesh: DeviceMesh, bf16: bool, compiled: bool):
        self.module = step
        found = {id(unit): unit for part in parts(step.model, step.criterion) for unit in part.shards()}
        self.units = list(found.values())
        self._check()
        # The forwards alone: what brings the weights together stays outside the graphs.
        self._compiled = [torch.compile(unit.forward) for unit in self.units] if compiled else []
        for parameter in step.parameters():
            # torch cuts no others; those of convolutions may lie in another order.
            parameter.data = parameter.data.contiguous()
        for unit in self.units:
            # The weights of a batch norm stay as they are: torch does not mix its types.
            normalises = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in unit.modules())
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if bf16 and not normalises else None,
                reduce_dtype=torch.float32 if bf16 and not normalises else None,
            )
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        fully_shard(step, mesh=mesh)
        # Nobody changes a step's outputs in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        # FSDP finds out in the first forward which module is the outermost, which an evaluation does not call.
        step._get_fsdp_state()._lazy_init()
        self._whole = False

    def _check(self) -> None:
        """Raises UserError where the parameters cannot be cut in rows, or a unit has those of another."""
        owner: dict[int, str] = {}
        names = {id(module): name for name, module in self.module.named_modules()}
        for name, parameter in self.module.named_parameters():
            if not parameter.ndim:
                raise UserError(f"parallel=fsdp cuts parameters in rows, and {name} has no dimension: make it [1]")
        for unit in self.units:
            for parameter in unit.parameters():
                former = owner.setdefault(id(parameter), names[id(unit)])
                if former != names[id(unit)]:
                    raise UserError(
                        f"parallel=fsdp: {former} and {names[id(unit)]} have a parameter in common, so that they "
                        "cannot be sharded apart: leave both out of `shards` of their part"
                    )

    def __call__(self, *given: Any) -> Any:
        """The step's answer. Raises UserError where a part reads weights that are in shards at the time."""
        # For a step alone: an evaluation has other shapes, and looks into the blocks.
        for unit, forward in zip(self.units, self._compiled, strict=False):
            unit.forward = forward
        try:
            return self.module(*given)
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" not in str(error):
                raise
            if not distributed.is_main():
                raise EndedElsewhere("all processes have failed alike, and process 0 shows the error") from error
            raise UserError(
                "parallel=fsdp: a part reads weights while they are in shards. A module that its `shards` names must "
                "be run by calling it, and its weights be read nowhere else: leave it out there (`shards` of "
                "ssl_ib.Part; without one of its own, a part's blocks and heads are taken), or use parallel=ddp"
            ) from error
        finally:
            for unit, _ in zip(self.units, self._compiled, strict=False):
                del unit.forward

    def _modules(self) -> list[FSDPModule]:
        return [self.module, *self.units]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """While entered, every process has all weights, and waits for no other where it runs the model.

        All processes enter at once.
        """
        if self._whole:
            yield
            return
        for module in self._modules():
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
            module.unshard()
        self._whole = True
        try:
            yield
        finally:
            self._whole = False
            for module in self._modules():
                module.reshard()
                module.set_reshard_after_backward(True, recurse=False)
            for unit in self.units:
                unit.set_reshard_after_forward(True, recurse=False)
            self._forget()

    def _forget(self) -> None:
        """Forgets in which order modules ran, which FSDP notes for a backward pass that did not come here.

        A process with a smaller share of the work ran fewer. It would fetch other weights ahead than the rest do.
        """
        for module in self._modules():
            state = module._get_fsdp_state()
            state._comm_ctx.post_forward_order.clear()
            if state._fsdp_param_group is not None:
                state._fsdp_param_group._post_forward_indices.clear()

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """While entered, processes may run the model without a gradient, all of them as often: a block's weights come
        together while it runs."""
        self.module.unshard()
        try:
            yield
        finally:
            self.module.reshard()

    def placed(self, state: dict[str, Any], parts: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """A checkpoint with the tensors of `parts` and the optimiser sharded as theirs are; of each, a process reads
        its own rows. Raises ValueError where one has another shape."""
        own = {f"parts.{name}": value for name, value in parts.state_dict().items()}
        numbered = enumerate(p for group in optimizer.param_groups for p in group["params"])
        own |= {f"optimizer.{number}": parameter for number, parameter in numbered}

        def like(name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
            """What a saved tensor is laid out as: a part's own, or as the parameter that the optimiser has it of."""
            kind, number, *_ = name.split(".")
            found = own.get(name if kind == "parts" else f"{kind}.{number}")
            if kind == "parts" and (found is None or tuple(found.shape) != tuple(shape)):
                here = "nothing" if found is None else list(found.shape)
                raise ValueError(f"{name.removeprefix('parts.')} has the shape {list(shape)} there, and {here} here")
            return found if found is not None and tuple(found.shape) == tuple(shape) else None

        def empty(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            found = like(name, shape)
            return torch.empty(shape, dtype=dtype) if found is None else torch.empty_like(found, dtype=dtype)

        if "sharded" in state:
            return shards.filled(state, empty)

        def sharded(name: str, value: Any) -> Any:
            found = like(name, value.shape) if isinstance(value, torch.Tensor) and value.ndim else None
            if found is None or not distributed.is_sharded(found):
                return value
            return distribute_tensor(value.to(found.device), found.device_mesh, found.placements, src_data_rank=None)

        kept = {
            number: {key: sharded(f"optimizer.{number}.{key}", value) for key, value in values.items()}
            for number, values in state["optimizer"]["state"].items()
        }
        found = {name: sharded(f"parts.{name}", value) for name, value in state["parts"].items()}
        return state | {"parts": found, "optimizer": state["optimizer"] | {"state": kept}}
