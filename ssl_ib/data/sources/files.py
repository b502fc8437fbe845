"""What folders and archives share: from a list of named files to training and held-out image sets.

Shapes: n images in a set, H x W pixels.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...config.hints import Positive, PositiveInt, Ratio
from ...device import require_memory
from .. import statistics as known_statistics
from ..decode import WORTH_THREADS, Unreadable, num_threads, pack
from ..statistics import KNOWN, Statistics
from . import layout
from .base import MAX_UNREADABLE, ImageSet, InMemory, Source, Streamed, stratified
from .layout import Layout, Split

log = logging.getLogger(__name__)

#: Files handed to a thread at a time.
_BLOCK = 64


class Files(ABC):
    """The image files of a folder or archive.

    names: relative paths with "/" between their parts, sorted here.
    top:   what every name begins with and the layout leaves out, such as "cifar10/".
    """

    def __init__(self, names: Iterable[str]):
        self.names = sorted(names)
        self.top = layout.common_top(self.names)

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of one file; may be called from several threads and processes."""

    @abstractmethod
    def sizer(self) -> Callable[[str], int]:
        """What gives the size of a file in bytes; it holds nothing of the files themselves."""


def _decoded(images: Streamed) -> Iterator[list[Tensor | Unreadable]]:
    """Decodes the images in order, a block at a time; the blocks after the first in threads, where that pays."""
    blocks = [range(i, min(i + _BLOCK, len(images))) for i in range(0, len(images), _BLOCK)]

    def work(numbers: range) -> list[Tensor | Unreadable]:
        return [images.decode(number) for number in numbers]

    first = work(blocks[0])
    yield first
    largest = max((image[0].numel() for image in first if isinstance(image, Tensor)), default=0)
    if largest < WORTH_THREADS or num_threads() == 1:
        yield from map(work, blocks[1:])
        return
    with ThreadPoolExecutor(num_threads()) as pool:
        yield from pool.map(work, blocks[1:])


def hold(streamed: Streamed, most_bytes: float) -> InMemory | None:
    """Decodes a set into memory; None as soon as it is clear that it takes more than `most_bytes`.

    Unreadable images are left out, and the numbers close up. Raises UserError where they are more than the share
    `max_unreadable` of the set.
    """
    n = len(streamed)
    # The canvas grows when a larger image turns up. Since n is known, one image is enough to refuse a large set.
    canvas = torch.empty(n, 3, 0, 0, dtype=torch.uint8)
    sizes = torch.zeros(n, 2, dtype=torch.int64)
    readable = torch.ones(n, dtype=torch.bool)
    unreadable: list[Unreadable] = []
    seen = held = 0
    with closing(_decoded(streamed)) as blocks:
        for block in blocks:
            readable[seen : seen + len(block)] = torch.tensor([isinstance(image, Tensor) for image in block])
            seen += len(block)
            unreadable += [file for file in block if isinstance(file, Unreadable)]
            images = [image for image in block if isinstance(image, Tensor)]
            if not images:
                continue
            packed, packed_sizes = pack(images)
            (old_height, old_width), (height, width) = canvas.shape[2:], packed.shape[2:]
            new_height, new_width = max(old_height, height), max(old_width, width)
            if n * 3 * new_height * new_width > most_bytes:
                return None
            if (new_height, new_width) != (old_height, old_width):
                require_memory(
                    n * 3.0 * new_height * new_width,
                    f"source.memory_gb: {n:,} images of {new_height} x {new_width} pixels",
                )
                grown = torch.zeros(n, 3, new_height, new_width, dtype=torch.uint8)
                grown[:held, :, :old_height, :old_width] = canvas[:held]
                canvas = grown
            rows = slice(held, held + len(images))
            canvas[rows, :, :height, :width], sizes[rows] = packed, packed_sizes
            held += len(images)
    labels, classes = streamed.labels[readable], streamed.classes
    found = InMemory(canvas[:held], labels, classes, sizes[:held], streamed.max_unreadable)
    found.names = [name for name, ok in zip(streamed.names, readable.tolist(), strict=True) if ok]
    found.file_size = streamed.file_size
    found.record(unreadable, total=n)
    return found


