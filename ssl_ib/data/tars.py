"""Tar archives, read member by member."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

#: Members of an archive; each takes memory before one is read.
MOST_MEMBERS = 20_000_000


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """What a tar holds, in its order.

    Raises ReadError at the end where the tar has none, so that one that was cut short does not pass for a smaller one.
    """
    count = 0
    for member in tar:
        count += 1
        if count > MOST_MEMBERS:
            raise tarfile.ReadError(f"more than {MOST_MEMBERS:,} members")
        yield member
    # tarfile takes whatever it cannot read for the end.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(
            f"it has no end after {count} members, at byte {tar.offset:,}: it was cut short or is damaged"
        )
