"""The order in which a run visits its images, and the loader that fetches them: reproducible, resumable, sharded.

Shapes: n images in the set, B in a batch, W processes.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..errors import UserError
from ..types import Sample
from .sources.base import ImageSet, Streamed, stratified
from .workers import Workers


class Loader:
    """Shuffled training batches. What a batch holds depends on (seed, epoch, step) alone, not on the workers.

    Global step s of an epoch takes B*W images of its order, and process `rank` the rank-th B of those; the last,
    incomplete global batch is dropped. Images held in memory are indexed; streamed ones are decoded in `workers`
    processes, or in threads of this one where that is 0. Raises UserError where the set is smaller than one batch, and,
    from an epoch, where no batch comes for `timeout` seconds, or workers die one after another.
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
        self._workers: Workers | None = None
        if isinstance(images, Streamed) and workers > 0:
            self._workers = Workers(images, workers, timeout)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Sample]:
        """The batches of an epoch from `start_step` on, which are those an uninterrupted epoch would have gone on with.

        One epoch at a time: beginning another ends the one before.
        """
        batches = self._numbers(epoch)[start_step:]
        if self._workers is None:
            yield from map(self.images.gather, batches)
            return
        for sample, unreadable in self._workers.fetch(batches):
            self.images.record(unreadable)
            assert sample is not None
            yield sample

    def close(self) -> None:
        """Ends the workers, if there are any."""
        if self._workers is not None:
            self._workers.close()

    def _numbers(self, epoch: int) -> Tensor:
        """This process's images by step: int64 [steps_per_epoch, B]."""
        order = self.images.order(self.seed, epoch)
        used = order[: self.steps_per_epoch * self.world_size * self.batch_size]
        return used.view(self.steps_per_epoch, self.world_size, self.batch_size)[:, self.rank]


def ordered(images: ImageSet, batch_size: int, limit: int | None = None) -> Iterator[Sample]:
    """All images in order, for evaluation; the last batch may be short.

    limit: at most so many images, chosen evenly over the set and its classes; always the same.
    """
    index = stratified(images.labels, len(images) if limit is None else limit)
    yield from map(images.gather, index.split(batch_size))
