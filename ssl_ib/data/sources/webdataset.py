"""Images in shards: tar files as the package webdataset reads and writes them, on the disk or on a web server.

Shapes: n images in a set.
"""

from __future__ import annotations

import logging
import posixpath
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from ... import random
from ...config.hints import Positive, PositiveInt, Ratio
from ...config.outside import user_path
from ...config.registry import register_source
from ...errors import UserError
from ..found_shards import found_index, named, present
from ..kept import cache_folder
from ..remote import Copies, Missing, State, copy, is_url
from ..shards import INDEX, Reader, ShardIndex, read_index
from ..statistics import recognise
from .base import MAX_UNREADABLE
from .layout import hold_out
from .rows import Indexed, Rows, RowSource

log = logging.getLogger(__name__)

#: How far an image of shards on a server moves from its shard's place in the order.
BUFFER = 10_000


class _InShards(Rows):
    """Images in shards. buffer: how far one moves from its shard's place in the order; None: anywhere."""

    shard: Tensor
    buffer: int | None

    def order(self, seed: int, epoch: int) -> Tensor:
        if self.buffer is None:
            return super().order(seed, epoch)
        return random.shuffled_nearby(seed, epoch, self.shard, self.buffer)

    def fingerprint(self) -> dict[str, int]:
        # The buffer and the shards' sizes decide the order.
        sizes = self.shard.unique_consecutive(return_counts=True)[1]
        order = 0 if self.buffer is None else zlib.crc32(sizes.numpy().data, self.buffer)
        return {**super().fingerprint(), "shards": order}


