"""The operations views are made of, against torchvision's on float images, image by image."""

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from ssl_ib import random
from ssl_ib.ops.pixels import colour, resample

B = 12


@pytest.fixture
def images() -> torch.Tensor:
    """Float images [B, 3, 20, 26] with grey, black, white and saturated patches, where hue has its corner cases."""
    x = torch.rand(B, 3, 20, 26, generator=torch.Generator().manual_seed(0))
    x[0] = x[0, :1]
    x[1, :, :4], x[1, :, 4:8] = 0.0, 1.0
    x[2] = (x[2] > 0.5).float()
    x[3, 1] = x[3, 0]
    return x


def each(images, operation, *parameters):
    """The operation on one image at a time, with plain numbers."""
    return torch.stack([operation(x, *(p[i].item() for p in parameters)) for i, x in enumerate(images)])


def uniform(n, low, high, seed=1):
    return random.uniform(random.fold(torch.arange(B), seed), n, low, high)


# (top, left, height, width): corners, one pixel, one row, one column, the whole image, the inside.
BOXES = torch.tensor(
    [[0, 0, 20, 26], [0, 0, 5, 7], [15, 19, 5, 7], [0, 25, 20, 1], [19, 0, 1, 26], [7, 9, 1, 1]]
    + [[3, 4, 11, 13], [2, 0, 16, 16], [4, 10, 16, 16], [10, 3, 9, 22], [0, 13, 20, 13], [1, 1, 2, 3]]
)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [1, 5, 16, 37])
def test_resized_crop_equals_torchvision(images, size, interpolation):
    flip = torch.arange(B) % 3 == 0
    ours = resample.resized_crop(images, BOXES, size, flip, interpolation)
    for x, box, mirrored, y in zip(images, BOXES.tolist(), flip, ours, strict=True):
        expected = tv.resized_crop(x, *box, [size, size], tv.InterpolationMode(interpolation), antialias=True)
        torch.testing.assert_close(y, expected.flip(-1) if mirrored else expected, atol=1e-5, rtol=0)


def test_resized_crop_of_uint8_is_that_of_its_floats(images):
    pixels = (images * 255).round().to(torch.uint8)
    ours = resample.resized_crop(pixels, BOXES, 16)
    torch.testing.assert_close(ours, resample.resized_crop(pixels.float() / 255, BOXES, 16), atol=1e-6, rtol=0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_nothing_outside_the_box_leaks_in(images, interpolation):
    inside = torch.zeros(B, 1, 20, 26, dtype=torch.bool)
    for i, (top, left, height, width) in enumerate(BOXES.tolist()):
        inside[i, :, top : top + height, left : left + width] = True
    other = torch.where(inside, images, 1e6)
    for size in (4, 16, 37):
        a, b = (resample.resized_crop(x, BOXES, size, interpolation=interpolation) for x in (images, other))
        assert torch.equal(a, b)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_matrix_rows_sum_to_one_and_are_the_identity_where_nothing_changes(interpolation):
    start, length = torch.tensor([0, 3, 5, 0]), torch.tensor([40, 9, 1, 12])
    resized, offset = torch.tensor([12, 12, 12, 12]), torch.zeros(4, dtype=torch.int64)
    matrix = resample.resize_matrix(start, length, resized, offset, 12, 40, interpolation)
    torch.testing.assert_close(matrix.sum(2), torch.ones(4, 12))
    assert torch.equal(matrix[3], torch.eye(12, 40))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("resized", "size"), [(8, 8), (16, 14), (33, 28), (20, 20)])
