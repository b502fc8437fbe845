"""Which images a folder holds and what classes they are of, without holding their names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.decode import ENDINGS, identity, is_folder, is_hidden, is_image, say_passed_over
from ..data.sources import layout
from ..errors import UserError


@dataclass(frozen=True)
class Listing:
    """The images of a folder, without their names.

    total:   how many there are.
    digest:  of all names, in order.
    labels:  the class of the images of each folder, where folders are classes.
    notes:   what was decided about labels, in lines.
    """

    total: int
    digest: str
    labels: dict[str, str]
    notes: list[str]

    @property
    def classes(self) -> list[str]:
        return sorted(set(self.labels.values()))

    def lines(self) -> list[str]:
        """The classes, in words."""
        names = self.classes
        if not names:
            # What follows is advice about recipes.
            return [f"labels: none: {self.notes[0].partition(';')[0]}" if self.notes else "labels: none"]
        shown = f"{', '.join(names[:3])}{', ...' * (len(names) > 3)}"
        return [f"labels: {len(names)} class{'es' * (len(names) > 1)}: {shown}"]

    def label(self, name: str) -> str:
        return self.labels.get(name.rpartition("/")[0], "")


def walk(root: Path, passed_over: list[str] | None = None) -> Iterator[str]:
    """The relative names of the images below a folder, in the order in which `sorted` has them, a folder at a time.

    They are those of `image_files`: each real folder is read once, by its own path where it has one below `root`. Links
    to it that are passed over are added to `passed_over`.
    """
    top = root.resolve()
    seen = {identity(folder) for folder in top.parents}
    return _walk(root, "", top, seen, [] if passed_over is None else passed_over)


def _walk(root: Path, below: str, top: Path, seen: set[tuple[int, int]], passed_over: list[str]) -> Iterator[str]:
    here = identity(root / below)
    if here in seen:
        passed_over.append(below.removesuffix("/"))
        return
    seen.add(here)
    with os.scandir(root / below) as entries:
        found = {f"{entry.name}/" if is_folder(entry) else entry.name: entry.is_symlink() for entry in entries}
    for name, linked in sorted(found.items()):
        if not name.endswith("/"):
            if is_image(below + name):
                yield below + name
        elif is_hidden(name):
            continue
        elif linked and _has_own_path((root / below / name).resolve(), top):
            passed_over.append(below + name.removesuffix("/"))
        else:
            yield from _walk(root, below + name, top, seen, passed_over)


def _has_own_path(folder: Path, top: Path) -> bool:
    """Whether a real folder is met below `top` without a link."""
    return folder.is_relative_to(top) and not any(map(is_hidden, folder.relative_to(top).parts))


def look(root: Path) -> Listing:
    """Counts the images below a folder, and finds out whether its folders are classes, as the source `folder` does.

    Raises UserError where there is none.
    """
    total, digest, first = 0, hashlib.blake2b(digest_size=16), {}
    passed_over: list[str] = []
    for name in walk(root, passed_over) if root.is_dir() else ():
        total += 1
        digest.update(os.fsencode(name) + b"\0")
        first.setdefault(name.rpartition("/")[0], name)
    if not total:
        found = "no image in it" if root.is_dir() else "a file" if root.exists() else "nothing"
        raise UserError(f"expected a folder of images, found {found}: {root}; what counts: {ENDINGS}")
    say_passed_over(root, "links to folders that are read already", passed_over)
    labels, notes = _labels(first)
    return Listing(total, digest.hexdigest(), labels, notes)


def _labels(first: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """The class by folder, from one image of each; and what is to be said of it."""
    found, notes = {}, []
    # A held-out split at a time, because `arrange` takes one.
    remaining = sorted(first.values())
    while remaining:
        arranged = layout.arrange(remaining, layout.common_top(remaining), val_fraction=0.0)
        for split in filter(None, (arranged.train, arranged.val)):
            for name, label in zip(split.names, split.labels.tolist(), strict=True):
                if label >= 0:
                    found[name.rpartition("/")[0]] = arranged.classes[label]
        notes = notes or arranged.notes
        if arranged.val is None:
            break
        remaining = sorted({*remaining} - {*arranged.val.names})
    return found, notes


def readable(root: Path, bad: dict[int, Any]) -> Iterator[str]:
    """The names of the images that could be read, in order."""
    return (name for number, name in enumerate(walk(root)) if number not in bad)
