"""Folders of boxes in the layouts of Pascal VOC and of COCO.

VOC:  Annotations/*.xml, JPEGImages/*, ImageSets/Main/SPLIT.txt.
COCO: a JSON file a split, and a folder of images.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..data.decode import image_files
from ..errors import UserError

#: Where COCO's files and those of tools that write them lie, with the split's name for {}.
_JSON = ("annotations/instances_{}.json", "annotations/instances_{}[0-9]*.json", "annotations/{}.json", "{}.json")
_JSON += ("{}/_annotations.coco.json", "instances_{}.json", "instances_{}[0-9]*.json")


@dataclass(frozen=True)
class Found:
    """An object as its file has it.

    box: left, top, right, bottom, and crowd and difficult, as in `Objects`; nothing is checked yet.
    shape: its mask as COCO writes it, polygons or run lengths; None where there is none.
    """

    name: str
    box: tuple[float, float, float, float]
    crowd: bool = False
    difficult: bool = False
    shape: Any = None


@dataclass(frozen=True)
class Entry:
    """An image as its file has it. said: the height and width that are written there; None where none are."""

    name: str
    file: Path
    said: tuple[int, int] | None
    objects: list[Found]


@dataclass(frozen=True)
class Read:
    """What a split's files say: its images, and the names of the classes in order."""

    entries: list[Entry]
    classes: list[str]


def is_voc(path: Path) -> bool:
    """Whether a folder has the layout of Pascal VOC."""
    return (path / "Annotations").is_dir() and (path / "ImageSets" / "Main").is_dir()


def read_voc(path: Path, split: str) -> Read:
    """A split in the layout of Pascal VOC; `FOLDER/SPLIT` is a split of a folder below `path`, such as VOC2007/test.

    VOC counts pixels from 1 and includes both edges of a box: its xmin is one more than the left edge here, and its
    xmax is the right edge. Raises UserError, which names the split's files, where one is missing or cannot be read.
    """
    folder, _, name = split.rpartition("/")
    root = path / folder
    lists = root / "ImageSets" / "Main"
    file = lists / f"{name}.txt"
    if not file.is_file():
        choices = sorted(found.stem for found in lists.glob("*.txt") if "_" not in found.stem)
        raise UserError(f"there is no split {split} in {lists}: expected one of {', '.join(choices) or 'some .txt'}")
    try:
        ids = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not ids:
        raise UserError(f"{file} names no image")
    _refuse_twins(ids, file)
    images, notes = root / "JPEGImages", root / "Annotations"
    pictures: dict[str, Path] = {}
    wanted = set(ids)
    for found in sorted(image_files(images)):
        name = Path(found).with_suffix("").as_posix()
        if name in pictures and name in wanted:
            raise UserError(f"{images} has both {pictures[name].name} and {Path(found).name}: which one counts?")
        pictures[name] = images / found
    for missing, what in (
        ([i for i in ids if i not in pictures], f"image in {images}"),
        ([i for i in ids if not (notes / f"{i}.xml").is_file()], f"file in {notes}"),
    ):
        if missing:
            raise UserError(
                f"{len(missing):,} of the {len(ids):,} images that {file} names have no {what}: {missing[0]}"
            )
    entries = [_voc_entry(f"{folder}/{i}".lstrip("/"), pictures[i], notes / f"{i}.xml") for i in ids]
    return Read(entries, sorted({one.name for entry in entries for one in entry.objects}))


def _refuse_twins(names: list[str], file: Path) -> None:
    twins = len(names) - len(set(names))
    if twins:
        again = next(name for number, name in enumerate(names) if name in names[:number])
        raise UserError(f"{file} names {twins} images twice, such as {again}")


def _voc_entry(name: str, image: Path, xml: Path) -> Entry:
    try:
        root = ElementTree.parse(xml).getroot()
        said = tuple(int(root.findtext(f"size/{side}") or 0) for side in ("height", "width"))
        objects = [_voc_object(one) for one in root.findall("object")]
    except (ElementTree.ParseError, ValueError, OSError) as error:
        raise UserError(f"{xml} cannot be read: {error}") from None
    return Entry(name, image, said if all(said) else None, objects)


def _voc_object(one: ElementTree.Element) -> Found:
    name = (one.findtext("name") or "").strip()
    sides = [one.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    if not name or None in sides:
        raise ValueError("an object has no name, or no bndbox with xmin, ymin, xmax and ymax")
    left, top, right, bottom = (_finite(side) for side in sides)
    # A box whose ends are the same is a mark that was never drawn out, not a box of one pixel.
    empty = right <= left or bottom <= top
    box = (left, top, left, top) if empty else (left - 1, top - 1, right, bottom)
    return Found(name, box, difficult=(one.findtext("difficult") or "0").strip() == "1")


def _finite(text: Any) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"a side of a box is {value}")
    return value


