"""Images in tables that Hugging Face's `datasets` reads: Arrow and Parquet files, folders, and sets on its hub.

Shapes: n images in a set, N rows in a table.
"""

from __future__ import annotations

import logging
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config.hints import Positive, PositiveInt, Ratio
from ...config.outside import user_path
from ...config.registry import register_source
from ...errors import UserError, nearest
from ..decode import MOST_BYTES, read_image
from ..shards import numbered
from ..statistics import recognise
from ..tables import Names
from .base import MAX_UNREADABLE
from .layout import hold_out
from .rows import Indexed, Rows, RowSource

log = logging.getLogger(__name__)

#: The splits that are held out, the first that there is.
HELD_OUT = ("validation", "valid", "val", "test", "testing")
#: Seconds in which the hub has to answer.
TIMEOUT = 5
#: Files that `save_to_disk` leaves.
_SAVED = ("dataset_dict.json", "state.json")


class _Tables:
    """Gives the bytes of an image by its row: those of the tables one after the other."""

    def __init__(self, tables: list[Any], column: str):
        self.tables, self.column = tables, column
        self.ends = torch.tensor([len(table) for table in tables]).cumsum(0)

    def __call__(self, row: int) -> bytes:
        which = int(torch.searchsorted(self.ends, row, right=True))
        table = self.tables[which]
        found = table[row - int(self.ends[which]) + len(table)][self.column]
        if found is None:
            raise OSError(None, "the row has no image")
        if found["bytes"] is None:
            return read_image(Path(found["path"]))
        if len(found["bytes"]) > MOST_BYTES:
            raise OSError(None, f"{len(found['bytes']):,} bytes, at most {MOST_BYTES:,} are read")
        return found["bytes"]


