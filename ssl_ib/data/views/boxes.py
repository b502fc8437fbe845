"""Where a crop lies: boxes drawn at random, as torchvision's `RandomResizedCrop` draws them.

Shapes: B images, H x W pixels of the source.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import random
from ...errors import UserError

_TRIES = 10


def full_sizes(images: Tensor) -> Tensor:
    """The sizes of images without padding: int64 [B, 2], (H, W) in each row, on the CPU.

    Raises UserError where they are no images [B, C, H, W] but films.
    """
    if images.ndim != 4:
        raise UserError(
            f"these views are of images [C, H, W], and the source has films {list(images.shape[1:])}: choose views of "
            "films, such as views=moving_mnist, or another source"
        )
    return torch.tensor(images.shape[-2:]).expand(len(images), 2)


def sample_boxes(keys: Tensor, sizes: Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> Tensor:
    """Boxes of random area, shape and place, distributed as torchvision's `RandomResizedCrop`.

    The area is uniform in `scale` times the image's, width / height log-uniform in `ratio`. The first of ten tries that
    fits is taken; where none does, the largest centred box whose shape lies within `ratio`.
    keys: int64 [B]; sizes: int64 [B, 2], (height, width). Returns int64 [B, 4]: (top, left, height, width).
    """
    draws = random.uniform(keys, 2 * _TRIES + 2).double()
    height, width = sizes[:, 0], sizes[:, 1]
    area = (height * width)[:, None] * (scale[0] + (scale[1] - scale[0]) * draws[:, :_TRIES])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = torch.exp(low + (high - low) * draws[:, _TRIES : 2 * _TRIES])
    tried = torch.stack([(area / shape).sqrt().round(), (area * shape).sqrt().round()], 2).long()
    fits = ((tried > 0) & (tried <= sizes[:, None])).all(2)
    first = fits.int().argmax(1)
    box = tried[torch.arange(len(keys), device=keys.device), first]

    tallest = torch.minimum(height, (width / ratio[0]).round().long())
    widest = torch.minimum(width, (height * ratio[1]).round().long())
    box = torch.where(fits.any(1, keepdim=True), box, torch.stack([tallest, widest], 1))
    room = sizes - box
    place = (draws[:, -2:] * (room + 1)).long()
    return torch.cat([torch.where(fits.any(1, keepdim=True), place, room // 2), box], 1)
