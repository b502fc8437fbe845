"""Colorful Moving-MNIST: a digit that moves over a picture, rendered when it is asked for.

Shapes: B sequences, n sequences of a set, T frames, S side of the canvas in pixels, d side of a digit, P side of a
picture, from which a backdrop of S x S is cut.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ... import random
from ...config.hints import PositiveInt
from ...config.outside import user_path
from ...config.registry import register_source
from ...errors import UserError
from ...types import Sample
from ..statistics import Statistics, measure
from .archive import Archive
from .base import ImageSet, InMemory, Source, Streamed, stratified
from .digits import Digits
from .folder import Folder

#: Frames of a sequence, and how many of them, the first ones, are seen (Tian et al., 2020, appendix B.4).
FRAMES, SEEN = 20, 10
#: Shares of the canvas: the side of a digit, and the way it goes from one frame to the next.
DIGIT, SPEED = 28 / 64, 0.1
#: Side of a picture over that of the canvas: STL-10's 96 pixels over 64.
PICTURE = 96 / 64
#: A held-out set has so many sequences for each training sequence.
HELD_OUT = 0.2
#: scikit-learn's photographs are cut into so many tiles (rows, columns).
_TILES = 4, 6

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
# Streams of a scene's key.
_DIGIT, _PICTURE, _CROP, _START, _DIRECTION = range(5)


@dataclass(frozen=True)
class Scenes:
    """What was drawn for B scenes; on the CPU. Places are (down, right), in pixels, of the top-left corner.

    digit, picture: int64 [B], numbers of images in a pool.
    crop:           int64 [B, 2], place of the backdrop within the picture.
    start:          float32 [B, 2], place of the digit in the first frame, uniform over the canvas.
    velocity:       float32 [B, 2], pixels a frame.
    """

    digit: Tensor
    picture: Tensor
    crop: Tensor
    start: Tensor
    velocity: Tensor

    def __getitem__(self, rows: Tensor) -> Scenes:
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class Pool:
    """The digits and pictures of one split, and the scenes that are composed of them.

    digits:         uint8 [m, d, d], the ink.
    digit_classes:  int64 [m]; on the CPU.
    pictures:       uint8 [p, 3, P, P].
    picture_classes: int64 [p], on the CPU, or None where the pictures have no classes.
    size:           S.
    """

    digits: Tensor
    digit_classes: Tensor
    pictures: Tensor
    picture_classes: Tensor | None
    size: int

    @property
    def room(self) -> int:
        """The largest place, down or right, that a digit may have on the canvas."""
        return self.size - self.digits.shape[-1]

    def draw(self, keys: Tensor) -> Scenes:
        """One scene a key: every digit, every picture, every crop, every place and every direction is as likely.

        keys: int64 [B], on the CPU.
        """
        angle = 2 * torch.pi * random.uniform(random.fold(keys, _DIRECTION), 1)
        crops = self.pictures.shape[-1] - self.size + 1
        return Scenes(
            digit=random.randint(random.fold(keys, _DIGIT), 1, len(self.digits))[:, 0],
            picture=random.randint(random.fold(keys, _PICTURE), 1, len(self.pictures))[:, 0],
            crop=random.randint(random.fold(keys, _CROP), 2, crops),
            start=random.uniform(random.fold(keys, _START), 2) * self.room,
            velocity=torch.cat([angle.sin(), angle.cos()], 1) * (SPEED * self.size),
        )

    def ink(self, scenes: Scenes) -> Tensor:
        """The scenes' digits: uint8 [B, d, d]."""
        return self.digits[scenes.digit.to(self.digits.device)]

    def backdrops(self, scenes: Scenes) -> Tensor:
        """The scenes' backdrops: uint8 [B, 3, S, S]."""
        picture, top, left = torch.stack([scenes.picture, *scenes.crop.T]).to(self.pictures.device)
        return _windows(self.pictures, self.size)[picture, :, top, left]

    def places(self, scenes: Scenes, *frames: int) -> Tensor:
        """Where the digits are in the given frames, the first of which is 1: int64 [B, T, 2], in [0, room]."""
        gone = torch.tensor(frames, dtype=torch.float32)[:, None] - 1
        unfolded = scenes.start[:, None] + gone * scenes.velocity[:, None]
        # A way that is reflected at both borders is a straight one on a strip that is folded every `room` pixels.
        folded = self.room - (unfolded % (2 * self.room) - self.room).abs()
        return folded.round().long()

    def to(self, device: torch.device | str) -> Pool:
        """The same pool with its pixels on `device`."""
        return Pool(
            self.digits.to(device), self.digit_classes, self.pictures.to(device), self.picture_classes, self.size
        )


