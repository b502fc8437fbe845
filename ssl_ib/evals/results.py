"""`evals.jsonl`: one line a result, which says all that it came of; what is finished is not computed again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.outside import json_object
from ..data.sources.base import ImageSet, InMemory
from ..record.files import replace

#: Settings that move no result but by rounding: what was computed with another value is not computed again.
MOVABLE = ("device", "encode_batch", "workers", "figures")
#: Settings of results that are fingerprints: they tell results apart, and a reader nothing.
FINGERPRINTS = ("chosen", "corrupted", "errors", "baseline_errors", "classifier_weights")


#: What a line is known by.
_RESULT = {"protocol": str, "settings": dict, "weights": str, "metric": str, "ssl_ib": str, "seconds": (int, float)}


class Results:
    """The results in a file, which need not exist; None: they are kept in memory alone."""

    def __init__(self, path: Path | None):
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path is not None and path.is_file():
            for text in path.read_bytes().splitlines():
                try:
                    line = json_object(text)
                except ValueError:
                    continue  # A kill tore the last line: its result is computed again.
                # Nor does it matter what else is no result.
                if all(isinstance(line.get(key), kind) for key, kind in _RESULT.items()):
                    self.lines.append(line)

    def find(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The newest line of a result, by what `identity_of` gives; None where there is none."""
        return next((line for line in reversed(self.lines) if identity_of(line) == identity), None)

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        """Writes a result in the place of a former one, and returns it as it is read back.

        Numbers that are not finite become texts.
        """
        line = json.loads(json.dumps(line), parse_constant=str)
        former = self.find(identity_of(line))
        if self.path is not None and former is not None:
            # What another command added in the meantime stays.
            lines = [one for one in Results(self.path).lines if one != former]
            replace(self.path, "".join(json.dumps(one) + "\n" for one in [*lines, line]))
        elif self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before = self.path.read_bytes() if self.path.is_file() else b""
            with self.path.open("a", encoding="utf-8") as file:
                # What a kill left of a line ends here.
                file.write("\n" * (before[-1:] not in (b"", b"\n")) + json.dumps(line, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.lines = [*(one for one in self.lines if one != former), line]
        return line


def identity_of(line: dict[str, Any]) -> dict[str, Any]:
    """What tells a result from others: protocol, settings but for those that are `MOVABLE`, weights, how images are
    prepared, and the images."""
    settings = {key: value for key, value in line["settings"].items() if key not in MOVABLE}
    return {"settings": settings, **{key: line.get(key) for key in ("protocol", "weights", "prepared", "data")}}


def fingerprint_of(content: Any) -> str:
    """16 hexadecimal digits that change with plain data."""
    digest = _Digest()
    digest.add(json.dumps(content, sort_keys=True).encode())
    return digest.hex()


def fingerprint_of_weights(module: nn.Module) -> str:
    """16 hexadecimal digits that change with the name, shape, type or value of any parameter or buffer."""
    digest = _Digest()
    for name, value in module.state_dict().items():
        digest.add(name.encode())
        if isinstance(value, Tensor):
            digest.add_tensor(value)
    return digest.hex()


def fingerprint_of_images(images: ImageSet, index: Tensor) -> str:
    """16 hexadecimal digits that change with the images `index` of a set, their order, or their labels.

    The pixels count where the set is held in memory; where it streams, the files' names do.
    """
    digest = _Digest()
    digest.add_tensor(images.labels[index])
    digest.add(json.dumps(images.classes).encode())
    if isinstance(images, InMemory):
        digest.add_tensor(images.sizes[index])
        for rows in index.split(4096):
            digest.add_tensor(images.images[rows])
    else:
        names = getattr(images, "names", None)
        digest.add(json.dumps(index.tolist() if names is None else [names[i] for i in index.tolist()]).encode())
    return digest.hex()


class _Digest:
    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)

    def add(self, data: bytes) -> None:
        self._hash.update(f"{len(data)}:".encode())
        self._hash.update(data)

    def add_tensor(self, tensor: Tensor) -> None:
        self.add(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        self._hash.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")

    def hex(self) -> str:
        return self._hash.hexdigest()
