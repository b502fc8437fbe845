"""Views made of images: crop, resize and mirror, change colours, blur, and normalise, each image by its own numbers.

Shapes: B images, C channels, H x W pixels of the source, S pixels of a side of the view, N operations of RandAugment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from . import view_operators as operators
from .backend import automatic, choose, ran
from .pixels import colour, levels, resample

#: What may be done to a view after the crop. Where a view has them all, this is the order of most papers.
Operation = Literal["jitter", "grey", "blur", "solarise", "rand_augment"]

#: The operations that mix the three colours.
_COLOURED = frozenset({"jitter", "grey", "rand_augment"})


@dataclass(frozen=True)
class Parameters:
    """What was drawn for one view of B images; on the CPU.

    boxes:    int64 [B, 4], (top, left, height, width).
    flip:     bool [B].
    factors:  float32 [B, 4], brightness, contrast, saturation, hue; (1, 1, 1, 0) where there is no jitter.
    order:    int64 [B, 4], the order of the four.
    grey:     bool [B].
    sigma:    float32 [B], the blur's width in pixels; 0 where there is none.
    solarise: bool [B].
    ops:      the operations of RandAugment, where the view has it.
    """

    boxes: Tensor
    flip: Tensor
    factors: Tensor
    order: Tensor
    grey: Tensor
    sigma: Tensor
    solarise: Tensor
    ops: levels.Operations | None = None


@dataclass(frozen=True)
class Steps:
    """What is done to all images of a view, and in which order; Parameters has the numbers of each.

    size:          pixels of a side of the view.
    operations:    what is done after the flip, in this order.
    interpolation: of the resized crop.
    blur_radius:   pixels that the blur reaches to either side, below size.
    level_ops:     names of RandAugment's operations, as `Parameters.ops` numbers them.
    fill:          colour that RandAugment puts where an image has no pixels.
    """

    size: int
    operations: tuple[Operation, ...] = ()
    interpolation: resample.Interpolation = "bilinear"
    blur_radius: int = 1
    level_ops: tuple[str, ...] = ()
    fill: tuple[float, float, float] = (0.0, 0.0, 0.0)


def augment(
    images: Tensor,
    steps: Steps,
    drawn: Parameters,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A view of each image: uint8, or float32 in [0, 1], [B, C, H, W] -> `dtype` [B, C, S, S].

    In [0, 1], or where mean and std, C numbers each, are given, minus the mean and over the deviation. Nothing has a
    gradient. The backends draw the same view but for rounding: kernels/ssl_ib_kernels/augment.py says how far apart.
    Raises UserError for images that the steps cannot be done to.
    """
    if images.ndim != 4 or images.dtype not in (torch.uint8, torch.float32):
        raise UserError(
            f"augment: expected images [B, C, H, W] of uint8 or float32, got {images.dtype} {list(images.shape)}"
        )
    coloured = [operation for operation in steps.operations if operation in _COLOURED]
    if coloured and images.shape[1] != 3:
        raise UserError(f"augment: {coloured[0]} needs images of 3 channels, got {images.shape[1]}")
    backend = choose("augment", images, len(images) * images.shape[1] * steps.size**2, torch.float32)
    if backend == "auto":
        backend, _ = automatic("augment", images.device.type, torch.float32, None)
    if backend == "reference":
        ran("augment", "reference")
        view = resample.resized_crop(images, drawn.boxes, steps.size, drawn.flip, steps.interpolation).clamp_(0.0, 1.0)
        return _finished(view, steps.operations, steps, drawn, mean, std, dtype)
    joined = joining(steps)
    rest = steps.operations[len(joined) :]
    pixels, ops = images.detach(), drawn.ops if "rand_augment" in joined else None
    view = operators.augment(
        pixels,
        drawn.boxes,
        drawn.flip,
        drawn.factors,
        drawn.order,
        drawn.grey,
        drawn.sigma,
        drawn.solarise,
        None if ops is None else ops.op,
        None if ops is None else ops.value,
        None if rest else mean,
        None if rest else std,
        steps.size,
        steps.interpolation == "bicubic",
        list(joined),
        steps.blur_radius,
        list(steps.level_ops) if ops is not None else [],
        torch.float32 if rest else dtype,
        backend,
    )
    return _finished(view, rest, steps, drawn, mean, std, dtype) if rest else view


def joining(steps: Steps) -> tuple[Operation, ...]:
    """The first operations, which the kernels do together with the crop; the rest run in plain torch after them.

    A jitter after a blur does not join, because its contrast would need one more pass over the view. RandAugment joins
    if each of its operations changes every pixel by itself. What comes after an operation that does not join does not
    join either.
    """
    for number, operation in enumerate(steps.operations):
        late = operation == "jitter" and "blur" in steps.operations[:number]
        if late or (operation == "rand_augment" and not levels.PIXELWISE.issuperset(steps.level_ops)):
            return steps.operations[:number]
    return steps.operations


def _finished(
    view: Tensor,
    operations: tuple[Operation, ...],
    steps: Steps,
    drawn: Parameters,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The view after these operations, normalised, in plain torch."""
    for operation in operations:
        view = _OPERATIONS[operation](view, steps, drawn)
    if mean is not None and std is not None:
        view = view.sub_(mean.to(view.device).view(-1, 1, 1)).div_(std.to(view.device).view(-1, 1, 1))
    return view.to(dtype)


def _jitter(view: Tensor, steps: Steps, drawn: Parameters) -> Tensor:
    return colour.colour_jitter(view, drawn.factors, drawn.order)


def _grey(view: Tensor, steps: Steps, drawn: Parameters) -> Tensor:
    return _on_rows(view, drawn.grey, colour.greyscale)


def _blur(view: Tensor, steps: Steps, drawn: Parameters) -> Tensor:
    blurred = drawn.sigma > 0
    sigma = drawn.sigma[blurred]
    return _on_rows(view, blurred, lambda x: resample.gaussian_blur(x, sigma, steps.blur_radius).clamp_(0.0, 1.0))


def _solarise(view: Tensor, steps: Steps, drawn: Parameters) -> Tensor:
    return _on_rows(view, drawn.solarise, colour.solarise)


def _rand_augment(view: Tensor, steps: Steps, drawn: Parameters) -> Tensor:
    return view if drawn.ops is None else levels.apply(view, drawn.ops, steps.level_ops, steps.fill)


_OPERATIONS: dict[str, Callable[[Tensor, Steps, Parameters], Tensor]] = {
    "jitter": _jitter,
    "grey": _grey,
    "blur": _blur,
    "solarise": _solarise,
    "rand_augment": _rand_augment,
}


def _on_rows(images: Tensor, chosen: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies an operation in place to the images chosen (bool [B], on the CPU), and spends nothing on the others.

    Returns the images.
    """
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        rows = rows.to(images.device)
        images[rows] = operation(images[rows])
    return images
