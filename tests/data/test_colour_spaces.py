"""Colour spaces against scikit-image, and back."""

import numpy as np
import pytest
import torch
from skimage import color

from ssl_ib.data.views import colour_spaces


@pytest.fixture
def images() -> torch.Tensor:
    """[6, 3, 12, 15] in [0, 1] with black, white, grey and saturated pixels."""
    x = torch.rand(6, 3, 12, 15, generator=torch.Generator().manual_seed(0))
    x[0, :, :3], x[0, :, 3:6] = 0.0, 1.0
    x[1] = x[1, :1]
    x[2] = (x[2] > 0.5).float()
    x[3] *= 0.03
    return x


@pytest.mark.parametrize("space", ["ydbdr", "ycbcr", "lab", "hsv"])
def test_a_space_is_scikit_images_and_inverts(images, space):
    ours = colour_spaces.convert(images, space)
    theirs = getattr(color, f"rgb2{space}")(images.double().numpy(), channel_axis=1)
    low, high, _ = colour_spaces.FIRST[space]
    assert ours[:, 0].min() >= low - 1e-3 and ours[:, 0].max() <= high + 1e-3
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5 * (high - low) + 1e-5, rtol=1e-5)
    torch.testing.assert_close(colour_spaces.invert(ours, space), images, atol=1e-4, rtol=0)


def test_rgb_stays(images):
    assert torch.equal(colour_spaces.convert(images, "rgb"), images)
    assert torch.equal(colour_spaces.invert(images, "rgb"), images)
