"""Mean and standard deviation of the pixels of a set, by which views are normalised.

Shapes: n images, H x W pixels.
"""

from __future__ import annotations

import math
import re
from pathlib import PurePath

import torch
from torch import Tensor

from .. import distributed
from ..errors import UserError, nearest

#: Images that are summed at a time.
_CHUNK = 32

#: (mean, standard deviation), each one number a channel (red, green, blue), for pixels scaled to [0, 1].
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]

#: The values in common use. Grey sets have equal channels.
KNOWN: dict[str, Statistics] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.262)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion_mnist": ((0.2860, 0.2860, 0.2860), (0.3530, 0.3530, 0.3530)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mnist": ((0.1307, 0.1307, 0.1307), (0.3081, 0.3081, 0.3081)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
}

_OTHER_SPELLINGS = {"imagenet1k": "imagenet", "ilsvrc2012": "imagenet", "tinyimagenet200": "tiny_imagenet"}


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def recognise(path: str) -> str | None:
    """The known set that a folder or archive is named after (`data/CIFAR-10.tar.gz` -> "cifar10"), or None.

    The whole name has to match: "imagenette" is not "imagenet".
    """
    stem = _letters(PurePath(path).name.split(".")[0])
    return ({_letters(name): name for name in KNOWN} | _OTHER_SPELLINGS).get(stem)


def check(name: str | None) -> str | None:
    """`name` itself; raises UserError where it is given and no known set."""
    if name is not None and name not in KNOWN:
        raise UserError(f"source.statistics: unknown set {name!r}{nearest(name, KNOWN)}")
    return name


def measure(images: Tensor, sizes: Tensor) -> Statistics:
    """Statistics of images uint8 [n, 3, H, W] of sizes int64 [n, 2], padded with zeros, which do not count.

    Several processes ask at once, and each reads its share of the pixels. Sums are of whole numbers, so that they do
    not depend on how many there are. A standard deviation is at least 1/255, so that one can divide by it.
    """
    sums = distributed.shared(_sums, images.split(_CHUNK))
    total, squares = (torch.tensor(column, dtype=torch.int64).sum(0).tolist() for column in zip(*sums, strict=True))
    # Python's whole numbers have no largest one.
    whole = 255 * int(sizes.prod(dim=1).sum())
    count = whole // 255
    mean = tuple(x / whole for x in total)
    deviation = tuple(max(math.sqrt(count * xx - x * x), count) / whole for x, xx in zip(total, squares, strict=True))
    return mean, deviation


def _sums(images: Tensor) -> tuple[list[int], list[int]]:
    """The sum of the pixels of each channel, and that of their squares."""
    pixels = images.to(torch.int32)
    return pixels.sum((0, 2, 3)).tolist(), pixels.square().sum((0, 2, 3)).tolist()
