"""Views made of images in one to three kernels: crop and resize, then what changes pixels one by one, then the blur.

What changes pixels one by one (the jitter's four, grey, solarise, RandAugment's) is a list an image: codes with a value
each, in the order in which they are done, made on the host from what was drawn. So one compilation does any order, and
an image pays only for what is done to it. Two things need more than a pixel: contrast needs the mean of the view at its
place in the list, the blur needs neighbours. Hence the passes:

1. crop:    the resized crop, and the list up to contrast or blur; sums for the mean, a number a tile
2. colour:  the list from contrast on up to the blur, and the blur along the rows; only for a jitter or a blur
3. columns: the blur along the columns, and the rest of the list; only for a blur

The last of them normalises. Between them the view lies in float32, once: the second pass works in place.

Differences to plain torch come from the order of sums and from products that are rounded once, not twice: pixels differ
by no more than 2e-6 before a jitter and 2e-5 after it. What jumps can make more of it: a pixel next to the border
between two of RandAugment's grey levels may end on the other one.

Shapes: B images, C channels, H x W pixels of the source, S pixels of a side of the view, L entries of an image's list,
R = 7 + 2 L numbers of its row of the table.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variant import Variant, launch, recording

#: A row of the table, float32: the box, whether mirrored, the blur's width, where the list waits for the mean, and then
#: the list's codes and its values.
TOP, LEFT, TALL, WIDE, FLIP, SIGMA, PAUSE, LIST = (tl.constexpr(i) for i in range(8))

#: Codes of the list. The first three blend with black, with the mean of the luma, and with the luma.
NOTHING, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, SOLARISE = (tl.constexpr(i) for i in range(7))
#: Codes of RandAugment's, between TO_LEVELS (0 to 255) and FROM_LEVELS.
TO_LEVELS, FROM_LEVELS, INVERT, POSTERIZE, SOLARIZE, SOLARIZE_ADD, LEVEL_BRIGHTNESS, LEVEL_COLOUR = (
    tl.constexpr(i) for i in range(7, 15)
)
LEVEL_CODES = {
    "identity": NOTHING.value,
    "invert": INVERT.value,
    "posterize": POSTERIZE.value,
    "solarize": SOLARIZE.value,
    "solarize_add": SOLARIZE_ADD.value,
    "brightness": LEVEL_BRIGHTNESS.value,
    "colour": LEVEL_COLOUR.value,
}

#: Columns of the first and the last pass's tiles, and rows of each; pixels of a tile of whole rows in the second.
COLUMNS, CROP_ROWS, BLUR_ROWS, PIXELS = 32, 16, 32, 1024


@triton.jit
def unit(x):
    """Clamped to [0, 1]."""
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def luma(red, green, blue):
    return red * 0.2989 + green * 0.587 + blue * 0.114


@triton.jit
def level_luma(red, green, blue):
    """As Pillow rounds it, of whole levels; the sums are whole and below 2^24."""
    return tl.floor((red * 19595.0 + green * 38470.0 + blue * 7471.0 + 32768.0) * (1.0 / 65536.0))


@triton.jit
def trapezium(sector, displacement):
    """The share of the chroma that a channel lacks, by the hue in sixths of a turn."""
    turned = sector + displacement
    turned = turned - 6.0 * tl.floor(turned * (1.0 / 6.0))
    return unit(2.0 - tl.abs(turned - 2.0))


@triton.jit
def single(code, value, x):
    """What a code of RandAugment's that mixes no channels makes of one channel; the others leave it as it is."""
    if code == TO_LEVELS:
        # Adding 1.5 x 2^23 leaves no digits after the point: halves are rounded to even numbers, as torch does.
        x = (x * 255.0 + 12582912.0) - 12582912.0
    elif code == FROM_LEVELS:
        x = tl.div_rn(x, tl.full(x.shape, 255.0, tl.float32))
    elif code == INVERT:
        x = 255.0 - x
    elif code == POSTERIZE:
        # The value is a power of two, so this product is exact.
        x = tl.floor(x * (1.0 / value)) * value
    elif code == SOLARIZE:
        x = tl.where(x < value, x, 255.0 - x)
    elif code == SOLARIZE_ADD:
        x = tl.where(x < 128.0, tl.minimum(x + value, 255.0), x)
    return x


