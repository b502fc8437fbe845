"""The files of features: rows that are added one after another, and what they become at the end.

Shapes: n images, L patches, D feature dimensions.
"""

from __future__ import annotations

import csv
import io
import json
import os
import struct
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from ..config.outside import read_json
from ..errors import UserError
from ..record.files import replace
from .listing import Listing, readable

FORMATS = (".npy", ".safetensors", ".parquet")
#: Rows that are copied at a time.
_ROWS = 4096


def check_out(out: Path, overwrite: bool = False) -> None:
    """Raises UserError where features cannot be written to `out`: its ending, its folder, or a file that is there."""
    if out.suffix not in FORMATS:
        raise UserError(f"--out: expected a file that ends in {', '.join(FORMATS)}, got {out}")
    if not out.parent.is_dir():
        raise UserError(f"--out: there is no folder {out.parent}")
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder: expected the name of a file")
    if out.exists() and not overwrite:
        raise UserError(f"--out: {out} is there already: replace it with --overwrite, or choose another name")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise UserError("--out: .parquet needs pyarrow: pip install 'ssl-ib[embed]', or choose .npy or .safetensors")


def _npy_header(rows: int, shape: tuple[int, ...], classes: list[str], length: int = 0) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, *shape)}
    # numpy leaves room for a longer first axis: the length does not depend on the number of rows.
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def _safetensors_header(rows: int, shape: tuple[int, ...], classes: list[str], length: int = 0) -> bytes:
    """length: what it is filled up to, in bytes."""
    size = 4 * rows * int(np.prod(shape))
    header: dict[str, Any] = {
        "features": {"dtype": "F32", "shape": [rows, *shape], "data_offsets": [0, size]},
        "labels": {"dtype": "I64", "shape": [rows], "data_offsets": [size, size + 8 * rows]},
        "__metadata__": {"classes": json.dumps(classes)},
    }
    text = json.dumps(header).encode()
    filled = max(length, -(-(8 + len(text)) // 64) * 64)
    return struct.pack("<Q", filled - 8) + text.ljust(filled - 8)


def _no_header(rows: int, shape: tuple[int, ...], classes: list[str], length: int = 0) -> bytes:
    return b""


HEADERS: dict[str, Callable[..., bytes]] = {
    ".npy": _npy_header,
    ".safetensors": _safetensors_header,
    ".parquet": _no_header,
}


@dataclass
class Part:
    """What a process has of its share of the images: whole rows in `file`, and numbers of images that are unreadable.

    Images are numbered in the order of the walk.
    """

    file: Path
    start: int
    stop: int
    header: int = 0
    shape: tuple[int, ...] | None = None
    rows: int = 0
    unreadable: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def about(self) -> Path:
        return self.file.with_name(f"{self.file.name}.json")

    @property
    def bad(self) -> Path:
        return self.file.with_name(f"{self.file.name}.unreadable")

    @property
    def row_bytes(self) -> int:
        return 4 * int(np.prod(self.shape))

    @property
    def done(self) -> int:
        """The number of the first image that is not done."""
        number = self.start + self.rows
        for bad in sorted(self.unreadable):
            if bad > number:
                break
            number += 1
        return number

    def remember(self, settings: dict[str, Any], finished: bool = False) -> None:
        # Once it is finished, the rows of other parts may follow.
        about = {"settings": settings, "header": self.header, "shape": self.shape, "finished": finished}
        about |= {"rows": self.rows} if finished else {}
        replace(self.about, json.dumps(about) + "\n")

    def recall(self, settings: dict[str, Any]) -> bool:
        """Takes up what is there; whether it is finished. Raises UserError where it was begun otherwise."""
        if not (self.about.is_file() and self.file.is_file()):
            return False
        about = read_json(self.about)
        kinds = {"settings": dict, "header": int, "shape": (list, NoneType), "finished": bool, "rows": (int, NoneType)}
        if not all(isinstance(about.get(key), kind) for key, kind in kinds.items()):
            raise UserError(f"{self.about} is damaged: --overwrite begins anew")
        changed = [
            f"{key}: {about['settings'].get(key)} -> {value}"
            for key, value in settings.items()
            if about["settings"].get(key) != value
        ]
        if changed:
            raise UserError(f"{self.file} was begun otherwise ({'; '.join(changed)}): --overwrite begins anew")
        if about["shape"] is not None:
            self.header, self.shape = about["header"], tuple(about["shape"])
            self.rows = max(self.file.stat().st_size - self.header, 0) // self.row_bytes
            self.rows = about.get("rows", self.rows)
        lines = self.bad.read_text(encoding="utf-8").splitlines() if self.bad.is_file() else []
        for line in lines:
            try:
                number, name, reason = json.loads(line)
            except (ValueError, TypeError):
                continue  # The last line of a process that was killed.
            self.unreadable[number] = (name, reason)
        # Those behind the last row will be met again.
        self.keep_before(self.done)
        return about["finished"]

    def keep_before(self, number: int) -> None:
        """Forgets what is there of the images from `number` on, up to which all are done."""
        self.unreadable = {bad: found for bad, found in self.unreadable.items() if bad < number}
        self.rows = number - self.start - len(self.unreadable)

    def remove(self) -> None:
        for path in (self.file, self.about, self.bad):
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Written:
    """What came of a folder: the shape of its features, how many images were unreadable, and what classes there are."""

    shape: tuple[int, ...]
    unreadable: int
    listing: Listing

    def lines(self, out: Path) -> list[str]:
        """It in words."""
        beside = "" if out.suffix == ".parquet" else f", files and labels in {out.name}.csv"
        lines = [f"features {' x '.join(map(str, self.shape))} in {out}{beside}", *self.listing.lines()]
        if self.unreadable:
            lines.append(f"{self.unreadable} images could not be read and are left out: {out.name}.unreadable.txt")
        return lines


def finish(out: Path, parts: list[Part], root: Path, listing: Listing) -> Written:
    """Puts the parts together, writes the table, and gives the file its header and its name."""
    first = parts[0]
    bad = {number: found for part in parts for number, found in part.unreadable.items()}
    rows = sum(part.rows for part in parts)
    with first.file.open("r+b") as file:
        # A former attempt may have been ended in the midst of this.
        file.truncate(first.header + first.rows * first.row_bytes)
        file.seek(0, os.SEEK_END)
        for part in parts[1:]:
            with part.file.open("rb") if part.rows else nullcontext(io.BytesIO()) as more:
                while content := more.read(1 << 22):
                    file.write(content)
        if out.suffix == ".safetensors":
            number = {"": -1} | {name: k for k, name in enumerate(listing.classes)}
            labels = (number[listing.label(name)] for name in readable(root, bad))
            while some := list(islice(labels, _ROWS)):
                file.write(np.array(some, dtype="<i8").tobytes())
        file.seek(0)
        file.write(HEADERS[out.suffix](rows, first.shape, listing.classes, first.header))
    # Before the file has its name: after that, a run that was ended here is finished.
    listed = out.with_name(f"{out.name}.unreadable.txt")
    if bad:
        replace(listed, "".join(f"{name}: {reason}\n" for name, reason in bad.values()))
    else:
        listed.unlink(missing_ok=True)
    if out.suffix == ".parquet":
        _parquet(first.file, out, rows, first.shape, root, listing, bad)
    else:
        _table(out.with_name(f"{out.name}.csv"), root, listing, bad)
        os.replace(first.file, out)
    for part in parts:
        part.remove()
    return Written((rows, *first.shape), len(bad), listing)


def _table(path: Path, root: Path, listing: Listing, bad: dict[int, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "label"])
        writer.writerows((name, listing.label(name)) for name in readable(root, bad))
    os.replace(temporary, path)


def _parquet(
    rows_file: Path,
    out: Path,
    rows: int,
    shape: tuple[int, ...],
    root: Path,
    listing: Listing,
    bad: dict[int, Any],
) -> None:
    """Copies the rows to a Parquet file, some at a time: file, label and features, which are one list an image."""
    import pyarrow
    from pyarrow import parquet

    width = int(np.prod(shape))
    features = np.memmap(rows_file, dtype="<f4", mode="r", shape=(rows, width))
    schema = pyarrow.schema(
        [
            ("file", pyarrow.string()),
            ("label", pyarrow.string()),
            ("features", pyarrow.list_(pyarrow.float32(), width)),
        ],
        metadata={"shape": json.dumps(shape)},
    )
    names, temporary = readable(root, bad), out.with_name(f"{out.name}.tmp")
    with parquet.ParquetWriter(temporary, schema) as writer:
        for start in range(0, rows, _ROWS):
            block = np.array(features[start : start + _ROWS])
            some = list(islice(names, len(block)))
            column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(block.reshape(-1)), width)
            labels = [listing.label(name) or None for name in some]
            writer.write_table(pyarrow.table([some, labels, column], schema=schema))
    os.replace(temporary, out)
