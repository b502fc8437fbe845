"""Counter-based random numbers: pure functions of (seed, epoch, image index, stream), vectorised over images.

A draw depends on its key alone, never on the batch it came in, the rank, the world size, the number of workers or
the device, so the same image gets the same view and the same mask however the run is arranged, and a resumed run
needs no generator state. The integers come from SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in wrapping int64
arithmetic, which torch computes alike on every device.

Shapes: B images, n draws an image.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """A 64-bit constant as the int64 that has its bits (torch has no uint64 arithmetic)."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's >> copies the sign bit)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def fold(keys: Tensor, value: int | Tensor) -> Tensor:
    """Derives an independent key from each key and an integer (a stream, a view, an epoch).

    keys: int64 [B] or a scalar tensor; value: int or int64 tensor that broadcasts with it. Returns int64, broadcast.
    """
    return _mix((keys ^ _mix(torch.as_tensor(value, device=keys.device) + _GOLDEN)) + _GOLDEN)


def image_keys(seed: int, epoch: int, index: Tensor, stream: int = 0) -> Tensor:
    """One key an image: index int64 [B] -> keys int64 [B]. `stream` separates views, masks and other uses."""
    base = fold(fold(torch.zeros((), dtype=torch.int64, device=index.device), seed), epoch)
    return fold(fold(base.expand_as(index), index.to(torch.int64)), stream)


def bits(keys: Tensor, n: int) -> Tensor:
    """n independent 64-bit draws a key: keys [B] -> int64 [B, n]."""
    counter = torch.arange(1, n + 1, device=keys.device, dtype=torch.int64) * _GOLDEN
    return _mix(keys[:, None] + counter)


def uniform(keys: Tensor, n: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """n draws a key, uniform: keys [B] -> float32 [B, n] in [0, 1), or in [low, high]; the same on every device."""
    unit = _shift(bits(keys, n), 40).to(torch.float32) * 2.0**-24
    return unit if (low, high) == (0.0, 1.0) else low + (high - low) * unit


def randint(keys: Tensor, n: int, high: int | Tensor) -> Tensor:
    """n integers a key, uniform in [0, high): keys [B] -> int64 [B, n]; `high` is an int or broadcasts to [B, n]."""
    # 31 random bits: the bias of the remainder is below high / 2^31.
    return _shift(bits(keys, n), 33) % high


def permutation(keys: Tensor, n: int) -> Tensor:
    """One uniform permutation of 0..n-1 a key: keys [B] -> int64 [B, n]."""
    # 63 bits make ties (which a stable sort would resolve in favour of the lower index) practically impossible.
    return _shift(bits(keys, n), 1).argsort(dim=1, stable=True)


def shuffled(seed: int, epoch: int, n: int) -> Tensor:
    """The order in which an epoch visits n images: int64 [n], on the CPU."""
    zero = torch.zeros(1, dtype=torch.int64)
    return permutation(image_keys(seed, epoch, zero, stream=-1), n)[0]


def shuffled_nearby(seed: int, epoch: int, part: Tensor, buffer: int) -> Tensor:
    """An order that goes through one part after another, so that few parts are needed at a time: int64 [n].

    The parts (shards) are shuffled and laid end to end, and each image moves back by up to `buffer` places. Any stretch
    of the order so reads from parts that lie within `buffer` images of one another, plus the two at its ends.

    part: the part of each of n images, int64 [n], ascending.
    """
    parts, sizes = part.unique_consecutive(return_counts=True)
    order = shuffled(seed, epoch, len(parts))
    begins = torch.empty_like(sizes)
    begins[order] = sizes[order].cumsum(0) - sizes[order]
    index = torch.arange(len(part))
    place = (begins - (sizes.cumsum(0) - sizes)).repeat_interleave(sizes) + index
    moved = uniform(image_keys(seed, epoch, index, stream=-2), 1)[:, 0].double() * buffer
    return (place + moved).argsort(stable=True)
