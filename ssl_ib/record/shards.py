"""Checkpoints of sharded runs: a folder that all processes write at once, in the background, and that any number reads.

    last/shard-*.safetensors    the rows that a process holds of the sharded tensors, by torch.distributed.checkpoint
    last/state.pt               all else that `last.pt` has, which sharded tensors there are, and each file's checksum

`state.pt` comes last, when every process has written its file, so that its presence says that all is there. Then the
folder takes the name `last`, and the former one becomes `previous`. Nothing that could run code is read: safetensors
hold numbers alone, and `state.pt` loads with `torch.load(..., weights_only=True)`. (torch's own format for sharded
checkpoints has a pickle as its index.)

Tensors are named `parts.NAME` and `optimizer.NUMBER.KEY`.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from .. import distributed
from ..errors import UserError

STATE = "state.pt"
#: Bytes of a file that are read at once for its checksum: few enough to stay in a core's cache until they are summed.
PIECE = 1 << 18


def split(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint's content in two: all but the sharded tensors, and these by name."""
    tensors = {f"parts.{name}": value for name, value in state["parts"].items() if distributed.is_sharded(value)}
    kept: dict[int, dict[str, Any]] = {}
    for number, values in state["optimizer"]["state"].items():
        sharded = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        sharded = {key: value for key, value in sharded.items() if distributed.is_sharded(value)}
        tensors |= {f"optimizer.{number}.{key}": value for key, value in sharded.items()}
        kept[number] = {key: value for key, value in values.items() if key not in sharded}
    parts = {name: value for name, value in state["parts"].items() if f"parts.{name}" not in tensors}
    sharded = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    return state | {"parts": parts, "optimizer": state["optimizer"] | {"state": kept}, "sharded": sharded}, tensors


