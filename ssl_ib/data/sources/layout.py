"""From the names of image files to splits and labels: what folders stand for, and what a table of labels says.

Shapes: n images in a set.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...config.outside import user_path
from ...errors import UserError, nearest
from .base import ImageSet, stratified

#: What `labels` may be, apart from the path of a table.
CHOICES = ("auto", "folders", "none")
#: The columns of a table, by their headers in lower case; the first of these that it has counts.
FILE_COLUMNS = ("file", "filename", "file_name", "path", "image")
LABEL_COLUMNS = ("label", "class", "category", "target")

# Words that folders are named after. Held-out splits: the first that can be evaluated is held out.
_TRAIN = {"train", "training"}
_HELD_OUT = ("val", "valid", "validation", "test", "testing")
_IMAGES = {"image", "images", "img", "imgs", "jpegimages", "pictures", "frames"}
_MASKS = {"label", "labels", "mask", "masks", "annotation", "annotations", "annot", "gt", "groundtruth"}
_MASKS |= {"segmentation", "segmentations", "segmentationclass", "segmentationobject"}
# Folders by year, month or day.
_DATE = re.compile(r"(19|20)\d\d([-_.]?\d\d){0,2}")
_NO_CLASS = _TRAIN | set(_HELD_OUT) | _IMAGES | _MASKS | {"unlabeled", "unlabelled", "extra"}


@dataclass(frozen=True)
class Split:
    """Files that form one set: their names and labels, int64 [n], -1 where unknown."""

    names: list[str]
    labels: Tensor

    def rows(self, index: Tensor) -> Split:
        """The files with the numbers `index`."""
        return Split([self.names[i] for i in index.tolist()], self.labels[index])


@dataclass(frozen=True)
class Layout:
    """The files of each split and their classes, sorted; `notes` says in a line each what was decided for the user."""

    classes: list[str]
    train: Split
    val: Split | None
    notes: list[str]


@cache
def _words(folder: str) -> frozenset[str]:
    """The words of a folder's name: "train_images" has two, "train2017" has one."""
    return frozenset(re.findall("[a-z]+", folder.lower()))


def _some(items: Sequence[str]) -> str:
    """The first three in words."""
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def common_top(names: Sequence[str]) -> str:
    """The folder, or chain of folders, that everything lies in: "cifar10/"; `train` alone is a split and stays."""
    folders = os.path.commonprefix(names).split("/")[:-1]
    end = next((i for i, folder in enumerate(folders) if _split(folder) in _TRAIN), None)
    return "".join(f"{folder}/" for folder in folders[:end])


def _split(folder: str) -> str | None:
    """The split that a folder is named after: "val" for `val`, `val2017` and `val_images`."""
    words = _words(folder) - _IMAGES
    return next(iter(words)) if len(words) == 1 and words <= _TRAIN | set(_HELD_OUT) else None


def _split_folders(names: Sequence[str]) -> tuple[str, list[str]]:
    """The folders (ending in "/", or "" for all) of the training split and of the splits that may be held out."""
    splits = {folder: _split(folder) for folder in {name.split("/", 1)[0] for name in names if "/" in name}}
    train = [folder for folder, split in splits.items() if split in _TRAIN]
    held_out = [folder for word in _HELD_OUT for folder in sorted(splits) if splits[folder] == word]
    alone = len(splits) == 1 and all("/" in name for name in names)
    # A folder named `train` among others may be a class: the vehicle.
    if len(train) == 1 and (held_out or alone):
        return f"{train[0]}/", [f"{folder}/" for folder in held_out]
    return "", []