def _windows(images: Tensor, side: int) -> Tensor:
    """Every window of side x side pixels, as a view: [B, C, H, W] -> [B, C, H - side + 1, W - side + 1, side, side]."""
    return images.unfold(2, side, 1).unfold(3, side, 1)


def render(ink: Tensor, backdrop: Tensor, places: Tensor) -> Tensor:
    """White digits over backdrops, as opaque as their ink is strong.

    Not the maximum of both: over a bright backdrop that would take away the grey rim of a digit.
    ink: uint8 [B, d, d]; backdrop: uint8 [B, 3, S, S]; places: int64 [B, T, 2], (down, right) of the digit's top-left
    corner, within [0, S - d]. Returns uint8 [B, T, 3, S, S].
    """
    (b, t, _), (_, c, size, _), side = places.shape, backdrop.shape, ink.shape[-1]
    ink, places = ink.to(backdrop.device), places.to(backdrop.device)
    top, left = places.unbind(2)
    row = torch.arange(b, device=backdrop.device)[:, None].expand(b, t)
    below = _windows(backdrop, side)[row, :, top, left].float()
    opacity = ink[:, None, None].float() / 255
    blended = torch.lerp(below, torch.full_like(below, 255.0), opacity).round_().to(torch.uint8)
    # Only the digit's window is blended: it is a fifth of the canvas.
    channel, line, column = (torch.arange(count, device=backdrop.device) for count in (c, side, side))
    window = channel[:, None, None] * size * size + line[:, None] * size + column
    index = (top * size + left)[:, :, None, None, None] + window
    frames = backdrop[:, None].repeat(1, t, 1, 1, 1)
    frames.view(b, t, -1).scatter_(2, index.flatten(2), blended.flatten(2))
    return frames


class Sequences(ImageSet):
    """Numbered sequences; each is a function of its split and its number alone. Frames are rendered when asked for.

    `gather` gives frames 1 to 10 as images, uint8 [B, 10, 3, S, S]; the digit's class as label; as factors `digit`,
    `background` (where the pictures have classes) and `position`, float32 [B, 2], the (down, right) pixels of the
    digit's centre in frame 20. In `extra` is what frame 20 is made of: `ink` uint8 [B, d, d], `backdrop` uint8
    [B, 3, S, S], `place` int64 [B, 2], and `held_out` bool [B], whether the sequences are held out.
    """

    in_memory = True

    def __init__(self, pool: Pool, n: int, held_out: bool, classes: list[str]):
        keys = random.image_keys(seed=0, epoch=0, index=torch.arange(n), stream=int(held_out))
        self.pool, self.held_out, self.scenes = pool, held_out, pool.draw(keys)
        super().__init__(pool.digit_classes[self.scenes.digit], classes)
        self.factors = {"digit": self.labels}
        if pool.picture_classes is not None:
            self.factors["background"] = pool.picture_classes[self.scenes.picture]
        centre = pool.digits.shape[-1] / 2
        self.factors["position"] = pool.places(self.scenes, FRAMES)[:, 0] + centre

    def gather(self, index: Tensor) -> Sample:
        index = index.cpu()
        scenes, pool = self.scenes[index], self.pool
        ink, backdrop = pool.ink(scenes), pool.backdrops(scenes)
        images = render(ink, backdrop, pool.places(scenes, *range(1, SEEN + 1)))
        held_out = torch.full((len(index),), self.held_out)
        extra = {"ink": ink, "backdrop": backdrop, "place": pool.places(scenes, FRAMES)[:, 0], "held_out": held_out}
        factors = {name: values[index] for name, values in self.factors.items()}
        return Sample(images, index, self.labels[index], extra, factors)

    def to(self, device: torch.device | str) -> Sequences:
        moved = copy.copy(self)
        moved.pool = self.pool.to(device)
        return moved


