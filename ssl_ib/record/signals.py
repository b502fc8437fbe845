"""Stopping a run politely: what asks it to end is remembered, so that the loop saves before it does."""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
import threading
from pathlib import Path
from typing import Any


class Stopped(Exception):
    """A signal stopped the run at `step`, and it saved itself first (`saved` is None where it writes nothing)."""

    def __init__(self, signum: int, saved: Path | None, step: int):
        self.signum, self.saved, self.step = signum, saved, step
        super().__init__(signal.Signals(signum).name)


#: What asks a run to end, unless it was ignored when the run began: a closed terminal (SIGHUP; nohup has it ignored),
#: Ctrl-C (a script's background jobs have it ignored), and what batch systems send before their time is over.
POLITE = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """While entered, SIGTERM and the signals of `POLITE` only set `signum` (0 until then).

    `signum` is SIGPIPE where nobody reads the output any more, as behind `| head`. A second Ctrl-C interrupts at once.
    A second SIGTERM does not: batch systems send it to every process, and torchrun sends it on to them again. Outside
    the main thread, where Python handles no signals, nothing is changed.
    """

    def __init__(self):
        self._asked = 0
        self._former: dict[signal.Signals, Any] = {}

    @property
    def signum(self) -> int:
        return self._asked or (signal.SIGPIPE if self._former and _unread() else 0)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            heeded = [s for s in POLITE if signal.getsignal(s) is not signal.SIG_IGN]
            self._former = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, *heeded)}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._former.items():
            # None: it was not Python that had set it.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _ask(self, signum: int, frame: Any) -> None:
        if self._asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = signum


def _unread() -> bool:
    """Whether the output goes into a pipe that has no reader any more."""
    try:
        out = sys.stdout.fileno()
        if not stat.S_ISFIFO(os.fstat(out).st_mode):
            return False
        poll = select.poll()
        poll.register(out, 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # Closed, or no file at all: a notebook's.
        return False
