"""Factors of an image that a probe looks for: what a source knows of its images, and what an augmentation changes.

A factor of the augmentation is set by hand: each image gets one of a few levels, whatever else it shows, and is then
made the plain view. The operations are those of the views recipes.

Shapes: B images, H x W pixels of the source, n images in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import UserError, nearest
from ..evals.protocol import Split
from ..ops.pixels import colour, resample
from ..types import Sample

#: The share of each side that a moved window spans.
WINDOW = 0.7
#: Levels between the quartiles of a number that a source knows of its images.
QUARTERS = 4
CLASS = "class"


@dataclass(frozen=True)
class Levels:
    """The levels of a factor of the augmentation, and what makes an image be at one.

    names: of the levels. apply: images float32 [B, C, H, W] in [0, 1] and the level's number -> the same; where they
    are turned, H and W change places.
    """

    names: tuple[str, ...]
    apply: Callable[[Tensor, int], Tensor]


def _window(images: Tensor, share: float, down: float, right: float) -> Tensor:
    """A window of a share of each side, resized to the whole again.

    down and right, in [0, 1], say where it is, from the top left to the bottom right.
    """
    sides = images.shape[-2:]
    height, width = (max(round(share * side), 1) for side in sides)
    top, left = round(down * (sides[0] - height)), round(right * (sides[1] - width))
    window = images[..., top : top + height, left : left + width]
    return images if share == 1 else interpolate(window, size=sides, mode="bilinear", antialias=True)


def _jittered(images: Tensor, kind: int, amount: float) -> Tensor:
    """Brightness, contrast or saturation times an amount, or the hue turned by it."""
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(len(images), 1)
    factors[:, kind] = amount
    return colour.colour_jitter(images, factors, torch.arange(4).repeat(len(images), 1))


def _blurred(images: Tensor, share: float) -> Tensor:
    """Gaussian blur of a width that is a share of the shorter side."""
    side = min(images.shape[-2:])
    if not share:
        return images
    sigma = torch.full((len(images),), share * side)
    return resample.gaussian_blur(images, sigma, min(max(round(3 * share * side), 1), side - 1))


_PLACES = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
_SIZES, _TURNS, _BRIGHTNESS, _CONTRAST = (1.0, 0.8, 0.6, 0.4), (0.0, 0.25, 0.5, -0.25), (0.6, 1.0, 1.4), (0.6, 1.0, 1.4)
_BLURS = (0.0, 1 / 64, 1 / 32)

#: The factors of the augmentation.
AUGMENTATION: dict[str, Levels] = {
    "crop_position": Levels(
        ("centre", "top left", "top right", "bottom left", "bottom right"),
        lambda x, k: _window(x, WINDOW, *_PLACES[k]),
    ),
    "crop_size": Levels(
        tuple(f"{100 * size:.0f} % of a side" for size in _SIZES), lambda x, k: _window(x, _SIZES[k], 0.5, 0.5)
    ),
    "hue": Levels(
        ("0", "1/4 turn", "1/2 turn", "3/4 turn"), lambda x, k: _jittered(x, colour.HUE, _TURNS[k]) if k else x
    ),
    "rotation": Levels(("0", "90", "180", "270 degrees"), lambda x, k: torch.rot90(x, k, (-2, -1))),
    "brightness": Levels(
        tuple(f"x {amount:g}" for amount in _BRIGHTNESS), lambda x, k: _jittered(x, colour.BRIGHTNESS, _BRIGHTNESS[k])
    ),
    "contrast": Levels(
        tuple(f"x {amount:g}" for amount in _CONTRAST), lambda x, k: _jittered(x, colour.CONTRAST, _CONTRAST[k])
    ),
    "blur": Levels(("none", "1/64 of a side", "1/32 of a side"), lambda x, k: _blurred(x, _BLURS[k])),
    "flip": Levels(("no", "yes"), lambda x, k: x.flip(-1) if k else x),
    "grey": Levels(("no", "yes"), lambda x, k: colour.greyscale(x) if k else x),
}


def known(train: Split, val: Split) -> dict[str, tuple[Tensor, Tensor]]:
    """The class and the source's own factors of the images, each int64 [n] and [m].

    A number is cut at the quartiles of the training images; of several numbers each is a factor, named `NAME.0` and so
    on. A factor with the name of one of the augmentation's is called `source.NAME`.
    """
    found = {CLASS: (train.labels, val.labels)}
    for name, values in train.images.factors.items():
        name = f"source.{name}" if name in AUGMENTATION or name == CLASS else name
        values, others = values[train.index], val.images.factors[name.removeprefix("source.")][val.index]
        if not values.is_floating_point():
            found[name] = (values, others)
            continue
        values, others = (x.view(len(x), -1) for x in (values, others))
        for number in range(values.shape[1]):
            cuts = torch.quantile(values[:, number], torch.arange(1, QUARTERS) / QUARTERS)
            part = f"{name}.{number}" if values.shape[1] > 1 else name
            found[part] = tuple(torch.bucketize(x[:, number].contiguous(), cuts) for x in (values, others))
    return found


def chosen(names: list[str] | None, own: Mapping[str, object]) -> list[str]:
    """The factors that are asked for, all where none is named. Raises UserError for one that there is not."""
    choices = [*own, *AUGMENTATION]
    for name in names or ():
        if name not in choices:
            raise UserError(f"--factors: unknown factor {name!r}{nearest(name, choices)}")
    return list(dict.fromkeys(names)) if names else choices


def drawn(count: int, levels: int, seed: int) -> Tensor:
    """A level for each of some images by chance, each level as often as the others but for one: int64 [count]."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return (torch.arange(count) % levels)[order]


def at_levels(sample: Sample, levels: Tensor, factor: Levels, plain: Callable[[Sample], Tensor]) -> Tensor:
    """The plain views of images at levels int64 [B], as `plain` makes them: [B, ...]."""
    views: list[Tensor | None] = [None] * len(sample)
    sizes = sample.extra.get("size")
    for level in levels.unique().tolist():
        rows = (levels == level).nonzero()[:, 0]
        # Images of different sizes lie padded, and what is made of them must not see the padding.
        groups = [rows] if sizes is None else rows.split(1)
        for group in groups:
            images = sample.images[group.to(sample.images.device)]
            if sizes is not None:
                height, width = sizes[group[0]].tolist()
                images = images[..., :height, :width]
            changed = _changed(images, factor, level)
            made = plain(replace(_rows(sample, group), images=changed))
            for row, view in zip(group.tolist(), made, strict=True):
                views[row] = view
    return torch.stack(views)


def _changed(images: Tensor, factor: Levels, level: int) -> Tensor:
    """uint8 [B, ..., 3, H, W] -> the same with the factor at a level; frames of a film are changed alike."""
    flat = images.flatten(0, -4).float() / 255
    made = factor.apply(flat, level)
    return (made * 255).round().clamp(0, 255).to(torch.uint8).unflatten(0, images.shape[:-3])


def _rows(sample: Sample, rows: Tensor) -> Sample:
    extra = {k: v[rows.to(v.device)] for k, v in sample.extra.items() if k != "size"}
    return Sample(sample.images, sample.index[rows], sample.label[rows.to(sample.label.device)], extra)
