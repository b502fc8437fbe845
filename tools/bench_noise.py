"""Images for benchmarks on machines that have none: random pixels, as the source `noise` of tools/bench_train.py."""

from __future__ import annotations

import torch

from ssl_ib.config.hints import PositiveInt
from ssl_ib.config.registry import register_source
from ssl_ib.data.sources.base import InMemory, Source


@register_source("noise")
class Noise(Source):
    """Random pixels in `images` images of `size` x `size`, held in memory, without labels."""

    def __init__(self, images: PositiveInt = 2048, size: PositiveInt = 256):
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator)
        self._images = InMemory(pixels, torch.full((images,), -1), [])

    def train(self) -> InMemory:
        return self._images

    def val(self) -> None:
        return None

    def statistics(self):
        return (0.5,) * 3, (0.29,) * 3
