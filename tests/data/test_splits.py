"""Views that are parts of one image: shuffled cells, channels, frequencies, patches."""

import pytest
import torch

from ssl_ib import UserError, random
from ssl_ib.data.sources.base import InMemory, Source
from ssl_ib.data.views import Augment, colour_spaces
from ssl_ib.data.views.infomin import cmc
from ssl_ib.data.views.jigsaw import Jigsaw
from ssl_ib.data.views.splits import ColourSplit, FrequencySplit, Patches
from ssl_ib.ops.pixels import resample
from ssl_ib.types import Sample


def pixels(b: int, height: int = 24, width: int = 30) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (b, 3, height, width), dtype=torch.uint8, generator=generator)


def keys(n: int, view: int = 0) -> torch.Tensor:
    return random.image_keys(seed=0, epoch=0, index=torch.arange(n), stream=view)


class Held(Source):
    def __init__(self, images, val=None, sizes=None):
        label = torch.full((len(images),), -1)
        self.images, self.held_out = InMemory(images, label, [], sizes), val

    def train(self):
        return self.images

    def val(self):
        return self.held_out


# --- jigsaw ---


@pytest.mark.parametrize(("size", "patch", "grid"), [(33, 8, 3), (33, 11, 3), (32, 15, 2), (25, 8, 3)])
def test_each_image_is_cut_into_its_own_cells_in_an_order_of_its_own(size, patch, grid):
    b, cell, n = 20, size // grid, grid**2
    place = torch.arange(size).div(cell, rounding_mode="floor").clamp_max(grid - 1)
    # The red channel has the number of the cell, the green one that of the image.
    images = torch.zeros(b, 3, size, size, dtype=torch.uint8)
    images[:, 0] = 20 * (place[:, None] * grid + place)
    images[:, 1] = 10 * torch.arange(b, dtype=torch.uint8)[:, None, None]
    parts = Jigsaw(size, patch, grid, scale=(1.0, 1.0), flip=0.0)(images, keys(b)) * 255
    assert parts.shape == (b, n, 3, patch, patch)
    torch.testing.assert_close(parts[:, :, 1], 10.0 * torch.arange(b)[:, None, None, None].expand_as(parts[:, :, 1]))
    cells = parts[:, :, 0, 0, 0] / 20
    torch.testing.assert_close(parts[:, :, 0] / 20, cells[..., None, None].expand_as(parts[:, :, 0]))
    torch.testing.assert_close(cells.sort(1).values, torch.arange(n).float().expand(b, -1))
    assert len(cells.round().unique(dim=0)) > b // 2


def test_parts_come_from_anywhere_in_their_cells():
    # Each pixel states its row and its column; of 9 cells of 10 pixels, squares of 7 begin at 0 to 3 in each.
    line = torch.arange(30, dtype=torch.uint8)
    images = torch.stack([line[:, None].expand(30, 30), line.expand(30, 30), line.expand(30, 30)]).expand(
        200, -1, -1, -1
    )
    parts = Jigsaw(30, 7, 3, scale=(1.0, 1.0), flip=0.0)(images, keys(200)) * 255
    corner = parts[:, :, :2, 0, 0].round().long() % 10
    counts = torch.bincount((4 * corner[..., 0] + corner[..., 1]).flatten(), minlength=16) / 1800
    assert len(counts) == 16 and (counts - 1 / 16).abs().max() < 0.03


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 32, "patch": 12}, "jigsaw_size=32 pixels cannot be divided into 3 x 3 cells .* at least 36"),
        ({"size": 32, "patch": 8, "scale": (0.9, 0.5)}, "jigsaw_scale: expected 0 < low <= high <= 1"),
    ],
)
def test_a_jigsaw_that_cannot_be_cut(arguments, message):
    with pytest.raises(UserError, match=message):
        Jigsaw(**arguments)


# --- channels and frequencies ---


@pytest.mark.parametrize("space", ["rgb", "ydbdr", "lab", "ycbcr", "hsv"])
def test_both_views_are_channels_of_the_same_drawn_image(space):
    augment, sample = Augment(16, jitter=(0.4, 0.4, 0.4, 0.1)), Sample.unlabelled(pixels(8))
    views = ColourSplit(augment, space)
    drawn = views.draw(sample, [keys(8, 0), keys(8, 1)])
    expected = augment(sample.images, keys(8, 0))
    torch.testing.assert_close(torch.cat(drawn, 1), colour_spaces.convert(expected, space))
    plain = views.center(sample)
    views.measure(Held(sample.images))
    torch.testing.assert_close(views.show(views.center(sample), None), colour_spaces.invert(plain, space))


