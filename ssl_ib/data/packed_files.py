"""The two files of a packed set: images decoded once, whose pixels are mapped into memory.

    images.bin         the pixels of one image after the other, uint8 [3, H, W] each
    index.safetensors  `labels` int64 [n], `sizes` int64 [n, 2] of (height, width), `checksums` int64 [n] (CRC-32 of
                       each image's pixels), `names` uint8, joined by NUL; what else is known is its metadata, as JSON

Training images come first, held-out ones after them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.outside import kind_of
from ..errors import UserError
from .statistics import Statistics
from .tables import Names, OtherFormat, Table, load_table, save_table

PIXELS, INDEX = "images.bin", "index.safetensors"
#: What the index says it is.
FORMAT = "ssl_ib packed images, version 1"

#: Shows how far a work is: takes its items, their number and what they are, and gives the items.
Track = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclass(frozen=True)
class Index:
    """What is known of a packed set's images; the pixels are not read for it.

    sizes: int64 [n, 2], (height, width); labels: int64 [n], -1 where unknown; checksums: int64 [n].
    names: of the files they were, relative to their source; None where they were no files.
    train: how many of the n are training images.
    """

    sizes: Tensor
    labels: Tensor
    checksums: Tensor
    names: list[str] | None
    classes: list[str]
    notes: list[str]
    train: int
    statistics: Statistics

    @property
    def ends(self) -> Tensor:
        """Where in the file the pixels of each image end: int64 [n]."""
        return (3 * self.sizes.prod(dim=1)).cumsum(0)


def save_index(index: Index, folder: Path) -> None:
    """Writes the index of the pixels in `folder`."""
    tensors = {"sizes": index.sizes, "labels": index.labels, "checksums": index.checksums}
    known = {
        "classes": index.classes,
        "notes": index.notes,
        "train": index.train,
        "statistics": index.statistics,
    }
    names = None if index.names is None else Names.of(index.names)
    save_table(Table(tensors, names, known), folder / INDEX, FORMAT)


def read_index(folder: Path, key: str = "source.path") -> Index:
    """The index of a packed set. Raises UserError where there is none, or where it or the pixels are not whole.

    key: what named the folder, for messages.
    """
    if not (folder / INDEX).is_file() or not (folder / PIXELS).is_file():
        raise UserError(
            f"{key}: expected a packed set (a folder with {INDEX} and {PIXELS}), found {kind_of(folder)} at {folder}; "
            "ssl-ib-data pack writes one"
        )
    try:
        table = load_table(folder / INDEX, FORMAT)
        tensors, known = table.tensors, table.known
        index = Index(
            tensors["sizes"],
            tensors["labels"],
            tensors["checksums"],
            None if table.names is None else list(table.names),
            known["classes"],
            known["notes"],
            known["train"],
            tuple(tuple(numbers) for numbers in known["statistics"]),
        )
        expected, found = int(index.ends[-1]), (folder / PIXELS).stat().st_size
    except OtherFormat:
        raise UserError(f"{key}: {folder / INDEX} is no index of packed images: expected {FORMAT!r}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{key}: {folder / INDEX} is damaged ({error}); pack the images anew") from None
    if expected != found:
        raise UserError(
            f"{key}: expected {expected:,} bytes in {folder / PIXELS}, found {found:,}: pack the images anew"
        )
    return index


def map_pixels(folder: Path, size: int) -> Tensor:
    """The pixels of a packed set, uint8 [size], read from the disk when they are used."""
    return torch.from_file(str(folder / PIXELS), shared=False, size=size, dtype=torch.uint8)


def damaged(folder: Path, index: Index, track: Track = lambda items, total, what: items) -> list[int]:
    """The numbers of the images whose pixels are not those that were packed; reads all of them."""
    ends = index.ends.tolist()
    pixels, found, begin = map_pixels(folder, ends[-1]), [], 0
    for number, end in track(enumerate(ends), len(ends), "checked"):
        if zlib.crc32(pixels[begin:end].numpy().data) != int(index.checksums[number]):
            found.append(number)
        begin = end
    return found
