"""The views of InfoMin and of the methods it is compared with, with the numbers of their reference code (PyContrast),
and the constructions of its studies. As in recipes.py, `strength` multiplies the jitter.
"""

from __future__ import annotations

from ...config.hints import Count, CropRatio, NonNegative, Positive, PositiveInt, Probability
from ...config.registry import register_views
from ...errors import UserError
from ...ops.pixels.resample import Interpolation
from .augment import Augment, Crops
from .colour_spaces import Space
from .jigsaw import CropsAndJigsaw, Jigsaw
from .rand_augment import OPS, PLAIN_OPS, RandAugment
from .recipes import Scale
from .splits import ColourSplit, FrequencySplit


def _jitter(strength: float, *base: float) -> tuple[float, ...]:
    return tuple(strength * number for number in base)


@register_views("infomin")
def infomin(
    size: PositiveInt = 224,
    scale: Scale = (0.2, 1.0),
    strength: NonNegative = 1.0,
    jitter_p: Probability = 0.8,
    blur_p: Probability = 0.5,
    grey_p: Probability = 0.2,
    rand_augment: Count = 2,
    magnitude: NonNegative = 10.0,
    magnitude_std: NonNegative = 0.5,
    op_p: Probability = 0.5,
    ops: tuple[str, ...] = OPS,
    op_strengths: dict[str, float] | None = None,
    jigsaw: bool = True,
    jigsaw_size: PositiveInt = 255,
    jigsaw_patch: PositiveInt = 64,
    jigsaw_grid: PositiveInt = 3,
    jigsaw_scale: Scale = (0.6, 1.0),
    crop_ratio: CropRatio = 0.875,
    interpolation: Interpolation = "bilinear",
    flip: Probability = 0.5,
) -> Crops:
    """Two views alike for query and key, and by default a JigSaw view (Tian et al., InfoMin, 2020).

    In order: crop, flip, jitter (.8, .8, .8, .2), blur, RandAugment, grey.

    rand_augment:  operations of RandAugment an image; 0 for none. Each has a magnitude of its own, normal with mean
                   `magnitude` and deviation `magnitude_std`, clipped to [0, 10], and fires with probability `op_p`.
    ops:           the operations that are drawn from.
    op_strengths:  what an operation does at magnitude 10, by its name, such as {rotate: 15}; the others do what they do
                   in timm (see ops/pixels/levels.py).
    jigsaw:        the third view: jigsaw_grid x jigsaw_grid squares of jigsaw_patch pixels, shuffled, each cut from its
                   cell of a crop of jigsaw_size pixels.
    """
    drawn = RandAugment(rand_augment, magnitude, magnitude_std, op_p, ops, op_strengths or {})
    augment = Augment(
        size, scale, flip=flip, jitter=_jitter(strength, 0.8, 0.8, 0.8, 0.2), jitter_p=jitter_p, grey_p=grey_p,
        blur_p=blur_p, interpolation=interpolation, operations=("jitter", "blur", "rand_augment", "grey"),
        rand_augment=drawn,
    )  # fmt: skip
    parts = Jigsaw(jigsaw_size, jigsaw_patch, jigsaw_grid, jigsaw_scale, flip, interpolation) if jigsaw else None
    return Crops([augment] * 2, crop_ratio) if parts is None else CropsAndJigsaw([augment] * 2, parts, crop_ratio)


def _instance(
    size: int,
    scale: Scale,
    strength: float,
    jitter_p: float,
    grey_p: float,
    interpolation: Interpolation,
    flip: float,
) -> Augment:
    """What InstDis, MoCo v1 and PIRL do to a view."""
    jitter = _jitter(strength, 0.4, 0.4, 0.4, 0.4)
    return Augment(size, scale, flip=flip, jitter=jitter, jitter_p=jitter_p, grey_p=grey_p, interpolation=interpolation)


@register_views("instdis")
def instdis(
    size: PositiveInt = 224,
    scale: Scale = (0.08, 1.0),
    strength: NonNegative = 1.0,
    jitter_p: Probability = 1.0,
    grey_p: Probability = 0.2,
    crop_ratio: CropRatio = 0.875,
    interpolation: Interpolation = "bilinear",
    flip: Probability = 0.5,
) -> Crops:
    """One view, to be compared with a memory bank: jitter (.4, .4, .4, .4), grey (Wu et al., InstDis, 2018)."""
    return Crops([_instance(size, scale, strength, jitter_p, grey_p, interpolation, flip)], crop_ratio)