@register_source("moving_mnist")
class MovingMNIST(Source):
    """Colorful Moving-MNIST (Tian et al., "What Makes for Good Views for Contrastive Learning?", 2020, appendix B.4).

    A white digit moves over a backdrop that stands still: 28/64 of the canvas large, a tenth of the canvas a frame
    fast, from a uniform place in a uniform direction, reflected at the borders. A sequence has 20 frames, of which the
    first ten are what is encoded. It is a function of its number alone, and the same in every run. Held-out sequences
    have digits and pictures of their own. Views: `moving_mnist`.

    digits:      FILE.npz with the arrays x_train [m, h, w] and x_test, uint8, white (255) on black, and their classes
                 y_train [m] and y_test, numbers from 0; the test digits are held out. Keras's mnist.npz has them.
                 Default: the digits of scikit-learn, a fifth of them held out.
    backgrounds: folder or archive of pictures, laid out as for the source `folder`; its classes are the factor
                 `background`, and without classes there is none. Each picture's centre square is resized to 96/64 of
                 the canvas, and a backdrop is a random crop of that: 64 of 96 pixels, as of STL-10 in the paper.
                 Default: tiles of the two photographs of scikit-learn, a fifth of them held out; a class a photograph.
    size:        side of the canvas in pixels, at least 8; 64 in the paper.
    sequences:   number of training sequences; a fifth as many are held out. The paper does not say how many it has.
    pictures:    use at most so many pictures of each split, chosen evenly over the classes.
    """

    def __init__(
        self,
        digits: str | None = None,
        backgrounds: str | None = None,
        size: PositiveInt = 64,
        sequences: PositiveInt = 5000,
        pictures: PositiveInt = 5000,
    ):
        if size < 8:
            raise UserError(f"size={size}: expected a canvas of at least 8 pixels")
        self.digits, self.backgrounds, self.size = digits, backgrounds, size
        self.sequences, self.pictures = sequences, pictures
        self._files = None if backgrounds is None else _files(backgrounds, pictures)
        self._arrays = None if digits is None else _read_digits(user_path(digits, "digits"))

    def train(self) -> Sequences:
        return self._sets[0]

    def val(self) -> Sequences:
        return self._sets[1]

    @cached_property
    def pools(self) -> tuple[Pool, Pool]:
        """The training and the held-out digits and pictures."""
        pairs = zip(self._split_digits(), self._split_pictures(), strict=True)
        return tuple(Pool(*digits, *pictures, self.size) for digits, pictures in pairs)

    @cached_property
    def _sets(self) -> tuple[Sequences, Sequences]:
        train, val = self.pools
        names = [str(number) for number in range(1 + int(max(p.digit_classes.max() for p in self.pools)))]
        held_out = max(round(HELD_OUT * self.sequences), 1)
        return Sequences(train, self.sequences, False, names), Sequences(val, held_out, True, names)

    def statistics(self) -> Statistics:
        """Mean and standard deviation of each channel in the first frames of at most 512 training sequences."""
        return self._statistics

    @cached_property
    def _statistics(self) -> Statistics:
        frames = self.train().gather(torch.arange(min(512, self.sequences))).images[:, 0]
        return measure(frames, torch.tensor(frames.shape[2:]).expand(len(frames), 2))

    def _split_digits(self) -> list[tuple[Tensor, Tensor]]:
        """Digits uint8 [m, d, d] and their classes int64 [m], for training and held out."""
        side = round(DIGIT * self.size)
        if self._arrays is None:
            source = Digits(side)
            return [(images.images[:, 0].contiguous(), images.labels) for images in (source.train(), source.val())]
        x_train, y_train, x_test, y_test = self._arrays
        return [(_resized(x[:, None], side)[:, 0], y) for x, y in ((x_train, y_train), (x_test, y_test))]

    def _split_pictures(self) -> list[tuple[Tensor, Tensor | None]]:
        """Pictures uint8 [p, 3, P, P] and their classes int64 [p], for training and held out."""
        side = round(PICTURE * self.size)
        if self._files is None:
            return _photographs(side)
        try:
            sets = self._files.train(), self._files.val()
        except UserError as error:
            raise _of_backgrounds(error) from None
        if sets[1] is None:
            raise UserError(
                f"source.backgrounds: expected ten pictures or more in {self.backgrounds}, to hold a tenth of them "
                f"out, got {len(sets[0])}"
            )
        # One class is nothing to tell apart.
        classes = len(sets[0].labels[sets[0].labels >= 0].unique()) > 1
        return [_pictures(images, side, self.pictures, classes) for images in sets]