def joined(state: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What `split` has taken apart."""
    parts, kept = dict(state["parts"]), {number: dict(v) for number, v in state["optimizer"]["state"].items()}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "parts":
            parts[rest] = tensor
        else:
            number, _, key = rest.partition(".")
            kept[int(number)][key] = tensor
    return state | {"parts": parts, "optimizer": state["optimizer"] | {"state": kept}}


class Writer:
    """Writes checkpoints in the background, one after the other. All processes make one, and call it, at once."""

    def __init__(self):
        # Its own, as it works while the processes train.
        self._group = dist.new_group(backend="gloo", timeout=distributed.TIMEOUT)
        self._pending: Future | None = None
        # The copies that are written, kept because making room for them takes longer than copying, and who writes what
        # of them, as agreeing on that takes as long as writing.
        self._copies: dict[str, Tensor] = {}
        self._planner = _Planner()

    @torch.no_grad()
    def save(self, state: dict[str, Any], folder: Path, keep_as: str | None = None) -> Path:
        """Begins to write `state` to `folder`/last, and returns that path: the tensors may change afterwards.

        keep_as: another name for it, which stays, as a file would have it.

        Raises UserError as `wait` does, of the one before.
        """
        self.wait()
        rest, tensors = split(state)
        if distributed.is_main():
            rest = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to("cpu", copy=True), rest)
        storage = _Storage(folder, rest, keep_as)
        if self._copies.keys() == tensors.keys():
            for name, tensor in tensors.items():
                distributed.local(self._copies[name]).copy_(distributed.local(tensor))
        else:
            self._copies, self._planner = BlockingAsyncStager().stage(tensors), _Planner()
        self._pending = dcp.async_save(
            {_Planner.ALL: self._copies}, storage_writer=storage, planner=self._planner, process_group=self._group
        )
        return folder / "last"

    def wait(self) -> None:
        """Until the one that was begun is there. Raises UserError where the disk refuses; the former one is intact."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except dcp.CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            found = cause
            while found is not None and not isinstance(found, OSError):
                found = found.__cause__ or found.__context__
            if found is None:
                raise
            raise UserError(
                f"could not save the checkpoint: process {rank}: {found}; the one before is intact. Free some space, "
                "then continue with --resume"
            ) from None


class _Planner(dcp.DefaultSavePlanner):
    """Who writes what, which the processes agree on once, for checkpoints of the same tensors.

    torch's own cache of plans is one for all planners of a process, and still has each process make its plan anew.
    """

    #: The name of the one entry that holds all tensors: torch logs each entry of what it is given.
    ALL = "tensors"

    def __init__(self):
        super().__init__(dedup_save_to_lowest_rank=True)
        self._agreed: dcp.SavePlan | None = None

    def set_up_planner(self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False):
        super().set_up_planner(state_dict[self.ALL], storage_meta, is_coordinator)

    def create_local_plan(self) -> dcp.SavePlan:
        return super().create_local_plan() if self._agreed is None else dcp.SavePlan([])

    def create_global_plan(self, all_plans: list[dcp.SavePlan]) -> tuple[list[dcp.SavePlan], dcp.Metadata]:
        if self._agreed is None:
            return super().create_global_plan(all_plans)
        return all_plans, self.metadata

    def finish_plan(self, new_plan: dcp.SavePlan) -> dcp.SavePlan:
        if self._agreed is None:
            self._agreed = super().finish_plan(new_plan)
        return self._agreed


class _Storage(dcp.HuggingFaceStorageWriter):
    """Where the processes write to, and what the main one does when all have."""

    def __init__(self, folder: Path, state: dict[str, Any], keep_as: str | None):
        self.folder, self.state, self.keep_as = folder, state, keep_as
        self.fresh = folder / "last.tmp"
        super().__init__(path=str(self.fresh), save_distributed=True)

    def stage(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors  # They are copies.

    def prepare_global_plan(self, plans: list) -> list:
        # In the main process, before any writes.
        self.folder.mkdir(exist_ok=True)
        shutil.rmtree(self.fresh, ignore_errors=True)
        self.fresh.mkdir()
        return super().prepare_global_plan(plans)

    def prepare_local_plan(self, plan: Any) -> Any:
        _give_way()
        return plan

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Writes this process's file, and answers its name, size and checksum.

        In place of torch's own way, which copies all tensors twice in calls during which the training cannot go on.
        """
        done: torch.futures.Future[list] = torch.futures.Future()
        written = []
        if plan.items:
            file = self.fresh / f"shard-{distributed.rank():05}.safetensors"
            tensors = {item.index.fqn: planner.resolve_data(item).detach().contiguous() for item in plan.items}
            begins = {item.index.fqn: {SAVED_OFFSETS_KEY: item.tensor_data.chunk.offsets} for item in plan.items}
            save_file(tensors, file, {CUSTOM_METADATA_KEY: json.dumps(begins)})
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
            written = [(file.name, file.stat().st_size, checksum(file))]
        done.set_result(written)
        return done

    def finish(self, metadata: Any, results: list) -> None:
        files = {name: (size, value) for written in results for name, size, value in written}
        fresh = self.fresh / f"{STATE}.tmp"
        with fresh.open("wb") as stream:
            torch.save(self.state | {"files": files}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(fresh, self.fresh / STATE)
        settle(self.folder)
        if self.keep_as is not None:
            _alias(self.folder / "last", self.folder / Path(self.keep_as).stem)


def _give_way() -> None:
    """Lets this thread, which a save has for itself, run where the cores have nothing else to do."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def settle(folder: Path) -> None:
    """Gives a checkpoint that is whole its name `last`, and the former one, of either kind, the name `previous`."""
    fresh, last, previous = folder / "last.tmp", folder / "last", folder / "previous"
    if last.is_dir():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(last, previous)
        (folder / "previous.pt").unlink(missing_ok=True)
    os.replace(fresh, last)
    if (folder / "last.pt").exists():
        os.replace(folder / "last.pt", folder / "previous.pt")


def _alias(folder: Path, name: Path) -> None:
    """Gives a folder's files a second place, by links where the file system has them."""
    fresh = name.with_name(f"{name.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    shutil.copytree(folder, fresh, copy_function=link)
    shutil.rmtree(name, ignore_errors=True)
    os.replace(fresh, name)


def checksum(file: Path) -> int:
    """CRC-32 of a file's content."""
    value = 0
    with file.open("rb") as stream:
        while piece := stream.read(PIECE):
            value = zlib.crc32(piece, value)
    return value


def read(folder: Path) -> dict[str, Any]:
    """What a checkpoint's `state.pt` holds, and its own `folder`. All processes together read its files through.

    Raises OSError or RuntimeError where one is missing or damaged.
    """
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)

    def problem(name: str) -> str | None:
        file, (size, value) = folder / name, state["files"][name]
        with suppress(OSError):
            if file.stat().st_size == size and checksum(file) == value:
                return None
        return name

    damaged = [name for name in distributed.shared(problem, list(state["files"])) if name is not None]
    if damaged:
        raise RuntimeError(f"{', '.join(damaged)}: missing or damaged")
    return state | {"folder": str(folder)}


def filled(state: dict[str, Any], empty: Callable[[str, tuple[int, ...], torch.dtype], Tensor]) -> dict[str, Any]:
    """A checkpoint with its sharded tensors: of each, what `empty(name, shape, dtype)` has a place for is read.

    A checkpoint that is one file is given back as it is.
    """
    if "sharded" not in state:
        return state
    tensors = {name: empty(name, *what) for name, what in state["sharded"].items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(state["folder"]), no_dist=True)
    return joined(state, tensors)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is the folder of a checkpoint."""
    return (path / STATE).is_file()


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with all of its tensors, each whole, on the CPU."""
    return filled(state, lambda name, shape, dtype: torch.empty(shape, dtype=dtype))
