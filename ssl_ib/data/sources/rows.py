"""What shards and tables of images share: images read by their row in an index, and sources made of them.

Shapes: n images in a set, N rows in an index.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ...errors import UserError
from .. import statistics as known_statistics
from ..decode import Unreadable, decode_file
from ..statistics import KNOWN, Statistics
from ..tables import Names
from .base import ImageSet, Source, Streamed, stratified
from .files import held_where_it_fits


class Rows(Streamed):
    """Streamed images that are read by their row.

    read_row: gives the bytes of the image in a row; may be called from several threads and processes.
    rows:     the n rows, int64; names and labels are theirs.
    sizes:    the bytes of each image: int64 [n].
    """

    def __init__(
        self,
        read_row: Callable[[int], bytes],
        rows: Tensor,
        names: Names,
        labels: Tensor,
        sizes: Tensor,
        classes: Sequence[str],
        max_side: int,
        max_unreadable: float,
    ):
        super().__init__(self._read, names, labels, classes, max_side, max_unreadable)
        self.read_row, self.rows, self.sizes = read_row, rows, sizes
        self.file_size = _Sizes(names, sizes)

    def _read(self, name: str) -> bytes:
        return self.read_row(int(self.rows[self.file_size.number[name]]))

    def decode(self, number: int) -> Tensor | Unreadable:
        return decode_file(lambda _: self.read_row(int(self.rows[number])), self.names[number], self.max_side)

    def fingerprint(self) -> dict[str, int]:
        names = zlib.crc32(self.names.tobytes())
        return {"labels": _crc(self.labels), "names": names, "sizes": _crc(self.sizes)}


def _crc(values: Tensor) -> int:
    return zlib.crc32(values.contiguous().numpy().data)


class _Sizes:
    """Gives the bytes of an image by its name."""

    def __init__(self, names: Names, sizes: Tensor):
        self.names, self.sizes = names, sizes

    @cached_property
    def number(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def __call__(self, name: str) -> int:
        return int(self.sizes[self.number[name]])


@dataclass(frozen=True)
class Indexed:
    """The rows of an index and what is known of them: names and labels of all N; which are trained on, which held out.

    statistics: the known set whose mean and standard deviation are used, where there is one.
    """

    names: Names
    labels: Tensor
    classes: list[str]
    train: Tensor
    val: Tensor
    notes: list[str]
    statistics: str | None


class RowSource(Source):
    """A source of images in the rows of an index; where they lie is for the subclass to say."""

    def __init__(
        self,
        path: str,
        limit: int | None,
        max_unreadable: float,
        max_side: int,
        memory_gb: float,
        statistics: str | None,
    ):
        self.path, self.limit, self.memory_gb = path, limit, memory_gb
        self.max_unreadable, self.max_side = max_unreadable, max_side
        self._statistics = known_statistics.check(statistics)

    @abstractmethod
    def _index(self) -> Indexed:
        """The images there are."""

    @abstractmethod
    def _rows(self, rows: Tensor) -> Rows:
        """The images of some rows, with their labels and names."""

    @cached_property
    def _indexed(self) -> Indexed:
        found = self._index()
        if len(found.train) == 0:
            raise UserError(f"source.path: no image in {self.path}")
        self.notes = found.notes
        return found

    @cached_property
    def _train(self) -> ImageSet:
        rows = self._indexed.train
        if self.limit is not None:
            rows = rows[stratified(self._indexed.labels[rows], self.limit)]
        return held_where_it_fits(self._rows(rows), self.memory_gb, self.path)

    @cached_property
    def _val(self) -> ImageSet | None:
        rows = self._indexed.val
        return held_where_it_fits(self._rows(rows), self.memory_gb, self.path) if len(rows) else None

    def train(self) -> ImageSet:
        return self._train

    def val(self) -> ImageSet | None:
        return self._val

    def statistics(self) -> Statistics:
        name = self._statistics or self._indexed.statistics
        return KNOWN[name] if name else super().statistics()
