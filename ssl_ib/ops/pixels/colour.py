"""Colour operations on a batch of images, each image with parameters of its own.

The formulas, their clamping included, are torchvision's for float images. Images are float32 [B, 3, H, W] in [0, 1];
parameters [B, ...] may lie on another device than the images: they are few, and moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The operations of `colour_jitter`, as `order` numbers them.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def _luma(images: Tensor) -> Tensor:
    """Rec. 601 brightness of each pixel: [B, 3, H, W] -> [B, H, W]."""
    red, green, blue = images.unbind(1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def greyscale(images: Tensor) -> Tensor:
    """Every channel replaced by the luma: [B, 3, H, W] -> [B, 3, H, W], a broadcast view."""
    return _luma(images)[:, None].expand_as(images)


def solarise(images: Tensor) -> Tensor:
    """Pixels of 0.5 and above inverted: [B, 3, H, W] -> [B, 3, H, W]."""
    return torch.minimum(images, 1.0 - images)  # at a threshold of one half, x or 1 - x: whichever is smaller


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """The hue turned by `shift` [B] (in turns, [-0.5, 0.5]), value and saturation of HSV kept: [B, 3, H, W]."""
    red, green, blue = images.unbind(1)
    value = torch.maximum(red, green).maximum(blue)
    chroma = value - torch.minimum(red, green).minimum(blue)
    divisor = chroma.clamp_min(1e-12)  # where chroma is 0 the hue is undefined, and without effect below
    # In sixths of a turn from red, by which channel is the largest.
    sector = torch.where(value == green, (blue - red).div_(divisor).add_(2.0), (red - green).div_(divisor).add_(4.0))
    sector = torch.where(value == red, (green - blue).div_(divisor), sector)
    sector += 6.0 * shift.to(images.device)[:, None, None]
    # Each channel is value - chroma * ramp, where ramp is a trapezium over the circle, displaced from channel to
    # channel by a third of a turn: the six cases of HSV -> RGB in one formula.
    result = torch.empty_like(images)
    for channel, displacement in enumerate((5.0, 3.0, 1.0)):
        ramp = (sector + displacement).remainder_(6.0).sub_(2.0).abs_().neg_().add_(2.0).clamp_(0.0, 1.0)
        torch.sub(value, ramp.mul_(chroma), out=result[:, channel])
    return result


def _blend_(images: Tensor, kind: Tensor, factor: Tensor) -> None:
    """In place factor x image + (1 - factor) x reference, clamped to [0, 1]; kind and factor [B].

    The reference is black for brightness, the luma's mean for contrast and the luma for saturation. A factor of 1
    leaves an image exactly as it is, so images that are not jittered need not be taken out of the batch.
    """
    rest = 1.0 - factor
    luma = _luma(images)
    # Row by row, because the mean of a lone image over all its pixels would be summed by all threads together, in
    # another order than in a batch.
    mean = luma.mean(2, keepdim=True).mean(1, keepdim=True)
    reference = luma.mul_((rest * (kind == SATURATION))[:, None, None])
    reference += mean * (rest * (kind == CONTRAST))[:, None, None]
    images.mul_(factor[:, None, None, None]).add_(reference[:, None]).clamp_(0.0, 1.0)


def colour_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue changed, in an order of each image's own.

    factors: float32 [B, 4], for brightness, contrast and saturation (>= 0; 1 changes nothing) and the shift of the hue
             (in [-0.5, 0.5] turns; 0 changes nothing).
    order:   int64 [B, 4], permutations of BRIGHTNESS, CONTRAST, SATURATION, HUE: what is done first, second, ...
    """
    images = images.clone()
    blends = order[order != HUE].view(-1, 3)
    blend_factors = factors.gather(1, blends).to(images.device)
    shifts = factors[:, HUE]
    shifted_at = torch.where(shifts != 0, (order == HUE).int().argmax(1), -1)
    kinds = blends.to(images.device)
    for step in range(4):
        # The hue costs as much as all the rest, so it is turned for those images alone whose turn it is.
        rows = (shifted_at == step).nonzero()[:, 0]
        if len(rows):
            on_device = rows.to(images.device)
            images[on_device] = adjust_hue(images[on_device], shifts[rows])
        if step < 3:
            _blend_(images, kinds[:, step], blend_factors[:, step])
    return images
