"""Images in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ...config.registry import register_source
from ...errors import UserError
from ..decode import ENDINGS, is_image
from .files import Files, FileSource


def _walk(root: Path) -> Iterator[str]:
    """The relative paths of the image files below `root`, through symbolic links too."""
    for folder, _, names in os.walk(root, followlinks=True):
        below = Path(folder).relative_to(root)
        yield from filter(is_image, ((below / name).as_posix() for name in names))


class _FolderFiles(Files):
    def __init__(self, root: Path):
        self.root, self.names = root, sorted(_walk(root))

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


@register_source("folder")
class Folder(FileSource):
    """Image files below a folder, in any format that Pillow reads; hidden files and folders are passed over.

    Layouts: `train/` with `val/` or `test/` (the first with classes is held out), each with a folder a class; or class
    folders alone; or images alone, which then have no label. A class's folder may hold further folders; the classes'
    sorted names give the label numbers. Raises UserError where the folder is missing or holds no image.

    path:         the folder.
    val_fraction: share of the labelled training images that is held out where no split is; 0: none.
    limit:        use only so many training images, stratified by class; the others are not decoded.
    max_side:     larger images are shrunk, aspect kept, until their longer side has this many pixels.
    memory_gb:    a set that takes less when decoded (in 1e9 bytes) is held in memory, a larger one streams.
    statistics:   name of a known set whose mean and standard deviation to use. Default: recognised by the path's
                  name, else measured on a training set held in memory, else ImageNet's.
    """

    def _check(self) -> None:
        root = self._root()
        if not root.is_dir():
            found = "a file (source=archive reads archives)" if root.exists() else "nothing"
            raise UserError(f"source.path: expected a folder of images, found {found} at {root}")
        if next(_walk(root), None) is None:
            raise UserError(f"source.path: no image in {root} or its subfolders; what counts: {ENDINGS}")

    def _list(self) -> Files:
        return _FolderFiles(self._root())

    def _root(self) -> Path:
        return Path(self.path).expanduser()
