"""Images in a tar or zip archive, read without unpacking it to the disk."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import math
import os
import posixpath
import stat
import tarfile
import zipfile
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ...config.outside import kind_of, user_path
from ...config.registry import register_source
from ...errors import UserError
from .. import tars
from ..decode import ENDINGS, MOST_BYTES, is_image, say_passed_over
from .files import Files, FileSource

#: What opens each compressed tar for reading.
_COMPRESSED = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.xz": lzma.open,
    ".txz": lzma.open,
    ".tar.bz2": bz2.open,
    ".tbz2": bz2.open,
}
_KINDS = (".tar", *_COMPRESSED, ".zip")
#: Bytes decompressed at a time.
_PIECE = 1 << 24


def _kind(path: Path) -> str | None:
    return next((kind for kind in _KINDS if path.name.lower().endswith(kind)), None)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what a damaged archive raises into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Damaged bytes lead Python's readers anywhere.
        raise UserError(f"source.path: cannot read the archive {path}: {str(error) or type(error).__name__}") from error


def _members(tar: tarfile.TarFile, links: list[str]) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The image files in a tar with their normalised names ("./a/b.png" is "a/b.png"); raises as `tars.members`.

    Links, symbolic and hard, have no bytes of their own: their names are added to `links`.
    """
    for member in tars.members(tar):
        name = posixpath.normpath(member.name)
        if member.isfile() and is_image(name):
            yield name, member
        elif member.issym() or member.islnk():
            links.append(name)


def _bounded(size: int, offset: int = 0, end: float = math.inf) -> None:
    """Raises OSError, which is about one image, for a member that is too large, or that is not all there."""
    if not 0 <= size <= MOST_BYTES:
        raise OSError(None, f"{size:,} bytes, at most {MOST_BYTES:,} are read")
    if not 0 <= offset <= end - size:
        raise OSError(None, "it lies outside the archive")


class _UpTo:
    """A decompressed file for tarfile, which may seek anywhere: raises what `refuse` gives beyond `most` bytes."""

    def __init__(self, file: IO[bytes], most: float, refuse: Callable[[], UserError]):
        self.file, self.most, self.refuse, self.tell = file, most, refuse, file.tell

    def seek(self, place: int) -> int:
        if place > self.most:
            raise self.refuse()
        return self.file.seek(place)

    def read(self, size: int) -> bytes:
        if self.tell() + size > self.most:
            raise self.refuse()
        return self.file.read(size)


class _ArchiveFiles(Files):
    """places: what finds a file in the archive, by its name; links: the names of members that are links."""

    def __init__(self, places: dict[str, Any], links: list[str]):
        super().__init__(places)
        self.places, self.links = places, links

    def sizer(self) -> Callable[[str], int]:
        return {name: self._size(place) for name, place in self.places.items()}.__getitem__

    @abstractmethod
    def _size(self, place: Any) -> int: ...


class _TarFiles(_ArchiveFiles):
    """A tar, read at random: on the disk, or decompressed in memory (`held`)."""

    def __init__(self, path: Path, held: bytes | None):
        self.path, self.held = path, held
        opened = tarfile.open(path, "r:") if held is None else tarfile.open(fileobj=io.BytesIO(held), mode="r:")
        with opened as tar:
            links: list[str] = []
            places = {name: (member.offset_data, member.size) for name, member in _members(tar, links)}
        super().__init__(places, links)
        self.bytes = path.stat().st_size if held is None else len(held)

    def _size(self, place: tuple[int, int]) -> int:
        return place[1]

    def read(self, name: str) -> bytes:
        offset, size = self.places[name]
        _bounded(size, offset, self.bytes)
        if self.held is not None:
            return self.held[offset : offset + size]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(size)


def _is_link(info: zipfile.ZipInfo) -> bool:
    """Whether a member of a zip is a symbolic link, of which it holds the path that it leads to."""
    return stat.S_ISLNK(info.external_attr >> 16)


class _ZipFiles(_ArchiveFiles):
    """A zip, read at random. Each process opens it for itself: processes would share one file's position."""

    def __init__(self, path: Path):
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        members = self._zip().infolist()
        if len(members) > tars.MOST_MEMBERS:
            raise zipfile.BadZipFile(f"more than {tars.MOST_MEMBERS:,} members")
        listed = [(posixpath.normpath(info.filename), info) for info in members if not info.is_dir()]
        links = [name for name, info in listed if _is_link(info)]
        places = {name: info.filename for name, info in listed if is_image(name) and not _is_link(info)}
        super().__init__(places, links)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def _zip(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self.path))
        return self._opened[1]

    def _size(self, place: str) -> int:
        return self._zip().getinfo(place).file_size

    def read(self, name: str) -> bytes:
        info = self._zip().getinfo(self.places[name])
        _bounded(info.file_size)
        return self._zip().read(info)


@register_source("archive")
class Archive(FileSource):
    """Image files in a .tar, .tar.gz, .tgz, .tar.xz, .txz, .tar.bz2, .tbz2 or .zip archive.

    Layouts and labels are those of `folder` (`--describe source:folder`). A tar without compression and a zip are read
    at random, so they may be of any size; a compressed tar is decompressed into memory, and raises UserError where that
    takes more than `memory_gb`. UserError too where the archive is missing, damaged or without images.

    path:   the archive.
    labels: as for `folder`; a FILE.csv lies outside the archive, below the working directory or beside the archive.
    val_fraction, limit, max_unreadable, max_side, memory_gb, statistics: as for `folder`.
    """

    def _check(self) -> None:
        path = self._archive()
        if not path.is_file():
            found = kind_of(path)
            found = "a folder (source=folder reads folders)" if found == "a folder" else found
            raise UserError(f"source.path: expected an archive of images, found {found} at {path}")
        kind = _kind(path)
        if kind is None:
            raise UserError(f"source.path: expected an archive ending in {', '.join(_KINDS)}, got {path}")
        with _readable(path):
            if kind == ".zip":
                empty = not _ZipFiles(path).names
            else:
                opener = _COMPRESSED.get(kind, open)
                most = self.memory_gb * 1e9 if kind in _COMPRESSED else math.inf
                with opener(path, "rb") as file:
                    tar = tarfile.open(fileobj=_UpTo(file, most, self._too_large), mode="r:")
                    empty = next(_members(tar, []), None) is None
        if empty:
            raise UserError(f"source.path: no image in the archive {path}; what counts: {ENDINGS}")

    def _list(self) -> Files:
        path = self._archive()
        kind = _kind(path)
        with _readable(path):
            if kind == ".zip":
                files: _ArchiveFiles = _ZipFiles(path)
            else:
                files = _TarFiles(path, self._decompressed(path) if kind in _COMPRESSED else None)
        say_passed_over(path, "links", files.links)
        return files

    def _decompressed(self, path: Path) -> bytes:
        most = self.memory_gb * 1e9
        tar = io.BytesIO()
        with _COMPRESSED[_kind(path)](path, "rb") as file:
            # Piece by piece, since one read of `most` bytes would take up that much memory first.
            while piece := file.read(_PIECE):
                tar.write(piece)
                if tar.tell() > most:
                    raise self._too_large()
        return tar.getvalue()

    def _too_large(self) -> UserError:
        return UserError(
            f"source.path: {self._archive()} takes more than source.memory_gb={self.memory_gb:g} decompressed, and a "
            "compressed tar cannot be read at random: unpack it and use source=folder, or decompress it to a plain "
            ".tar (which may be of any size), or raise source.memory_gb"
        )

    def _folder(self) -> Path:
        return self._archive().parent

    def _archive(self) -> Path:
        return user_path(self.path, "source.path")
