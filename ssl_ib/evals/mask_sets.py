"""Images with a mask each, whose pixels are classes: folders of them, and what is wrong with these.

Shapes: n images, H x W pixels of one of them, C classes. In a mask as it is used a class is 0 to C - 1, and void is -1.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..data.decode import decode, image_files, num_threads, open_image, read_image
from ..data.sources.base import MAX_UNREADABLE
from ..errors import UserError
from .progress import track

#: What folders are called, in lower case.
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_IMAGES = ("images", "image", "imgs", "img")
_MASKS = ("labels", "label", "masks", "mask", "annotations", "annotation")
#: The value that is void by custom, and one more than the largest value.
_VOID, _VALUES = 255, 1 << 16
#: The largest number of classes that a mask of int16 holds.
_MOST = (1 << 15) - 1


@dataclass(frozen=True)
class MaskedImages:
    """Images of a split with their masks.

    files:   the paths of each image and of its mask.
    classes: their names.
    counts:  pixels of each class in each mask, int64 [n, C].
    table:   int16 [65536], the class of each value of the files, or -1.
    digests: of the contents of each pair of files.
    """

    name: str
    files: Sequence[tuple[Path, Path]]
    classes: list[str]
    counts: Tensor
    table: np.ndarray
    digests: Sequence[str]

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, rows: Sequence[int]) -> MaskedImages:
        """The images with the numbers `rows` among these."""
        picked = {"files": [self.files[i] for i in rows], "digests": [self.digests[i] for i in rows]}
        return replace(self, counts=self.counts[list(rows)], **picked)

    def image(self, row: int) -> Image.Image:
        """One of the images, RGB and upright."""
        return Image.fromarray(decode(read_image(self.files[row][0]), None).permute(1, 2, 0).numpy())

    def mask(self, row: int) -> np.ndarray:
        """The mask of one of the images: int16 [H, W]."""
        return self.table[_values(read_image(self.files[row][1]))]

    @property
    def present(self) -> Tensor:
        """Which classes have a pixel here: bool [C]."""
        return self.counts.sum(dim=0) > 0

    @property
    def share(self) -> float:
        """How much of the pixels that are not void the most frequent class covers."""
        counts = self.counts.sum(dim=0)
        return int(counts.max()) / int(counts.sum())

    @property
    def chance(self) -> float:
        """The mIoU of always naming the most frequent class: its share of the pixels, over the classes there are."""
        return self.share / int(self.present.sum())

    @property
    def facts(self) -> str:
        return f"{len(self.classes)} classes, chance {self.chance:.4f}"

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(repr([self.classes, list(self.digests)]).encode(), digest_size=8)
        digest.update(self.table.tobytes())
        return digest.hexdigest()


def open_masks(
    path: str,
    split: str,
    say: Callable[[str], None],
    classes: int | str | None = None,
    ignore: Sequence[int] = (),
    reduce_zero_label: bool = False,
    limits: tuple[int | None, int | None] = (None, None),
) -> tuple[MaskedImages, MaskedImages]:
    """The training images of a folder, and those of the split `split`: "val" or "test".

    path:    path/train/images and path/train/labels, or path/images/training and path/annotations/training, and the
             same of other splits. An image and its mask have the same name but for the ending.
    classes: how many classes there are, numbered from 0; or a file with a name in each line; None: as many as the
             training masks say. 255 is void where there are no more than 255.
    ignore:  further values of the masks that are void. reduce_zero_label: 0 is void, and the classes begin at 1.
    limits:  at most so many images of either split, spread over the sorted names.

    Every file is read. Images without a mask, masks without an image and unreadable files are left out and counted.
    Raises UserError where the masks cannot be used.
    """
    root, found = Path(path), []
    folders = _folders(root)
    for name in ("train", split):
        if name not in folders:
            others = [other for other in folders if other != "train"]
            hint = f"; it has {' and '.join(others)}: split={others[0]}" if name != "train" and others else ""
            raise UserError(f"path: {root} has no split {name} with images and masks{hint}")
    for (name, limit), told in zip((("train", limits[0]), (split, limits[1])), ("training", "held-out"), strict=True):
        pairs = _pairs(*folders[name], name, say)
        if limit is not None and limit < len(pairs):
            pairs = [pairs[i * len(pairs) // limit] for i in range(limit)]
        found.append((name, *_read(pairs, name, told, say)))
    trained = set().union(*(seen.values for seen in found[0][2]))
    names, table, void = _classes(trained, classes, ignore, int(reduce_zero_label))
    sets = []
    for name, pairs, looked in found:
        _check_values(name, looked, table, void)
        counts = torch.zeros(len(pairs), len(names), dtype=torch.int64)
        for row, seen in enumerate(looked):
            for value, count in seen.values.items():
                if table[value] >= 0:
                    counts[row, table[value]] += count
        sets.append(MaskedImages(name, pairs, names, counts, table, [seen.digest for seen in looked]))
    _say_what_is_missing(*sets, say)
    return sets[0], sets[1]


@dataclass(frozen=True)
class _Seen:
    """What a pair of files holds: the number of pixels by value, and a digest."""

    values: Counter
    digest: str


def _folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """The folders of images and masks of each split."""
    if not root.is_dir():
        raise UserError(
            f"path: expected a folder of images and masks, found {'a file' if root.exists() else 'nothing'}: {root}"
        )
    found = {}
    for split, words in _SPLITS.items():
        inside = _folder(root, words)
        if inside and (images := _folder(inside, _IMAGES)) and (masks := _folder(inside, _MASKS)):
            found[split] = (images, masks)
            continue
        images, masks = _folder(root, _IMAGES), _folder(root, _MASKS)
        if images and masks and (inside := _folder(images, words)) and (other := _folder(masks, words)):
            found[split] = (inside, other)
    if not found:
        there = ", ".join(sorted(child.name for child in root.iterdir())[:8]) or "nothing"
        raise UserError(
            f"path: expected train/images and train/labels (or masks, annotations) in {root}, and the same in val; or "
            f"images/training and annotations/training, as ADE20K has them; found {there}"
        )
    return found


def _folder(parent: Path, words: Sequence[str]) -> Path | None:
    """The folder below `parent` that has one of these names. Raises UserError where there are several."""
    found = sorted(child for child in parent.iterdir() if child.name.lower() in words and child.is_dir())
    if len(found) > 1:
        raise UserError(f"path: {parent} has {' and '.join(child.name for child in found)}: which one counts?")
    return found[0] if found else None


def _pairs(images: Path, masks: Path, split: str, say: Callable[[str], None]) -> list[tuple[Path, Path]]:
    """The images that have a mask, with these, by name."""
    named = []
    for folder in (images, masks):
        by_stem: dict[str, str] = {}
        for name in sorted(image_files(folder)):
            stem = os.path.splitext(name)[0]
            if stem in by_stem:
                raise UserError(f"path: {folder} has both {by_stem[stem]} and {name}: which one counts?")
            by_stem[stem] = name
        named.append(by_stem)
    both = sorted(named[0].keys() & named[1].keys())
    if not both:
        first = [
            f"{next(iter(by_stem.values()), 'no image')} in {folder}"
            for by_stem, folder in zip(named, (images, masks), strict=True)
        ]
        raise UserError(f"path: no image of the split {split} has a mask of its name: found {first[0]}, and {first[1]}")
    for mine, other, what in (
        (named[0], named[1], "images without a mask"),
        (named[1], named[0], "masks without an image"),
    ):
        alone = [mine[stem] for stem in sorted(mine.keys() - other.keys())]
        if alone:
            say(f"{len(alone):,} {what} of the split {split} are left out, such as {alone[0]}")
    return [(images / named[0][stem], masks / named[1][stem]) for stem in both]


def _read(
    pairs: list[tuple[Path, Path]], split: str, told: str, say: Callable[[str], None]
) -> tuple[list[tuple[Path, Path]], list[_Seen]]:
    """Reads all files; returns the pairs that can be read, and what they hold. Raises UserError for a false mask."""
    kept, seen, wrong, unreadable = [], [], [], []
    with ThreadPoolExecutor(num_threads()) as pool:
        looked = track(pool.map(_look, pairs), len(pairs), f"checking {told} images and masks")
        for pair, found in zip(pairs, looked, strict=True):
            if isinstance(found, _Seen):
                kept.append(pair)
                seen.append(found)
            elif isinstance(found, UserError):
                wrong.append(found)
            else:
                unreadable.append(str(found))
    if wrong:
        raise UserError(f"{len(wrong)} of {len(pairs)} masks of the split {split} cannot be used: {wrong[0]}")
    if unreadable:
        if not kept or len(unreadable) > max(1, MAX_UNREADABLE * len(pairs)):
            raise UserError(f"{len(unreadable)} of {len(pairs)} images or masks cannot be read: {unreadable[0]}")
        say(f"{len(unreadable)} images of the split {split} are left out, which cannot be read: {unreadable[0]}")
    return kept, seen


def _look(pair: tuple[Path, Path]) -> _Seen | UserError | str:
    """What a pair holds; what is wrong with it as UserError; or why it cannot be read."""
    image, mask = pair
    digest = hashlib.blake2b(digest_size=8)
    for place in pair:
        try:
            data = read_image(place)
            digest.update(data)
            if place is image:
                size = tuple(decode(data, None).shape[1:])
            else:
                values = _values(data)
        except UserError as error:
            return UserError(f"{place} {error}")
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes.
            return " ".join(f"{place} ({type(error).__name__}: {error})".split())[:200]
    if values.shape != size:
        there, here = (f"{width} x {height} pixels" for height, width in (values.shape, size))
        return UserError(f"{mask} has {there}, and its image {here}")
    return _Seen(
        Counter(dict(zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True))),
        digest.hexdigest(),
    )


def _values(data: bytes) -> np.ndarray:
    """The values of a mask's file: [H, W] of integers. Raises UserError, without the file's name, where it has none."""
    with open_image(io.BytesIO(data)) as image:
        if image.format == "JPEG":
            raise UserError("is a JPEG, which does not keep the numbers of classes: expected a format such as PNG")
        if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
            raise UserError(
                f"has colours ({image.mode}): expected the number of a class in each pixel, grey or with a palette"
            )
        # As its image is: a mask that was drawn on a turned photograph may say that it is turned too.
        values = np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)
    if values.min() < 0 or values.max() >= _VALUES:
        raise UserError(
            f"has values from {values.min()} to {values.max()}: expected numbers of classes below {_VALUES}"
        )
    return values


def _classes(
    trained: set[int], classes: int | str | None, ignore: Sequence[int], first: int
) -> tuple[list[str], np.ndarray, set[int]]:
    """The names of the classes, the class of each value of the masks, and the values that are void.

    trained: the values of the training masks. first: the value of the first class.
    """
    names, void = None, set(ignore) | set(range(first))
    if isinstance(classes, str):
        try:
            names = [line.strip() for line in Path(classes).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"classes: cannot read {classes}: {error}") from None
        twice = [name for name, times in Counter(names).items() if times > 1]
        if twice:
            raise UserError(f"classes: {classes} names {twice[0]} twice: expected another name for each class")
        count = len(names)
    elif classes is not None:
        count = classes
    else:
        values = trained - void
        if max(values, default=0) <= _VOID:
            values.discard(_VOID)
        count = max(values, default=first - 1) + 1 - first
    if count > _MOST:
        said = "the training masks say" if classes is None else f"classes={classes} says"
        raise UserError(f"{said} {count:,} classes, and there can be {_MOST:,}: are these masks of another kind?")
    if first + count <= _VOID:
        void.add(_VOID)
    kept = [value for value in range(first, first + count) if value not in void]
    if len(kept) < 2:
        said = "the training masks" if classes is None else f"classes={classes}"
        raise UserError(f"expected two classes at least, got {len(kept)} in {said} without what is void")
    table = np.full(_VALUES, -1, np.int16)
    table[kept] = np.arange(len(kept))
    return [str(value) if names is None else names[value - first] for value in kept], table, void


def _check_values(split: str, looked: Sequence[_Seen], table: np.ndarray, void: set[int]) -> None:
    """Raises UserError where masks have a value that is neither a class nor void."""
    strange = Counter(value for seen in looked for value in seen.values if table[value] < 0 and value not in void)
    if strange:
        value, masks = min(strange.items())
        classes = np.flatnonzero(table >= 0)
        others = f" (and {len(strange) - 1} other values)" if len(strange) > 1 else ""
        raise UserError(
            f"{masks} of {len(looked)} masks of the split {split} hold the value {value}{others}, and the "
            f"classes are {classes.min()} to {classes.max()}: ignore={value} makes it void, and classes=N says how "
            "many classes there are"
        )


def _say_what_is_missing(train: MaskedImages, val: MaskedImages, say: Callable[[str], None]) -> None:
    untrained, unscored = ~train.present & val.present, ~val.present
    if not val.present.any() or not train.present.any():
        raise UserError(f"path: all pixels of the split {train.name if val.present.any() else val.name} are void")
    if untrained.any():
        say(f"{_named(untrained, val)} no pixel in the training masks: the IoU can only be 0, and counts")
    if unscored.any():
        say(
            f"{_named(unscored, val)} no pixel in the masks of the split {val.name}: mIoU is the mean over the other "
            f"{int(val.present.sum())} classes"
        )


def _named(which: Tensor, images: MaskedImages) -> str:
    names = [images.classes[k] for k in which.nonzero()[:, 0].tolist()]
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"the class {some} has" if len(names) == 1 else f"{len(names)} classes ({some}) have"