@register_source("hf")
class HuggingFace(RowSource):
    """Images in tables that datasets reads: saved with `save_to_disk`, Parquet or Arrow files, folders, or on the hub.

    The tables are mapped into memory, so that they may be larger than it, and read by row, in any order. A set that is
    named is downloaded once, by datasets and to its own cache; where the hub cannot be reached, it has to be there.
    Code that belongs to a set is not run.

    Raises UserError where the package is missing, where the set cannot be loaded, and for columns that do not fit.

    path:           a folder or a file on this machine, else the name of a set on the hub.
    subset:         which configuration of a set on the hub, where it has several.
    split:          the split that is trained on.
    val:            the split that is held out. Default: the first of validation, valid, val, test and testing; one
                    without labels is passed over where training rows have some. none: a share of the training images.
    image:          the column of the images. auto: the one whose type is Image.
    labels:         the column of the labels, which are numbers or texts. auto: the one whose type is ClassLabel, if
                    there is one. none: there are no labels.
    val_fraction:   share of the training images that is held out where no split is; as for `folder`.
    streaming:      refused: rows of a stream have no numbers, by which a run visits each once and goes on where it was.
    limit, max_unreadable, max_side, memory_gb, statistics: as for `folder`.
    """

    def __init__(
        self,
        path: str,
        subset: str | None = None,
        split: str = "train",
        val: str | None = None,
        image: str = "auto",
        labels: str = "auto",
        val_fraction: Ratio = 0.1,
        streaming: bool = False,
        limit: PositiveInt | None = None,
        max_unreadable: Ratio = MAX_UNREADABLE,
        max_side: PositiveInt = 512,
        memory_gb: Positive = 4.0,
        statistics: str | None = None,
    ):
        try:
            import datasets  # noqa: F401
        except ImportError:
            raise UserError("source=hf needs the package datasets: pip install 'ssl-ib[stream]'") from None
        if streaming:
            raise UserError(
                "source.streaming: the rows of a stream have no numbers, by which a run visits each image once "
                "an epoch and goes on where it was stopped. Leave it out (tables are mapped, not loaded into memory), "
                "or write the images as shards and use source=webdataset, which can read from a server"
            )
        super().__init__(path, limit, max_unreadable, max_side, memory_gb, statistics)
        self._statistics = self._statistics or recognise(path)
        self.labels, self.val_fraction = labels, val_fraction
        found = _loaded(path, subset)
        self._splits = found if isinstance(found, dict) else {split: found}
        if split not in self._splits:
            raise UserError(f"source.split: there is no split {split!r}{nearest(split, self._splits)}")
        if val not in (None, "none") and (val not in self._splits or val == split):
            others = [name for name in self._splits if name != split]
            raise UserError(f"source.val: there is no other split {val!r}{nearest(val, [*others, 'none'])}")
        self.split, self.held_out = split, val
        features = self._splits[split].features
        self.image = _image_column(features, image)
        self._label = _label_column(features, labels, self.image)

    def _labels_of(self, table: Any) -> tuple[list[str], Tensor]:
        """The classes of a split, and its labels, int64 [N]."""
        if self._label is None or self._label not in table.features:
            return [], torch.full((len(table),), -1)
        values = table.with_format("arrow")[self._label].to_pylist() if len(table) else []
        names = getattr(table.features[self._label], "names", None)
        if names is not None:
            return list(names), torch.tensor([-1 if k is None else k for k in values], dtype=torch.int64)
        return numbered(["" if value is None else str(value) for value in values])

    def _index(self) -> Indexed:
        train = self._splits[self.split]
        classes, labels = self._labels_of(train)
        notes = []
        if self._label is None:
            why = "source.labels=none" if self.labels == "none" else "no column is a ClassLabel"
            others = [name for name in train.features if name != self.image]
            advice = f"; source.labels=COLUMN names one of {', '.join(others)}" if others and why[0] == "n" else ""
            notes.append(why + advice)
        held_out = None
        if self.held_out != "none":
            wanted = (self.held_out,) if self.held_out else HELD_OUT
            for name in (name for name in wanted if name in self._splits and name != self.split):
                val_classes, val_labels = self._labels_of(self._splits[name])
                if self.held_out or bool((val_labels >= 0).any()) or not bool((labels >= 0).any()):
                    held_out = name
                    break
                notes.append(f"the split {name} is left aside: it has no labels")
        if held_out is None:
            tables, names = [train], _names(self.split, train)
            rows, chosen = hold_out(labels, self.val_fraction)
        else:
            tables = [train, self._splits[held_out]]
            names = _names(self.split, train) + _names(held_out, tables[1])
            classes, labels = _together(classes, labels, val_classes, val_labels)
            rows, chosen = torch.arange(len(train)), torch.arange(len(train), len(labels))
        self._read, self._sizes = _Tables([_images_of(table, self.image) for table in tables], self.image), None
        return Indexed(Names.of(names), labels, classes, rows, chosen, notes, None)

    def _rows(self, rows: Tensor) -> Rows:
        found = self._indexed
        if self._sizes is None:
            self._sizes = torch.cat([_sizes(table, self.image) for table in self._read.tables])
        names, labels, sizes = found.names.rows(rows), found.labels[rows], self._sizes[rows]
        return Rows(self._read, rows, names, labels, sizes, found.classes, self.max_side, self.max_unreadable)


def _names(split: str, table: Any) -> list[str]:
    return [f"{split}/{row}" for row in range(len(table))]


def _together(classes: list[str], labels: Tensor, others: list[str], other: Tensor) -> tuple[list[str], Tensor]:
    """The classes of two splits, and the labels of the rows of both by their numbers among them."""
    if classes == others:
        return classes, torch.cat([labels, other])
    both = classes + [name for name in others if name not in classes]
    number = torch.tensor([both.index(name) for name in others] + [-1])
    return both, torch.cat([labels, number[other]])


def _images_of(table: Any, column: str) -> Any:
    """A table of the images alone, as they are in their files."""
    import datasets

    return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _sizes(table: Any, column: str) -> Tensor:
    """The bytes of each image: int64 [N]; -1 where there is none."""
    import pyarrow.compute as pc

    found = []
    for batch in table.with_format("arrow").iter(10_000):
        for chunk in batch[column].chunks:
            lengths = pc.binary_length(pc.struct_field(chunk, "bytes")).to_pylist()
            paths = pc.struct_field(chunk, "path").to_pylist()
            found += [_size(path) if n is None else n for n, path in zip(lengths, paths, strict=True)]
    return torch.tensor(found, dtype=torch.int64)


