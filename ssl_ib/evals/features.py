"""Features of a whole set of images, computed once and cached, for the evaluations that need nothing else.

Shapes: B images a batch, n images in all, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor

from ..errors import UserError
from ..types import Sample


@torch.no_grad()
def extract(
    encode: Callable[[Tensor], Tensor],
    samples: Iterable[Sample],
    center: Callable[[Sample], Tensor],
    device: torch.device | str,
    amp: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Encodes every image once, without augmentation.

    encode:  plain views -> representations [B, D], or anything of more dimensions, which is flattened.
    samples: batches of raw images.
    center:  raw batch (already on `device`) -> the plain, normalised view, [B, 3, H, W] of images.
    amp:     the dtype to compute in where autocast allows; None leaves that to the autocast around the call, if any.

    Returns float32 features [n, D] and int64 labels [n], both on the CPU. Raises UserError where there is no image.
    """
    features, labels = [], []
    with nullcontext() if amp is None else torch.autocast(torch.device(device).type, amp):
        for sample in samples:
            encoded = encode(center(sample.to(device)))
            features.append(encoded.flatten(1).float().cpu())
            labels.append(sample.label.cpu())
    if not features:
        raise UserError("evaluation: expected at least one image, got an empty set")
    return torch.cat(features), torch.cat(labels)


def raw_pixels(samples: Iterable[Sample], center: Callable[[Sample], Tensor]) -> tuple[Tensor, Tensor]:
    """The normalised pixels as features [n, 3 H W], with their labels [n]: the floor any representation must clear."""
    return extract(lambda images: images, samples, center, "cpu")


def num_classes(*labels: Tensor) -> int:
    """One more than the largest of the labels (int64, any shape). Raises UserError where an image has none (-1)."""
    unknown = sum(int((part < 0).sum()) for part in labels)
    if unknown:
        total = sum(part.numel() for part in labels)
        raise UserError(f"evaluation: expected a label for every image, got {unknown} of {total} without one")
    return 1 + max(int(part.max()) for part in labels)
