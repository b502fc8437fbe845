"""The training and the held-out images of detection: which of a folder they are, and whether they can be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch

from ..data.decode import decode, num_threads, open_image, read_image
from ..errors import UserError
from .box_files import Entry, Found, Read, find_coco, folders_of, is_voc, read_coco, read_voc
from .boxes import BoxImages, Objects
from .progress import track

#: Pixels by which a box may reach beyond its image without a word: files round.
_ROUNDING = 1.0
#: Where EXIF says that an image lies on its side.
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)


def open_sets(
    path: Path,
    splits: tuple[Sequence[str], Sequence[str]],
    annotations: Sequence[str] = (),
    folders: Sequence[str] = (),
    masks: bool | Literal["auto"] = "auto",
    limits: tuple[int | None, int | None] = (None, None),
    say: Callable[[str], None] = print,
) -> tuple[BoxImages, BoxImages]:
    """The training and the held-out images of a folder in the layout of Pascal VOC or of COCO.

    splits:      names of splits for each of the two; several are put together.
    annotations: COCO's JSON files of the two, where they have not the usual names, and `folders` the images'.
    masks:       "auto": where every object has one. limits: at most so many images of each, spread over the list.

    Raises UserError where the images or their boxes cannot be used.
    """
    if not path.is_dir():
        raise UserError(f"path: there is no folder {path}")
    for key, given in (("annotations", annotations), ("images", folders)):
        if len(given) not in (0, 2) and not (key == "images" and len(given) == 1):
            raise UserError(f"{key}: expected two, for training and for what is held out, got {len(given)}")
    for key, names in zip(("train", "val"), splits, strict=True):
        if not names or any(not name or Path(name).is_absolute() for name in names):
            raise UserError(f"{key}: expected the name of a split in {path}, or several, got {list(names)}")
    read = []
    for part, names in enumerate(splits):
        file = path / annotations[part] if annotations else None
        below = [path / folders[min(part, len(folders) - 1)]] if folders else []
        read.append(_joined([_read(path, name, file, below) for name in (names[:1] if annotations else names)]))
    classes = list(dict.fromkeys(read[0].classes + read[1].classes))
    twice = {one.file for one in read[0].entries} & {one.file for one in read[1].entries}
    if twice:
        raise UserError(f"{len(twice):,} images are in the training images and held out as well, such as {min(twice)}")
    _check_classes(read[0], read[1])
    names = ["+".join(split) for split in splits]
    entries = [_spread(part.entries, limit) for part, limit in zip(read, limits, strict=True)]
    masked = masks is not False and _masked(entries, names, masks is True, say)
    train, val = (_gather(name, part, classes, masked, say) for name, part in zip(names, entries, strict=True))
    untrained = set(classes) - {classes[k] for one in train.objects for k in one.labels.tolist()}
    if missing := sorted(untrained & {classes[k] for one in val.objects for k in one.labels.tolist()}):
        say(f"{len(missing)} classes have no box on the {len(train):,} training images taken, such as {missing[0]}")
    return train, val


def _read(path: Path, split: str, file: Path | None, folders: list[Path]) -> Read:
    if file is None and is_voc((path / split).parent):
        if folders:
            raise UserError(f"images: only for COCO's layout; {path} has Pascal VOC's, whose images are in JPEGImages")
        return read_voc(path, split)
    file = find_coco(path, split) if file is None else file
    return read_coco(file, folders or folders_of(path, file, split))


def _joined(parts: list[Read]) -> Read:
    """Several splits as one; the classes of one in its own order, else by name. Raises UserError where they overlap."""
    classes = list(dict.fromkeys(name for part in parts for name in part.classes))
    if len(parts) > 1:
        classes = sorted(classes)
    entries = [entry for part in parts for entry in part.entries]
    twice = [file for file, count in Counter(entry.file for entry in entries).items() if count > 1]
    if twice:
        raise UserError(f"{len(twice):,} images are in several of the splits that are put together, such as {twice[0]}")
    return Read(entries, classes)


def _spread(entries: list[Entry], limit: int | None) -> list[Entry]:
    if limit is None or limit >= len(entries):
        return entries
    return [entries[number * len(entries) // limit] for number in range(limit)]


def _check_classes(train: Read, val: Read) -> None:
    """Raises UserError where a class is held out and has no training box: none of it could be found."""
    counts = [Counter(one.name for e in part.entries for one in e.objects if not one.crowd) for part in (train, val)]
    unknown = sorted(set(counts[1]) - set(counts[0]))
    if unknown:
        boxes, names = sum(counts[1][name] for name in unknown), ", ".join(unknown[:3])
        raise UserError(
            f"{boxes:,} held-out boxes are of {len(unknown)} classes that have no training box ({names}"
            f"{', ...' if len(unknown) > 3 else ''}), so that they cannot be found: check the names, or leave them out"
        )


def _masked(entries: list[list[Entry]], names: list[str], wanted: bool, say: Callable[[str], None]) -> bool:
    """Whether every object has a mask, but for crowds. Raises UserError where that is wanted and not so."""
    objects = [[one for entry in part for one in entry.objects if not one.crowd] for part in entries]
    bare = [sum(one.shape is None for one in part) for part in objects]
    if not any(bare):
        return True
    text = ", ".join(
        f"{count:,} of {len(part):,} boxes of the split {name}"
        for count, part, name in zip(bare, objects, names, strict=True)
        if count
    )
    if wanted:
        raise UserError(f"masks=true: {text} have no mask")
    if sum(bare) < sum(map(len, objects)):
        say(f"{text} have no mask: boxes alone are detected")
    return False


def _gather(split: str, entries: list[Entry], classes: list[str], masks: bool, say: Callable[[str], None]) -> BoxImages:
    """The images of a split with their objects.

    Boxes without an area, and boxes wholly outside their image, are dropped; others are cut at its edge.
    Raises UserError where images are missing or cannot be opened, have another size than is said, or hold no box.
    """
    sizes = _sizes(split, entries)
    counts: Counter = Counter()
    number = {name: k for k, name in enumerate(classes)}
    objects = [_objects(entry, size, number, masks, counts) for entry, size in zip(entries, sizes, strict=True)]
    for what, text in (
        ("empty", "without an area dropped"),
        ("outside", "wholly outside of their image dropped"),
        ("cut", "that reach beyond their image cut at its edge"),
        ("crowd", "around crowds: not trained on, and what is found in them is not counted"),
        ("difficult", "marked as difficult: trained on, and what is found in them is not counted"),
    ):
        if counts[what]:
            say(f"{split}: {counts[what]:,} {'box' if counts[what] == 1 else 'boxes'} {text}")
    if not any((~one.crowd & ~one.difficult).any() for one in objects):
        raise UserError(f"no image of the split {split} has a box that counts")
    bare = sum(not len(one) for one in objects)
    if bare:
        say(f"{split}: {bare:,} of {len(objects):,} images have no box; whatever is found on them is wrong")
    return BoxImages([one.name for one in entries], [one.file for one in entries], sizes, objects, classes, masks)


def _objects(entry: Entry, size: tuple[int, int], number: dict[str, int], masks: bool, counts: Counter) -> Objects:
    height, width = size
    kept: list[Found] = []
    boxes: list[tuple[float, float, float, float]] = []
    shapes = []
    for one in entry.objects:
        left, top, right, bottom = one.box
        if right <= left or bottom <= top:
            counts["empty"] += 1
            continue
        if left >= width or top >= height or right <= 0 or bottom <= 0:
            counts["outside"] += 1
            continue
        counts["cut"] += max(-left, -top, right - width, bottom - height) > _ROUNDING
        counts["crowd"] += one.crowd
        counts["difficult"] += one.difficult and not one.crowd
        kept.append(one)
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        boxes.append((left, top, right, bottom))
        # A crowd without a mask is its box.
        shapes.append(one.shape or [[left, top, right, top, right, bottom, left, bottom]])
        if masks and isinstance(one.shape, dict) and list(one.shape["size"]) != [height, width]:
            raise UserError(
                f"{entry.file}: a mask is of {one.shape['size'][1]} x {one.shape['size'][0]} pixels, and the image of "
                f"{width} x {height}"
            )
    return Objects(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor([number[one.name] for one in kept], dtype=torch.int64),
        torch.tensor([one.crowd for one in kept], dtype=torch.bool),
        torch.tensor([one.difficult for one in kept], dtype=torch.bool),
        shapes if masks else [],
    )


def _sizes(split: str, entries: list[Entry]) -> list[tuple[int, int]]:
    """The height and width of each image. Raises UserError where one is missing, or of another size than is said."""
    with ThreadPoolExecutor(num_threads()) as pool:
        read = pool.map(_size, (entry.file for entry in entries))
        found = list(track(read, len(entries), f"sizes of the images of {split}"))
    bad = [(entry, why) for entry, why in zip(entries, found, strict=True) if isinstance(why, str)]
    if bad:
        entry, why = bad[0]
        raise UserError(
            f"{len(bad):,} of {len(entries):,} images of the split {split} cannot be read, such as {entry.file}: {why}"
        )
    other = [(entry, size) for entry, size in zip(entries, found, strict=True) if entry.said not in (None, size)]
    if other:
        entry, (height, width) = other[0]
        raise UserError(
            f"{len(other):,} of {len(entries):,} images of the split {split} have another size than their annotation "
            f"says, so that boxes would be in the wrong place, such as {entry.file}: it has {width} x {height} pixels, "
            f"and {entry.said[1]} x {entry.said[0]} are said"
        )
    return found


def _size(file: Path) -> tuple[int, int] | str:
    """The height and width of an upright image, or why it cannot be opened."""
    try:
        with open_image(file) as image:
            width, height = image.size
            if image.format == "TIFF":
                # Whether the size of an open TIFF is already that of the upright image depends on Pillow.
                return tuple(decode(read_image(file), None).shape[1:])
            sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
    except FileNotFoundError:
        return "there is no such file"
    except Exception as error:  # Pillow raises nearly anything on damaged bytes.
        return " ".join(str(error).split())[:120]
    return (width, height) if sideways else (height, width)
