"""Colour spaces on a batch: red, green and blue in [0, 1] to another space and back, in scikit-image's units.

Each function takes and returns float32 [B, 3, H, W]. What each space's channels are:

rgb:   red, green, blue, in [0, 1].
ydbdr: luma in [0, 1], then two differences of colour in [-1.333, 1.333].
ycbcr: luma in [16, 235], then two differences of colour in [16, 240].
lab:   lightness in [0, 100], then green to red and blue to yellow, about [-108, 98] (CIE L*a*b*, D65, 2 degrees).
hsv:   hue in turns in [0, 1), saturation and value in [0, 1].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Space = Literal["rgb", "ydbdr", "lab", "ycbcr", "hsv"]

YDBDR = ((0.299, 0.587, 0.114), (-0.45, -0.883, 1.333), (-1.333, 1.116, 0.217))
_YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))
_YCBCR_OFFSET = (16.0, 128.0, 128.0)
_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)

#: Of each space's first channel: its range, for figures, and what stands in for it where the other two are shown alone.
FIRST = {
    "rgb": (0.0, 1.0, 0.5),
    "ydbdr": (0.0, 1.0, 0.5),
    "ycbcr": (16.0, 235.0, 125.5),
    "lab": (0.0, 100.0, 50.0),
    "hsv": (0.0, 1.0, 0.0),
}


def convert(images: Tensor, space: Space) -> Tensor:
    """From red, green and blue in [0, 1] to a space."""
    if space == "rgb":
        return images
    if space == "ydbdr":
        return _mixed(images, _matrix(YDBDR, images))
    if space == "ycbcr":
        return _mixed(images, _matrix(_YCBCR, images)) + _channels(_YCBCR_OFFSET, images)
    return _to_lab(images) if space == "lab" else _to_hsv(images)


def invert(images: Tensor, space: Space) -> Tensor:
    """From a space back to red, green and blue, clamped to [0, 1]."""
    if space == "ydbdr":
        images = _mixed(images, _matrix(YDBDR, images).inverse())
    elif space == "ycbcr":
        images = _mixed(images - _channels(_YCBCR_OFFSET, images), _matrix(_YCBCR, images).inverse())
    elif space == "lab":
        images = _from_lab(images)
    elif space == "hsv":
        images = _from_hsv(images)
    return images.clamp(0.0, 1.0)


def _matrix(rows: tuple[tuple[float, ...], ...], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=like.dtype, device=like.device)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    """A number a channel: [3, 1, 1]."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


def _mixed(images: Tensor, matrix: Tensor) -> Tensor:
    """Each output channel the sum of the input's, weighted by a row of the matrix."""
    # Not in an autocast region, where a product would lose the last bits of an 8-bit value.
    with torch.autocast(images.device.type, enabled=False):
        return (matrix @ images.flatten(2)).view_as(images)


def _to_lab(images: Tensor) -> Tensor:
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055) ** 2.4, images / 12.92)
    xyz = _mixed(linear, _matrix(_XYZ, images)) / _channels(_WHITE, images)
    # The maximum keeps the branch that is not taken away from a power of nothing.
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp_min(1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], 1)


def _from_lab(images: Tensor) -> Tensor:
    lightness, a, b = images.unbind(1)
    y = (lightness + 16.0) / 116.0
    roots = torch.stack([y + a / 500.0, y, (y - b / 200.0).clamp_min(0.0)], 1)
    xyz = torch.where(roots > 0.2068966, roots**3, (roots - 16 / 116) / 7.787) * _channels(_WHITE, images)
    linear = _mixed(xyz, _matrix(_XYZ, images).inverse())
    return torch.where(linear > 0.0031308, 1.055 * linear.clamp_min(1e-6) ** (1 / 2.4) - 0.055, 12.92 * linear)


def _to_hsv(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    divisor = chroma.clamp_min(1e-12)
    # In sixths of a turn from red, by which channel is the largest.
    sector = torch.where(value == green, (blue - red) / divisor + 2.0, (red - green) / divisor + 4.0)
    sector = torch.where(value == red, (green - blue) / divisor, sector)
    hue = torch.where(chroma > 0, (sector / 6.0).remainder(1.0), 0.0)
    return torch.stack([hue, chroma / value.clamp_min(1e-12), value], 1)


def _from_hsv(images: Tensor) -> Tensor:
    hue, saturation, value = images.unbind(1)
    # Each channel is value - chroma x ramp: a trapezium over the circle, displaced by a third of a turn a channel.
    ramps = [2.0 - ((6.0 * hue + shift).remainder(6.0) - 2.0).abs() for shift in (5.0, 3.0, 1.0)]
    return torch.stack([value - value * saturation * ramp.clamp(0.0, 1.0) for ramp in ramps], 1)
