"""Indexes that took long to make, kept in the user's cache folder, and made again where they are no longer true."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .tables import Table, load_table, save_table

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where this package keeps what it can make again: `ssl_ib` in `$XDG_CACHE_HOME`, by default `~/.cache`."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "ssl_ib"
    try:
        return Path.home() / ".cache" / "ssl_ib"
    except RuntimeError:  # A user without a home, as in containers.
        return Path(tempfile.gettempdir()) / f"ssl_ib-{os.getuid()}"


def short_hash(text: str) -> str:
    """32 hexadecimal digits, which name a file after a text of any length."""
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:32]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one process of this machine in at a time. Raises OSError where `path` cannot be written."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def keep(
    what: str, key: str, build: Callable[[], Table], fresh: Callable[[Table], bool], worth: Callable[[Table], bool]
) -> Table:
    """An index from the cache folder where one is kept and still true, else a new one, which is kept.

    what:  the index's format and version.
    key:   which index it is.
    build: makes the index.
    fresh: whether an index that was kept is still true.
    worth: whether an index is worth a file, and safe to be kept.
    """
    if (found := kept(what, key, fresh)) is not None:
        return found
    built = build()
    if worth(built):
        _write(Table(built.tensors, built.names, {**built.known, "key": key}), _place(what, key), what)
    return built


def _write(table: Table, path: Path, what: str) -> None:
    # Of several processes that write it at once, each writes its own.
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_table(table, partial, what)
        partial.replace(path)
    except OSError as error:
        log.info("the index %s is not kept: %s", path, error)
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def kept(what: str, key: str, fresh: Callable[[Table], bool]) -> Table | None:
    """The index from the cache folder where one is kept and still true; the arguments are those of `keep`."""
    try:
        found = load_table(_place(what, key), what)
    except (OSError, ValueError):
        return None
    return found if found.known.get("key") == key and fresh(found) else None


def _place(what: str, key: str) -> Path:
    return cache_folder() / "indexes" / f"{short_hash(f'{what} {key}')}.safetensors"
