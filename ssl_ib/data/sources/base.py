"""What a source is, and the two kinds of image sets it gives: held in memory, and streamed.

Shapes: n images in a set, B in a batch, H x W pixels.
"""

from __future__ import annotations

import copy
import logging
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from ... import random
from ...errors import UserError
from ...types import Sample
from ..decode import WORTH_THREADS, Unreadable, decode_file, num_threads, pack
from ..statistics import KNOWN, Statistics, measure

log = logging.getLogger(__name__)

#: The share of unreadable images above which a set is refused, where a source is not told another.
MAX_UNREADABLE = 0.01
#: A set moves to a GPU where it takes no more than this share of the free memory: the run needs the rest.
SHARE_OF_GPU = 0.5


class ImageSet(ABC):
    """Numbered uint8 images, some with labels.

    labels:    int64 [n], -1 where unknown; on the CPU.
    classes:   the labels' names; label k is `classes[k]`.
    factors:   what is known of how the images came about, by name: int64 [n] for classes, float32 [n, d] for numbers.
               Linear probes read them off the representation. For sets of which every image can be read.
    in_memory: whether every image is decoded already; `gather` is then a mere indexing.
    max_unreadable: the share of the images that may be unreadable, in [0, 1); one may be in any case, but not at 0.
    names:     of the images' files, relative to the source; None where they are no files.
    file_size: gives the bytes of a named file, where they are files; raises OSError where it is gone.
    """

    in_memory: ClassVar[bool]
    names: Sequence[str] | None = None
    file_size: Callable[[str], int] | None = None
    factors: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(self, labels: Tensor, classes: Sequence[str], max_unreadable: float = MAX_UNREADABLE):
        self.labels, self.classes, self.max_unreadable = labels, list(classes), max_unreadable
        self._unreadable: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def bad(self) -> list[str]:
        """The names of the files that could not be decoded so far."""
        return list(self._unreadable)

    def fingerprint(self) -> dict[str, int]:
        """Checksums of what images these are, in their order: of the files' `names` and `sizes`, and of the `labels`.

        Asks for the size of every file; what is in them is not read.
        """
        found = {"labels": zlib.crc32(self.labels.numpy().tobytes())}
        if self.names is not None:
            found["names"] = zlib.crc32(b"\0".join(map(os.fsencode, self.names)))
        if self.names is not None and self.file_size is not None:
            sizes = torch.tensor([_size(self.file_size, name) for name in self.names], dtype=torch.int64)
            found["sizes"] = zlib.crc32(sizes.numpy().tobytes())
        return found

    def order(self, seed: int, epoch: int) -> Tensor:
        """The order in which an epoch visits the images, each of them once: int64 [n], the same in every process."""
        return random.shuffled(seed, epoch, len(self))

    @abstractmethod
    def gather(self, index: Tensor) -> Sample:
        """The images with the numbers `index`, int64 [B].

        The canvas is the smallest that holds the batch; `extra["size"]` is there where the images' sizes differ. An
        unreadable image is replaced by the next readable one, with that one's number and label. Raises UserError
        where more than `max_unreadable` of the set has turned out to be unreadable.
        """

    def sample(self, images: Tensor, sizes: Tensor, index: Tensor) -> Sample:
        """The images numbered `index` with what is known of each; sizes int64 [B, 2] of (height, width)."""
        extra = {"size": sizes} if bool((sizes != sizes[:1]).any()) else {}
        factors = {name: values[index] for name, values in self.factors.items()}
        return Sample(images, index, self.labels[index], extra, factors)

    def to(self, device: torch.device | str) -> ImageSet:
        """The set with its images on `device`, if it is held in memory and fits there; else the set itself."""
        return self

    def most_unreadable(self, total: int) -> int:
        """How many of `total` images may be unreadable."""
        return max(int(self.max_unreadable * total), int(self.max_unreadable > 0))

    def record(self, unreadable: Sequence[Unreadable], total: int | None = None) -> None:
        """Remembers unreadable files; raises UserError above the share `max_unreadable` of `total`.

        total: number of images; default: those of the set.
        """
        total = len(self) if total is None else total
        self._unreadable |= {file.name: file.reason for file in unreadable}
        count = len(self._unreadable)
        if unreadable and (count > self.most_unreadable(total) or count == total):
            first = "; ".join(f"{name} ({reason})" for name, reason in list(self._unreadable.items())[:3])
            raise UserError(
                f"source.max_unreadable: {count} of {total} images cannot be read ({count / total:.1%}), and at most "
                f"{100 * self.max_unreadable:g}% may be left out: {first}{'; ...' if count > 3 else ''}"
            )


