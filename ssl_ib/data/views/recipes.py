"""The named recipes of views, with the numbers of their papers; `size`, `scale` and the rest may be changed.

Every recipe crops, and flips half of the images (SimCLR's and the plain one let `flip` change that, for digits and the
like). `strength` multiplies the jitter of brightness, contrast, saturation and hue; `crop_ratio` belongs to the
evaluation view: its size over the side that the shorter side is resized to.
Pairs of probabilities are for the first and the second view.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from ...config.hints import Count, CropRatio, NonNegative, PositiveInt, Probability
from ...config.registry import register_views
from ...errors import UserError
from ...ops.pixels.resample import Interpolation
from .augment import Augment, Crops

Share = Annotated[float, Interval(gt=0, le=1)]
Scale = tuple[Share, Share]
Probabilities = tuple[Probability, Probability]


def _two_views(
    size: int,
    scale: Scale,
    jitter: tuple[float, float, float, float],
    strength: float,
    jitter_p: float,
    grey_p: float,
    blur_p: Probabilities,
    solarise_p: Probabilities,
    crop_ratio: float,
    interpolation: Interpolation,
    flip: float = 0.5,
) -> Crops:
    augments = [
        Augment(
            size,
            scale,
            flip=flip,
            jitter=tuple(strength * base for base in jitter),
            jitter_p=jitter_p,
            grey_p=grey_p,
            blur_p=blur,
            solarise_p=solarise,
            interpolation=interpolation,
        )
        for blur, solarise in zip(blur_p, solarise_p, strict=True)
    ]
    return Crops(augments, crop_ratio)


@register_views("simclr")
def simclr(
    size: PositiveInt = 224,
    scale: Scale = (0.08, 1.0),
    strength: NonNegative = 1.0,
    jitter_p: Probability = 0.8,
    grey_p: Probability = 0.2,
    blur_p: Probability = 0.5,
    crop_ratio: CropRatio = 0.875,
    interpolation: Interpolation = "bicubic",
    flip: Probability = 0.5,
) -> Crops:
    """Two views alike: strong colour jitter (.8, .8, .8, .2), grey, blur (Chen et al., SimCLR, appendix A)."""
    jitter, blur, never = (0.8, 0.8, 0.8, 0.2), (blur_p, blur_p), (0.0, 0.0)
    return _two_views(size, scale, jitter, strength, jitter_p, grey_p, blur, never, crop_ratio, interpolation, flip)


@register_views("simclr_cifar")
def simclr_cifar(
    size: PositiveInt = 32,
    scale: Scale = (0.08, 1.0),
    strength: NonNegative = 0.5,
    jitter_p: Probability = 0.8,
    grey_p: Probability = 0.2,
    crop_ratio: CropRatio = 1.0,
    interpolation: Interpolation = "bicubic",
    flip: Probability = 0.5,
) -> Crops:
    """SimCLR's views of small images: half the jitter, no blur (SimCLR, appendix B.9)."""
    return simclr(size, scale, strength, jitter_p, grey_p, 0.0, crop_ratio, interpolation, flip)


@register_views("moco_v2")
def moco_v2(
    size: PositiveInt = 224,
    scale: Scale = (0.2, 1.0),
    strength: NonNegative = 1.0,
    jitter_p: Probability = 0.8,
    grey_p: Probability = 0.2,
    blur_p: Probability = 0.5,
    crop_ratio: CropRatio = 0.875,
    interpolation: Interpolation = "bilinear",
) -> Crops:
    """Two views alike: jitter (.4, .4, .4, .1), grey, blur (Chen et al., MoCo v2)."""
    jitter, blur, never = (0.4, 0.4, 0.4, 0.1), (blur_p, blur_p), (0.0, 0.0)
    return _two_views(size, scale, jitter, strength, jitter_p, grey_p, blur, never, crop_ratio, interpolation)


@register_views("barlow_twins")
@register_views("byol")
def byol(
    size: PositiveInt = 224,
    scale: Scale = (0.08, 1.0),
    strength: NonNegative = 1.0,
    jitter_p: Probability = 0.8,
    grey_p: Probability = 0.2,
    blur_p: Probabilities = (1.0, 0.1),
    solarise_p: Probabilities = (0.0, 0.2),
    crop_ratio: CropRatio = 0.875,
    interpolation: Interpolation = "bicubic",
) -> Crops:
    """Two unlike views: the first always blurred, the second at times solarised (Grill et al., BYOL, appendix B)."""
    jitter = (0.4, 0.4, 0.2, 0.1)
    return _two_views(size, scale, jitter, strength, jitter_p, grey_p, blur_p, solarise_p, crop_ratio, interpolation)


