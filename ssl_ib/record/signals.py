"""Stopping a run politely: SIGTERM and Ctrl-C are remembered, so that the loop saves before it ends."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any


class Stopped(Exception):
    """A signal stopped the run at `step`, and it saved itself first (`saved` is None where it writes nothing)."""

    def __init__(self, signum: int, saved: Path | None, step: int):
        self.signum, self.saved, self.step = signum, saved, step
        super().__init__(signal.Signals(signum).name)


class StopRequest:
    """While entered, SIGTERM and Ctrl-C only set `signum` (0 until then); a second Ctrl-C interrupts at once.

    A second SIGTERM does not: batch systems send it to every process, and torchrun sends it on to them again. A process
    that was started with Ctrl-C ignored, as a script's background jobs are, goes on ignoring it. Outside the main
    thread, where Python handles no signals, nothing is changed.
    """

    def __init__(self):
        self.signum = 0

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            self._former = {}
            return self
        heeded = [signal.SIGTERM]
        heeded += [signal.SIGINT] if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN else []
        self._former = {s: signal.signal(s, self._ask) for s in heeded}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._former.items():
            signal.signal(signum, handler)

    def _ask(self, signum: int, frame: Any) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