def _is_shape(shape: Any) -> bool:
    """Whether something is a mask in one of COCO's notations: polygons of three corners at least, or run lengths."""
    if isinstance(shape, list):
        return bool(shape) and all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in shape)
    if not (isinstance(shape, dict) and "counts" in shape and isinstance(shape.get("size"), list)):
        return False
    return len(shape["size"]) == 2


def find_coco(path: Path, split: str) -> Path:
    """The JSON file of a split, under the usual names. Raises UserError where there is none, or more than one."""
    found = list(dict.fromkeys(file for pattern in _JSON for file in sorted(path.glob(pattern.format(split)))))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(file.relative_to(path)) for file in found)
        raise UserError(f"{path} has several files for the split {split} ({names}): say which, with annotations=")
    near = ", ".join(sorted(str(file.relative_to(path)) for file in path.rglob("*.json"))[:5]) or "no .json at all"
    raise UserError(
        f"{path} is neither a folder of Pascal VOC (Annotations, ImageSets/Main) nor of COCO with a file such as "
        f"annotations/instances_{split}.json: it has {near}. Name the files with annotations=[TRAIN.json,VAL.json]"
    )


def read_coco(file: Path, folders: Iterable[Path]) -> Read:
    """A split in COCO's JSON. folders: where the images may lie; the first that has the first image is taken.

    The numbers of categories may have holes: classes are in their order. Raises UserError for a file that is not
    COCO's, and for annotations of images or categories that it does not have.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        images, annotations, categories = (data[key] for key in ("images", "annotations", "categories"))
        names = {one["id"]: one["name"] for one in sorted(categories, key=lambda one: one["id"])}
        pictures = {one["id"]: one for one in images}
        files = [os.fspath(one["file_name"]) for one in pictures.values()]
        sizes = [_said(one) for one in pictures.values()]
        known = [(one.get("image_id") in pictures, one.get("category_id") in names) for one in annotations]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    except (AttributeError, KeyError, TypeError):
        raise UserError(
            f"{file} is no file of COCO's for detection: expected lists of images (id, file_name), annotations "
            "(image_id, category_id, bbox) and categories (id, name)"
        ) from None
    for what, given, kept in (("images", images, pictures), ("categories", categories, names)):
        if len(kept) < len(given):
            raise UserError(f"{file}: {len(given) - len(kept)} {what} have the id of another one")
    if len(set(names.values())) < len(names):
        raise UserError(f"{file}: two categories have the same name")
    if not pictures:
        raise UserError(f"{file} names no image")
    _refuse_twins(files, file)
    objects: dict[Any, list[Found]] = {i: [] for i in pictures}
    strange: dict[str, list[Any]] = {"image_id": [], "category_id": [], "bbox": []}
    for one, (has_image, has_category) in zip(annotations, known, strict=True):
        if not has_image:
            strange["image_id"].append(one.get("image_id"))
        elif not has_category:
            strange["category_id"].append(one.get("category_id"))
        elif (box := _coco_box(one.get("bbox"))) is None:
            strange["bbox"].append(one.get("bbox"))
        else:
            shape = one["segmentation"] if _is_shape(one.get("segmentation")) else None
            found = Found(names[one["category_id"]], box, crowd=bool(one.get("iscrowd")), shape=shape)
            objects[one["image_id"]].append(found)
    expected = {"image_id": "the id of an image", "category_id": "the id of a category", "bbox": "four numbers"}
    for key, values in strange.items():
        if values:
            raise UserError(
                f"{file}: the {key} of {len(values):,} annotations is not {expected[key]}, such as {values[0]}"
            )
    folder = next((folder for folder in folders if (folder / files[0]).is_file()), None)
    if folder is None:
        tried = ", ".join(map(str, folders))
        raise UserError(f"{file}: its first image, {files[0]}, is in none of {tried}: say where, with images=FOLDER")
    entries = [
        Entry(name, folder / name, size, objects[i]) for name, i, size in zip(files, pictures, sizes, strict=True)
    ]
    return Read(entries, list(names.values()))


def folders_of(path: Path, file: Path, split: str) -> list[Path]:
    """Where the images of a split usually lie, beside COCO's JSON file or below `path`."""
    name = file.stem.removeprefix("instances_")
    below = (name, split, f"images/{name}", f"images/{split}", "images", "JPEGImages", ".")
    return list(dict.fromkeys([*(path / part for part in below), file.parent]))


def _coco_box(box: Any) -> tuple[float, float, float, float] | None:
    try:
        left, top, width, height = map(_finite, box)
    except (TypeError, ValueError):
        return None
    return left, top, left + width, top + height


def _said(one: dict[str, Any]) -> tuple[int, int] | None:
    height, width = one.get("height"), one.get("width")
    return (int(height), int(width)) if height and width else None