@register_source("webdataset")
class WebDataset(RowSource):
    """Images in shards: .tar files in webdataset's format, one image a sample, on the disk or on a web server.

    `ssl-ib-data shard` writes such shards with an index, which has their splits, labels, classes and names. Shards
    without an index are gone through once, at the first start; what was found is kept in the user's cache folder for as
    long as the shards' sizes and dates stay the same.

    Every image has its number, so that what a batch holds is a function of seed, epoch and step alone, with any number
    of processes and workers, and more of them than shards. Shards on the disk are read at random. Those on a server are
    copied to `cache` one by one, when they are needed, and read there. Each machine copies each shard.

    Raises UserError where the package webdataset is missing, for shards that are missing, damaged or differ in their
    keys, and for samples without an image.

    path:           a folder of shards; one shard; a pattern (data/train-*.tar); a range (data/train-{000..146}.tar); or
                    any of these but the pattern on a server (http://..., https://...), of a folder those with an index.
    val:            the same for the shards that are held out, where there is no index. Default: a share of the others.
    image:          the key of the image in a sample, as in jpg, or several: "jpg;png". auto: any that Pillow reads.
    labels:         the key of the label: cls, or a field of the sample's JSON, as in json:category. A label is a number
                    or a text.
                    auto: what the index says, else cls, or a field named label, cls, class, category or target.
                    none: there are no labels.
    val_fraction:   share of the images that is held out, where neither an index nor `val` says which; as for `folder`.
    buffer:         shuffle by shard: the shards in a random order, and each image moved by up to so many places. It
                    reads each shard in one stretch, which suits disks and servers that are slow at random. Default: the
                    whole set is shuffled, as from a folder; on a server 10,000.
    cache:          the folder for copies of shards from a server. Default: shards in the user's cache folder.
    cache_gb:       what that folder may hold, in 1e9 bytes. Where the set takes more, each epoch copies it anew.
    max_unreadable: share of the images that may be unreadable or lost with a shard that is missing or cut short; of the
                    shards, where there is no index to tell how many images they had.
    limit, max_side, memory_gb, statistics: as for `folder`.
    """

    def __init__(
        self,
        path: str,
        val: str | None = None,
        image: str = "auto",
        labels: str = "auto",
        val_fraction: Ratio = 0.1,
        buffer: PositiveInt | None = None,
        cache: str | None = None,
        cache_gb: Positive = 20.0,
        limit: PositiveInt | None = None,
        max_unreadable: Ratio = MAX_UNREADABLE,
        max_side: PositiveInt = 512,
        memory_gb: Positive = 4.0,
        statistics: str | None = None,
    ):
        try:
            import webdataset  # noqa: F401
        except ImportError:
            raise UserError("source=webdataset needs the package webdataset: pip install 'ssl-ib[stream]'") from None
        super().__init__(path, limit, max_unreadable, max_side, memory_gb, statistics)
        self.held_out, self.image, self.labels, self.val_fraction = val, image, labels, val_fraction
        self.buffer, self.cache_gb = BUFFER if buffer is None and is_url(path) else buffer, cache_gb
        self._cache = user_path(cache, "source.cache") if cache else cache_folder() / "shards"
        self._statistics = self._statistics or recognise(path) or recognise(posixpath.dirname(path))
        if val is not None and is_url(val) != is_url(path):
            raise UserError("source.val: expected shards where those of source.path are, on the disk or on a server")
        if labels not in ("auto", "none", "cls") and not (labels.startswith("json:") and labels[5:]):
            raise UserError(f"source.labels: expected auto, none, cls or json:FIELD, got {labels!r}")
        written = self._written()
        self._shards = self._found() if written is None else self._whole(written)

    # Shards with an index

    def _written(self) -> ShardIndex | None:
        """The index that lies beside the shards, their names made whole; None where there is none."""
        top = self.path.rstrip("/") if is_url(self.path) else str(user_path(self.path, "source.path"))
        if is_url(top):
            if ".tar" in top:
                return None
            index = self._fetched(f"{top}/{INDEX}")
        elif (Path(top) / INDEX).is_file():
            index = read_index(Path(top) / INDEX)
        else:
            return None
        if self.held_out is not None or self.image != "auto" or self.labels not in ("auto", "none"):
            raise UserError(
                f"source.val, source.image and source.labels: the index in {top} says what is held out and labelled; "
                f"name the shards themselves ({top}/train/...tar) to choose otherwise"
            )
        if self.labels == "none":
            labels = torch.full_like(index.labels, -1)
            index = replace(index, labels=labels, classes=[], notes=["source.labels=none"])
        return replace(index, shards=[replace(shard, name=f"{top}/{shard.name}") for shard in index.shards])

    def _fetched(self, url: str) -> ShardIndex:
        """The index on a server; it is asked for at every start, so that it is never an old one."""
        with TemporaryDirectory() as folder:
            try:
                copy(url, Path(folder) / INDEX)
            except Missing:
                raise UserError(
                    "source.path: expected shards (....tar) or a folder that ssl-ib-data shard has written, found no "
                    f"{url}"
                ) from None
            return read_index(Path(folder) / INDEX)

    def _whole(self, index: ShardIndex) -> ShardIndex:
        """The index without the images that are lost with their shards; raises UserError where they are too many."""
        names = [shard.name for shard in index.shards]
        found = present(names)
        self._paths = self._places(names, found, [shard.sha256 for shard in index.shards])
        sizes, said = [], []
        for number, (shard, state) in enumerate(zip(index.shards, found, strict=True)):
            # A server may not say how long a file is.
            size = 0 if state is None else state[0] or shard.bytes
            sizes.append(size)
            if size > shard.bytes:
                raise UserError(
                    f"source.path: the shard {shard.name} has {size:,} bytes, its index says {shard.bytes:,}: write "
                    "the shards anew"
                )
            if size < shard.bytes:
                mine = index.shard == number
                lost = int((index.offset + index.size > size)[mine].sum())
                what = "is missing" if state is None else "was cut short"
                said.append(f"{shard.name} {what}, and with it {lost:,} of its {int(mine.sum()):,} images")
        if not said:
            return index
        kept = index.offset + index.size <= torch.tensor(sizes)[index.shard]
        count, total = int((~kept).sum()), len(kept)
        self._bear(f"{count:,} of {total:,} images ({count / total:.1%}) are lost", said, count / total, "images")
        return index.rows(kept.nonzero()[:, 0], int(kept[: index.train].sum()))

    # Shards without an index

    def _found(self) -> ShardIndex:
        names = named(self.path, "source.path")
        held_out = named(self.held_out, "source.val") if self.held_out is not None else []
        if twice := sorted({*names} & {*held_out}):
            raise UserError(f"source.val: {twice[0]} is one of the shards of source.path too")
        train, names = len(names), names + held_out
        found = present(names)
        self._paths = self._places(names, found, [""] * len(names))
        index, damaged = found_index(names, train, self._paths, found, self.image, self.labels)
        if isinstance(self._paths, Copies):
            self._paths.sha256 = [shard.sha256 for shard in index.shards]
        if damaged:
            count, total = len(damaged), len(names)
            self._bear(f"{count} of {total} shards are damaged", damaged, count / total, "shards without an index")
        if held_out:
            return index
        rows, chosen = hold_out(index.labels, self.val_fraction)
        return index.rows(torch.cat([rows, chosen]), len(rows))

    def _bear(self, what: str, each: Sequence[str], share: float, of: str) -> None:
        """Says what is lost; raises UserError where it is more than the share `max_unreadable`."""
        said = f"{what}: {'; '.join(each[:3])}{'; ...' if len(each) > 3 else ''}"
        if share > self.max_unreadable:
            raise UserError(
                f"source.max_unreadable: {said}. At most {100 * self.max_unreadable:g}% of {of} may be lost"
            )
        log.warning("%s. The others are used", said)

    def _places(self, names: Sequence[str], found: Sequence[State], sha256: Sequence[str]) -> Callable[[int], Path]:
        if is_url(self.path):
            return Copies(names, found, sha256, self._cache, self.cache_gb)
        return _Paths(names)

    # The sets

    def _index(self) -> Indexed:
        index = self._shards
        rows = torch.arange(len(index.labels))
        train, val = rows[: index.train], rows[index.train :]
        return Indexed(index.names, index.labels, index.classes, train, val, list(index.notes), index.statistics)

    def _rows(self, rows: Tensor) -> Rows:
        index = self._shards
        images = _InShards(
            Reader(index, self._paths),
            rows,
            index.names.rows(rows),
            index.labels[rows],
            index.size[rows],
            index.classes,
            self.max_side,
            self.max_unreadable,
        )
        images.shard, images.buffer = index.shard[rows], self.buffer
        if images.buffer is not None and is_url(self.path):
            self._check_cache(images.shard, images.buffer)
        return images

    def _check_cache(self, shard: Tensor, buffer: int) -> None:
        """Raises UserError where the shards that a stretch of the order reads from do not fit into the cache."""
        sizes = [each.bytes for each in self._shards.shards]
        used = [sizes[number] for number in shard.unique().tolist()]
        # The stretch moves through shards of their average size; at its ends it cuts through two.
        needed = min(sum(used), sum(used) * buffer / len(shard) + 2 * max(used)) / 1e9
        if needed > self.cache_gb:
            raise UserError(
                f"source.cache_gb: with source.buffer={buffer:,} about {needed:.3g} GB of shards are in use at a time, "
                f"and the cache may hold {self.cache_gb:g}: raise source.cache_gb, or lower source.buffer"
            )


class _Paths:
    """Where shards on the disk lie, by their number."""

    def __init__(self, names: Sequence[str]):
        self.paths = [Path(name) for name in names]

    def __call__(self, number: int) -> Path:
        return self.paths[number]