def _size(path: str | None) -> int:
    try:
        return -1 if path is None else Path(path).stat().st_size
    except OSError:
        return -1


def _image_column(features: Any, asked: str) -> str:
    import datasets

    kinds = {name: str(getattr(kind, "dtype", kind)) for name, kind in features.items()}
    if asked != "auto":
        if asked not in features:
            raise UserError(f"source.image: there is no column {asked!r}{nearest(asked, features)}")
        kind = features[asked]
        if not isinstance(kind, datasets.Image) and kinds[asked] not in ("binary", "large_binary"):
            if not (isinstance(kind, dict) and set(kind) == {"bytes", "path"}):
                raise UserError(f"source.image: the column {asked!r} holds no images but {kinds[asked]}")
        return asked
    found = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if len(found) != 1:
        what = f"are {len(found)} columns of images, {', '.join(found)}" if found else "is no column of images"
        raise UserError(
            f"source.image: there {what}; name one of the columns "
            f"{', '.join(f'{name} ({kind})' for name, kind in kinds.items())}"
        )
    return found[0]


def _label_column(features: Any, asked: str, image: str) -> str | None:
    import datasets

    others = [name for name in features if name != image]
    if asked == "none":
        return None
    if asked != "auto":
        if asked not in others:
            raise UserError(f"source.labels: there is no column {asked!r}{nearest(asked, [*others, 'auto', 'none'])}")
        kind = features[asked]
        if not isinstance(kind, datasets.ClassLabel) and not str(getattr(kind, "dtype", "")).startswith(
            ("int", "uint", "string", "large_string", "bool")
        ):
            raise UserError(f"source.labels: the column {asked!r} holds {getattr(kind, 'dtype', kind)}, not labels")
        return asked
    found = [name for name in others if isinstance(features[name], datasets.ClassLabel)]
    if len(found) > 1:
        raise UserError(f"source.labels: there are {len(found)} columns of labels, name one: {', '.join(found)}, none")
    return found[0] if found else None


def _loaded(path: str, subset: str | None) -> Any:
    """What datasets makes of a path or a name: a table, or tables by split. Raises UserError."""
    import datasets

    place = user_path(path, "source.path")
    here = place.exists()
    if not here and (path.startswith(("/", "./", "../", "~")) or path.count("/") > 1):
        raise UserError(
            f"source.path: expected a folder or a file of tables, or a name on the hub; found nothing at {path}"
        )
    online = here or _hub_answers()
    try:
        if place.is_dir() and any((place / name).is_file() for name in _SAVED):
            return datasets.load_from_disk(str(place))
        if place.is_file():
            kind = {".parquet": "parquet", ".arrow": "arrow"}.get(place.suffix)
            if kind is None:
                raise UserError(f"source.path: expected a .parquet or an .arrow file, or a folder, got {path}")
            return datasets.load_dataset(kind, data_files=str(place))
        return datasets.load_dataset(str(place) if here else path, subset)
    except UserError:
        raise
    except Exception as error:  # Its loaders raise nearly anything.
        said = " ".join(str(error).split())[:300] or type(error).__name__
        if not online:
            raise UserError(
                f"source.path: there is no folder or file {path} here, the hub does not answer, and its set of that "
                "name is not in the cache of datasets: download it where there is a network, and give its path"
            ) from None
        raise UserError(f"source.path: datasets cannot load {path}: {said}") from None


def _hub_answers() -> bool:
    """Whether the hub can be asked; where it cannot, datasets is told so, and does not try for minutes."""
    import datasets
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            urllib.request.urlopen(request, timeout=TIMEOUT).close()
            return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            log.info("%s does not answer: sets are taken from the cache of datasets", constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return False
