"""Features of a whole set of images, computed once and cached, for the evaluations that need nothing else.

Shapes: B images a batch, n images in all, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from .. import distributed
from ..data.sources.base import ImageSet
from ..errors import UserError
from ..types import Sample


@torch.no_grad()
def extract(
    encode: Callable[[Tensor], Tensor],
    images: ImageSet,
    index: Tensor,
    size: int,
    center: Callable[[Sample], Tensor],
    device: torch.device | str,
    amp: torch.dtype | None = None,
    show: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
) -> tuple[Tensor, Tensor]:
    """Encodes images once, without augmentation. The processes of a group share the batches, and all get all features.

    encode: plain views -> representations [B, D], or anything of more dimensions, which is flattened.
    index:  the numbers of the images to encode, int64 [n]; size: how many are encoded at a time.
    center: raw batch (already on `device`) -> the plain, normalised view, [B, 3, H, W] of images.
    amp:    the dtype to compute in where autocast allows; None leaves that to the autocast around the call, if any.
    show:   as for `distributed.shared_rows`.

    Returns float32 features [n, D] and int64 labels [n], both on the CPU. Raises UserError where there is no image.
    """
    if not len(index):
        raise UserError("evaluation: expected at least one image, got an empty set")

    def encoded(batch: Tensor) -> tuple[Tensor, Tensor]:
        sample = images.gather(batch)
        with nullcontext() if amp is None else torch.autocast(torch.device(device).type, amp):
            found = encode(center(sample.to(device)))
        return found.flatten(1).float().cpu(), sample.label.cpu()

    return distributed.shared_rows(encoded, index.split(size), show)


def raw_pixels(images: ImageSet, index: Tensor, size: int, center: Callable[[Sample], Tensor]) -> tuple[Tensor, Tensor]:
    """The normalised pixels as features [n, 3 H W], with their labels [n]: the floor any representation must clear."""
    return extract(lambda views: views, images, index, size, center, "cpu")


def num_classes(*labels: Tensor) -> int:
    """One more than the largest of the labels (int64, any shape). Raises UserError where an image has none (-1)."""
    unknown = sum(int((part < 0).sum()) for part in labels)
    if unknown:
        total = sum(part.numel() for part in labels)
        raise UserError(f"evaluation: expected a label for every image, got {unknown} of {total} without one")
    return 1 + max(int(part.max()) for part in labels)