def test_low_and_high_frequencies_add_up_to_the_image():
    augment, sample = Augment(16), Sample.unlabelled(pixels(8))
    views = FrequencySplit(augment, sigma=0.7)
    low, high = views.draw(sample, [keys(8, 0), keys(8, 1)])
    torch.testing.assert_close(low + high, augment(sample.images, keys(8, 0)))
    torch.testing.assert_close(low, resample.gaussian_blur(low + high, torch.full((8,), 0.7), 3))
    wider = FrequencySplit(augment, sigma=2.0).draw(sample, [keys(8, 0), keys(8, 1)])
    assert wider[0].var() < 0.5 * low.var() and wider[1].var() > high.var()


def test_statistics_are_measured_once_on_plain_views_unless_they_are_stated():
    images = pixels(6, 20, 20)
    views = ColourSplit(Augment(20), "ydbdr")
    source = Held(images)
    views.measure(source)
    channels = colour_spaces.convert(images / 255, "ydbdr").transpose(0, 1).flatten(1)
    assert views.statistics == (
        pytest.approx(channels.mean(1).tolist(), abs=1e-5),
        pytest.approx(channels.std(1, correction=0).tolist(), abs=1e-5),
    )
    source.train = None  # A second measurement would fail.
    views.measure(source)
    grey = ColourSplit(Augment(20), "ydbdr")
    grey.measure(Held(images[:, :1].expand(-1, 3, -1, -1)))
    assert grey.statistics[1][1:] == pytest.approx((1 / 255, 1 / 255))
    stated = cmc(size=20, mean=(0.457, -0.082, -0.052), std=(0.5, 1.331, 1.333))
    stated.measure(source)
    assert stated.statistics == (pytest.approx((0.457, -0.082, -0.052)), pytest.approx((0.5, 1.331, 1.333)))
    with pytest.raises(UserError, match="mean and std: expected both or none"):
        cmc(size=20, mean=(0.457, -0.082, -0.052))


# --- patches ---


def test_patches_lie_at_their_distance_anywhere_in_the_image():
    sizes = torch.tensor([[24, 30], [17, 20]]).repeat(200, 1)
    images = torch.zeros(400, 3, 24, 30, dtype=torch.uint8)
    images[:, 0], images[:, 1] = torch.arange(24)[:, None], torch.arange(30)
    sample = Sample(images, torch.arange(400), torch.full((400,), -1), {"size": sizes})
    first, second = (view * 255 for view in Patches(6, 9).draw(sample, [keys(400), keys(400, 1)]))
    torch.testing.assert_close(second[:, :2] - first[:, :2], torch.full_like(first[:, :2], 9.0))
    corners = first[:, :2, 0, 0].round().long()
    assert (first[:, 0, :, 0].round().long() - corners[:, :1] == torch.arange(6)).all()
    for number, (height, width) in enumerate(sizes[:2].tolist()):
        rows, columns = corners[number::2].T
        assert (rows.min(), rows.max()) == (0, height - 15) and (columns.min(), columns.max()) == (0, width - 15)


def test_patches_that_do_not_fit_name_the_image():
    sizes = torch.tensor([[24, 30], [24, 30], [14, 30]])
    message = r"distance=9: two patches of 6 pixels \(size\) .* at least 15 pixels a side; {} 2 has 14 x 30 pixels"
    sample = Sample(pixels(3), torch.arange(3), torch.full((3,), -1), {"size": sizes})
    with pytest.raises(UserError, match=message.format("image")):
        Patches(6, 9).draw(sample, [keys(3), keys(3)])
    with pytest.raises(UserError, match=message.format("training image")):
        Patches(6, 9, source=Held(pixels(3), sizes=sizes))
    with pytest.raises(UserError, match=message.format("held-out image")):
        Patches(6, 9, source=Held(pixels(3), Held(pixels(3), sizes=sizes).images))
    assert Patches(6, 8, source=Held(pixels(3), sizes=sizes)).shapes == ((3, 6, 6),) * 2
