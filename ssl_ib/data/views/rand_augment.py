"""RandAugment on a batch: every image draws its own operations and strengths (Cubuk et al., 2020; timm's variant).

Drawing and changing are two acts, as in augment.py. What the operations do stands in ops/pixels/levels.py.

Shapes: B images, N operations an image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ... import random
from ...errors import UserError, nearest
from ...ops.pixels import levels
from ...ops.pixels.levels import FUNCTIONS, Operations

#: What each operation does at magnitude 10, in its own unit. The others, without a number, have no strength.
STRENGTHS = {
    "rotate": 30.0,  # degrees
    "posterize": 4.0,  # bits that are kept: fewer at smaller magnitudes, none below 2.5
    "solarize": 256.0,  # grey level from which pixels are inverted: at 256 none is
    "solarize_add": 110.0,  # grey levels added to pixels below 128
    "colour": 1.8,  # these four blend with a factor of 0.1 + this
    "contrast": 1.8,
    "brightness": 1.8,
    "sharpness": 1.8,
    "shear_x": 0.3,  # pixels a row (shear_y: a column)
    "shear_y": 0.3,
    "translate_x": 0.45,  # share of the width (translate_y: of the height)
    "translate_y": 0.45,
}
#: The 15 operations of InfoMin and of timm, of which an image draws uniformly and with replacement.
OPS = ("autocontrast", "equalize", "invert", *STRENGTHS)
#: The 8 operations that CMC's variant has, which leave colours as they are: `identity` changes nothing.
PLAIN_OPS = ("autocontrast", "identity", "rotate", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y")

#: The geometric operations, which go in either direction and interpolate.
_GEOMETRIC = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
_BLENDED = {"colour", "contrast", "brightness", "sharpness"}
_WHOLE = {"posterize", "solarize", "solarize_add"}
_MOST = {"posterize": 8.0, "solarize": 256.0, "solarize_add": 128.0, "rotate": 180.0}
_DRAWS = 5  # for each operation of an image: which, whether, magnitude, sign, interpolation


@dataclass(frozen=True)
class RandAugment:
    """The distribution of the operations that an image draws, one after the other.

    number:        operations an image (N), drawn uniformly and with replacement.
    magnitude:     mean of the magnitude, in [0, 10]; each operation draws its own, normal, clipped to [0, 10].
    magnitude_std: standard deviation of the magnitude.
    op_p:          probability that a drawn operation fires.
    ops:           names of the operations to draw from; one that stands there twice is drawn twice as often.
    op_strengths:  what an operation does at magnitude 10, in the units of STRENGTHS, where it is not what stands there.
    fill:          colour in [0, 1] that geometric operations put where the image has no pixels; the mean of ImageNet.

    Raises UserError where a number is out of its range or a name is unknown.
    """

    number: int = 2
    magnitude: float = 10.0
    magnitude_std: float = 0.5
    op_p: float = 0.5
    ops: tuple[str, ...] = OPS
    op_strengths: Mapping[str, float] = field(default_factory=dict)
    fill: tuple[float, float, float] = (0.485, 0.456, 0.406)

    def __post_init__(self) -> None:
        if not self.ops:
            raise UserError(f"ops: expected the name of an operation or several, got none{nearest('', FUNCTIONS)}")
        for name in self.ops:
            if name not in FUNCTIONS:
                raise UserError(f"ops: unknown operation {name!r}{nearest(name, FUNCTIONS)}")
        for name, strength in self.op_strengths.items():
            if name not in STRENGTHS:
                why = "has no strength" if name in FUNCTIONS else "is unknown"
                raise UserError(f"op_strengths: operation {name!r} {why}{nearest(name, STRENGTHS)}")
            most = _MOST.get(name, math.inf)
            if not 0 <= strength <= most:
                allowed = "of 0 or more" if most == math.inf else f"in [0, {most:g}]"
                raise UserError(f"op_strengths: expected a strength {allowed} for {name!r}, got {strength}")
        if self.number < 0:
            raise UserError(f"rand_augment: expected 0 operations an image or more, got {self.number}")
        if not 0 <= self.magnitude <= 10:
            raise UserError(f"magnitude: expected a number in [0, 10], got {self.magnitude}")
        if self.magnitude_std < 0:
            raise UserError(f"magnitude_std: expected 0 or more, got {self.magnitude_std}")
        if not 0 <= self.op_p <= 1:
            raise UserError(f"op_p: expected a probability, got {self.op_p}")

    def draw(self, keys: Tensor) -> Operations:
        """Draws the operations of B images: keys int64 [B]."""
        which, whether, normal, sign, bicubic = (
            random.uniform(keys.cpu(), _DRAWS * self.number).double().view(len(keys), self.number, _DRAWS).unbind(2)
        )
        op = (which * len(self.ops)).long()
        # Half a step keeps the uniform number above 0, where the normal one would be minus infinity.
        magnitude = self.magnitude + self.magnitude_std * torch.special.ndtri(normal + 2.0**-25)
        share = magnitude.clamp(0.0, 10.0) / 10.0
        strength = torch.tensor([{**STRENGTHS, **self.op_strengths}.get(name, 0.0) for name in self.ops])
        value = share * strength.double()[op]
        value = torch.where(self._is(_WHOLE)[op], value.trunc(), value)
        value = value + 0.1 * self._is(_BLENDED)[op]
        value = torch.where(self._is(_GEOMETRIC)[op] & (sign < 0.5), -value, value)
        bicubic = (bicubic < 0.5) & self._is(_GEOMETRIC)[op]
        return Operations(torch.where(whether < self.op_p, op, -1), value, bicubic)

    def _is(self, names: set[str]) -> Tensor:
        """Which operations are among the names: bool [number of ops]."""
        return torch.tensor([name in names for name in self.ops])

    def apply(self, images: Tensor, drawn: Operations) -> Tensor:
        """Changes the images in place, and returns them: float32 [B, 3, H, W] in [0, 1]."""
        return levels.apply(images, drawn, self.ops, self.fill)
