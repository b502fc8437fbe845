"""Semantic segmentation: a decoder on an encoder's feature maps, its training on crops, and the masks it predicts.

Shapes: B crops or windows of c x c pixels, C classes, H x W pixels of one image.
"""

from __future__ import annotations

import random as python_random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    pil_to_tensor,
)

from .. import random
from ..errors import UserError
from .maps import FeatureMaps, groups_of
from .mask_sets import MaskedImages
from .progress import track
from .protocol import Job
from .training import Order, train

#: Keeps what an image draws apart from the order of the images, and from what a step draws.
_IMAGES = -3
#: How often a crop is drawn anew that one class fills.
_TRIES = 10
#: Channels of the auxiliary head, as in the published configurations.
_AUXILIARY = 256


@dataclass(frozen=True)
class Recipe:
    """How a decoder is made and trained; rates are those of a step, as they stand.

    decoder:     "upernet" on four maps of the encoder, or "layers": four layers on its last one.
    frozen:      whether the encoder stays as it is. width: channels of the decoder. blocks: as for FeatureMaps.
    auxiliary:   weight of the loss of a second, small head on the third map, as UPerNet has it; 0: there is none.
    crop:        pixels of a side of the crops, and of the windows that an image is predicted by.
    size:        pixels of the shorter side of the images before they are scaled and cropped.
    scale:       range of the further scaling. largest: a crop is drawn anew where one class has more of it than this.
    jitter:      change brightness, contrast, saturation and hue, each half the time. flip: mirror half of the crops.
    steps:       of `batch_size` crops each. warmup: the share of them in which the rate rises; it falls linearly to 0.
    layer_decay, drop_path: of an encoder that is not frozen.
    overlap:     the share of a window that the next one covers too.
    """

    decoder: Literal["upernet", "layers"]
    frozen: bool
    width: int
    blocks: Sequence[int] | None
    auxiliary: float
    dropout: float
    crop: int
    size: int
    scale: tuple[float, float]
    largest: float
    jitter: bool
    flip: bool
    steps: int
    batch_size: int
    lr: float
    warmup: float
    weight_decay: float
    layer_decay: float
    drop_path: float
    overlap: float

    def rate(self, step: int) -> float:
        """AdamW's rate at a step."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        return self.lr * (self.steps - step) / max(self.steps - warm, 1)


class Segmenter(nn.Module):
    """An encoder's feature maps, and a decoder that scores the classes of each position.

    The new layers are drawn from torch's global generator. Raises UserError where the encoder does not fit.
    """

    def __init__(self, job: Job, recipe: Recipe):
        super().__init__()
        self.frozen, self.upernet = recipe.frozen, recipe.decoder == "upernet"
        # The last map: of a vision transformer that of its patches.
        scales = (4, 8, 16, 32) if self.upernet else (16,) if job.subject.vit else (32,)
        self.maps = FeatureMaps(
            job.subject,
            recipe.crop,
            scales,
            drop_path=0.0 if recipe.frozen else recipe.drop_path,
            blocks=recipe.blocks,
            norm=not self.upernet,
        )
        if recipe.frozen:
            self.maps.encoder.requires_grad_(False)
        if self.upernet:
            self.decoder: nn.Module = _upernet(self.maps.channels, recipe.width)
        else:
            self.decoder = _layers(self.maps.channels[-1], self.maps.strides[-1], recipe.width)
        self.classifier = _classifier(recipe.width, job.num_classes, recipe.dropout)
        self.auxiliary = None
        if self.upernet and recipe.auxiliary:
            head = _classifier(_AUXILIARY, job.num_classes, recipe.dropout)
            self.auxiliary = nn.Sequential(_convolution(self.maps.channels[2], _AUXILIARY), head)

    def train(self, mode: bool = True) -> Segmenter:
        """A frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.maps.encoder.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Scores of prepared crops: [B, 3, c, c] -> [B, C, c, c]; in training those of the auxiliary head too."""
        maps = self.maps(images)
        # UPerNet's decoder expects the maps of strides 1 and 2 as well, and does not use them.
        decoded = self.decoder([images, images, *maps] if self.upernet else maps[-1])
        scores = [self.classifier(decoded)]
        if self.auxiliary is not None and self.training:
            scores.append(self.auxiliary(maps[2]))
        return [
            F.interpolate(part.float(), size=images.shape[2:], mode="bilinear", align_corners=False) for part in scores
        ]


def _upernet(channels: Sequence[int], width: int) -> nn.Module:
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    return UPerNetDecoder([0, 0, *channels], decoder_channels=width)


def _layers(channels: int, stride: float, width: int) -> nn.Module:
    """Three convolutions, each at twice the resolution of the one before, up to a quarter of the image's."""
    layers: list[nn.Module] = []
    for _ in range(3):
        if stride >= 8:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
            stride /= 2
        layers.append(_convolution(channels, width))
        channels = width
    return nn.Sequential(*layers)


