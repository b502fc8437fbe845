"""Where the pixels of a patch lie. Patches are numbered row by row; any strides, so no layout of images is copied.

Shapes: C channels, p patch side, R patches of a tile, Q = C*p*p pixels of a patch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def layout(images: Tensor, side: int) -> dict[str, int]:
    """The constants that describe images [B, C, H, W] cut into patches of side p.

    Constants rather than arguments: a run has few sizes of images, and the compiler divides by a constant and sees
    that p neighbouring pixels are one vector.
    """
    _, channels, height, width = images.shape
    image, channel, row, column = images.stride()
    return {
        "CHANNELS": channels,
        "SIDE": side,
        "COLUMNS": width // side,
        "PATCHES": (height // side) * (width // side),
        "IMAGE_STRIDE": image,
        "CHANNEL_STRIDE": channel,
        "ROW_STRIDE": row,
        "COLUMN_STRIDE": column,
    }


@triton.jit
def first_pixel(
    images,
    image,
    patch,
    SIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    IMAGE_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
):
    """Pointers [R] to the upper left pixel of patches; image and patch int [R]."""
    row, column = patch // COLUMNS * SIDE, patch % COLUMNS * SIDE
    return images + image.to(tl.int64) * IMAGE_STRIDE + row * ROW_STRIDE + column * COLUMN_STRIDE