def test_centre_crop_equals_torchvision(images, resized, size, interpolation):
    sizes = torch.tensor([[20, 26], [20, 9], [11, 26], [3, 4], [13, 13], [20, 21]]).repeat(2, 1)
    ours = resample.centre_crop(images, sizes, resized, size, interpolation)
    for x, (height, width), y in zip(images, sizes.tolist(), ours, strict=True):
        small = tv.resize(x[:, :height, :width], [resized], tv.InterpolationMode(interpolation), antialias=True)
        torch.testing.assert_close(y, tv.center_crop(small, [size, size]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("radius", [1, 3, 11])
def test_gaussian_blur_equals_torchvision(images, radius):
    sigma = uniform(1, 0.1, 2.0)[:, 0]
    expected = each(images, lambda x, s: tv.gaussian_blur(x, [2 * radius + 1] * 2, [s, s]), sigma)
    torch.testing.assert_close(resample.gaussian_blur(images, sigma, radius), expected, atol=1e-5, rtol=0)


def test_autocast_does_not_coarsen_the_pixels(images):
    plain = resample.resized_crop(images, BOXES, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resample.resized_crop(images, BOXES, 16), plain)


def test_greyscale_and_solarise_equal_torchvision(images):
    torch.testing.assert_close(colour.greyscale(images), tv.rgb_to_grayscale(images, 3))
    images[4, :, 0] = 0.5
    torch.testing.assert_close(colour.solarise(images), tv.solarize(images, 0.5), atol=0, rtol=0)


def test_adjust_hue_equals_torchvision(images):
    shift = uniform(1, -0.5, 0.5)[:, 0]
    shift[:3], shift[-1] = torch.tensor([0.5, -0.5, 0.25]), 0.0
    expected = each(images, tv.adjust_hue, shift)
    torch.testing.assert_close(colour.adjust_hue(images, shift), expected, atol=1e-5, rtol=0)


def test_hue_of_pure_colours_turns_red_to_green_to_blue():
    red, green, blue = torch.eye(3)[:, None, :, None, None]
    third = torch.tensor([1 / 3])
    torch.testing.assert_close(colour.adjust_hue(red, third), green, atol=1e-5, rtol=0)
    torch.testing.assert_close(colour.adjust_hue(green, third), blue, atol=1e-5, rtol=0)
    torch.testing.assert_close(colour.adjust_hue(red, -third), blue, atol=1e-5, rtol=0)


TORCHVISION = {
    colour.BRIGHTNESS: tv.adjust_brightness,
    colour.CONTRAST: tv.adjust_contrast,
    colour.SATURATION: tv.adjust_saturation,
    colour.HUE: tv.adjust_hue,
}


@pytest.mark.parametrize("operation", TORCHVISION)
def test_one_jitter_operation_equals_torchvision(images, operation):
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(B, 1)
    strength = uniform(1, -0.5, 0.5)[:, 0] if operation == colour.HUE else uniform(1, 0.0, 1.8)[:, 0]
    factors = neutral.index_copy(1, torch.tensor([operation]), strength[:, None])
    ours = colour.colour_jitter(images, factors, random.permutation(torch.arange(B), 4))
    torch.testing.assert_close(ours, each(images, TORCHVISION[operation], strength), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_colour_jitter_in_random_order_equals_torchvision(images, seed):
    # All 24 orders are met over the seeds and images; they give different results because of the clamping.
    order = torch.cartesian_prod(*[torch.arange(4)] * 4)
    order = order[order.sort(1).values.eq(torch.arange(4)).all(1)].roll(8 * seed, 0)[:B]
    factors = torch.cat([uniform(3, 0.2, 1.8, seed), uniform(1, -0.5, 0.5, seed + 10)], 1)
    before = images.clone()
    ours = colour.colour_jitter(images, factors, order)
    for x, factor, sequence, y in zip(images, factors.tolist(), order.tolist(), ours, strict=True):
        for operation in sequence:
            x = TORCHVISION[operation](x, factor[operation])
        torch.testing.assert_close(y, x, atol=2e-5, rtol=0)
    assert torch.equal(images, before)


def test_neutral_jitter_changes_no_bit(images):
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(B, 1)
    assert torch.equal(colour.colour_jitter(images, neutral, random.permutation(torch.arange(B), 4)), images)


def test_separable_is_the_double_product():
    generator = torch.Generator().manual_seed(0)
    x, rows, columns = (torch.rand(s, generator=generator) for s in ((2, 3, 5, 7), (2, 4, 5), (2, 6, 7)))
    expected = torch.einsum("bhi,bcij,bwj->bchw", rows.double(), x.double(), columns.double())
    torch.testing.assert_close(resample.separable(x, rows, columns).double(), expected, atol=1e-5, rtol=0)