def _convolution(channels: int, width: int) -> nn.Module:
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def _classifier(width: int, classes: int, dropout: float) -> nn.Module:
    layer = nn.Conv2d(width, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Dropout2d(dropout), layer)


def fit(job: Job, recipe: Recipe, images: MaskedImages, seed: int, workers: int, saved: Path | None) -> Segmenter:
    """A decoder, and an encoder that is not frozen, trained on crops of the images.

    workers, saved: as in `finetune`. Raises UserError where there are too few images, or the loss is not finite.
    """
    batch = min(recipe.batch_size, len(images))
    if batch < 2:
        raise UserError(f"expected two images in a batch at least, got batch_size={batch}: batch norm needs them")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Segmenter(job, recipe).to(job.device)
    groups = [] if recipe.frozen else model.maps.groups(recipe.weight_decay, recipe.layer_decay)
    if recipe.frozen:
        groups += groups_of(model.maps.necks, recipe.weight_decay)
    for head in filter(None, (model.decoder, model.classifier, model.auxiliary)):
        groups += groups_of(head, recipe.weight_decay)
    optimiser = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999))
    loader = DataLoader(
        _Crops(job, recipe, images, seed),
        batch_sampler=Order(len(images), batch, len(images) // batch, seed),
        num_workers=workers,
        generator=torch.Generator(),
        persistent_workers=workers > 0,
    )

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        crops, masks = (part.to(job.device, non_blocking=True) for part in batch)
        with job.autocast():
            scores = model(prepared(job, crops))
        main, *rest = [_cross_entropy(part, masks) for part in scores]
        return main + recipe.auxiliary * sum(rest)

    train(job, model, loader, loss_of, optimiser, recipe.rate, recipe.steps, seed, saved, "training of the decoder")
    return model


def _cross_entropy(scores: Tensor, masks: Tensor) -> Tensor:
    """The mean over the pixels that are not void: scores [B, C, c, c], masks int64 [B, c, c]."""
    # As a list of pixels, of which the cross-entropy repeats bit by bit on CUDA too.
    scores, masks = scores.movedim(1, -1).flatten(0, 2), masks.flatten()
    total = F.cross_entropy(scores, masks, ignore_index=-1, reduction="sum")
    return total / (masks >= 0).sum().clamp_min(1)


def prepared(job: Job, crops: Tensor) -> Tensor:
    """What the encoder is given: uint8 [B, 3, c, c] -> float32 of the same shape, normalised as its own images were."""
    mean, std = (
        torch.tensor(job.subject.description[key], device=crops.device).view(-1, 1, 1) for key in ("mean", "std")
    )
    return (crops.float() / 255 - mean) / std


class _Crops(Dataset):
    """Crops, each by its own draw: (epoch, row) -> uint8 [3, c, c] and int64 [c, c], void where the image ends."""

    def __init__(self, job: Job, recipe: Recipe, images: MaskedImages, seed: int):
        self.recipe, self.images, self.seed, self.colour = recipe, images, seed, _colour(job)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, row = place
        key = random.image_keys(self.seed, epoch, torch.tensor([row]), _IMAGES)
        image, mask = crop(self.images.image(row), self.images.mask(row), self.recipe, python_random.Random(int(key)))
        void = np.full((self.recipe.crop,) * 2, -1, np.int64)
        void[: image.height, : image.width] = mask
        return _filled(image, self.recipe.crop, self.colour), torch.from_numpy(void)


def crop(
    image: Image.Image, mask: np.ndarray, recipe: Recipe, rng: python_random.Random
) -> tuple[Image.Image, np.ndarray]:
    """A random crop of an image, scaled, mirrored and with other colours, and the same crop of its mask.

    Both are smaller than the crop's side where the scaled image is.
    """
    height, width = mask.shape
    tall, wide = _scaled(height, width, recipe.size * rng.uniform(*recipe.scale))
    rows, columns = min(tall, recipe.crop), min(wide, recipe.crop)
    for _ in range(_TRIES):
        top, left = rng.randint(0, tall - rows), rng.randint(0, wide - columns)
        # The pixel of the mask at the centre of each pixel of the crop.
        down = (2 * np.arange(top, top + rows) + 1) * height // (2 * tall)
        along = (2 * np.arange(left, left + columns) + 1) * width // (2 * wide)
        part = mask[down[:, None], along]
        counts = np.bincount(part[part >= 0])
        if (counts > 0).sum() > 1 and counts.max() <= recipe.largest * counts.sum():
            break
    box = (left * width / wide, top * height / tall, (left + columns) * width / wide, (top + rows) * height / tall)
    image = image.resize((columns, rows), Image.Resampling.BILINEAR, box=box)
    if recipe.flip and rng.random() < 0.5:
        image, part = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), part[:, ::-1]
    if recipe.jitter:
        for change, low, high in (
            (adjust_brightness, 0.875, 1.125),
            (adjust_contrast, 0.5, 1.5),
            (adjust_saturation, 0.5, 1.5),
            (adjust_hue, -0.1, 0.1),
        ):
            if rng.random() < 0.5:
                image = change(image, rng.uniform(low, high))
    return image, part


