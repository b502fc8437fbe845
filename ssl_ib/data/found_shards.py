"""Shards that have no index: which they are, and the index that one reading of them gives.

Shapes: n images.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Sequence
from glob import glob, has_magic
from pathlib import Path

import torch

from ..config.outside import kind_of, user_path
from ..errors import UserError
from .kept import keep, short_hash
from .remote import State, is_url, states
from .shards import Shard, ShardIndex, label_key, numbered, scan, sha256_of
from .tables import Names, Table

#: The format of the indexes that are kept.
FORMAT = "ssl_ib index of found shards, version 1"
#: An index is kept for the next start from so many images on; of shards on a server in any case.
WORTH_KEEPING = 10_000


def named(path: str, key: str) -> list[str]:
    """The shards that a folder, a file, a pattern, a range or a URL names; key: what has the path, for messages.

    Raises UserError where there are none.
    """
    from webdataset.shardlists import expand_urls

    if is_url(path):
        return expand_urls(path)
    folder = user_path(path, key)
    if folder.is_dir():
        if found := sorted(glob(f"{folder}/*.tar")):
            return found
        raise UserError(f"{key}: expected shards, found no .tar in the folder {folder}")
    found = []
    for each in expand_urls(path):
        name = str(user_path(each, key))
        found += sorted(glob(name, recursive=True)) if has_magic(name) else [name]
    if not found:
        raise UserError(f"{key}: expected shards, no file fits {path}")
    if not any(map(os.path.isfile, found)):
        raise UserError(f"{key}: expected shards, found {kind_of(Path(found[0]))} at {found[0]}")
    return found


def present(names: Sequence[str]) -> list[State]:
    """What tells each shard from another version of it: its bytes and its date or tag; None where it is missing."""
    return states(names) if is_url(names[0]) else [_state(Path(name)) for name in names]


def _state(path: Path) -> State:
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def found_index(
    names: Sequence[str], train: int, places: Callable[[int], Path], now: list[State], image: str, labels: str
) -> tuple[ShardIndex, list[str]]:
    """An index of shards that have none, and in words which of them are damaged.

    It is kept in the user's cache folder for as long as the shards stay as they are `now`; else they are gone through.

    train:  how many of the shards are trained on; the images of the others come after theirs.
    places: where a shard, by its number, lies on this machine.
    image, labels: the keys, as for `shards.scan`; labels="auto" is what the first sample has.
    """
    table = keep(
        FORMAT,
        f"{names[0]} ({len(names)} shards, {short_hash(repr((names, train, image, labels)))})",
        lambda: _scanned(names, train, places, now, image, labels),
        lambda table: table.known["states"] == now,
        lambda table: len(table.names or ()) >= WORTH_KEEPING or is_url(names[0]),
    )
    return ShardIndex.of(table), table.known["damaged"]


def _scanned(
    names: Sequence[str], train: int, places: Callable[[int], Path], now: list[State], image: str, labels: str
) -> Table:
    there = [number for number, state in enumerate(now) if state is not None]
    asked = labels
    if labels == "auto":
        labels = label_key(places(there[0])) if there else "none"
    top = posixpath.commonpath([posixpath.dirname(name) for name in names])
    shard, offset, size, words, image_names = [], [], [], [], []
    damaged = [f"{name} is missing" for name, state in zip(names, now, strict=True) if state is None]
    digests, count = [""] * len(names), 0
    for number in there:
        name, path = names[number], places(number)
        found = scan(path, name, image, labels)
        shard += [number] * len(found.offsets)
        offset, size, words = offset + found.offsets, size + found.sizes, words + found.labels
        stem = name.removeprefix(top).removeprefix("/").removesuffix(".tar")
        image_names += [f"{stem}/{each}" for each in found.names]
        if found.cut:
            damaged.append(f"{name} after {len(found.names):,} images: {found.cut}")
        if number < train:
            count += len(found.names)
        if is_url(name):
            # A later copy is compared with it, so that what was found holds for what is read.
            digests[number] = sha256_of(path)
    classes, numbers = numbered(words) if labels != "none" else ([], torch.full((len(image_names),), -1))
    notes = []
    if labels == "none":
        notes = ["source.labels=none" if asked == "none" else "the samples have neither a cls nor a label in a json"]
    index = ShardIndex(
        [Shard(name, state[0] if state else 0, sha) for name, state, sha in zip(names, now, digests, strict=True)],
        *(torch.tensor(column, dtype=torch.int64) for column in (shard, offset, size)),
        numbers,
        Names.of(image_names),
        classes,
        notes,
        count,
    )
    table = index.table()
    return Table(table.tensors, table.names, {**table.known, "states": now, "damaged": damaged})
