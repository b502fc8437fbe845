"""Handwritten digits that need no download: scikit-learn carries them."""

from __future__ import annotations

from functools import cached_property

import torch
from torch.nn.functional import interpolate

from ...config.hints import PositiveInt
from ...config.registry import register_source
from ...device import require_memory
from .base import InMemory, Source, stratified

#: Every fifth digit is held out.
_HELD_OUT = 0.2


@register_source("digits")
class Digits(Source):
    """The 1,797 8x8 digits embedded in scikit-learn (UCI's optical recognition set), enlarged and in RGB.

    80 % train, 20 % held out, stratified and always the same. Statistics are measured.

    size:  side of the images in pixels (bilinear).
    limit: use only so many training images, stratified by class.
    """

    def __init__(self, size: PositiveInt = 16, limit: PositiveInt | None = None):
        self.size, self.limit = size, limit

    def train(self) -> InMemory:
        return self._sets[0]

    def val(self) -> InMemory:
        return self._sets[1]

    @cached_property
    def _sets(self) -> tuple[InMemory, InMemory]:
        from sklearn.datasets import load_digits

        data = load_digits()
        labels = torch.from_numpy(data.target).to(torch.int64)
        require_memory(4.0 * len(labels) * self.size**2, f"source.size: digits of {self.size:,} x {self.size:,} pixels")
        # 17 levels of ink, 0..16.
        ink = torch.from_numpy(data.images).to(torch.float32)[:, None] * (255 / 16)
        ink = interpolate(ink, size=(self.size, self.size), mode="bilinear", antialias=True)
        images = ink.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        held_out[stratified(labels, round(_HELD_OUT * len(labels)))] = True
        classes = [str(name) for name in data.target_names]
        train, val = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
        if self.limit is not None:
            train = train[stratified(labels[train], self.limit)]
        train, val = (InMemory(images[rows].contiguous(), labels[rows], classes) for rows in (train, val))
        return train, val
