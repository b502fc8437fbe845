"""Writes the files of a folder or an archive as shards (shards.py), and compares shards with their checksums.

train/000000.tar  some hundred samples each: the image as it was, and its label in a file .cls (-1: unknown)
val/000000.tar    held-out images
index.safetensors what lies where; names, labels, classes; SHA-256 of the shards
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config.outside import kind_of
from ..errors import UserError
from .decode import Unreadable
from .packed_files import Track
from .shards import INDEX, Shard, ShardIndex, save_index, scan, sha256_of
from .sources.base import Streamed
from .sources.files import Files, FileSource
from .sources.layout import Split
from .tables import Names

#: What is changed of a shard between two times of writing it: nothing.
_ALWAYS = {"mtime": 0, "user": "", "group": "", "encoder": False}


def write_shards(
    source: FileSource,
    out: Path,
    most_bytes: float,
    most_images: int,
    overwrite: bool = False,
    track: Track = lambda items, total, what: items,
) -> ShardIndex:
    """Writes the files of a source, undecoded and in its order, to shards in the folder `out`: whole, or not at all.

    most_bytes, most_images: of a shard; it is closed after the image that reaches one of them.
    overwrite: replace shards that are there.
    track:     is handed the images, their number and what they are, and shows how far it is.

    Files that cannot be read are left out. Raises UserError where they are more than `source.max_unreadable`, or where
    something else is at `out`; OSError where the disk is full.
    """
    check_out(out, overwrite)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        index = _write(source, partial, most_bytes, most_images, track)
        if overwrite and out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return index


def check_out(out: Path, overwrite: bool) -> None:
    """Raises UserError where shards cannot go to `out`."""
    if not out.exists() and not out.is_symlink():
        return
    if not (out / INDEX).is_file() or not (out / "train").is_dir():
        raise UserError(f"OUT: expected a new folder, found {kind_of(out)} at {out}")
    if not overwrite:
        raise UserError(f"OUT: there are shards in {out} already; --overwrite replaces them")


def _write(source: FileSource, folder: Path, most_bytes: float, most_images: int, track: Track) -> ShardIndex:
    files, layout = source.files()
    shards: list[Shard] = []
    columns: dict[str, list[Any]] = {"shard": [], "offset": [], "size": [], "names": [], "labels": []}
    counts = []
    for split, name, what in ((layout.train, "train", "training images"), (layout.val, "val", "held-out images")):
        before = len(columns["names"])
        if split is not None:
            writer = _Writer(folder, name, most_bytes, most_images, bool(layout.classes), shards, columns)
            writer.write(files, split, source.max_unreadable, track, what)
        counts.append(len(columns["names"]) - before)
    index = ShardIndex(
        shards,
        *(torch.tensor(columns[name], dtype=torch.int64) for name in ("shard", "offset", "size", "labels")),
        Names.of(columns["names"]),
        layout.classes,
        list(layout.notes),
        counts[0],
        source.known_set,
    )
    save_index(index, folder)
    return index


class _Writer:
    """Writes the shards of a split, and notes in `shards` and `columns` what lies where."""

    def __init__(
        self,
        folder: Path,
        split: str,
        most_bytes: float,
        most_images: int,
        labelled: bool,
        shards: list[Shard],
        columns: dict[str, list[Any]],
    ):
        self.folder, self.split, self.labelled, self.shards, self.columns = folder, split, labelled, shards, columns
        self.most_bytes, self.most_images = most_bytes, most_images
        (folder / split).mkdir()

    def write(self, files: Files, split: Split, max_unreadable: float, track: Track, what: str) -> None:
        from webdataset import TarWriter

        # Counts what cannot be read, and refuses too much of it; it reads nothing.
        counted = Streamed(files.read, split.names, split.labels, [], 1, max_unreadable)
        file = writer = None
        number = count = size = 0
        try:
            for name, label in track(zip(split.names, split.labels.tolist(), strict=True), len(split.names), what):
                try:
                    data = files.read(name)
                except OSError as error:
                    counted.record([Unreadable(name, error.strerror or str(error))])
                    continue
                if writer is None or file is None:
                    file = open(self.folder / self.split / f"{number:06}.tar", "wb")
                    writer, number, count, size = TarWriter(file, **_ALWAYS), number + 1, 0, 0
                sample = {"__key__": f"{len(self.columns['names']):09}", name.rpartition(".")[2].lower(): data}
                if self.labelled:
                    sample["cls"] = str(label).encode()
                size += writer.write(sample)
                count += 1
                self.columns["names"].append(name)
                self.columns["labels"].append(label)
                if count >= self.most_images or size >= self.most_bytes:
                    self._close(file, writer)
                    file = writer = None
            if file is not None:
                self._close(file, writer)
        finally:
            if file is not None:
                file.close()

    def _close(self, file: Any, writer: Any) -> None:
        writer.close()
        file.flush()
        os.fsync(file.fileno())
        file.close()
        path = Path(file.name)
        name = f"{self.split}/{path.name}"
        # What was written is read again: so the index holds what is there.
        found = scan(path, name, "auto", "none")
        self.columns["shard"] += [len(self.shards)] * len(found.offsets)
        self.columns["offset"] += found.offsets
        self.columns["size"] += found.sizes
        self.shards.append(Shard(name, path.stat().st_size, sha256_of(path)))


def damaged(folder: Path, index: ShardIndex, track: Track = lambda items, total, what: items) -> Sequence[str]:
    """What is wrong with the shards of a folder, in words; reads all of them."""
    found = []
    for shard in track(index.shards, len(index.shards), "checked"):
        path = folder / shard.name
        if not path.is_file():
            found.append(f"{shard.name} is missing")
        elif path.stat().st_size != shard.bytes:
            found.append(f"{shard.name} has {path.stat().st_size:,} bytes, not {shard.bytes:,}")
        elif sha256_of(path) != shard.sha256:
            found.append(f"{shard.name} has another SHA-256")
    return found