def held_where_it_fits(streamed: Streamed, memory_gb: float, what: str) -> ImageSet:
    """The set decoded into memory where that takes at most `memory_gb` (in 1e9 bytes), else as it is, which is said."""
    found = hold(streamed, memory_gb * 1e9)
    if found is None:
        log.info("%s: %d images stream, as they take more than %g GB decoded", what, len(streamed), memory_gb)
    return streamed if found is None else found


def _printable(text: str) -> str:
    """A text in which the bytes of a name that are no UTF-8 stand as escapes, such as \\xfa."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class FileSource(Source):
    """A source of image files with splits and labels in their paths; where they lie is for the subclass to say.

    The arguments are described where users look for them: at the source `folder`.
    """

    def __init__(
        self,
        path: str,
        labels: Literal["auto", "folders", "none"] | str = "auto",
        val_fraction: Ratio = 0.1,
        limit: PositiveInt | None = None,
        max_unreadable: Ratio = MAX_UNREADABLE,
        max_side: PositiveInt = 512,
        memory_gb: Positive = 4.0,
        statistics: str | None = None,
    ):
        self.path, self.labels, self.val_fraction, self.limit = path, labels, val_fraction, limit
        self.max_unreadable, self.max_side, self.memory_gb = max_unreadable, max_side, memory_gb
        #: The known set whose mean and standard deviation are used, if it is one.
        self.known_set = known_statistics.check(statistics) or known_statistics.recognise(path)
        self._files: Files | None = None
        self._layout: Layout | None = None
        self._sets: dict[str, ImageSet | None] = {}
        self._check()
        self._table = layout.table_path(labels, self._folder())

    @abstractmethod
    def _check(self) -> None:
        """Raises UserError where the path is missing or holds no image; reads as little as that takes."""

    @abstractmethod
    def _folder(self) -> Path:
        """The folder of the images, or of the archive."""

    @abstractmethod
    def _list(self) -> Files:
        """The image files."""

    def train(self) -> ImageSet:
        return self._set("train")

    def val(self) -> ImageSet | None:
        return self._set("val")

    def statistics(self) -> Statistics:
        return KNOWN[self.known_set] if self.known_set else super().statistics()

    def files(self) -> tuple[Files, Layout]:
        """The files, none of them read, and how they are divided and labelled."""
        if self._files is None or self._layout is None:
            files = self._files = self._list()
            table = None if self._table is None else layout.read_table(self._table, files.names, files.top)
            found = layout.arrange(files.names, files.top, self.val_fraction, self.labels, table)
            train = found.train if self.limit is None else found.train.rows(stratified(found.train.labels, self.limit))
            # Names of folders that are no UTF-8 cannot be printed, drawn or written; the files keep theirs.
            classes, self.notes = ([_printable(text) for text in texts] for texts in (found.classes, found.notes))
            self._layout = replace(found, train=train, classes=classes, notes=self.notes)
        return self._files, self._layout

    def _set(self, name: str) -> ImageSet | None:
        if name not in self._sets:
            split = getattr(self.files()[1], name)
            self._sets[name] = None if split is None else self._images(split)
            if len(self._sets) == 2:
                # A compressed archive's bytes are in memory: let them go.
                self._files = self._layout = None
        return self._sets[name]

    def _images(self, split: Split) -> ImageSet:
        assert self._files is not None and self._layout is not None
        read, classes = self._files.read, self._layout.classes
        images = Streamed(read, split.names, split.labels, classes, self.max_side, self.max_unreadable)
        images.file_size = self._files.sizer()
        return held_where_it_fits(images, self.memory_gb, self.path)