def _files(path: str, limit: int) -> Folder | Archive:
    """The source that reads the backgrounds' files."""
    found = user_path(path, "backgrounds")
    if not found.exists():
        raise UserError(f"backgrounds={path}: expected a folder or an archive of pictures, and there is nothing")
    try:
        return (Folder if found.is_dir() else Archive)(path, limit=limit)
    except UserError as error:
        raise _of_backgrounds(error) from None


def _of_backgrounds(error: UserError) -> UserError:
    """What a folder or archive complains of, under the name that its path has here."""
    return UserError(str(error).replace("source.path", "source.backgrounds"))


def _read_digits(path: Path) -> list[Tensor]:
    """The arrays of a file of digits, images uint8 [m, h, w] and classes int64 [m]. Raises UserError on any other."""
    expected = "expected FILE.npz with x_train and x_test, uint8 [m, h, w], and y_train and y_test, numbers from 0 [m]"
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in _ARRAYS if name not in file]
            if missing:
                raise UserError(f"digits={path}: {expected}; it lacks {', '.join(missing)}")
            arrays = {name: file[name] for name in _ARRAYS}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"digits={path}: {expected}, and it cannot be read: {error}") from None
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        fits = x.ndim == 3 and x.dtype == np.uint8 and y.shape == x.shape[:1] and len(y) > 0
        if not fits or not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
            found = f"x_{split} is {x.dtype} {list(x.shape)}, y_{split} {y.dtype} {list(y.shape)}"
            raise UserError(f"digits={path}: {expected}; {found}")
    return [torch.from_numpy(array if name[0] == "x" else array.astype(np.int64)) for name, array in arrays.items()]


def _resized(images: Tensor, side: int) -> Tensor:
    """The centre squares of images uint8 [n, C, h, w], resized with antialiasing: uint8 [n, C, side, side]."""
    short = min(images.shape[2:])
    top, left = ((length - short) // 2 for length in images.shape[2:])
    square = images[:, :, top : top + short, left : left + short]
    if short == side:
        return square.contiguous()
    resized = interpolate(square.float(), size=(side, side), mode="bilinear", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _photographs(side: int) -> list[tuple[Tensor, Tensor]]:
    """Tiles of scikit-learn's photographs with the photograph's number as class, for training and held out."""
    from sklearn.datasets import load_sample_images

    rows, columns = _TILES
    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    tiles = [
        _resized(tile[None], side)
        for image in photographs
        for row in image.tensor_split(rows, dim=1)
        for tile in row.tensor_split(columns, dim=2)
    ]
    pictures = torch.cat(tiles)
    classes = torch.arange(len(photographs)).repeat_interleave(rows * columns)
    held_out = torch.zeros(len(classes), dtype=torch.bool)
    held_out[stratified(classes, len(classes) // 5)] = True
    return [(pictures[chosen], classes[chosen]) for chosen in (~held_out, held_out)]


def _pictures(images: InMemory | Streamed, side: int, limit: int, classes: bool) -> tuple[Tensor, Tensor | None]:
    """A set's pictures as squares, uint8 [p, 3, side, side], and their classes; those without a class are left out."""
    numbers = (images.labels >= 0).nonzero()[:, 0] if classes else torch.arange(len(images))
    numbers = numbers[stratified(images.labels[numbers], limit)]
    found, labels = [], []
    for index in numbers.split(256):
        sample = images.gather(index)
        sizes = sample.extra.get("size")
        labels.append(sample.label)
        if sizes is None:
            found.append(_resized(sample.images, side))
            continue
        for image, (height, width) in zip(sample.images, sizes.tolist(), strict=True):
            found.append(_resized(image[None, :, :height, :width], side))
    return torch.cat(found), torch.cat(labels) if classes else None
