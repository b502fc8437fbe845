"""Packs a source: decodes its images once and writes them as a packed set (packed_files.py)."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..config.outside import kind_of
from ..errors import UserError
from .decode import num_threads
from .packed_files import INDEX, PIXELS, Index, Track, save_index
from .sources.base import ImageSet, Source, Streamed

#: Images that are decoded at a time.
_CHUNK = 256


def pack(source: Source, out: Path, overwrite: bool = False, track: Track = lambda items, total, what: items) -> Index:
    """Writes the images of a source, as it gives them, to the folder `out`: whole, or not at all.

    Images that cannot be read are left out, and the numbers close up, as where a source holds its images in memory.

    overwrite: replace a packed set that is there.
    track:     is handed the chunks, their number and what they are, and shows how far it is.

    Raises UserError where something else is at `out`, or where too many images cannot be read; OSError where the disk
    is full.
    """
    check_out(out, overwrite)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        index = _write(source, partial, track)
        if overwrite and out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return index


def check_out(out: Path, overwrite: bool) -> None:
    """Raises UserError where a packed set cannot go to `out`."""
    if not out.exists() and not out.is_symlink():
        return
    if not (out / INDEX).is_file():
        raise UserError(f"OUT: expected a new folder, found {kind_of(out)} at {out}")
    if not overwrite:
        raise UserError(f"OUT: there is a packed set in {out} already; --overwrite replaces it")


def _write(source: Source, folder: Path, track: Track) -> Index:
    sets = [images for images in (source.train(), source.val()) if images is not None]
    sizes: list[Tensor] = []
    labels: list[Tensor] = []
    checksums: list[int] = []
    names: list[str] | None = [] if all(images.names is not None for images in sets) else None
    counts: list[int] = []
    with open(folder / PIXELS, "wb") as file:
        for images, what in zip(sets, ("training images", "held-out images"), strict=False):
            before = len(checksums)
            chunks = torch.arange(len(images)).split(_CHUNK)
            for numbers, pixels in track(_decoded(images, chunks), len(chunks), what):
                for image in pixels:
                    data = image.contiguous().numpy().data
                    file.write(data)
                    checksums.append(zlib.crc32(data))
                sizes.append(torch.tensor([image.shape[1:] for image in pixels], dtype=torch.int64).reshape(-1, 2))
                labels.append(images.labels[numbers])
                if names is not None and images.names is not None:
                    names += [images.names[number] for number in numbers.tolist()]
            counts.append(len(checksums) - before)
        file.flush()
        os.fsync(file.fileno())
    index = Index(
        torch.cat(sizes),
        torch.cat(labels),
        torch.tensor(checksums, dtype=torch.int64),
        names,
        sets[0].classes,
        list(source.notes),
        counts[0],
        source.statistics(),
    )
    save_index(index, folder)
    return index


def _decoded(images: ImageSet, chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """The images of each chunk of numbers that can be read: their numbers, and each as uint8 [3, H, W]."""
    for numbers in chunks:
        if isinstance(images, Streamed):
            sample, unreadable = images.fetch(numbers.tolist(), num_threads())
            images.record(unreadable)
            assert sample is not None
        else:
            sample = images.gather(numbers)
        sizes = sample.extra.get("size", torch.tensor(sample.images.shape[2:]).expand(len(numbers), 2))
        # An unreadable image has been replaced by the next one, which comes by itself.
        kept = (sample.index == numbers).nonzero()[:, 0]
        rows = zip(sample.images[kept], sizes[kept].tolist(), strict=True)
        yield numbers[kept], [image[:, :height, :width] for image, (height, width) in rows]
