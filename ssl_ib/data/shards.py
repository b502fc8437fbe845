"""Shards: tar files of images and their labels, as webdataset reads and writes them, and what an index knows of them.

An index says where in which shard each image lies, so that images can be read by number, in any order. The one that
`ssl-ib-data shard` writes lies beside its shards, in index.safetensors; shards without one are gone through once.

Shapes: n images.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import UserError
from . import tars
from .decode import MOST_BYTES, is_image
from .tables import Names, OtherFormat, Table, load_table, save_table

INDEX = "index.safetensors"
#: What the index says it is.
FORMAT = "ssl_ib shards of images, version 1"
#: The fields of a sample's JSON that may hold its label, unless one is named; the first that is there.
LABEL_FIELDS = ("label", "cls", "class", "category", "target")
#: Bytes of a sample's label.
MOST_LABEL_BYTES = 1 << 20


@dataclass(frozen=True)
class Shard:
    """A tar file: its name (relative to the index, or a path, or a URL), its bytes, and their SHA-256 where known."""

    name: str
    bytes: int
    sha256: str = ""


@dataclass(frozen=True)
class ShardIndex:
    """What is known of the images in shards, in their order: training images first, held-out ones after them.

    shard, offset, size: the shard an image lies in, and where: int64 [n] each; labels: int64 [n], -1 where unknown.
    names:      of the images' files.
    train:      how many of the n are training images.
    statistics: the known set whose mean and standard deviation are used, where there is one.
    """

    shards: list[Shard]
    shard: Tensor
    offset: Tensor
    size: Tensor
    labels: Tensor
    names: Names
    classes: list[str]
    notes: list[str]
    train: int
    statistics: str | None = None

    def rows(self, rows: Tensor, train: int) -> ShardIndex:
        """The images in some rows, of which the first `train` are trained on."""
        columns = [column[rows] for column in (self.shard, self.offset, self.size, self.labels)]
        names = self.names.rows(rows)
        return ShardIndex(self.shards, *columns, names, self.classes, self.notes, train, self.statistics)

    def table(self) -> Table:
        """The index as it is written."""
        tensors = {"shard": self.shard, "offset": self.offset, "size": self.size, "labels": self.labels}
        known = {
            "shards": [[shard.name, shard.bytes, shard.sha256] for shard in self.shards],
            "classes": self.classes,
            "notes": self.notes,
            "train": self.train,
            "statistics": self.statistics,
        }
        return Table(tensors, self.names, known)

    @classmethod
    def of(cls, table: Table) -> ShardIndex:
        """Raises KeyError, TypeError or ValueError where the table is no such index."""
        tensors, known = table.tensors, table.known
        shards = [Shard(*shard) for shard in known["shards"]]
        columns = [tensors[name] for name in ("shard", "offset", "size", "labels")]
        if table.names is None or {len(column) for column in columns} != {len(table.names)}:
            raise ValueError("its columns differ in length")
        return cls(shards, *columns, table.names, known["classes"], known["notes"], known["train"], known["statistics"])


def save_index(index: ShardIndex, folder: Path) -> None:
    """Writes the index of the shards in `folder`."""
    save_table(index.table(), folder / INDEX, FORMAT)


def read_index(path: Path, key: str = "source.path") -> ShardIndex:
    """The index in a file. Raises UserError where it cannot be read, or is damaged. key: what named it."""
    try:
        return ShardIndex.of(load_table(path, FORMAT))
    except OtherFormat:
        raise UserError(f"{key}: {path} is no index of shards: expected {FORMAT!r}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{key}: {path} is damaged ({error}); write the shards anew") from None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class Reader:
    """Gives the bytes of an image by its row in the index, in any thread or process.

    path: where a shard, by its number, lies on this machine.
    """

    def __init__(self, index: ShardIndex, path: Callable[[int], Path]):
        self.shard, self.offset, self.size, self.path = index.shard, index.offset, index.size, path

    def __call__(self, row: int) -> bytes:
        shard, size = int(self.shard[row]), int(self.size[row])
        if not 0 <= size <= MOST_BYTES:
            raise OSError(None, f"{size:,} bytes, at most {MOST_BYTES:,} are read")
        path, file = self._open(shard)
        try:
            data = os.pread(file, size, int(self.offset[row]))
        finally:
            os.close(file)
        if len(data) < size:
            raise OSError(None, f"its shard {path} was cut short")
        return data

    def _open(self, shard: int) -> tuple[Path, int]:
        for _ in range(3):
            path = self.path(shard)
            try:
                return path, os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except FileNotFoundError:
                pass  # A copy may have made room for another since.
        raise OSError(None, f"its shard {path} is missing")


@dataclass
class Scanned:
    """The samples of one shard: where each one's image lies, its name in the shard, and its label in words.

    cut: why nothing more of it could be read, where that is so.
    """

    offsets: list[int]
    sizes: list[int]
    names: list[str]
    labels: list[str]
    cut: str = ""


def scan(path: Path, name: str, image: str, labels: str) -> Scanned:
    """Goes through a shard on the disk: the headers of its members and, of what they hold, the labels.

    name:   of the shard, for messages.
    image:  the key of the image in a sample, as in "jpg" or "jpg;png"; "auto" is any that Pillow reads.
    labels: the key of the label ("cls", or "json:FIELD"); "none".

    Raises UserError where a sample lacks one of the keys or holds one twice, and where the file is no plain tar.
    """
    found = Scanned([], [], [], [])
    with _opened(path, name) as file:
        whole = os.fstat(file.fileno()).st_size
        try:
            tar = tarfile.open(fileobj=file, mode="r:")
        except tarfile.ReadError as error:
            if whole < tarfile.BLOCKSIZE:
                found.cut = "it was cut short within its first header"
                return found
            raise UserError(
                f"source.path: {name} is no plain .tar ({error}); a compressed shard cannot be read at random: "
                "decompress it"
            ) from None
        with tar:
            for key, sample in _samples(tar, whole, found):
                _add(found, file, name, key, sample, image, labels)
    return found


def _opened(path: Path, name: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"source.path: cannot read the shard {name}: {error.strerror}") from None


def _samples(tar: tarfile.TarFile, whole: int, found: Scanned) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The samples of a tar: their keys and members, by suffix. What is not all there is left out, and `cut` says so."""
    from webdataset.tariterators import base_plus_ext

    key, sample = None, {}
    try:
        for member in tars.members(tar):
            base, suffix = base_plus_ext(member.name.removeprefix("./"))
            # As in webdataset: files without an ending, and those of the format's own, are no part of a sample.
            if not member.isfile() or base is None or re.match(r"__[^/]*__($|/)", member.name):
                continue
            if member.offset_data + member.size > whole:
                raise tarfile.ReadError("it was cut short")
            if base != key:
                if key is not None:
                    yield key, sample
                key, sample = base, {}
            if suffix.lower() in sample:
                raise UserError(f"source.path: the sample {key} has two files .{suffix.lower()} in one shard")
            sample[suffix.lower()] = member
    except (tarfile.TarError, OSError, ValueError):
        # The last sample, which may lack a file, is left out.
        found.cut = "it was cut short or is damaged"
        return
    if key is not None:
        yield key, sample