def _without_masks(names: Sequence[str], named: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Leaves out masks of other images, `masks/1.png` where there is `images/1.jpg`; a note where there are some.

    A folder of masks counts only where each of its images has such a partner and none is `named` in a table.
    """
    images, masks = set(), {}
    for name in names:
        *folders, file = name.split("/")
        stem = file.rsplit(".", 1)[0]
        for i, folder in enumerate(folders):
            words = _words(folder)
            if not words & (_IMAGES | _MASKS):
                continue
            # The same for `train_images/1.jpg` and `train_masks/1.png`.
            place = (*folders[:i], words - _IMAGES - _MASKS, *folders[i + 1 :], stem)
            if words & _MASKS:
                masks.setdefault("/".join(folders[: i + 1]) + "/", {})[name] = place
            else:
                images.add(place)
    masks = {folder: files for folder, files in masks.items() if not files.keys() & named.keys()}
    masks = {folder: files for folder, files in masks.items() if images.issuperset(files.values())}
    left_out = {name for files in masks.values() for name in files}
    if not left_out:
        return list(names), []
    note = f"{len(left_out):,} masks of other images are left out ({_some(list(masks))})"
    return [name for name in names if name not in left_out], [f"{note}; source.labels=none trains on them too"]


def _why_no_classes(paths: Sequence[Sequence[str]]) -> str:
    """Why the folders of images do not look like classes; "" where they do. paths: split into their parts."""
    folders = sorted({path[0] for path in paths if len(path) > 1})
    odd = [name for name in folders if _words(name) and _words(name) <= _NO_CLASS]
    if odd and not (len(odd) == 1 and _words(odd[0]) <= _TRAIN and len(folders) > 2):
        masks = [name for name in odd if _words(name) & _MASKS]
        others = [name for name in folders if name not in masks]
        advice = f" (all are trained on: point source.path at {_some(others)} to leave {_some(masks)} out)"
        return f"the folders {_some(folders)} are not named like classes{advice if masks and others else ''}"
    if all(_DATE.fullmatch(name) for name in folders):
        return f"the folders {_some(folders)} are named like dates"
    lowest, deepest = min(paths, key=len), max(paths, key=len)
    if len(lowest) != len(deepest):
        return f"images lie at different depths ({'/'.join(lowest)}, {'/'.join(deepest)})"
    # A class may keep its images in a folder of that name: n01443537/images/0.jpg.
    if all(_words(folder) and _words(folder) <= _IMAGES for path in paths for folder in path[1:-1]):
        return ""
    return f"the folders {_some(folders)} hold no images but further folders ({'/'.join(deepest)})"


def arrange(
    names: Sequence[str],
    top: str = "",
    val_fraction: float = 0.1,
    labels: str = "auto",
    table: Mapping[str, str] | None = None,
) -> Layout:
    """Reads splits and labels out of paths: `[top][train/|val/|test/][class/...]file`.

    labels: "folders" takes the folders for classes, "auto" where they look like classes, "none" never.
    table:  the class by name; given, it stands in place of the folders.

    Held out is the first held-out folder with images of the training classes, of which the labelled ones count; else
    `val_fraction` of the labelled training images, stratified. Where no training image has a label, it is all of the
    first held-out folder, else `val_fraction` of the training images, chosen evenly.
    """
    notes = []
    if labels not in ("folders", "none"):
        names, notes = _without_masks(names, table or {})
    folder, held_out = _split_folders([name[len(top) :] for name in names])
    # A folder that holds every training image is no class.
    chain = common_top([name[len(top + folder) :] for name in names if name.startswith(top + folder)])

    def below(folder: str) -> dict[str, list[str]]:
        """The files of a split, with the parts of their paths from the class on."""
        prefix = top + folder
        return {name: name[len(prefix) :].removeprefix(chain).split("/") for name in names if name.startswith(prefix)}

    paths = below(folder)
    why = _why_unlabelled(labels, paths, table)
    notes = [why, *notes] if why else notes

    def labelled(paths: dict[str, list[str]]) -> dict[str, str | None]:
        if table is not None:
            return {name: table.get(name) for name in paths}
        return {name: None if why or len(path) == 1 else path[0] for name, path in paths.items()}

    train, val = labelled(paths), {}
    known = {label for label in train.values() if label is not None}
    notes += ["one class alone gives no accuracy"] if len(known) == 1 else []
    for other in held_out:
        val = labelled(below(other))
        if known:
            classes = {label for label in val.values() if label is not None}
            val = {name: label for name, label in val.items() if label is not None and classes & known}
        if val:
            break
        notes.append(f"{other} is left aside: its images belong to none of the classes")
    classes = sorted(known | {label for label in val.values() if label is not None})
    number = {None: -1} | {label: k for k, label in enumerate(classes)}

    def split(files: dict[str, str | None]) -> Split:
        return Split(list(files), torch.tensor([number[label] for label in files.values()], dtype=torch.int64))

    everything = split(train)
    if val:
        return Layout(classes, everything, split(val), notes)
    kept, chosen = hold_out(everything.labels, val_fraction)
    if len(chosen) == 0:
        return Layout(classes, everything, None, notes)
    return Layout(classes, everything.rows(kept), everything.rows(chosen), notes)


def hold_out(labels: Tensor, val_fraction: float) -> tuple[Tensor, Tensor]:
    """Divides n images into those that are trained on and a share that is held out: their numbers, int64 each.

    Held out are labelled images, stratified by class; where none has a label, images spread over the whole set.
    """
    known = (labels >= 0).nonzero()[:, 0]
    candidates = known if len(known) else torch.arange(len(labels))
    chosen = candidates[stratified(labels[candidates], int(val_fraction * len(candidates)))]
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[chosen] = False
    return kept.nonzero()[:, 0], chosen


def _why_unlabelled(labels: str, paths: Mapping[str, Sequence[str]], table: Mapping[str, str] | None) -> str:
    """Why there are no labels, and how to get some; "" where there are."""
    if labels == "none":
        return "source.labels=none"
    if table is not None:
        return "" if table.keys() & paths.keys() else f"{labels} names no training image"
    if all(len(path) == 1 for path in paths.values()):
        return "all training images lie in one folder; source.labels=FILE.csv reads labels from a table"
    why = _why_no_classes(list(paths.values())) if labels == "auto" else ""
    return f"{why}; source.labels=folders takes folders for classes, FILE.csv reads a table" if why else ""


def table_path(labels: str, folder: Path) -> Path | None:
    """The table that `labels` names, below the working directory or else below `folder`; None where it names none.

    Raises UserError where `labels` is neither a choice nor a table, or where there is no such file.
    """
    if labels in CHOICES:
        return None
    if not labels.lower().endswith(".csv"):
        raise UserError(
            f"source.labels: expected one of these or the path of a .csv file, got {labels!r}{nearest(labels, CHOICES)}"
        )
    for path in (user_path(labels, "source.labels"), user_path(folder / labels, "source.labels")):
        if path.is_file():
            return path
    raise UserError(f"source.labels: there is no file {labels}, neither in the working directory nor in {folder}")


def read_table(path: Path, names: Sequence[str], top: str) -> dict[str, str]:
    """The class of each image that a table names; an empty class is none.

    path:  a CSV file with a header.
    names: the images there are. A table may leave out their common `top`.

    Raises UserError where the table cannot be read, lacks a column, gives an image two classes, or names images that
    there are not.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"source.labels: cannot read {path}: {error}") from error
    columns = [column.strip().lower() for column in header]
    places = [
        next((columns.index(c) for c in wanted if c in columns), None) for wanted in (FILE_COLUMNS, LABEL_COLUMNS)
    ]
    if None in places:
        raise UserError(
            f"source.labels: expected a first line in {path} with a column for the image ({', '.join(FILE_COLUMNS)}) "
            f"and one for its label ({', '.join(LABEL_COLUMNS)}), got {', '.join(header)}"
        )
    known, found, unknown = set(names), {}, []
    for row in rows:
        if len(row) <= max(places):
            raise UserError(f"source.labels: expected {len(header)} columns in {path}, got {len(row)}: {','.join(row)}")
        file, label = (row[place].strip() for place in places)
        name = os.path.normpath(file).replace(os.sep, "/")
        name = name if name in known else top + name
        if name not in known:
            unknown.append(file)
        elif found.setdefault(name, label) != label:
            raise UserError(f"source.labels: {path} gives {file} two labels, {found[name]} and {label}")
    if unknown:
        raise UserError(
            f"source.labels: {len(unknown)} of {len(rows)} rows of {path} name no image of the source, such as "
            f"{_some(unknown)}; expected paths relative to the source, such as {names[0].removeprefix(top)}"
        )
    return {name: label for name, label in found.items() if label}


def label_lines(images: ImageSet, notes: Sequence[str]) -> list[str]:
    """The classes of a set of images with their counts, the first by name; then what the source says, a line each."""
    counts = images.labels[images.labels >= 0].bincount(minlength=len(images.classes)).tolist()
    names = [f"{name} {n:,}" for name, n in zip(images.classes, counts, strict=True) if n]
    missing = int((images.labels < 0).sum())
    if names:
        shown = f"{len(names)} class{'es' * (len(names) > 1)}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
        lines = [f"{shown}; {missing:,} images without a label" if missing else shown, *notes]
    else:
        # The first note says why.
        lines = [": ".join(["none", *notes[:1]]), *notes[1:]]
    return lines
