"""Images in a folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ...config.outside import kind_of, user_path
from ...config.registry import register_source
from ...errors import UserError
from ..decode import ENDINGS, image_files, read_image
from ..listing import kept_list, list_images
from .files import Files, FileSource


class _FolderFiles(Files):
    def __init__(self, root: Path):
        super().__init__(list_images(root))
        self.root = root

    def read(self, name: str) -> bytes:
        return read_image(self.root / name)

    def sizer(self) -> Callable[[str], int]:
        return partial(_size, self.root)


def _size(root: Path, name: str) -> int:
    return os.stat(root / name).st_size


@register_source("folder")
class Folder(FileSource):
    """Image files below a folder, in any format that Pillow reads; hidden files and folders are passed over.

    Splits: where there is a folder `train` and one of `val`, `valid`, `validation`, `test` or `testing` (also spelled
    like `train2017` or `train_images`), the first of those with images of the classes is held out. Without such a
    folder a share of the training images is held out (`val_fraction`).

    Labels: each class has a folder, and the sorted names of the classes give the label numbers. A folder that holds
    everything is passed through. Images without a label are trained on, and not scored. A run has no accuracies where
    there are fewer than two classes. Its heading shows the classes, or why there are none.

    Symbolic links are followed, and each real folder is read once. The list of a folder of 20,000 images or more is
    kept in the user's cache folder, and made again as soon as a folder in it has changed.

    Raises UserError where the folder is missing or holds no image, and for a table that does not fit the images.

    path:           the folder.
    labels:         where labels come from.
                    auto:     from the folders, where they look like classes: there are several, the images lie directly
                              in them (or in a folder `images` in each), and none is named like `images`, `masks` or
                              `test`. Masks of other images (`masks/1.png` beside `images/1.jpg`) are left out.
                    folders:  from the folders, whatever they look like. A class may hold further folders.
                    none:     from nowhere.
                    FILE.csv: from a table, looked for in the working directory and then in the source's folder. Its
                              first line names the columns. The image's path, relative to the source, is in `file`,
                              `filename`, `file_name`, `path` or `image`, and its label in `label`, `class`, `category`
                              or `target`; of several such columns the first in this order counts. Images that are not
                              in the table have no label.
    val_fraction:   share of the training images that is held out where no split is: of the labelled ones, stratified by
                    class, or of all where none is labelled. 0: none. The choice is always the same.
    limit:          use only so many training images, stratified by class; the others are not decoded.
    max_unreadable: share of a split's images that may be unreadable. So many are left out, and one in any case; more
                    stop the run. At 0 the first one does.
    max_side:       larger images are shrunk, aspect kept, until their longer side has this many pixels.
    memory_gb:      a set that takes less when decoded (in 1e9 bytes) is held in memory, a larger one streams.
    statistics:     name of a known set whose mean and standard deviation to use. Default: recognised by the path's
                    name, else measured on a training set held in memory, else ImageNet's.
    """

    def _check(self) -> None:
        root = self._folder()
        if not root.is_dir():
            found = kind_of(root)
            found = "a file (source=archive reads archives)" if found == "a file" else found
            raise UserError(f"source.path: expected a folder of images, found {found} at {root}")
        if kept_list(root) is None and next(image_files(root), None) is None:
            raise UserError(f"source.path: no image in {root} or its subfolders; what counts: {ENDINGS}")

    def _list(self) -> Files:
        return _FolderFiles(self._folder())

    def _folder(self) -> Path:
        return user_path(self.path, "source.path")