class InMemory(ImageSet):
    """Images decoded once into one tensor.

    images: uint8 [n, 3, H, W]; sizes: int64 [n, 2], (height, width) of each within the canvas, default the whole of it.
    """

    in_memory = True

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: Sequence[str],
        sizes: Tensor | None = None,
        max_unreadable: float = MAX_UNREADABLE,
    ):
        super().__init__(labels, classes, max_unreadable)
        self.images = images
        self.sizes = torch.tensor(images.shape[2:]).expand(len(images), 2) if sizes is None else sizes

    def gather(self, index: Tensor) -> Sample:
        index = index.cpu()
        sizes = self.sizes[index]
        height, width = sizes.amax(dim=0).tolist()
        device = self.images.device
        images = self.images[:, :, :height, :width].index_select(0, index.to(device))
        return self.sample(images, sizes, index).to(device)

    def to(self, device: torch.device | str) -> InMemory:
        device = torch.device(device)
        if device.type == "cuda":
            free, needed = torch.cuda.mem_get_info(device)[0], self.images.nbytes
            if needed > SHARE_OF_GPU * free:
                log.info(
                    "the images stay on the CPU: %.1f GB, with %.1f GB free on %s", needed / 1e9, free / 1e9, device
                )
                return self
        moved = copy.copy(self)
        moved.images = self.images.to(device)
        return moved


class Streamed(ImageSet):
    """Images read and decoded when they are asked for.

    read:     gives the bytes of a named file; may be called from several threads and processes.
    names:    the n files.
    max_side: larger images are shrunk until their longer side has this many pixels.
    """

    in_memory = False
    names: Sequence[str]

    def __init__(
        self,
        read: Callable[[str], bytes],
        names: Sequence[str],
        labels: Tensor,
        classes: Sequence[str],
        max_side: int,
        max_unreadable: float = MAX_UNREADABLE,
    ):
        super().__init__(labels, classes, max_unreadable)
        self.read, self.names, self.max_side = read, names, max_side

    def gather(self, index: Tensor) -> Sample:
        sample, unreadable = self.fetch(index.tolist(), num_threads())
        self.record(unreadable)
        assert sample is not None
        return sample

    def fetch(self, numbers: Sequence[int], threads: int = 1) -> tuple[Sample | None, list[Unreadable]]:
        """What `gather` gives, and the unreadable files on the way, not yet recorded.

        A worker process calls this, and the parent records: the set's own list lives there. The sample is None where
        so many files are unreadable that `record` will raise.
        """
        rest = numbers[1:]
        found = self._readable(numbers[:1])
        _, first, _ = found[0]
        if threads == 1 or first is None or first[0].numel() < WORTH_THREADS:
            found += self._readable(rest)
        else:
            with ThreadPoolExecutor(threads) as pool:
                shares = list(pool.map(self._readable, (rest[i::threads] for i in range(threads))))
            found += [shares[i % threads][i // threads] for i in range(len(rest))]
        unreadable = [file for _, _, skipped in found for file in skipped]
        images = [image for _, image, _ in found if image is not None]
        if len(images) < len(found):
            return None, unreadable
        index = torch.tensor([number for number, _, _ in found], dtype=torch.int64)
        return self.sample(*pack(images), index), unreadable

    def decode(self, number: int) -> Tensor | Unreadable:
        """One image, uint8 [3, H, W], or what is wrong with it; from any thread or process."""
        return decode_file(self.read, self.names[number], self.max_side)

    def _readable(self, numbers: Sequence[int]) -> list[tuple[int, Tensor | None, list[Unreadable]]]:
        return [self._nearest_readable(number) for number in numbers]

    def _nearest_readable(self, number: int) -> tuple[int, Tensor | None, list[Unreadable]]:
        """The first readable image from `number` on, its number, and the unreadable files before it."""
        skipped: list[Unreadable] = []
        while len(skipped) <= self.most_unreadable(len(self)):
            image = self.decode(number)
            if isinstance(image, Tensor):
                return number, image, skipped
            skipped.append(image)
            number = (number + 1) % len(self)
        return number, None, skipped


class Source(ABC):
    """Where images come from. The constructor checks what it can without decoding anything.

    notes: what was decided about splits and labels, for the heading of a run; known once `train` has been called.
    """

    registry_kind: ClassVar[str] = "source"
    notes: Sequence[str] = ()
    _measured: Statistics | None = None

    @abstractmethod
    def train(self) -> ImageSet:
        """The training images; the same object at every call."""

    def val(self) -> ImageSet | None:
        """Held-out images, or None; the same object at every call."""
        return None

    def statistics(self) -> Statistics:
        """Mean and standard deviation of each channel, for pixels in [0, 1].

        Measured on training images held in memory; ImageNet's where they stream.
        """
        images = self.train()
        if not isinstance(images, InMemory):
            return KNOWN["imagenet"]
        # Once: some gigabytes take a while, and normalisation, checkpoints and the saved encoder all ask.
        self._measured = self._measured or measure(images.images, images.sizes)
        return self._measured


def _size(file_size: Callable[[str], int], name: str) -> int:
    """The bytes of a file; -1 where it is gone, which is for whoever reads it to say."""
    try:
        return file_size(name)
    except OSError:
        return -1


def stratified(labels: Tensor, count: int) -> Tensor:
    """Chooses `count` of n images evenly: each class keeps its share to within one image, strided within the class.

    labels: int64 [n]. Returns the chosen numbers, sorted: int64 [min(count, n)]. No randomness.
    """
    n = len(labels)
    if count >= n:
        return torch.arange(n)
    by_class = labels.argsort(stable=True)
    middles = (2 * torch.arange(count) + 1) * n // (2 * count)
    return by_class[middles].sort().values
