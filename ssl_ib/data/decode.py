"""From the bytes of an image file to a uint8 tensor, and from several of those to one batch.

Shapes: B images, H x W pixels.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..config.outside import read_bytes
from ..errors import UserError

log = logging.getLogger(__name__)

#: Formats that Pillow recognises but cannot decode by itself: for EPS it would start Ghostscript, an interpreter, on
#: the file. IPTC may hold an image of any other format.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}

#: Bytes of an image file, and pixels of an image: half a GiB in Pillow's memory, for each worker or thread.
MOST_BYTES, MOST_PIXELS = 1 << 30, 1 << 27
# Pillow warns from 89 million on, without a name, and refuses more than 179 million.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

#: Below so many pixels an image, threads wait for Python's lock longer than they decode (measured on two cores, where
#: images of 96 and 160 pixels a side were as fast or faster in one thread, and those of 320 faster in two).
WORTH_THREADS = 192 * 192

#: The endings in words, for messages.
ENDINGS = ".jpg, .jpeg, .png, .webp, .bmp, .gif, .tif or another format that Pillow reads"


@cache
def _formats() -> tuple[str, ...]:
    # The common formats first: Pillow tries the formats on a file in this order.
    Image.preinit()
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NOT_DECODED)


@cache
def _endings() -> frozenset[str]:
    formats = _formats()
    return frozenset(end for end, name in Image.registered_extensions().items() if name in formats)


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """Opens an image of a format that Pillow decodes by itself, whatever its name says. Raises as Pillow does.

    And OSError for one of more than `MOST_PIXELS`, before they are decoded.
    """
    image = Image.open(file, formats=_formats())
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise OSError(None, f"{image.width:,} x {image.height:,} pixels, at most {MOST_PIXELS:,} are decoded")
    return image


def is_image(name: str) -> bool:
    """Whether a file counts as an image: by its ending, in either case, and neither hidden nor in a hidden folder.

    name: relative path with "/" between its parts. What macOS adds to zip files (`__MACOSX/`) counts as hidden.
    """
    return not any(map(is_hidden, name.split("/"))) and os.path.splitext(name)[1].lower() in _endings()


def is_hidden(part: str) -> bool:
    """Whether nothing counts that has this part in its path; it may end in "/"."""
    return part.startswith(".") or part.removesuffix("/") == "__MACOSX"


@dataclass
class Visited:
    """What was met on the way through a folder: from this one sees whether another way would be the same.

    folders:  each folder that was read, relative to the root, with its device, number and time of change.
    left_out: links to folders that are read already, with the device and number of what they lead to.
    loose:    links that lead to no folder and are not named like an image.
    """

    folders: list[tuple[str, int, int, int]] = field(default_factory=list)
    left_out: list[tuple[str, int, int]] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)


def image_files(root: Path, visited: Visited | None = None) -> Iterator[str]:
    """The relative paths of the image files below `root`, in no order, through symbolic links too.

    Each real folder is read once, by its own path where it has one below `root`. Links to a folder that is read
    already, or that `root` lies in, lead to the same images again: they are passed over. `visited` is told what
    is met; without it, what was passed over is said at the end. Raises UserError where a folder cannot be read: what
    is in it would be missing without a word.
    """
    told, visited = visited is not None, visited or Visited()
    above = root.resolve()
    seen = {identity(folder) for folder in above.parents}
    folders, links = [""], []
    while folders or links:
        # Links last, so that what they lead to has been read by its own path.
        linked = not folders
        below = links.pop() if linked else folders.pop()
        try:
            state = (root / below).stat()
            here = state.st_dev, state.st_ino
            if here in seen:
                visited.left_out.append((below, *here))
                continue
            seen.add(here)
            # From before it is read: a change in between leaves another time.
            visited.folders.append((below, *here, state.st_mtime_ns))
            with os.scandir(root / below) as entries:
                found = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise UserError(f"cannot read the folder {root / below}: {error.strerror}") from None
        for entry in found:
            name = f"{below}/{entry.name}" if below else entry.name
            if is_hidden(entry.name):
                continue
            if is_folder(entry):
                (links if entry.is_symlink() else folders).append(name)
            elif is_image(name):
                yield name
            elif entry.is_symlink():
                visited.loose.append(name)
    if not told:
        say_passed_over(root, "links to folders that are read already", [name for name, *_ in visited.left_out])


def say_passed_over(where: Path, what: str, names: Sequence[str]) -> None:
    """Says how many of the names in a folder or an archive are passed over, if any are."""
    if names:
        log.info("%s: %d %s are passed over, such as %s", where, len(names), what, names[0])


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # A link in a circle.
        return False


def identity(folder: Path) -> tuple[int, int]:
    """What tells a folder from any other, whatever the path to it. Raises OSError where it cannot be looked at."""
    found = folder.stat()
    return found.st_dev, found.st_ino


def read_image(path: Path) -> bytes:
    """The bytes of an image file. Raises OSError for a pipe or a device, which may never end, and one too large."""
    return read_bytes(path, MOST_BYTES)


def decode(data: bytes, max_side: int | None) -> Tensor:
    """The image in `data` as RGB: uint8 [3, H, W], upright, shrunk (never enlarged) to H, W <= max_side (None: any).

    Transparency is dropped, 16-bit grey keeps its high byte, of an animation the first frame counts. Raises whatever
    Pillow raises on bytes that are no image, or not a whole one, and OSError for more than `MOST_PIXELS`.
    """
    with open_image(io.BytesIO(data)) as image:
        return pixels(image, max_side)


def pixels(image: Image.Image, max_side: int | None) -> Tensor:
    """`decode` of an open image, which changes it."""
    limit = (max_side, max_side)
    if image.format == "JPEG" and max_side is not None:
        # Before anything loads the pixels: a JPEG can be decoded at a half, a quarter or an eighth of its size.
        image.thumbnail(limit)
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        # Pillow would clip these to 255 and turn a 16-bit picture white.
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode in ("1", "P", "PA"):
        # Colour numbers cannot be averaged, colours can. RGBA, because a palette may carry transparency.
        image = image.convert("RGBA")
    if max_side is not None:
        image.thumbnail(limit)
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB"))).permute(2, 0, 1)


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be read or decoded, and why."""

    name: str
    reason: str


def decode_file(read: Callable[[str], bytes], name: str, max_side: int | None) -> Tensor | Unreadable:
    """Reads and decodes one file: uint8 [3, H, W], or what was wrong with it."""
    try:
        return decode(read(name), max_side)
    except UserError:  # About more than this image.
        raise
    except UnidentifiedImageError:
        return Unreadable(name, "not an image that Pillow knows")
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes, and so do archives.
        if isinstance(error, OSError) and error.strerror:
            return Unreadable(name, error.strerror)
        return Unreadable(name, " ".join(f"cannot be decoded, {type(error).__name__}: {error}".split())[:120])


def pack(images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Puts images [3, H, W] in the top-left corner of the smallest common canvas, zeros elsewhere.

    Returns uint8 [B, 3, H, W] and their sizes (height, width), int64 [B, 2].
    """
    images = list(images)
    sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.int64).reshape(-1, 2)
    height, width = sizes.amax(dim=0).tolist()
    if bool((sizes == sizes[0]).all()):
        return torch.stack(images), sizes
    canvas = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for row, image in zip(canvas, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return canvas, sizes


def num_threads() -> int:
    """How many threads decode: one a core this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)