@register_views("byol_cifar")
def byol_cifar(
    size: PositiveInt = 32,
    scale: Scale = (0.08, 1.0),
    strength: NonNegative = 1.0,
    jitter_p: Probability = 0.8,
    grey_p: Probability = 0.2,
    solarise_p: Probabilities = (0.0, 0.2),
    crop_ratio: CropRatio = 1.0,
    interpolation: Interpolation = "bicubic",
) -> Crops:
    """BYOL's views of small images: no blur; the second view is still solarised at times."""
    return byol(size, scale, strength, jitter_p, grey_p, (0.0, 0.0), solarise_p, crop_ratio, interpolation)


@register_views("dino")
def dino(
    size: PositiveInt = 224,
    scale: Scale = (0.4, 1.0),
    strength: NonNegative = 1.0,
    jitter_p: Probability = 0.8,
    grey_p: Probability = 0.2,
    blur_p: Probabilities = (1.0, 0.1),
    solarise_p: Probabilities = (0.0, 0.2),
    crop_ratio: CropRatio = 0.875,
    interpolation: Interpolation = "bicubic",
) -> Crops:
    """DINO's two global views: BYOL's, of larger crops (Caron et al., DINO, appendix)."""
    return byol(size, scale, strength, jitter_p, grey_p, blur_p, solarise_p, crop_ratio, interpolation)


@register_views("multi_crop")
def multi_crop(
    size: PositiveInt = 224,
    scale: Scale = (0.4, 1.0),
    num_global: PositiveInt = 2,
    local_size: PositiveInt = 96,
    local_scale: Scale = (0.05, 0.4),
    num_local: Count = 8,
    further_local: tuple[tuple[PositiveInt, PositiveInt, Share, Share], ...] = (),
    strength: NonNegative = 1.0,
    jitter_p: Probability = 0.8,
    grey_p: Probability = 0.2,
    blur_p: tuple[Probability, Probability, Probability] = (1.0, 0.1, 0.5),
    solarise_p: tuple[Probability, Probability, Probability] = (0.0, 0.2, 0.0),
    crop_ratio: CropRatio = 0.875,
    interpolation: Interpolation = "bicubic",
    flip: Probability = 0.5,
) -> Crops:
    """Global crops, then local ones: BYOL's augmentation (Caron et al., SwAV, 2020; DINO, 2021).

    A teacher sees the global crops alone. Probabilities of blur and solarisation are those of the first global crop, of
    the other global crops, and of the local ones. further_local: more groups of local crops, each (number, size,
    smallest and largest share of the image).
    """
    jitter = tuple(strength * base for base in (0.4, 0.4, 0.2, 0.1))

    def augment(side: int, share: Scale, kind: int, name: str) -> Augment:
        if share[0] > share[1]:
            raise UserError(f"{name}: expected 0 < low <= high <= 1, got {share}")
        return Augment(
            side, share, flip=flip, jitter=jitter, jitter_p=jitter_p, grey_p=grey_p, blur_p=blur_p[kind],
            solarise_p=solarise_p[kind], interpolation=interpolation,
        )  # fmt: skip

    augments = [augment(size, scale, min(number, 1), "scale") for number in range(num_global)]
    augments += [augment(local_size, local_scale, 2, "local_scale") for _ in range(num_local)]
    for number, side, *share in further_local:
        augments += [augment(side, tuple(share), 2, "further_local") for _ in range(number)]
    return Crops(augments, crop_ratio, num_global)


@register_views("plain")
def plain(
    size: PositiveInt = 224,
    scale: Scale = (0.2, 1.0),
    num_views: PositiveInt = 1,
    crop_ratio: CropRatio = 0.875,
    interpolation: Interpolation = "bicubic",
    flip: Probability = 0.5,
) -> Crops:
    """Crop and flip alone, as masked image modelling has it (He et al., MAE)."""
    return Crops([Augment(size, scale, flip=flip, interpolation=interpolation)] * num_views, crop_ratio)
