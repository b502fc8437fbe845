"""How far an evaluation is, and how long it has still to go: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from .. import distributed
from ..record.terminal import duration, say

#: Seconds from one line to the next.
EVERY = 15.0
_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"

T = TypeVar("T")


def track(items: Iterable[T], total: int, what: str, done: int = 0) -> Iterator[T]:
    """The items one by one, while it is shown how many of `total` are done and how long the others will take.

    what: names the work. done: how many were done before, of which no time is known. The main process alone shows it.
    """
    if not distributed.is_main():
        yield from items
        return
    if sys.stderr.isatty():
        yield from tqdm(items, what, total, initial=done, leave=False, dynamic_ncols=True, bar_format=_BAR)
        return
    began = said = time.perf_counter()
    for number, item in enumerate(items, start=1):
        yield item
        now = time.perf_counter()
        if now - said >= EVERY and number + done < total:
            left = (now - began) / number * (total - done - number)
            say(f"{what}: {number + done}/{total}, {duration(left)} left")
            said = now