@triton.jit
def blended(x, reference, value):
    """reference + value (x - reference), as Pillow rounds it: down."""
    return tl.floor(tl.minimum(tl.maximum((x - reference) * value + reference, 0.0), 255.0))


@triton.jit
def changed(code, value, mean, red, green, blue):
    """The three channels after one entry of the list."""
    if code <= SATURATION:
        rest = 1.0 - value
        weight = tl.where(code == SATURATION, rest, 0.0)
        reference = luma(red, green, blue) * weight + tl.where(code == CONTRAST, mean * rest, 0.0)
        red = unit(red * value + reference)
        green = unit(green * value + reference)
        blue = unit(blue * value + reference)
    elif code == HUE:
        largest = tl.maximum(red, tl.maximum(green, blue))
        chroma = largest - tl.minimum(red, tl.minimum(green, blue))
        divisor = tl.maximum(chroma, 1e-12)
        sector = tl.where(largest == green, (blue - red) / divisor + 2.0, (red - green) / divisor + 4.0)
        sector = tl.where(largest == red, (green - blue) / divisor, sector) + 6.0 * value
        red = largest - chroma * trapezium(sector, 5.0)
        green = largest - chroma * trapezium(sector, 3.0)
        blue = largest - chroma * trapezium(sector, 1.0)
    elif code == GREY:
        red = luma(red, green, blue)
        green = red
        blue = red
    elif code == SOLARISE:
        red = tl.minimum(red, 1.0 - red)
        green = tl.minimum(green, 1.0 - green)
        blue = tl.minimum(blue, 1.0 - blue)
    elif code >= LEVEL_BRIGHTNESS:
        reference = level_luma(red, green, blue) * tl.where(code == LEVEL_COLOUR, 1.0, 0.0)
        red = blended(red, reference, value)
        green = blended(green, reference, value)
        blue = blended(blue, reference, value)
    else:
        red = single(code, value, red)
        green = single(code, value, green)
        blue = single(code, value, blue)
    return red, green, blue


@triton.jit
def listed(row, first, last, length, mean, red, green, blue, PLANES: tl.constexpr):
    """The pixels after the entries [first, last) of an image's list of `length`; with one plane all are SOLARISE."""
    for entry in range(first, last):
        code = tl.load(row + LIST + entry).to(tl.int32)
        value = tl.load(row + LIST + length + entry)
        if code != NOTHING:
            if PLANES == 3:
                red, green, blue = changed(code, value, mean, red, green, blue)
            else:
                red = tl.minimum(red, 1.0 - red)
    return red, green, blue


@triton.jit
def stored(out, place, inside, plane, step, mean, std, red, green, blue, PLANES: tl.constexpr):
    """Writes the planes, normalised where there is a mean; place: of the first plane's pixels, step: between planes."""
    if mean is not None:
        red = (red - tl.load(mean + plane)) / tl.load(std + plane)
        if PLANES == 3:
            green = (green - tl.load(mean + 1)) / tl.load(std + 1)
            blue = (blue - tl.load(mean + 2)) / tl.load(std + 2)
    tl.store(out + place, red.to(out.dtype.element_ty), mask=inside)
    if PLANES == 3:
        tl.store(out + place + step, green.to(out.dtype.element_ty), mask=inside)
        tl.store(out + place + 2 * step, blue.to(out.dtype.element_ty), mask=inside)


