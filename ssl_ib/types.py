"""What flows through one step: Sample -> Batch -> outputs -> Loss.

Shapes: B batch, V views, N masks an image, L patches, K kept patches, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """A batch as the loader gives it: raw images, before any view is drawn.

    images: uint8 [B, 3, H, W], smaller images in the top-left corner, padded with zeros; or [B, ...] of any further
            shape that the views recipe knows, such as the frames of films.
    index:  int64 [B], the image's number in its set; it keys every random draw. It stays on the CPU, where the
            parameters of the draws are made, so that no device waits for them.
    label:  int64 [B], -1 where unknown.
    extra:  further tensors with leading dimension B; `size` int64 [B, 2] gives (height, width) where images are padded,
            and stays on the CPU too.
    factors: what is known of how the images came about, by name, such as where an object lies: int64 [B] for classes,
            float32 [B, d] for numbers.
    """

    images: Tensor
    index: Tensor
    label: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def unlabelled(cls, images: Tensor, sizes: Tensor | None = None) -> Sample:
        """Images of which nothing else is known, numbered from 0; sizes int64 [B, 2] where they are padded."""
        extra = {} if sizes is None else {"size": sizes}
        return cls(images, torch.arange(len(images)), torch.full((len(images),), -1), extra)

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str) -> Sample:
        """The same sample on `device`, all but its index and `extra["size"]`, which decide how views are drawn."""
        images, label = (x.to(device, non_blocking=True) for x in (self.images, self.label))
        extra = {k: v if k == "size" else v.to(device, non_blocking=True) for k, v in self.extra.items()}
        factors = {k: v.to(device, non_blocking=True) for k, v in self.factors.items()}
        return Sample(images, self.index, label, extra, factors)

    def pin_memory(self) -> Sample:
        """The same sample in memory from which a GPU copies while the program goes on."""
        extra, factors = ({k: v.pin_memory() for k, v in named.items()} for named in (self.extra, self.factors))
        return Sample(self.images.pin_memory(), self.index, self.label.pin_memory(), extra, factors)

    def __getitem__(self, rows: slice) -> Sample:
        """The sample's rows `rows`: a micro-batch."""
        extra, factors = ({k: v[rows] for k, v in named.items()} for named in (self.extra, self.factors))
        return Sample(self.images[rows], self.index[rows], self.label[rows], extra, factors)


@dataclass(frozen=True)
class Masks:
    """Which patches of each image stay visible. True in `mask` means hidden.

    keep: int64 [B, N, K], the visible patches' numbers (row-major over the grid); one K a batch.
    mask: bool [B, N, L].
    """

    keep: Tensor
    mask: Tensor

    @classmethod
    def from_keep(cls, keep: Tensor, num_patches: int) -> Masks:
        """Masks from the visible patches: keep int64 [B, K] or [B, N, K] with values in [0, num_patches)."""
        keep = keep[:, None] if keep.ndim == 2 else keep
        mask = torch.ones(*keep.shape[:2], num_patches, dtype=torch.bool, device=keep.device)
        return cls(keep, mask.scatter_(2, keep, False))

    @classmethod
    def from_noise(cls, noise: Tensor, num_kept: int) -> Masks:
        """MAE's masks, each row ascending: the `num_kept` smallest stay visible; noise [B, L] or [B, N, L]."""
        keep = noise.argsort(dim=-1, stable=True)[..., :num_kept].sort(dim=-1).values
        return cls.from_keep(keep, noise.shape[-1])


@dataclass(frozen=True)
class Batch:
    """What the model sees; its forward is deterministic in it.

    views: V tensors, each with leading dimension B, such as [B, 3, H, W], normalised.
    masks: one `Masks` or None a view.
    index, label: int64 [B], as in Sample; the label is -1 too where a loss is not to read it.
    factors: as in Sample.
    """

    views: list[Tensor]
    masks: list[Masks | None]
    index: Tensor
    label: Tensor
    factors: dict[str, Tensor] = field(default_factory=dict)

    def unmasked(self) -> Batch:
        """The same batch with every patch visible."""
        return replace(self, masks=[None] * len(self.masks))


@dataclass(frozen=True)
class Progress:
    """Where the run stands. `step` counts finished optimiser steps, `epoch` the current epoch from 0."""

    step: int
    epoch: int
    total_steps: int
    total_epochs: int
    seed: int = 0

    @property
    def steps_per_epoch(self) -> float:
        return self.total_steps / max(self.total_epochs, 1)

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return self.step / max(self.total_steps, 1)


@dataclass(frozen=True)
class Loss:
    """A criterion's answer: the scalar to minimise, and the terms it was made of.

    terms:   raw (unweighted) scalars by name.
    weights: what each term was multiplied by in `total`, a number or a 0-d tensor; a term without is only watched.
    """

    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float | Tensor] = field(default_factory=dict)

    @classmethod
    def weighted(cls, **terms: tuple[Tensor, float | Tensor]) -> Loss:
        """Sum of weight x term: `Loss.weighted(rec=(rec, 1.0), contrastive=(nce, 0.5))`."""
        total: Tensor = sum(weight * value for value, weight in terms.values())  # type: ignore[assignment]
        return cls(total, {k: v for k, (v, _) in terms.items()}, {k: w for k, (_, w) in terms.items()})
