"""The 15 corruptions of ImageNet-C at 5 severities, made on the fly, in batch, on images of any size and any device.

After Hendrycks and Dietterich (ICLR 2019), with their strengths at 224 pixels; at other sizes lengths are in proportion
to the shorter side. All chance comes from one key an image, so that an image is corrupted alike in any batch. Three
differ in kind from the published images, and compare with nothing but themselves: frost is a generated texture in place
of photographs, fog is synthesised from its spectrum, and glass takes a pixel from nearby in place of exchanging two.

Shapes: B images, H x W pixels; images float32 [B, 3, H, W] in [0, 1].
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .. import random
from ..errors import UserError, nearest
from ..ops.pixels.resample import gaussian_blur

#: AlexNet's errors on ImageNet-C, the mean over the severities, in [0, 1].
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
NAMES = tuple(ALEXNET)
SEVERITIES = (1, 2, 3, 4, 5)
#: The side that the strengths are stated for.
_SIDE = 224
#: The least side that snow is drawn at.
_SNOW_SIDE = 96
#: Numbers drawn at a time, so that noise for a large batch does not fill the memory.
_AT_ONCE = 1 << 22


def mean_corruption_error(errors: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]]) -> float:
    """mCE in per cent: the mean over corruptions of the sum of errors over the baseline's sum, times 100.

    errors, baseline: errors in [0, 1] by corruption, one a severity. Raises UserError where the baseline lacks one.
    """
    missing = [name for name in errors if len(baseline.get(name, ())) != len(errors[name])]
    if missing:
        raise UserError(f"baseline: it has no errors of {', '.join(missing)} on these images with these settings")
    return 100 * fmean(sum(errors[name]) / sum(baseline[name]) for name in errors)


def corrupt(images: Tensor, name: str, severity: int, keys: Tensor) -> Tensor:
    """Images with a corruption, as they would be saved: uint8 [B, 3, H, W] -> uint8 [B, 3, H, W], on their device.

    name: one of NAMES; severity: 1 to 5; keys: int64 [B], what chance is drawn from. Raises UserError for another name.
    """
    if name not in _CORRUPTIONS:
        raise UserError(f"corruptions: unknown corruption {name!r}{nearest(name, NAMES)}")
    size = max(_AT_ONCE // max(images[0].numel(), 3 * _SNOW_SIDE**2), 1)
    done = []
    for part, some in zip(images.split(size), keys.to(images.device).split(size), strict=True):
        changed = _CORRUPTIONS[name](part.float() / 255, severity - 1, some)
        done.append((changed.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(done)


def _scale(images: Tensor) -> float:
    return min(images.shape[-2:]) / _SIDE


def _uniform(keys: Tensor, stream: int, *shape: int) -> Tensor:
    return random.uniform(random.fold(keys, stream), math.prod(shape)).view(len(keys), *shape)


def _normal(keys: Tensor, stream: int, *shape: int) -> Tensor:
    """Box and Muller's."""
    length = (-2 * (1 - _uniform(keys, stream, *shape)).log()).sqrt()
    return length * torch.cos(2 * math.pi * _uniform(keys, stream + 100, *shape))


def _gaussian_noise(x: Tensor, s: int, keys: Tensor) -> Tensor:
    return x + (0.08, 0.12, 0.18, 0.26, 0.38)[s] * _normal(keys, 0, *x.shape[1:])


def _shot_noise(x: Tensor, s: int, keys: Tensor) -> Tensor:
    photons = (60, 25, 12, 5, 3)[s]
    mean, u = x * photons, _uniform(keys, 0, *x.shape[1:])
    # The quantile of Poisson's distribution: how many of its cumulated probabilities lie below u.
    probability = (-mean).exp()
    below, count = probability.clone(), torch.zeros_like(x)
    for k in range(1, int(photons + 8 * photons**0.5) + 4):
        count += u > below
        probability = probability * mean / k
        below += probability
    return count / photons


