"""Files on a web server, copied whole to a folder of this machine that is kept below a size."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import UserError
from .kept import locked, short_hash

#: Seconds that a server may be silent, and how often it is asked.
TIMEOUT, TRIES = 60, 4
_PIECE = 1 << 20
#: The bytes of a file (0 where a server does not say) and its tag or date; None where it is missing.
State = list | None
#: What a server that cannot be reached, or that breaks off, raises.
_FAILURES = (urllib.error.URLError, http.client.HTTPException, OSError)


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


class Missing(UserError):
    """A file that the server does not have."""


def _ask(url: str, method: str = "GET"):
    """The server's answer. Raises Missing, and UserError where it cannot be reached."""
    for attempt in range(TRIES):
        try:
            return urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise Missing(f"source.path: {url} is missing ({error.code} {error.reason})") from None
            said, again = f"{error.code} {error.reason}", error.code >= 500 or error.code == 429
        except _FAILURES as error:
            said, again = str(getattr(error, "reason", error)), True
        if not again or attempt == TRIES - 1:
            break
        time.sleep(2**attempt / 2)
    raise UserError(f"source.path: cannot read {url}: {said}")


def states(urls: Sequence[str]) -> list[State]:
    """What tells each file from another version of it."""

    def state(url: str) -> State:
        try:
            with _ask(url, "HEAD") as answer:
                headers = answer.headers
                size = int(headers.get("Content-Length", 0))
                return [size, headers.get("ETag") or headers.get("Last-Modified") or ""]
        except Missing:
            return None

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(state, urls))


def copy(url: str, path: Path) -> str:
    """Copies a file to `path`, anew where the connection breaks off. Returns its SHA-256."""
    for attempt in range(TRIES):
        digest, done = hashlib.sha256(), 0
        with _ask(url) as answer, open(path, "wb") as file:
            expected = int(answer.headers.get("Content-Length", -1))
            try:
                while piece := answer.read(_PIECE):
                    file.write(piece)
                    digest.update(piece)
                    done += len(piece)
                said = f"{done:,} bytes of {expected:,} came"
            except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
                said = str(error)
                done = -1
        if done >= 0 and expected in (-1, done):
            return digest.hexdigest()
        time.sleep(2**attempt / 2)
    raise UserError(f"source.path: cannot read {url}: {said}")


class Copies:
    """Files of a server, each copied when it is first needed; the longest unused make room. Called from any process.

    urls:    the files.
    states:  which version of each it is, as `states` gives it.
    sha256:  of each, "" where unknown: a copy that is another raises UserError.
    folder:  where the copies lie; other runs on this machine find them there.
    most_gb: what the folder may hold, in 1e9 bytes.
    """

    def __init__(
        self, urls: Sequence[str], states: Sequence[State], sha256: Sequence[str], folder: Path, most_gb: float
    ):
        self.urls, self.states, self.sha256 = list(urls), list(states), list(sha256)
        self.folder, self.most_gb = folder, most_gb
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, number: int) -> Path:
        """The copy of a file. The next call may take it away again: open it at once."""
        path = self._place(number)
        try:
            os.utime(path)
        except FileNotFoundError:
            self._fetch(number, path)
        return path

    def _place(self, number: int) -> Path:
        return self.folder / f"{short_hash(f'{self.urls[number]} {self.states[number]}')}.tar"

    def _fetch(self, number: int, path: Path) -> None:
        with locked(path.with_suffix(".lock")):
            if path.exists():
                return
            partial = path.with_suffix(".partial")
            try:
                self._make_room((self.states[number] or [0])[0])
                found = copy(self.urls[number], partial)
                if self.sha256[number] not in ("", found):
                    raise UserError(
                        f"source.path: {self.urls[number]} is not the file that its index describes (another SHA-256): "
                        "write or index the shards anew"
                    )
                partial.replace(path)
            except OSError as error:
                raise UserError(f"source.cache: cannot write {path}: {error.strerror or error}") from None
            finally:
                partial.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        with locked(self.folder / "room.lock"):
            kept = []
            for path in self.folder.glob("*.tar"):
                try:
                    found = path.stat()
                except FileNotFoundError:
                    continue
                kept.append((found.st_mtime_ns, found.st_size, path))
            total = sum(taken for _, taken, _ in kept)
            for _, taken, path in sorted(kept):
                if total + size <= self.most_gb * 1e9 and shutil.disk_usage(self.folder).free > size:
                    break
                path.unlink(missing_ok=True)
                total -= taken