@register_views("moco_v1")
def moco_v1(
    size: PositiveInt = 224,
    scale: Scale = (0.2, 1.0),
    strength: NonNegative = 1.0,
    jitter_p: Probability = 1.0,
    grey_p: Probability = 0.2,
    crop_ratio: CropRatio = 0.875,
    interpolation: Interpolation = "bilinear",
    flip: Probability = 0.5,
) -> Crops:
    """Two views alike: jitter (.4, .4, .4, .4), grey (He et al., MoCo, 2020)."""
    return Crops([_instance(size, scale, strength, jitter_p, grey_p, interpolation, flip)] * 2, crop_ratio)


@register_views("pirl")
def pirl(
    size: PositiveInt = 224,
    scale: Scale = (0.08, 1.0),
    strength: NonNegative = 1.0,
    jitter_p: Probability = 1.0,
    grey_p: Probability = 0.2,
    jigsaw_size: PositiveInt = 255,
    jigsaw_patch: PositiveInt = 64,
    jigsaw_grid: PositiveInt = 3,
    jigsaw_scale: Scale = (0.6, 1.0),
    crop_ratio: CropRatio = 0.875,
    interpolation: Interpolation = "bilinear",
    flip: Probability = 0.5,
) -> Crops:
    """A view as InstDis has it and a JigSaw view (Misra and van der Maaten, PIRL, 2020); jigsaw_*: as for infomin."""
    augment = _instance(size, scale, strength, jitter_p, grey_p, interpolation, flip)
    parts = Jigsaw(jigsaw_size, jigsaw_patch, jigsaw_grid, jigsaw_scale, flip, interpolation)
    return CropsAndJigsaw([augment], parts, crop_ratio)


@register_views("cmc")
def cmc(
    space: Space = "ydbdr",
    size: PositiveInt = 224,
    scale: Scale = (0.08, 1.0),
    strength: NonNegative = 1.0,
    jitter_p: Probability = 1.0,
    blur_p: Probability = 0.0,
    rand_augment: Count = 0,
    magnitude: NonNegative = 10.0,
    magnitude_std: NonNegative = 0.5,
    op_p: Probability = 0.5,
    ops: tuple[str, ...] = PLAIN_OPS,
    op_strengths: dict[str, float] | None = None,
    crop_ratio: CropRatio = 0.875,
    interpolation: Interpolation = "bilinear",
    flip: Probability = 0.5,
    mean: tuple[float, float, float] | None = None,
    std: tuple[Positive, Positive, Positive] | None = None,
) -> ColourSplit:
    """The first channel of a colour space and the other two, of one image with jitter (.4, .4, .4, .1) (Tian et al.,
    Contrastive Multiview Coding, 2020). Its own RandAugment leaves colours alone, and is off by default.

    space:        rgb, ydbdr, lab, ycbcr or hsv, in scikit-image's units.
    rand_augment, magnitude, magnitude_std, op_p, ops, op_strengths: as for infomin.
    mean, std:    what the three channels are normalised with; measured on training images where they are not given.
                  The reference code has mean [0.457, -0.082, -0.052] and std [0.5, 1.331, 1.333] for ydbdr.
    """
    augment = Augment(
        size, scale, flip=flip, jitter=_jitter(strength, 0.4, 0.4, 0.4, 0.1), jitter_p=jitter_p, blur_p=blur_p,
        interpolation=interpolation, operations=("jitter", "blur", "rand_augment"),
        rand_augment=RandAugment(rand_augment, magnitude, magnitude_std, op_p, ops, op_strengths or {}),
    )  # fmt: skip
    if (mean is None) != (std is None):
        raise UserError(f"mean and std: expected both or none, got {mean} and {std}")
    return ColourSplit(augment, space, crop_ratio, None if mean is None else (mean, std))


@register_views("colour_split")
def colour_split(
    space: Space = "ydbdr",
    size: PositiveInt = 64,
    scale: Scale = (0.2, 1.0),
    crop_ratio: CropRatio = 1.0,
    interpolation: Interpolation = "bilinear",
    flip: Probability = 0.5,
) -> ColourSplit:
    """The first channel of a colour space and the other two, of one crop (Tian et al., InfoMin, 2020).

    space: rgb, ydbdr, lab, ycbcr or hsv, in scikit-image's units; its statistics are measured on training images.
    """
    return ColourSplit(Augment(size, scale, flip=flip, interpolation=interpolation), space, crop_ratio)


@register_views("frequency_split")
def frequency_split(
    sigma: Positive = 0.7,
    size: PositiveInt = 64,
    scale: Scale = (0.2, 1.0),
    crop_ratio: CropRatio = 1.0,
    interpolation: Interpolation = "bilinear",
    flip: Probability = 0.5,
) -> FrequencySplit:
    """One crop blurred, and what the blur took away (Tian et al., InfoMin, 2020).

    sigma: of the Gaussian blur, in pixels of the view: the smaller, the more the first view has.
    """
    return FrequencySplit(Augment(size, scale, flip=flip, interpolation=interpolation), sigma, crop_ratio)