def _scaled(height: int, width: int, shorter: float) -> tuple[int, int]:
    """An image's height and width when its shorter side has so many pixels."""
    ratio = shorter / min(height, width)
    return max(round(height * ratio), 1), max(round(width * ratio), 1)


def _colour(job: Job) -> tuple[int, ...]:
    """What stands where there is no image: the colour that is normalised to 0."""
    return tuple(round(255 * value) for value in job.subject.description["mean"])


def _filled(image: Image.Image, side: int, colour: tuple[int, ...]) -> Tensor:
    """An image with a colour at its right and lower edges, where it is smaller than `side`: uint8 [3, h, w]."""
    canvas = Image.new("RGB", (max(image.width, side), max(image.height, side)), colour)
    canvas.paste(image)
    return pil_to_tensor(canvas)


class _Whole(Dataset):
    """Held-out images, scaled: row -> uint8 [3, h, w], filled up to a window; (h, w) without that; int16 [H, W]."""

    def __init__(self, job: Job, recipe: Recipe, images: MaskedImages):
        self.recipe, self.images, self.colour = recipe, images, _colour(job)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, tuple[int, int], Tensor]:
        image = self.images.image(row)
        tall, wide = _scaled(image.height, image.width, self.recipe.size)
        image = image.resize((wide, tall), Image.Resampling.BILINEAR)
        return _filled(image, self.recipe.crop, self.colour), (tall, wide), torch.from_numpy(self.images.mask(row))


@torch.no_grad()
def predicted(
    job: Job, recipe: Recipe, model: Segmenter, images: MaskedImages, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The predicted mask of each image, and its true one: int64 [H, W] and int16 [H, W] at the mask's own size.

    Each image is scaled as in training, and covered by windows of the crop's size; where they overlap, their scores are
    averaged.
    """
    size, side = job.settings.encode_batch, recipe.crop
    loader = DataLoader(
        _Whole(job, recipe, images), size, num_workers=workers, collate_fn=list, generator=torch.Generator()
    )
    for images_of_batch in track(loader, len(loader), f"predicting the masks of {len(images):,} images, batches"):
        places = [
            (number, top, left)
            for number, (image, *_) in enumerate(images_of_batch)
            for top in _starts(image.shape[1], recipe)
            for left in _starts(image.shape[2], recipe)
        ]
        sums: dict[int, Tensor] = {}
        for start in range(0, len(places), size):
            some = places[start : start + size]
            windows = [images_of_batch[n][0][:, top : top + side, left : left + side] for n, top, left in some]
            with job.autocast():
                (scores,) = model(prepared(job, torch.stack(windows).to(job.device)))
            for following, ((number, top, left), part) in enumerate(zip(some, scores, strict=True), start + 1):
                image, (tall, wide), mask = images_of_batch[number]
                if number not in sums:
                    # The last channel counts the windows.
                    sums[number] = part.new_zeros(len(part) + 1, *image.shape[1:])
                here = sums[number][:, top : top + side, left : left + side]
                here += torch.cat([part, torch.ones_like(part[:1])])
                if following == len(places) or places[following][0] != number:
                    total = sums.pop(number)[None, :, :tall, :wide]
                    mean = total[:, :-1] / total[:, -1:]
                    mean = F.interpolate(mean, size=mask.shape, mode="bilinear", align_corners=False)
                    yield mean[0].argmax(dim=0).cpu(), mask


def _starts(length: int, recipe: Recipe) -> list[int]:
    """Where the windows along a side begin: they overlap as asked for, and the last one ends where the side does."""
    step = max(round(recipe.crop * (1 - recipe.overlap)), 1)
    last = length - recipe.crop
    return [*range(0, last, step), last]