@triton.jit
def part_of(size, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr):
    """A program's part: image int64, its first plane, number of its tile among the view's, rows [R], columns [P]."""
    across = tl.cdiv(size, COLUMNS)
    tiles = across * tl.cdiv(size, ROWS)
    group, tile, groups = tl.program_id(0) // tiles, tl.program_id(0) % tiles, channels // PLANES
    rows = tile // across * ROWS + tl.arange(0, ROWS)
    columns = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    return (group // groups).to(tl.int64), group % groups * PLANES, tile, rows, columns


@triton.jit
def support(pixel, length, size, BICUBIC: tl.constexpr):
    """Where pixels of a view's axis [P] lie in the box: their centres, their first tap, how many taps, and 1 / stretch.

    A shrinking resize stretches its kernel, which is what antialiasing is.
    """
    scale = tl.div_rn(length, size.to(tl.float32))
    stretch = tl.maximum(scale, 1.0)
    reach = stretch * (2.0 if BICUBIC else 1.0)
    centre = scale * (pixel.to(tl.float32) + 0.5)
    first = tl.maximum(tl.floor(centre - reach - 0.5).to(tl.int32) + 1, 0)
    taps = tl.minimum(tl.ceil(2.0 * reach), length).to(tl.int32)
    return centre, first, taps, tl.div_rn(1.0, stretch)


@triton.jit
def tap(place, length, centre, narrow, BICUBIC: tl.constexpr):
    """The weights [P] of the pixels at `place` in the box, 0 outside of it; bicubic is Keys' kernel with a = -1/2."""
    x = tl.abs((place.to(tl.float32) + 0.5 - centre) * narrow)
    if BICUBIC:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = -0.5 * (((x - 5.0) * x + 8.0) * x - 4.0)
        weight = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    else:
        weight = tl.maximum(1.0 - x, 0.0)
    return tl.where((place >= 0) & (place < length), weight, 0.0)


@triton.jit(
    do_not_specialize=[
        *("channels", "height", "width", "size", "length"),
        *("stride_image", "stride_channel", "stride_row", "stride_column"),
    ]
)
def crop_kernel(
    images,
    table,
    sums,
    mean,
    std,
    out,
    channels,
    height,
    width,
    size,
    length,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    BICUBIC: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program resizes a tile of a view, changes it up to the list's pause, and sums its luma into sums [B, tiles]."""
    image, plane, tile, rows, columns = part_of(size, channels, ROWS, COLUMNS, PLANES)
    row = table + image * (LIST + 2 * length)
    inside = (rows < size)[:, None] & (columns < size)[None, :]
    tall, wide = tl.load(row + TALL), tl.load(row + WIDE)
    top, left = tl.load(row + TOP).to(tl.int32), tl.load(row + LEFT).to(tl.int32)
    mirrored = tl.where(tl.load(row + FLIP) > 0.0, size - 1 - columns, columns)
    y_centre, y_first, y_taps, y_narrow = support(rows, tall, size, BICUBIC)
    x_centre, x_first, x_taps, x_narrow = support(mirrored, wide, size, BICUBIC)

    x_sum = tl.zeros((COLUMNS,), tl.float32)
    for j in range(x_taps):
        x_sum += tap(x_first + j, wide, x_centre, x_narrow, BICUBIC)
    y_sum = tl.zeros((ROWS,), tl.float32)
    red = tl.zeros((ROWS, COLUMNS), tl.float32)
    green = tl.zeros((ROWS, COLUMNS), tl.float32)
    blue = tl.zeros((ROWS, COLUMNS), tl.float32)
    source = images + image * stride_image + plane * stride_channel
    for i in range(y_taps):
        y = y_first + i
        weight = tap(y, tall, y_centre, y_narrow, BICUBIC)
        y_sum += weight
        y_there = (y >= 0) & (y.to(tl.float32) < tall) & (top + y < height) & (rows < size)
        line = (top + y) * stride_row
        for j in range(x_taps):
            x = x_first + j
            taps = weight[:, None] * tap(x, wide, x_centre, x_narrow, BICUBIC)[None, :]
            x_there = (x >= 0) & (x.to(tl.float32) < wide) & (left + x < width) & (columns < size)
            there = y_there[:, None] & x_there[None, :]
            pixel = line[:, None] + ((left + x) * stride_column)[None, :]
            red += taps * tl.load(source + pixel, mask=there, other=0).to(tl.float32)
            if PLANES == 3:
                green += taps * tl.load(source + stride_channel + pixel, mask=there, other=0).to(tl.float32)
                blue += taps * tl.load(source + 2 * stride_channel + pixel, mask=there, other=0).to(tl.float32)

    whole = 255.0 if images.dtype.element_ty == tl.uint8 else 1.0
    total = tl.where(inside, (y_sum * whole)[:, None] * x_sum[None, :], 1.0)
    red = unit(red / total)
    if PLANES == 3:
        green = unit(green / total)
        blue = unit(blue / total)
    pause = tl.load(row + PAUSE).to(tl.int32)
    red, green, blue = listed(row, 0, pause, length, 0.0, red, green, blue, PLANES)
    if sums is not None:
        light = tl.where(inside, luma(red, green, blue), 0.0)
        tiles = tl.cdiv(size, COLUMNS) * tl.cdiv(size, ROWS)
        tl.store(sums + image * tiles + tile, tl.sum(tl.sum(light, axis=1), axis=0))
    area = size * size
    place = (image * channels + plane) * area + rows[:, None] * size + columns[None, :]
    stored(out, place, inside, plane, area, mean, std, red, green, blue, PLANES)


@triton.jit
def reflected(x, size):
    """Pixels beyond a border, mirrored at the outermost one."""
    x = tl.abs(x)
    return tl.where(x < size, x, 2 * (size - 1) - x)


@triton.jit
def bell(reach, sigma):
    """The Gaussian at a distance, not yet over the sum of all."""
    far = reach / sigma
    return tl.exp(-0.5 * far * far)


@triton.jit
def along_rows(x, columns, size, sigma, radius):
    """The rows x [R, P] blurred; what lies behind a view's last column is not meant to be read."""
    total, weights = tl.zeros_like(x), 0.0
    for reach in range(-radius, radius + 1):
        weight = bell(reach, sigma)
        weights += weight
        near = tl.minimum(tl.maximum(reflected(columns + reach, size), 0), size - 1)
        total += weight * tl.gather(x, near[None, :] + tl.zeros(x.shape, tl.int32), axis=1)
    return total / weights


@triton.jit(do_not_specialize=["channels", "size", "length", "last", "radius", "tiles"])
def colour_kernel(
    table,
    sums,
    mean,
    std,
    x,
    out,
    channels,
    size,
    length,
    last,
    radius,
    tiles,
    BLUR: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """A program takes whole rows of a view through the list, from its pause to entry `last`, and blurs them.

    x and out may be the same: no program reads what another writes.
    """
    parts = tl.cdiv(size, ROWS)
    group, groups = tl.program_id(0) // parts, channels // PLANES
    image, plane = (group // groups).to(tl.int64), group % groups * PLANES
    rows = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < size)[:, None] & (columns < size)[None, :]
    row = table + image * (LIST + 2 * length)
    area = size * size
    place = (image * channels + plane) * area + rows[:, None] * size + columns[None, :]
    red = tl.load(x + place, mask=inside, other=0.0)
    green, blue = red, red
    if PLANES == 3:
        green = tl.load(x + place + area, mask=inside, other=0.0)
        blue = tl.load(x + place + 2 * area, mask=inside, other=0.0)

    level = 0.0
    if sums is not None:
        total = tl.zeros((TILES,), tl.float32)
        for start in range(0, tiles, TILES):
            tile = start + tl.arange(0, TILES)
            total += tl.load(sums + image * tiles + tile, mask=tile < tiles, other=0.0)
        level = tl.sum(total, axis=0) / area
    pause = tl.load(row + PAUSE).to(tl.int32)
    red, green, blue = listed(row, pause, last, length, level, red, green, blue, PLANES)

    if BLUR:
        sigma = tl.load(row + SIGMA)
        if sigma > 0.0:
            red = along_rows(red, columns, size, sigma, radius)
            if PLANES == 3:
                green = along_rows(green, columns, size, sigma, radius)
                blue = along_rows(blue, columns, size, sigma, radius)
    stored(out, place, inside, plane, area, mean, std, red, green, blue, PLANES)


@triton.jit(do_not_specialize=["channels", "size", "length", "first", "radius"])
def columns_kernel(
    table,
    mean,
    std,
    x,
    out,
    channels,
    size,
    length,
    first,
    radius,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program blurs a tile of a view along its columns and takes it through the list's entries from `first` on."""
    image, plane, _, rows, columns = part_of(size, channels, ROWS, COLUMNS, PLANES)
    row = table + image * (LIST + 2 * length)
    inside = (rows < size)[:, None] & (columns < size)[None, :]
    area = size * size
    start = (image * channels + plane) * area
    place = start + rows[:, None] * size + columns[None, :]
    sigma = tl.load(row + SIGMA)
    # An image that is not blurred has one tap, of weight 1.
    taps = tl.where(sigma > 0.0, radius, 0)
    width = tl.where(sigma > 0.0, sigma, 1.0)
    red = tl.zeros((ROWS, COLUMNS), tl.float32)
    green = tl.zeros((ROWS, COLUMNS), tl.float32)
    blue = tl.zeros((ROWS, COLUMNS), tl.float32)
    weights = 0.0
    for reach in range(-taps, taps + 1):
        weight = bell(reach, width)
        weights += weight
        near = start + reflected(rows + reach, size)[:, None] * size + columns[None, :]
        red += weight * tl.load(x + near, mask=inside, other=0.0)
        if PLANES == 3:
            green += weight * tl.load(x + near + area, mask=inside, other=0.0)
            blue += weight * tl.load(x + near + 2 * area, mask=inside, other=0.0)
    red = unit(red / weights)
    if PLANES == 3:
        green = unit(green / weights)
        blue = unit(blue / weights)
    red, green, blue = listed(row, first, length, length, 0.0, red, green, blue, PLANES)
    stored(out, place, inside, plane, area, mean, std, red, green, blue, PLANES)


def augment(
    images: Tensor,
    boxes: Tensor,
    flip: Tensor,
    factors: Tensor,
    order: Tensor,
    grey: Tensor,
    sigma: Tensor,
    solarise: Tensor,
    op: Tensor | None,
    value: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    size: int,
    bicubic: bool,
    operations: list[str],
    radius: int,
    level_ops: list[str],
    dtype: torch.dtype,
) -> Tensor:
    """images uint8, or float32 in [0, 1], [B, C, H, W] -> `dtype` [B, C, S, S], S = size.

    On the CPU, where what they decide costs no wait for the device: boxes int64 [B, 4] (top, left, height, width),
    flip bool [B], factors float32 [B, 4] and order int64 [B, 4] of the jitter, grey bool [B], sigma float32 [B],
    solarise bool [B], and for "rand_augment" op int64 [B, N] (its place in level_ops, -1 for none) and value [B, N].
    mean, std: float32, C numbers each, or both None. radius: of the blur, below S.
    operations: any of "jitter", "grey", "blur", "solarise", "rand_augment", each once, in the order in which they are
    done, a jitter not after a blur. All but blur and solarise need 3 channels.
    """
    batch, channels = images.shape[:2]
    out = images.new_empty(batch, channels, size, size, dtype=dtype)
    if not out.numel():
        return out
    entries, before = _entries(factors, order, grey, solarise, op, value, operations, level_ops)
    length = len(entries)
    blurred, jittered = "blur" in operations, "jitter" in operations
    last = before if blurred else length
    pause = torch.full((batch,), float(last))
    if jittered:
        waits = torch.stack([code == CONTRAST.value for code, _ in entries], 1)
        pause = torch.where(waits.any(1), waits.int().argmax(1), pause)
    head = [*boxes.float().unbind(1), flip.float(), sigma, pause]
    table = torch.stack([*head, *(code for code, _ in entries), *(number for _, number in entries)], 1)
    table = _moved(table, images.device)
    if mean is not None and std is not None:
        mean, std = (_moved(x.float().flatten(), images.device).contiguous() for x in (mean, std))

    planes = 3 if channels == 3 else 1
    groups = batch * channels // planes
    tiles = triton.cdiv(size, COLUMNS) * triton.cdiv(size, CROP_ROWS)
    common = {"table": table, "channels": channels, "size": size, "length": length, "PLANES": planes}
    absent, normal = {"mean": None, "std": None}, {"mean": mean, "std": std}
    sums = images.new_empty(batch, tiles, dtype=torch.float32) if jittered else None
    # What passes between the kernels. Without a blur no pixel is read by another's program, so `out` will do.
    held = out
    if blurred or (jittered and dtype != torch.float32):
        held = images.new_empty(batch, channels, size, size, dtype=torch.float32)
    launch(
        crop_kernel,
        (groups * tiles,),
        images=images,
        sums=sums,
        out=held,
        height=images.shape[2],
        width=images.shape[3],
        **dict(zip(("stride_image", "stride_channel", "stride_row", "stride_column"), images.stride(), strict=True)),
        **(absent if blurred or jittered else normal),
        **common,
        BICUBIC=bicubic,
        ROWS=CROP_ROWS,
        COLUMNS=COLUMNS,
        num_warps=8 if planes == 3 else 4,
        num_stages=1,
    )
    if blurred or jittered:
        block = max(16, triton.next_power_of_2(size))
        rows = max(1, PIXELS // block)
        launch(
            colour_kernel,
            (groups * triton.cdiv(size, rows),),
            sums=sums,
            x=held,
            out=held if blurred else out,
            last=last,
            radius=radius,
            tiles=tiles,
            **(absent if blurred else normal),
            **common,
            BLUR=blurred,
            ROWS=rows,
            BLOCK=block,
            TILES=64,
            num_warps=8 if block <= PIXELS else 16,
            num_stages=1,
        )
    if blurred:
        launch(
            columns_kernel,
            (groups * triton.cdiv(size, COLUMNS) * triton.cdiv(size, BLUR_ROWS),),
            x=held,
            out=out,
            first=before,
            radius=radius,
            **normal,
            **common,
            ROWS=BLUR_ROWS,
            COLUMNS=COLUMNS,
            num_warps=4,
            num_stages=1,
        )
    return out


def _entries(
    factors: Tensor,
    order: Tensor,
    grey: Tensor,
    solarise: Tensor,
    op: Tensor | None,
    value: Tensor | None,
    operations: list[str],
    level_ops: list[str],
) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """The list of what changes pixels one by one, (codes [B], values [B]) an entry, and how many stand before the blur.

    An entry has the code NOTHING for the images that it leaves alone.
    """
    entries: list[tuple[Tensor, Tensor]] = []
    before = 0
    zero = torch.zeros(len(grey))
    for operation in operations:
        if operation == "jitter":
            done = factors != torch.tensor([1.0, 1.0, 1.0, 0.0])
            codes = torch.where(done.gather(1, order), order + BRIGHTNESS.value, NOTHING.value)
            entries += zip(codes.float().unbind(1), factors.gather(1, order).unbind(1), strict=True)
        elif operation == "grey":
            entries.append((grey.float() * GREY.value, zero))
        elif operation == "solarise":
            entries.append((solarise.float() * SOLARISE.value, zero))
        elif operation == "blur":
            before = len(entries)
        elif op is not None and value is not None:
            fires = op >= 0
            codes = torch.tensor([LEVEL_CODES[name] for name in level_ops])[op.clamp(min=0)]
            codes = torch.where(fires, codes, NOTHING.value)
            # Posterize drops the lowest bits; the value is how many levels become one.
            posterized = codes == POSTERIZE.value
            numbers = torch.where(posterized, torch.exp2(8.0 - value.clamp(0.0, 8.0)), value).float()
            some = fires.any(1).float()
            entries.append((some * TO_LEVELS.value, zero))
            entries += zip(codes.float().unbind(1), numbers.unbind(1), strict=True)
            entries.append((some * FROM_LEVELS.value, zero))
    return entries, before


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host's on the device, without a wait for the device: copied from pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.is_cpu else x.to(device)


def variants(capability: int) -> list[Variant]:
    """What views of the usual sizes compile: uint8 images, with and without jitter and blur; and images of one channel,
    and of float32."""
    chains = ([], ["jitter", "grey"], ["jitter", "grey", "blur", "solarise"])
    usual = product((torch.uint8,), (3,), (False, True), (torch.float32, torch.bfloat16), (32, 96, 224), chains)
    others = [
        (torch.uint8, 1, False, torch.float32, 32, ["blur"]),
        (torch.float32, 3, True, torch.float32, 224, chains[2]),
    ]
    chance, boxes = torch.zeros(2) > 0, torch.ones(2, 4, dtype=torch.int64)
    jitter, sigma, statistics = (torch.zeros(2, 4), torch.arange(4).repeat(2, 1)), torch.zeros(2), torch.ones(3)
    with recording(capability) as listed:
        for source, channels, bicubic, dtype, size, chain in (*usual, *others):
            images = torch.empty(2, channels, 256, 256, dtype=source, device="meta")
            given = boxes, chance, *jitter, chance, sigma, chance, None, None, statistics, statistics
            augment(images, *given, size, bicubic, chain, 1, [], dtype)
    return listed
