"""The order in which a run visits its images, and the loader that fetches them: reproducible, resumable, sharded.

Shapes: n images in the set, B in a batch, W processes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import random
from ..errors import UserError
from ..types import Sample
from .decode import Unreadable
from .sources.base import ImageSet, Streamed, stratified


class _Fetch(Dataset):
    """Batches by their images' numbers, fetched in a worker process."""

    def __init__(self, images: Streamed):
        self.images = images

    def __getitem__(self, numbers: list[int]) -> tuple[Sample | None, list[Unreadable]]:
        return self.images.fetch(numbers)


def _as_it_is(fetched: tuple) -> tuple:
    return fetched


def _leave_interrupts_to_the_run(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal, and the run still needs its workers to end its step and save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _state(pid: int) -> str:
    """What a process does, in a word: stopped, waiting for a disk, or what the kernel calls it."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "ended"
    return {"T": "stopped", "D": "waiting for a disk", "R": "running", "S": "waiting", "Z": "ended"}.get(letter, letter)


class Loader:
    """Shuffled training batches. What a batch holds depends on (seed, epoch, step) alone, not on the workers.

    Global step s of an epoch takes B*W images of its order, and process `rank` the rank-th B of those; the last,
    incomplete global batch is dropped. Images held in memory are indexed; streamed ones are decoded in `workers`
    processes, or in threads of this one where that is 0. Raises UserError where the set is smaller than one batch, and,
    from an epoch, where no batch comes for `timeout` seconds.

    pin_memory: have what the worker processes fetch put where a GPU copies from.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        timeout: float = 600.0,
        pin_memory: bool = False,
    ):
        assert batch_size >= 1 and 0 <= rank < world_size
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.steps_per_epoch = len(images) // (batch_size * world_size)
        if self.steps_per_epoch == 0:
            processes = f" (batch_size={batch_size} in each of {world_size} processes)" if world_size > 1 else ""
            raise UserError(
                f"batch_size: a step takes {batch_size * world_size} images{processes}, but the training set has "
                f"{len(images)}; lower batch_size to at most {len(images) // world_size}, or give more images"
            )
        #: The batches still to fetch; the data loader, which keeps its workers between epochs, reads it anew in each.
        self._plan: list[list[int]] = []
        self._fetched: DataLoader | None = None
        if isinstance(images, Streamed) and workers > 0:
            self._fetched = DataLoader(
                _Fetch(images),
                batch_size=None,
                sampler=self._plan,
                num_workers=workers,
                collate_fn=_as_it_is,
                worker_init_fn=_leave_interrupts_to_the_run,
                persistent_workers=True,
                timeout=timeout,
                pin_memory=pin_memory,
                # Its own, so that the workers' seeds, of which nothing here makes use, draw nothing from the run's.
                generator=torch.Generator(),
            )

    @property
    def has_workers(self) -> bool:
        """Whether other processes fetch the batches, before they are asked for."""
        return self._fetched is not None

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Sample]:
        """The batches of an epoch from `start_step` on, which are those an uninterrupted epoch would have gone on with.

        One epoch at a time: beginning another ends the one before.
        """
        batches = self._numbers(epoch)[start_step:]
        if self._fetched is None:
            yield from map(self.images.gather, batches)
            return
        self._plan[:] = batches.tolist()
        fetched = iter(self._fetched)
        for numbers in self._plan:
            try:
                sample, unreadable = next(fetched)
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                raise UserError(self._late(fetched, numbers)) from None
            self.images.record(unreadable)
            assert sample is not None
            yield sample

    def _late(self, fetched: Any, numbers: list[int]) -> str:
        """Ends the workers, which could hold up the end of the process, and says which are late, and with what."""
        workers = fetched._workers
        said = [f"{worker.pid} ({_state(worker.pid)})" for worker in workers]
        # torch would raise an error of its own, wherever the process is, when it hears of their end.
        torch._C._remove_worker_pids(id(fetched))
        fetched._worker_pids_set = False
        for worker in workers:
            # A stopped process does not end at less.
            worker.kill()
            worker.join(5)
        names = [self.images.names[number] for number in numbers[:3]] if self.images.names is not None else numbers[:3]
        return (
            f"no worker gave the next batch within worker_timeout={self.timeout:g} seconds; workers: "
            f"{', '.join(said)}; the batch begins with {', '.join(map(str, names))}. Where reading is only slow, raise "
            "worker_timeout; workers=0 reads in the run's own process"
        )

    def _numbers(self, epoch: int) -> Tensor:
        """This process's images by step: int64 [steps_per_epoch, B]."""
        order = random.shuffled(self.seed, epoch, len(self.images))
        used = order[: self.steps_per_epoch * self.world_size * self.batch_size]
        return used.view(self.steps_per_epoch, self.world_size, self.batch_size)[:, self.rank]


def ordered(images: ImageSet, batch_size: int, limit: int | None = None) -> Iterator[Sample]:
    """All images in order, for evaluation; the last batch may be short.

    limit: at most so many images, chosen evenly over the set and its classes; always the same.
    """
    index = stratified(images.labels, len(images) if limit is None else limit)
    yield from map(images.gather, index.split(batch_size))