def _impulse_noise(x: Tensor, s: int, keys: Tensor) -> Tensor:
    u = _uniform(keys, 0, *x.shape[1:])
    amount = (0.03, 0.06, 0.09, 0.17, 0.27)[s]
    return torch.where(u < amount / 2, 0.0, torch.where(u < amount, 1.0, x))


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of all images alike; below a tenth of a pixel there is nothing to do."""
    radius = min(math.ceil(3 * sigma), min(x.shape[-2:]) - 1)
    if sigma < 0.1 or radius < 1:
        return x
    return gaussian_blur(x, torch.full((len(x),), sigma, device=x.device), radius)


def _defocus_blur(x: Tensor, s: int, keys: Tensor) -> Tensor:
    radius, alias = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[s]
    radius = radius * _scale(x)
    reach = min(math.ceil(radius), min(x.shape[-2:]) - 1)
    place = torch.arange(-reach, reach + 1, device=x.device, dtype=torch.float32)
    # The share of a pixel at the rim is in proportion to how far the disk reaches into it.
    disk = (radius + 0.5 - (place[:, None] ** 2 + place**2).sqrt()).clamp(0, 1)
    kernel = (disk / disk.sum()).expand(3, 1, -1, -1)
    return _blurred(F.conv2d(F.pad(x, (reach,) * 4, mode="reflect"), kernel, groups=3), alias * _scale(x))


def _glass_blur(x: Tensor, s: int, keys: Tensor) -> Tensor:
    sigma, reach, times = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[s]
    scale = _scale(x)
    reach, (height, width) = max(round(reach * scale), 1), x.shape[-2:]
    x = _blurred(x, sigma * scale)
    rows, columns = torch.arange(height, device=x.device)[:, None], torch.arange(width, device=x.device)
    for time in range(times):
        moved = [random.randint(random.fold(keys, 2 * time + i), height * width, 2 * reach + 1) - reach for i in (0, 1)]
        down, right = (move.view(-1, height, width) for move in moved)
        place = (rows + down).clamp(0, height - 1) * width + (columns + right).clamp(0, width - 1)
        x = x.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, 3, -1)).view_as(x)
    return _blurred(x, sigma * scale)


def _sampled(x: Tensor, matrix: Tensor) -> Tensor:
    """Images at the places that affine maps give, in coordinates from -1 to 1: matrix [B, 2, 3]."""
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def _along(x: Tensor, length: float, sigma: float, angle: Tensor) -> Tensor:
    """Blur in one direction: the mean of shifted images; angle [B] in degrees, length and sigma in pixels."""
    steps = torch.arange(0, 2 * max(math.ceil(length), 1) + 1, device=x.device)
    weights = torch.exp(-0.5 * (steps / max(sigma, 0.3)) ** 2)
    weights = weights[weights > 1e-3]
    radians, result = torch.deg2rad(angle), torch.zeros_like(x)
    for step, weight in enumerate(weights / weights.sum()):
        matrix = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
        matrix[:, 0, 2] = 2 * step * radians.cos() / x.shape[-1]
        matrix[:, 1, 2] = 2 * step * radians.sin() / x.shape[-2]
        result += weight * _sampled(x, matrix)
    return result


def _motion_blur(x: Tensor, s: int, keys: Tensor) -> Tensor:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[s]
    return _along(x, radius * _scale(x), sigma * _scale(x), _uniform(keys, 0, 1)[:, 0] * 90 - 45)


def _zoomed(x: Tensor, factor: float) -> Tensor:
    """The centre of images, enlarged by a factor of at least 1."""
    return _sampled(x, torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1) / factor)


def _zoom_blur(x: Tensor, s: int, keys: Tensor) -> Tensor:
    end, step = ((0.11, 0.01), (0.16, 0.01), (0.21, 0.02), (0.26, 0.02), (0.31, 0.03))[s]
    factors = [1 + i * step for i in range(math.ceil(round(end / step, 6)))]
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _snow(x: Tensor, s: int, keys: Tensor) -> Tensor:
    mean, deviation, zoom, least, length, sigma, share = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[s]
    # On a small image snow falls as on a larger one that is shrunk: flakes of whole pixels would cover it.
    small = min(min(x.shape[-2:]) / _SNOW_SIDE, 1.0)
    large, scale = [round(side / small) for side in x.shape[-2:]], _scale(x) / small
    layer = _zoomed(mean + deviation * _normal(keys, 0, 1, *large), max(zoom * scale, 1.0))
    layer = torch.where(layer < least, 0.0, layer).clamp(0, 1)
    layer = _along(layer, length * scale, sigma * scale, _uniform(keys, 1, 1)[:, 0] * 90 - 135)
    layer = F.interpolate(layer, x.shape[-2:], mode="area")
    grey = (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1, keepdim=True)
    x = share * x + (1 - share) * torch.maximum(x, grey * 1.5 + 0.5)
    return x + layer + layer.flip(2, 3)


def _clouds(x: Tensor, keys: Tensor, stream: int, decay: float) -> Tensor:
    """Noise whose amplitude at twice the frequency is divided by `decay`: [B, 1, H, W], from 0 to 1 in each image."""
    height, width = x.shape[-2:]
    spectrum = torch.fft.rfft2(_normal(keys, stream, 1, height, width))
    rows, columns = torch.fft.fftfreq(height, device=x.device), torch.fft.rfftfreq(width, device=x.device)
    frequency = (rows[:, None] ** 2 + columns**2).sqrt().clamp_min(1 / max(height, width))
    noise = torch.fft.irfft2(spectrum * frequency ** -(math.log2(decay) + 1), s=(height, width))
    low, high = noise.amin(dim=(2, 3), keepdim=True), noise.amax(dim=(2, 3), keepdim=True)
    return (noise - low) / (high - low).clamp_min(1e-12)


def _fog(x: Tensor, s: int, keys: Tensor) -> Tensor:
    strength, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[s]
    most = x.amax(dim=(1, 2, 3), keepdim=True)
    return (x + strength * _clouds(x, keys, 0, decay)) * most / (most + strength)


def _frost(x: Tensor, s: int, keys: Tensor) -> Tensor:
    kept, added = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[s]
    # Crystals: where the one or the other of two rough surfaces crosses its middle, thicker at the rim of the cloud.
    ridges = torch.maximum(*(1 - (2 * _clouds(x, keys, stream, 1.6) - 1).abs() * 3 for stream in (0, 1)))
    ice = (ridges.clamp(0, 1) ** 2) * _clouds(x, keys, 2, 2.2).sqrt()
    tint = x.new_tensor([0.82, 0.92, 1.0])[:, None, None]
    return kept * x + added * ice * tint


def _brightness(x: Tensor, s: int, keys: Tensor) -> Tensor:
    # The value of HSV is the largest channel: hue and saturation stay when all are multiplied alike.
    value = x.amax(dim=1, keepdim=True)
    brighter = (value + (0.1, 0.2, 0.3, 0.4, 0.5)[s]).clamp(max=1)
    return torch.where(value > 0, x * brighter / value.clamp_min(1e-12), brighter)


def _contrast(x: Tensor, s: int, keys: Tensor) -> Tensor:
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[s] + mean


def _elastic_transform(x: Tensor, s: int, keys: Tensor) -> Tensor:
    # In shares of the side: how far, how smooth, and how much of it is affine.
    far, smooth, affine = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))[s]
    height, width = x.shape[-2:]
    side = min(height, width)
    corners = x.new_tensor([[1 / 3, 1 / 3], [-1 / 3, 1 / 3], [-1 / 3, -1 / 3]]) * 2
    moved = corners + (_uniform(keys, 0, 3, 2) * 2 - 1) * affine * 2
    ones = torch.ones(len(x), 3, 1, device=x.device)
    matrix = torch.linalg.solve(torch.cat([moved, ones], dim=2), corners.expand(len(x), -1, -1)).mT
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    field = _uniform(keys, 1, 2, height, width) * 2 - 1
    field = _blurred(field, smooth * side) * far * 2
    return F.grid_sample(x, grid + field.permute(0, 2, 3, 1), padding_mode="reflection", align_corners=False)


def _pixelate(x: Tensor, s: int, keys: Tensor) -> Tensor:
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[s]
    small = F.interpolate(x, [max(int(side * share), 1) for side in x.shape[-2:]], mode="area")
    return F.interpolate(small, x.shape[-2:], mode="nearest")


def _jpeg_compression(x: Tensor, s: int, keys: Tensor) -> Tensor:
    done = []
    for image in (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[s])
        done.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(done).permute(0, 3, 1, 2).to(x.device).float() / 255


_CORRUPTIONS: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = {name: globals()[f"_{name}"] for name in NAMES}
