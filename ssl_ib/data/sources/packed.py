"""Images that `ssl-ib-data pack` has decoded once and for all.

Shapes: n images in a set, H x W pixels.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ...config.hints import PositiveInt
from ...config.outside import user_path
from ...config.registry import register_source
from ...types import Sample
from ..decode import pack
from ..packed_files import Index, map_pixels, read_index
from ..statistics import Statistics
from .base import ImageSet, InMemory, Source, stratified


class _Rows:
    """A packed set's training or held-out images, by the rows of the index that they are."""

    def __init__(self, index: Index, rows: Tensor):
        self.labels, self.sizes, self.checksums = index.labels[rows], index.sizes[rows], index.checksums[rows]
        self.ends = index.ends[rows]
        self.names = None if index.names is None else [index.names[row] for row in rows.tolist()]


class _OfOneSize(InMemory):
    """Images that fill their canvas; `images` is a view of the file, or lies on a GPU."""

    def __init__(self, pixels: Tensor, rows: _Rows, classes: Sequence[str]):
        height, width = rows.sizes[0].tolist()
        first, last = int(rows.ends[0]) - 3 * height * width, int(rows.ends[-1])
        super().__init__(pixels[first:last].view(-1, 3, height, width), rows.labels, classes)
        self.names, self._checksums = rows.names, rows.checksums

    def fingerprint(self) -> dict[str, int]:
        return {**super().fingerprint(), "pixels": _crc(self._checksums)}


class _OfSeveralSizes(ImageSet):
    """Images each of its own size; `gather` copies them onto a canvas."""

    in_memory = True

    def __init__(self, pixels: Tensor, rows: _Rows, classes: Sequence[str]):
        super().__init__(rows.labels, classes)
        self.names, self._pixels, self._rows = rows.names, pixels, rows

    def fingerprint(self) -> dict[str, int]:
        return {**super().fingerprint(), "pixels": _crc(self._rows.checksums)}

    def gather(self, index: Tensor) -> Sample:
        index = index.cpu()
        images = []
        for (height, width), end in zip(self._rows.sizes[index].tolist(), self._rows.ends[index].tolist(), strict=True):
            images.append(self._pixels[end - 3 * height * width : end].view(3, height, width))
        return self.sample(*pack(images), index)


def _crc(checksums: Tensor) -> int:
    return zlib.crc32(checksums.numpy().tobytes())


@register_source("packed")
class Packed(Source):
    """A set of images that `ssl-ib-data pack` has written: decoded, with their labels, names, splits and statistics.

    Nothing is decoded any more: the pixels are mapped into memory, and the system's cache keeps what fits. They and
    the order of the images are those of the source that was packed.

    Raises UserError where the folder holds no packed set, or one that is not whole.

    path:  the folder.
    limit: use only so many training images, stratified by class.
    """

    def __init__(self, path: str, limit: PositiveInt | None = None):
        self.path, self.limit = path, limit
        self._folder = user_path(path, "source.path")
        self._index = read_index(self._folder)
        self.notes = self._index.notes

    def train(self) -> ImageSet:
        return self._sets[0]

    def val(self) -> ImageSet | None:
        return self._sets[1]

    def statistics(self) -> Statistics:
        return self._index.statistics

    @cached_property
    def _sets(self) -> tuple[ImageSet, ImageSet | None]:
        index = self._index
        pixels = map_pixels(self._folder, int(index.ends[-1]))
        train, held_out = torch.arange(index.train), torch.arange(index.train, len(index.labels))
        if self.limit is not None:
            train = train[stratified(index.labels[train], self.limit)]

        def images(rows: Tensor) -> ImageSet:
            found = _Rows(index, rows)
            # A view has its rows side by side.
            together = int(rows[-1] - rows[0]) == len(rows) - 1
            uniform = bool((found.sizes == found.sizes[:1]).all())
            return (_OfOneSize if together and uniform else _OfSeveralSizes)(pixels, found, index.classes)

        return images(train), images(held_out) if len(held_out) else None
