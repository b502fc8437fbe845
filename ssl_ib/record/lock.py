"""A folder held by one process at a time: a lock that the kernel keeps, and in its file the name of who holds it.

The lock is `flock`'s. The kernel frees it when its holder ends, however that was. On NFS, Linux keeps it at the server,
so that other hosts see it. And it belongs to the open file: a sweep can hand it on to its runs, and two threads of one
process exclude each other, which `lockf` would let pass.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import UserError

_logger = logging.getLogger(__name__)

#: The file by which a run holds its folder.
LOCK = "run.lock"
#: A former holder may remove the file between our opening and locking it; so often that is tried again.
_TRIES = 100
#: Seconds that a holder is given to write its name.
_PATIENCE = 1.0
#: What a file system without locks answers.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
#: The locks of this process. Processes forked from it, such as a loader's workers, would go on holding them after it.
_held: set[int] = set()


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def holder(folder: Path, name: str) -> str:
    """Who holds a folder by the file `name` in it, in words; "" where nobody does. Takes nothing and writes nothing."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return _written(descriptor, _PATIENCE) or "another process"
    except OSError:  # A file system without locks: the name alone may be that of a process which has ended.
        pass
    finally:
        os.close(descriptor)
    return ""


class Lock:
    """Holds a folder while entered: makes it where it is missing, and at the end removes what it made and stayed empty.

    name: of the file in the folder.
    what: who holds such a lock, in words: "another run".

    Raises UserError where somebody else holds the folder, naming them, and where it can be no folder. Says so where the
    former holder ended without letting go, and where the file system keeps no locks.
    """

    def __init__(self, folder: Path, name: str, what: str):
        self.folder, self.path, self.what = folder, folder / name, what

    def __enter__(self) -> Lock:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file; a run needs a folder")
        self._process = os.getpid()
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.descriptor = self._taken()
            _held.add(self.descriptor)
            self._tell_of(_written(self.descriptor))
            now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            self._write({"process": self._process, "host": socket.gethostname(), "since": now})
        except OSError as error:
            self._release()
            raise UserError(f"--out: cannot make the folder {self.folder}, or lock it: {error.strerror}") from None
        except UserError:
            self._release()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        if os.getpid() != self._process:
            return
        gone = not self.is_there()
        self._release()
        if gone and (isinstance(error, OSError) or isinstance(getattr(error, "__cause__", None), OSError)):
            raise self._gone() from error

    def is_there(self) -> bool:
        """Whether the folder is still the one that is held, under its name."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.lstat(self.path))
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)

    def check(self) -> None:
        """Raises UserError where the folder was deleted or renamed."""
        if not self.is_there():
            raise self._gone()

    def _gone(self) -> UserError:
        return UserError(
            f"{self.folder} was deleted or renamed (or {self.path.name} removed from it) while {os.getpid()}, this "
            "process, was at work there, which ends here; what it has saved is where the folder went"
        )

    def _taken(self) -> int:
        """A descriptor of the file, locked."""
        for _ in range(_TRIES):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                continue  # A former holder has removed the folder, which it had made.
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                found = _written(self.descriptor, _PATIENCE)
                os.close(self.descriptor)
                del self.descriptor
                raise UserError(f"{self.what} is at work in {self.folder}{found and ': ' + found}") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                _logger.warning("%s: %s; see to it yourself that nobody else writes there", self.path, error.strerror)
            if self.is_there():
                return self.descriptor
            os.close(self.descriptor)
            del self.descriptor
        raise UserError(f"{self.folder}: others take and leave it all the time; try again")

    def _tell_of(self, former: str) -> None:
        if not former:
            return
        message = f"{self.path} is stale: it was left by {former}, which ended without removing it; it is taken over"
        if f" on host {socket.gethostname()}," not in former:
            message += ". Make sure that it has ended: some file systems show locks to one host alone"
        _logger.warning("%s", message)

    def _write(self, holder: dict[str, Any]) -> None:
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(holder).encode() + b"\n", 0)

    def _release(self) -> None:
        mine = True
        if hasattr(self, "descriptor"):
            with suppress(OSError):
                if mine := self.is_there():
                    self.path.unlink()
                else:
                    os.ftruncate(self.descriptor, 0)  # Where the folder went, nobody finds it held.
            _held.discard(self.descriptor)
            os.close(self.descriptor)
        with suppress(OSError):
            for folder in self._made if mine else ():
                folder.rmdir()


def _written(descriptor: int, patience: float = 0.0) -> str:
    """Who has written their name into the file; "" where nobody has within `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            found: Any = json.loads(os.pread(descriptor, 4096, 0))
            return f"process {found['process']} on host {found['host']}, since {found['since']}"
        except (ValueError, TypeError, KeyError):
            if time.monotonic() >= deadline:
                return ""
            time.sleep(0.05)
