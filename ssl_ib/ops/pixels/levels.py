"""RandAugment's operations on a batch: what timm's do to Pillow's images of 8 bits.

An image that is changed is first rounded to the 256 grey levels, and every operation returns whole levels again.

Shapes: B images, n of them that one operation changes, H x W pixels, N operations an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: The operations that change each pixel by itself, whatever the others are.
PIXELWISE = frozenset({"brightness", "colour", "identity", "invert", "posterize", "solarize", "solarize_add"})


@dataclass(frozen=True)
class Operations:
    """What was drawn for B images; on the CPU.

    op:      int64 [B, N], the number of the operation among those that are drawn from; -1 where it does not fire.
    value:   float64 [B, N], its strength in its own unit, with its sign.
    bicubic: bool [B, N], whether a geometric operation interpolates bicubically (else bilinearly); of others False.
    """

    op: Tensor
    value: Tensor
    bicubic: Tensor


def apply(images: Tensor, drawn: Operations, names: Sequence[str], fill: Sequence[float]) -> Tensor:
    """Changes the images in place, and returns them: float32 [B, 3, H, W] in [0, 1].

    names: of the operations that are drawn from, among FUNCTIONS; fill: the colour in [0, 1] that geometric operations
    put where the image has no pixels. An image for which nothing fires stays as it is; the others come out in multiples
    of 1/255.
    """
    fired = (drawn.op >= 0).any(1).nonzero()[:, 0]
    if not len(fired):
        return images
    on_device = fired.to(images.device)
    levels = images[on_device].mul_(255.0).round_()
    background = torch.tensor(fill, device=images.device).mul_(255.0).round_()[:, None, None]
    # The rows of each turn lie sorted by what is done to them, so that few small tensors are moved to the device.
    kind, order = (2 * drawn.op + drawn.bicubic)[fired].T.sort(dim=1, stable=True)
    value = drawn.value[fired].T.gather(1, order).float().to(images.device)
    rows = order.to(images.device)
    for turn in range(drawn.op.shape[1]):
        kinds, counts = kind[turn].unique_consecutive(return_counts=True)
        start = 0
        for which, count in zip(kinds.tolist(), counts.tolist(), strict=True):
            part, start = slice(start, start + count), start + count
            number, bicubic = divmod(which, 2)
            if number >= 0:
                chosen, function = rows[turn, part], FUNCTIONS[names[number]]
                levels[chosen] = function(levels[chosen], value[turn, part], bool(bicubic), background)
    images[on_device] = levels.div_(255.0)
    return images


# Each operation below takes levels, float32 [n, 3, H, W] of whole numbers in [0, 255], and returns such again; value
# is [n], fill is [3, 1, 1]. It may change what it is given.


def _identity(levels: Tensor, *_: Any) -> Tensor:
    return levels


def _autocontrast(levels: Tensor, *_: Any) -> Tensor:
    low, high = levels.amin((2, 3), keepdim=True), levels.amax((2, 3), keepdim=True)
    stretched = (levels - low).mul_(255.0).div_((high - low).clamp_min(1.0)).floor_()
    return torch.where(high > low, stretched, levels)


def _equalize(levels: Tensor, *_: Any) -> Tensor:
    """Every channel's levels mapped so that they come up equally often."""
    flat = levels.long().flatten(2)
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    brightest = counts.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - brightest) // 255
    table = (counts.cumsum(2) - counts + step // 2).div_(step.clamp_min(1), rounding_mode="floor").clamp_max_(255)
    equal = table.gather(2, flat).to(levels.dtype).view_as(levels)
    return torch.where(step[..., None] > 0, equal, levels)


def _invert(levels: Tensor, *_: Any) -> Tensor:
    return 255.0 - levels


def _posterize(levels: Tensor, bits: Tensor, *_: Any) -> Tensor:
    step = torch.exp2(8.0 - bits.clamp(0.0, 8.0))[:, None, None, None]
    return levels.div_(step).floor_().mul_(step)


def _solarize(levels: Tensor, threshold: Tensor, *_: Any) -> Tensor:
    return torch.where(levels < threshold[:, None, None, None], levels, 255.0 - levels)


def _solarize_add(levels: Tensor, added: Tensor, *_: Any) -> Tensor:
    return torch.where(levels < 128.0, (levels + added[:, None, None, None]).clamp_max_(255.0), levels)


def _luma(levels: Tensor) -> Tensor:
    """Rec. 601 brightness as Pillow rounds it: [n, 3, H, W] -> [n, 1, H, W]. The sums are whole and below 2^24."""
    red, green, blue = levels.split(1, 1)
    return (red * 19595.0).add_(green, alpha=38470.0).add_(blue, alpha=7471.0).add_(32768.0).div_(65536.0).floor_()


def _blend(reference: Tensor | float, levels: Tensor, factor: Tensor) -> Tensor:
    """reference + factor x (levels - reference), as Pillow rounds it: down."""
    blended = (levels - reference).mul_(factor[:, None, None, None]).add_(reference)
    return blended.clamp_(0.0, 255.0).floor_()


def _colour(levels: Tensor, factor: Tensor, *_: Any) -> Tensor:
    return _blend(_luma(levels), levels, factor)


def _contrast(levels: Tensor, factor: Tensor, *_: Any) -> Tensor:
    mean = _luma(levels).mean(3, keepdim=True).mean(2, keepdim=True)
    return _blend(mean.add_(0.5).floor_(), levels, factor)


def _brightness(levels: Tensor, factor: Tensor, *_: Any) -> Tensor:
    return _blend(0.0, levels, factor)


def _sharpness(levels: Tensor, factor: Tensor, *_: Any) -> Tensor:
    """A blend with the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, whose outermost pixels are those of the image."""
    smooth = levels.clone()
    if min(levels.shape[2:]) > 2:
        three = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
        nine = three[..., :-2] + three[..., 1:-1] + three[..., 2:]
        smooth[:, :, 1:-1, 1:-1] = nine.add_(levels[:, :, 1:-1, 1:-1], alpha=4.0).div_(13.0).round_()
    return _blend(smooth, levels, factor)


def _weights(d: Tensor, bicubic: bool) -> list[Tensor]:
    """The weights of the pixels around a place, as Pillow's `transform` has them: d beyond the centre of one of them.

    Two pixels, that one and the next, or four: also the one before and the one after. d: in [0, 1), of any shape.
    """
    if not bicubic:
        return [1.0 - d, d]
    # Keys' cubic kernel with a = -1. (Where images are resized, it has a = -1/2.)
    squared = d * d
    cubed = squared * d
    return [2.0 * squared - d - cubed, 1.0 - 2.0 * squared + cubed, d + squared - cubed, cubed - squared]


def _to_levels(sums: Tensor) -> Tensor:
    return sums.clamp_(0.0, 255.0).floor_()


def _slide(levels: Tensor, shift: Tensor, bicubic: bool, fill: Tensor) -> Tensor:
    """Each row read from `shift` pixels further right: shift [n, H], or [n, 1] for all rows alike."""
    _, c, height, width = levels.shape
    # A row's pixels all lie equally far from where they are read, so that one gather and one weight a row will do.
    shift = shift.expand(-1, height)
    whole = shift.floor()
    weights = _weights(shift - whole, bicubic)
    reach = len(weights) // 2 - 1
    column = torch.arange(-reach, width + reach + 1, device=levels.device)
    pixel = (whole.long()[:, :, None] + column).clamp_(0, width - 1)
    read = levels.gather(3, pixel[:, None].expand(-1, c, -1, -1))
    result = torch.zeros_like(levels)
    for number, weight in enumerate(weights):
        result.addcmul_(read[..., number : number + width], weight[:, None, :, None])
    at = shift[:, :, None] + torch.arange(width, device=levels.device) + 0.5
    return torch.where(((at >= 0) & (at < width))[:, None], _to_levels(result), fill)


def _shear_x(levels: Tensor, value: Tensor, bicubic: bool, fill: Tensor) -> Tensor:
    middle = torch.arange(levels.shape[2], device=levels.device) + 0.5
    return _slide(levels, value[:, None] * middle, bicubic, fill)


def _translate_x(levels: Tensor, value: Tensor, bicubic: bool, fill: Tensor) -> Tensor:
    return _slide(levels, value[:, None] * levels.shape[3], bicubic, fill)


def _shear_y(levels: Tensor, value: Tensor, bicubic: bool, fill: Tensor) -> Tensor:
    return _shear_x(levels.mT, value, bicubic, fill).mT


def _translate_y(levels: Tensor, value: Tensor, bicubic: bool, fill: Tensor) -> Tensor:
    return _translate_x(levels.mT, value, bicubic, fill).mT


def _rotate(levels: Tensor, degrees: Tensor, bicubic: bool, fill: Tensor) -> Tensor:
    """Counter-clockwise, around the image's centre."""
    n, c, height, width = levels.shape
    angle = (degrees * (math.pi / 180.0))[:, None, None]
    cos, sin = angle.cos(), angle.sin()
    # Where each pixel is read, in pixels from the corner, of which the centre of the first has 0.5.
    x = torch.arange(width, device=levels.device) + (0.5 - width / 2)
    y = (torch.arange(height, device=levels.device) + (0.5 - height / 2))[:, None]
    x, y = cos * x - sin * y + width / 2, sin * x + cos * y + height / 2
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    column, row = (x - 0.5).floor(), (y - 0.5).floor()
    across, down = _weights(x - 0.5 - column, bicubic), _weights(y - 0.5 - row, bicubic)
    column, row, reach = column.long(), row.long(), len(across) // 2 - 1
    columns = [(column + number - reach).clamp_(0, width - 1) for number in range(len(across))]
    flat, result = levels.flatten(2), torch.zeros_like(levels)
    for i, vertical in enumerate(down):
        start = (row + i - reach).clamp_(0, height - 1) * width
        for column, horizontal in zip(columns, across, strict=True):
            read = flat.gather(2, (start + column).view(n, 1, -1).expand(-1, c, -1)).view_as(levels)
            result.addcmul_(read, (vertical * horizontal)[:, None])
    return torch.where(inside[:, None], _to_levels(result), fill)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "autocontrast": _autocontrast,
    "brightness": _brightness,
    "colour": _colour,
    "contrast": _contrast,
    "equalize": _equalize,
    "identity": _identity,
    "invert": _invert,
    "posterize": _posterize,
    "rotate": _rotate,
    "sharpness": _sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
