"""Crops, resizing and blur as two batched matrix products, one matrix an axis and an image.

Resizing and Gaussian blur are separable, so an image becomes `rows @ image @ columns^T`. The matrices differ from image
to image, which is what draws B different crops at once, on any device. Their values are those of torchvision's
antialiased resize and of its Gaussian blur.

Shapes: B images, C channels, H x W pixels of the source, h x w of the result, T taps (source pixels an output reads).
Parameters an image ([B, ...]) may lie on another device than the images: they are few, and moved.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]

#: How far the interpolation kernel reaches to either side, in pixels of the coarser of the two grids.
_REACH = {"bilinear": 1.0, "bicubic": 2.0}


def resize_matrix(
    start: Tensor,
    length: Tensor,
    resized: Tensor,
    offset: Tensor,
    size: int,
    source: int,
    interpolation: Interpolation,
    flip: Tensor | None = None,
) -> Tensor:
    """The matrices that resize one axis: pixels [start, start + length) become `resized` pixels, `size` of which
    are kept, from `offset` on (in reverse order where `flip`).

    start, length, resized, offset: int64 [B]; flip: bool [B]; source: pixels along the axis, padding included. An
    output reads nothing outside its interval, and its weights sum to 1. Returns float32 [B, size, source].
    """
    pixel = torch.arange(size, device=start.device).expand(len(start), size)
    if flip is not None:
        pixel = torch.where(flip[:, None], size - 1 - pixel, pixel)
    scale = (length / resized)[:, None]
    stretch = scale.clamp_min(1.0)  # antialiasing: a shrinking resize widens its kernel
    reach = _REACH[interpolation]
    centre = scale * (pixel + offset[:, None] + 0.5)  # from the start of the interval

    # The number of taps depends on shapes only, never on the draws, so that the sum below adds up alike in any batch.
    taps = min(math.ceil(2 * reach * max(1.0, source / size)) + 1, source)
    first = start[:, None] + torch.ceil(centre - reach * stretch - 0.5).long()
    first = first.clamp(0, source - taps)
    index = first[:, :, None] + torch.arange(taps, device=start.device)
    inside = index - start[:, None, None]
    weight = _kernel((inside + 0.5 - centre[:, :, None]) / stretch[:, :, None], interpolation)
    weight = weight * ((inside >= 0) & (inside < length[:, None, None]))
    weight = weight / weight.sum(2, keepdim=True)
    return torch.zeros(len(start), size, source, device=start.device).scatter_(2, index, weight)


def _kernel(x: Tensor, interpolation: Interpolation) -> Tensor:
    """The interpolation kernel at distances x; bicubic is Keys' with a = -1/2, as for every antialiased resize."""
    x = x.abs()
    if interpolation == "bilinear":
        return (1.0 - x).clamp_min(0.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = -0.5 * (((x - 5.0) * x + 8.0) * x - 4.0)
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ image @ columns^T: images [B, C, H, W], rows [B, h, H], columns [B, w, W] -> [B, C, h, w]."""
    b, c, height, width = images.shape
    # These products are pixels: in an autocast region they would lose the last bits of an 8-bit value.
    with torch.autocast(images.device.type, enabled=False):
        narrow = torch.bmm(images.reshape(b, c * height, width), columns.mT)
        return rows[:, None] @ narrow.view(b, c, height, -1)


def _resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`separable` of images that may be uint8, which become [0, 1] on the way."""
    if images.dtype == torch.uint8:
        images, rows = images.float(), rows / 255
    return separable(images, rows, columns)


def resized_crop(
    images: Tensor, boxes: Tensor, size: int, flip: Tensor | None = None, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Each image's own box, resized with antialiasing to size x size, mirrored where `flip`.

    images: uint8, or float32 in [0, 1], [B, C, H, W]; boxes: int64 [B, 4], (top, left, height, width), within the
    images; flip: bool [B]. Returns float32 [B, C, size, size]; bicubic overshoots [0, 1] near edges.
    """
    height, width = images.shape[-2:]
    top, left, tall, wide = boxes.to(images.device).unbind(1)
    flip = None if flip is None else flip.to(images.device)
    resized, offset = torch.full_like(top, size), torch.zeros_like(top)
    rows = resize_matrix(top, tall, resized, offset, size, height, interpolation)
    columns = resize_matrix(left, wide, resized, offset, size, width, interpolation, flip)
    return _resample(images, rows, columns)


def centre_crop(
    images: Tensor, sizes: Tensor, resized: int, size: int, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """The shorter side resized to `resized` (the longer in proportion), then the centre size x size, size <= resized.

    images: uint8, or float32 in [0, 1], [B, C, H, W]; sizes: int64 [B, 2], (height, width) without padding. Returns
    float32 [B, C, size, size].
    """
    height, width = images.shape[-2:]
    sizes = sizes.to(images.device)
    target = resized * sizes // sizes.amin(1, keepdim=True)
    offset = ((target - size) / 2).round().long()
    start = torch.zeros_like(sizes)
    rows, columns = (
        resize_matrix(start[:, i], sizes[:, i], target[:, i], offset[:, i], size, source, interpolation)
        for i, source in enumerate((height, width))
    )
    return _resample(images, rows, columns)


def cut(images: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """P squares of each image as they are: images [B, C, H, W] -> [B, P, C, size, size].

    top, left: int64 [B, P], their corners; the squares lie within the image.
    """
    pixel = torch.arange(size, device=images.device)
    rows = (top.to(images.device)[:, :, None] + pixel)[..., None]
    columns = (left.to(images.device)[:, :, None] + pixel)[:, :, None]
    number = torch.arange(len(images), device=images.device)[:, None, None, None]
    return images.permute(0, 2, 3, 1)[number, rows, columns].permute(0, 1, 4, 2, 3).contiguous()


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur with each image's own width and reflected borders; the kernel spans 2 radius + 1 pixels.

    images: float32 [B, C, H, W], both sides above radius; sigma: float [B], in pixels, above 0. Returns the same shape.
    """
    height, width = images.shape[-2:]
    reach = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.softmax(-0.5 * (reach / sigma.to(images.device)[:, None]) ** 2, 1)
    rows = _blur_matrix(kernel, height)
    return separable(images, rows, rows if width == height else _blur_matrix(kernel, width))


def _blur_matrix(kernel: Tensor, size: int) -> Tensor:
    """The convolution with each kernel [B, 2 r + 1], reflecting at the borders, as matrices [B, size, size]."""
    b, span = kernel.shape
    pixel = torch.arange(size, device=kernel.device)
    index = (pixel[:, None] + torch.arange(span, device=kernel.device) - span // 2).abs()
    index = torch.where(index < size, index, 2 * (size - 1) - index)
    empty = torch.zeros(b, size, size, device=kernel.device)
    return empty.scatter_add_(2, index.expand(b, -1, -1), kernel[:, None].expand(-1, size, -1))
