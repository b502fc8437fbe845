"""Indexes of image sets on the disk: tensors, the images' names and what else is known, in one safetensors file.

Shapes: n images in a set.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Names(Sequence[str]):
    """n names in one tensor of bytes: millions of them take little memory, also in processes that are forked."""

    def __init__(self, joined: Tensor, begins: Tensor, ends: Tensor):
        self.joined, self._begins, self._ends = joined, begins, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """The names of a list."""
        return cls.split(_bytes(b"\0".join(map(os.fsencode, names))))

    @classmethod
    def split(cls, joined: Tensor) -> Names:
        """From their bytes, uint8, with a NUL between two names. No bytes at all are no names."""
        gaps = (joined == 0).nonzero()[:, 0]
        if len(joined) == 0:
            return cls(joined, gaps, gaps)
        return cls(joined, torch.cat([torch.zeros(1, dtype=torch.int64), gaps + 1]), torch.cat([gaps, _last(joined)]))

    def rows(self, index: Tensor) -> Names:
        """The names with the numbers `index`, int64."""
        return Names(self.joined, self._begins[index], self._ends[index])

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return list(self.rows(torch.arange(len(self))[number]))
        return os.fsdecode(self.joined[self._begins[number] : self._ends[number]].numpy().tobytes())

    def tobytes(self) -> bytes:
        """The names joined by NULs."""
        return b"\0".join(map(os.fsencode, self))

    def __iter__(self) -> Iterator[str]:
        joined = self.joined.numpy().tobytes()
        for begin, end in zip(self._begins.tolist(), self._ends.tolist(), strict=True):
            yield os.fsdecode(joined[begin:end])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))


def _last(joined: Tensor) -> Tensor:
    return torch.tensor([len(joined)])


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class Table:
    """What an index holds. known: plain data that JSON can write."""

    tensors: dict[str, Tensor]
    names: Names | None = None
    known: dict[str, Any] = field(default_factory=dict)


class OtherFormat(ValueError):
    """A safetensors file that says of itself that it is something else."""


def save_table(table: Table, path: Path, what: str) -> None:
    """Writes a table; what: the format and its version, which `load_table` asks for."""
    from safetensors.torch import save

    tensors = dict(table.tensors)
    if table.names is not None:
        tensors["names"] = _bytes(table.names.tobytes())
    known = {"format": what, **table.known}
    known["checksum"] = _checksum(tensors, known)
    path.write_bytes(save(tensors, {"ssl_ib": json.dumps(known)}))


def load_table(path: Path, what: str) -> Table:
    """Reads a table. Raises OtherFormat, and ValueError where it is damaged; OSError where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            known = json.loads((file.metadata() or {}).get("ssl_ib", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if not isinstance(known, dict) or known.get("format") != what:
        raise OtherFormat(f"expected {what!r}")
    if known.pop("checksum", None) != _checksum(tensors, known):
        raise ValueError("its checksum is another")
    names = tensors.pop("names", None)
    return Table(tensors, None if names is None else Names.split(names), known)


def _checksum(tensors: dict[str, Tensor], known: dict[str, Any]) -> int:
    """CRC-32 of the tensors, and of what else is known as JSON writes it."""
    found = zlib.crc32(json.dumps(known, sort_keys=True).encode())
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].contiguous().numpy().data, found)
    return found
