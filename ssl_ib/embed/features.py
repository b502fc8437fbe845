"""The work: images are read and prepared in threads, encoded in batches, and their features written as they come.

Shapes: n images, B images a batch, L patches, D feature dimensions, h x w pixels of the view that is encoded.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import distributed
from ..data.decode import Unreadable, decode_file, num_threads, read_image
from ..data.sources.base import MAX_UNREADABLE
from ..errors import UserError
from ..evals.results import fingerprint_of_weights
from ..pretrained import Backbone
from ..record.files import replace
from ..record.terminal import duration, say
from .files import HEADERS, Part, Written, check_out, finish
from .listing import Listing, look, walk

#: Images that a thread prepares at a time.
_CHUNK = 8
#: Seconds from one line of progress to the next.
EVERY = 30.0


def embed_to_file(
    backbone: Backbone,
    folder: Path | str,
    out: Path | str,
    *,
    tokens: str | None = None,
    batch_size: int = 64,
    bf16: bool = False,
    max_unreadable: float = MAX_UNREADABLE,
    overwrite: bool = False,
) -> Written | None:
    """Writes the features of all images below a folder to a file, in the order of their names.

    backbone:   computes where its parameters are.
    out:        ends in .npy or .safetensors: float32 [n, D], or [n, L, D] of patches; or in .parquet: a row an image
                with its `file`, `label` and `features`. `OUT.csv` beside the first two has the columns file and label;
                a label is the class that the folder stands for, and empty where folders are no classes.
    tokens:     cls, mean or patches (`Backbone.tokens`); None: the features as the run evaluated them.
    bf16:       compute in bfloat16 where autocast allows; features are float32 all the same.
    max_unreadable: share of the images that may be unreadable, and one in any case; they are left out, and listed in
                `OUT.unreadable.txt`. More than that are an error.
    overwrite:  replace `out`, and begin anew.

    Called again after it was ended, it goes on. The processes that torchrun started share the images, and the main one
    puts their parts together. A batch is always of the same images, however many processes there are, whichever images
    cannot be read and wherever it was ended: so the features are the same too.

    Returns what was written; None in all processes but the main one. Raises UserError where a file is in the way, the
    folder holds no image, or too many cannot be read.
    """
    root, out = Path(folder), Path(out)
    with distributed.together():
        check_out(out, overwrite)
        listing = look(root)
    batches = -(-listing.total // batch_size)
    rank, processes = distributed.rank(), min(distributed.world_size(), batches)
    settings = {
        "weights": fingerprint_of_weights(backbone.model),
        "images": f"{listing.total} in {root.resolve()}, {listing.digest}",
        "prepared": backbone.description and [backbone.description[key] for key in ("preprocessing", "mean", "std")],
        "tokens": tokens,
        "bf16": bf16,
        "processes": processes if processes == 1 else f"{processes}, with batches of {batch_size}",
    }
    starts = [batch_size * (batches * number // processes) for number in range(processes)]
    parts = [
        Part(out.with_name(f"{out.name}.part{number if processes > 1 else ''}"), start, stop)
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], listing.total], strict=True))
    ]
    with distributed.together():
        if overwrite and distributed.is_main():
            for part in parts:
                part.remove()
    if rank >= processes:
        return None
    part = parts[rank]
    if not part.recall(settings):
        part.keep_before(part.done // batch_size * batch_size)
        shown = f"{part.start:,} to {part.stop:,} of " if processes > 1 else ""
        if part.done > part.start and rank == 0:
            say(f"goes on after {part.done - part.start:,} images")
        say(f"{shown}{listing.total:,} images in {root}")
        most = max(int(max_unreadable * (part.stop - part.start)), 1 if max_unreadable else 0)
        _fill(part, settings, backbone, root, listing, out, tokens, batch_size, bf16, most)
        part.remember(settings, finished=True)
    if rank:
        return None
    _wait(parts[1:], settings)
    return finish(out, parts, root, listing)


def preview(backbone: Backbone, folder: Path | str, out: Path, tokens: str | None, bf16: bool) -> list[str]:
    """What `embed_to_file` would write, in words, by encoding its first images. Raises what it raises."""
    root = Path(folder)
    listing = look(root)
    features = next(_encoded(backbone, root, islice(enumerate(walk(root)), 8), tokens, 8, bf16))[0]
    if not len(features):
        raise UserError(f"{root}: none of its first images can be read")
    shape, gigabytes = (listing.total, *features.shape[1:]), 4e-9 * listing.total * features[0].numel()
    size = f"features {' x '.join(map(str, shape))}, {gigabytes:.3g} GB, to {out}"
    return [f"dry run: {listing.total:,} images in {root}", size, *listing.lines(), "nothing is written"]


def _fill(
    part: Part,
    settings: dict[str, Any],
    backbone: Backbone,
    root: Path,
    listing: Listing,
    out: Path,
    tokens: str | None,
    batch_size: int,
    bf16: bool,
    most: int,
) -> None:
    """Computes the rows of a part that are not there yet."""
    if part.shape is not None:
        with part.file.open("r+b") as file:
            file.truncate(part.header + part.rows * part.row_bytes)
    replace(part.bad, "".join(f"{json.dumps([n, *bad])}\n" for n, bad in sorted(part.unreadable.items())))
    names = enumerate(islice(walk(root), part.done, part.stop), start=part.done)
    progress = _Progress(part.done, part.stop)
    with part.file.open("ab" if part.shape is not None else "wb") as file, part.bad.open("a", encoding="utf-8") as bad:
        for features, unreadable, count in _encoded(backbone, root, names, tokens, batch_size, bf16):
            for number, found in unreadable:
                part.unreadable[number] = (found.name, found.reason)
                bad.write(json.dumps([number, found.name, found.reason]) + "\n")
            bad.flush()
            if len(part.unreadable) > most:
                name, reason = min(part.unreadable.items())[1]
                raise UserError(
                    f"{len(part.unreadable)} of {part.stop - part.start:,} images cannot be read, and {most} may be "
                    f"(--max-unreadable): such as {name}, {reason}; all are in {part.bad}"
                )
            if len(features):
                rows = features.numpy()
                if part.shape is None:
                    part.shape = rows.shape[1:]
                    header = HEADERS[out.suffix](listing.total, part.shape, listing.classes)
                    # Only the first part becomes the file.
                    part.header = len(header) if part.start == 0 else 0
                    file.write(b"\0" * part.header)
                    file.flush()
                    part.remember(settings)
                file.write(np.ascontiguousarray(rows, dtype="<f4").data)
                file.flush()
                part.rows += len(rows)
            progress.move(count)
    if part.shape is None and part.stop > part.start and part.start == 0:
        raise UserError(f"{root}: none of its images can be read; they are in {part.bad}")


def _prepared(
    backbone: Backbone, root: Path, names: Iterator[tuple[int, str]], ahead: int
) -> Iterator[list[tuple[int, Tensor | Unreadable]]]:
    """Views of images, float32 [3, h, w], in order; files are read and prepared in threads, `ahead` at most at once."""

    def work(chunk: list[tuple[int, str]]) -> list[tuple[int, Tensor | Unreadable]]:
        read = [decode_file(lambda name: read_image(root / name), name, backbone.max_side) for _, name in chunk]
        good = [image for image in read if isinstance(image, Tensor)]
        views = iter(backbone.views(good) if good else ())
        return [
            (number, image if isinstance(image, Unreadable) else next(views))
            for (number, _), image in zip(chunk, read, strict=True)
        ]

    waiting: deque = deque()
    with ThreadPoolExecutor(num_threads()) as pool:
        try:
            while True:
                while len(waiting) * _CHUNK < ahead and (chunk := list(islice(names, _CHUNK))):
                    waiting.append(pool.submit(work, chunk))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@torch.inference_mode()
def _encoded(
    backbone: Backbone,
    root: Path,
    names: Iterator[tuple[int, str]],
    tokens: str | None,
    batch_size: int,
    bf16: bool,
) -> Iterator[tuple[Tensor, list[tuple[int, Unreadable]], int]]:
    """Features of a batch [B, ...] on the CPU, its unreadable images, and how many images these are together.

    A batch ends with each image whose number is a multiple of the batch size, less one.
    """
    parameter = next(backbone.model.parameters())
    device, on_gpu = parameter.device, parameter.device.type == "cuda"
    amp = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    views: list[Tensor] = []
    bad: list[tuple[int, Unreadable]] = []
    before = None

    def encode() -> tuple[Tensor, list[tuple[int, Unreadable]], int]:
        if not views:
            return torch.empty(0), list(bad), len(bad)
        batch = torch.stack(views)
        batch = (batch.pin_memory() if on_gpu else batch).to(device, parameter.dtype, non_blocking=True)
        with amp:
            return backbone.tokens(batch, tokens).float(), list(bad), len(views) + len(bad)

    for chunk in _prepared(backbone, root, names, 3 * batch_size):
        for number, found in chunk:
            if isinstance(found, Unreadable):
                bad.append((number, found))
            else:
                views.append(found)
            if (number + 1) % batch_size == 0:
                now = encode()
                views.clear()
                bad.clear()
                # A GPU computes this batch while the one before is written.
                if before is not None:
                    yield before[0].cpu(), *before[1:]
                before = now
    if before is not None:
        yield before[0].cpu(), *before[1:]
    if views or bad:
        last = encode()
        yield last[0].cpu(), *last[1:]


class _Progress:
    """Says every half minute how far it is, and how long it will take."""

    def __init__(self, done: int, total: int):
        self.first = self.done = done
        self.total, self.began = total, time.perf_counter()
        self.said = self.began

    def move(self, images: int) -> None:
        self.done += images
        now = time.perf_counter()
        if now - self.said >= EVERY and self.done < self.total:
            rate = (self.done - self.first) / (now - self.began)
            left = duration((self.total - self.done) / rate)
            say(f"{self.done:,} of {self.total:,} images, {rate:.0f} images/s, {left} left")
            self.said = now


def _wait(parts: list[Part], settings: dict[str, Any]) -> None:
    """Until the other processes have done their shares. One that fails has torchrun end this one too."""
    for part in parts:
        while not part.recall(settings):
            time.sleep(0.2)
