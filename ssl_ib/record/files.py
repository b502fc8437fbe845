"""Writing a file at once: whoever reads it sees the old content or the new, and a kill leaves either."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has an OSError name the file at `path`: a disk that is full says no more than that it is."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def replace(path: Path, content: bytes | str) -> None:
    """Gives a file its content, text in UTF-8. Where the disk refuses, raises OSError and leaves the old content."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
