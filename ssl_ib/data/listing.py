"""The list of the image files of a folder; that of a large one is kept, and made again where a folder has changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

from .decode import Visited, image_files, say_passed_over
from .kept import keep, kept
from .tables import Names, Table

#: The format of the lists that are kept.
FORMAT = "ssl_ib list of image files, version 1"
#: A list is kept from so many images on.
WORTH_KEEPING = 20_000
#: Nanoseconds for which a folder has to have been left alone before its list is kept: a change within the tick of the
#: file system's clock, which may be 2 seconds, would leave no trace.
SETTLED = 3_000_000_000


def list_images(root: Path) -> list[str]:
    """The relative paths of the image files below `root`, sorted.

    The list of a large folder is kept in the user's cache folder. It holds for as long as every folder below is the one
    it was, and was last changed when it was: to add, remove or rename a file changes the time of its folder. What is in
    a file may change, since the list does not say it.
    """
    table = keep(FORMAT, _key(root), lambda: _listed(root), lambda table: _is_true(root, table), _is_worth_it)
    say_passed_over(root, "links to folders that are read already", [name for name, *_ in table.known["left_out"]])
    assert table.names is not None
    return list(table.names)


def kept_list(root: Path) -> Table | None:
    """The list of a folder, where one is kept and holds."""
    return kept(FORMAT, _key(root), lambda table: _is_true(root, table))


def _key(root: Path) -> str:
    return str(root.resolve())


def _listed(root: Path) -> Table:
    began, visited = time.time_ns(), Visited()
    names = Names.of(sorted(image_files(root, visited)))
    settled = all(changed < began - SETTLED for *_, changed in visited.folders)
    return Table({}, names, {**vars(visited), "settled": settled})


def _is_worth_it(table: Table) -> bool:
    return len(table.names or ()) >= WORTH_KEEPING and table.known["settled"]


def _is_true(root: Path, table: Table) -> bool:
    """Whether the folders and links are those that were met when the list was made."""
    try:
        for name, *former in table.known["folders"]:
            found = os.stat(f"{root}/{name}")
            if [found.st_dev, found.st_ino, found.st_mtime_ns] != former:
                return False
        for name, *former in table.known["left_out"]:
            found = os.stat(f"{root}/{name}")
            if [found.st_dev, found.st_ino] != former:
                return False
    except OSError:
        return False
    return not any(os.path.isdir(f"{root}/{name}") for name in table.known["loose"])