def _add(
    found: Scanned, file: Any, name: str, key: str, sample: dict[str, tarfile.TarInfo], image: str, labels: str
) -> None:
    keys = [suffix for suffix in sample if is_image(f"x.{suffix}")] if image == "auto" else image.split(";")
    suffix = next((suffix for suffix in keys if suffix in sample), None)
    if suffix is None:
        wanted = "of an image" if image == "auto" else f"{image!r} of source.image"
        raise UserError(
            f"source.image: the sample {key} of {name} has no key {wanted}, only {', '.join(sorted(sample))}"
        )
    if labels != "none":
        found.labels.append(_label(file, name, key, sample, labels))
    found.offsets.append(sample[suffix].offset_data)
    found.sizes.append(sample[suffix].size)
    found.names.append(f"{key}.{suffix}")


def _label(file: Any, name: str, key: str, sample: dict[str, tarfile.TarInfo], labels: str) -> str:
    """The label of a sample in words."""
    suffix, _, field = labels.partition(":")
    member = sample.get(suffix)
    if member is None:
        raise UserError(
            f"source.labels: the shards differ in their keys: the sample {key} of {name} has no key {suffix!r}, only "
            f"{', '.join(sorted(sample))}; source.labels=none trains without labels"
        )
    text = _content(file, member).decode("utf-8", "replace").strip()
    if not field:
        return text
    try:
        return str(json.loads(text)[field]).strip()
    except (ValueError, KeyError, TypeError):
        raise UserError(f"source.labels: the JSON of the sample {key} of {name} has no field {field!r}") from None


def _content(file: Any, member: tarfile.TarInfo) -> bytes:
    return os.pread(file.fileno(), min(member.size, MOST_LABEL_BYTES), member.offset_data)


def label_key(path: Path) -> str:
    """The label's key in the first sample of a shard: "cls", or "json:FIELD"; "none" where there is neither."""
    with _opened(path, str(path)) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                samples = _samples(tar, os.fstat(file.fileno()).st_size, Scanned([], [], [], []))
                _, sample = next(samples, ("", {}))
        except tarfile.TarError:
            return "none"
        if "cls" in sample:
            return "cls"
        try:
            fields = json.loads(_content(file, sample["json"]))
            return next((f"json:{field}" for field in LABEL_FIELDS if field in fields), "none")
        except (ValueError, KeyError, TypeError):
            return "none"


def numbered(labels: Sequence[str]) -> tuple[list[str], Tensor]:
    """The classes that labels in words name, and the number of each label among them: int64 [n].

    Whole numbers are taken as they are, and their classes are called after them; a negative one is no label, and
    neither is an empty text.
    """
    try:
        numbers = torch.tensor([int(label) if label else -1 for label in labels], dtype=torch.int64)
    except ValueError:
        classes = sorted(set(labels) - {""})
        number = {"": -1} | {label: k for k, label in enumerate(classes)}
        return classes, torch.tensor([number[label] for label in labels], dtype=torch.int64)
    if len(numbers) and int(numbers.max()) >= max(1_000_000, 10 * len(numbers)):
        raise UserError(f"source.labels: a label is {int(numbers.max())}, which is no number of a class")
    return [str(k) for k in range(int(numbers.max()) + 1 if len(numbers) else 0)], numbers.clamp_min(-1)
