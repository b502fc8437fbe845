"""What a run shows while it trains: a bar where there is a terminal, elsewhere a line every half minute."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

#: Seconds from one line to the next, where a step is not longer than that.
EVERY = 30.0
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


@contextmanager
def _to_whom_it_concerns() -> Iterator[None]:
    """Nobody may be there any more: the pipe's reader has ended, the terminal was closed. That ends no step half way;
    whether it ends the run is for `StopRequest`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise


class Terminal:
    """Shows how far a run is: a bar on stderr where that is a terminal, and lines on stdout where one of them is not.

    step, total: where the run stands, and its last step.
    epochs:      of the whole run.
    images:      a step's, those of all processes together.
    main:        whether this is the main process; others show nothing.
    clock:       seconds; only their differences count.
    """

    def __init__(
        self,
        step: int,
        total: int,
        epochs: int,
        images: int,
        main: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.total, self.epochs, self.images, self.clock = total, epochs, images, clock
        self.has_bar = main and sys.stderr.isatty()
        self.has_lines = main and not (self.has_bar and sys.stdout.isatty())
        self.first = step
        #: Drawn from the first step on: what is logged before it would run into the bar.
        self.bar: tqdm | None = None
        #: When the first step began, and when the last line was printed.
        self.began = self.said = None
        #: Of the steps since that line.
        self.losses, self.seconds = [], 0.0

    def update(self, step: int, epoch: int, loss: float, seconds: float, waiting: float) -> None:
        """Shows a finished step of the epoch `epoch`, from 1: its loss, how long it took, and how long of that it
        waited for images."""
        if self.has_bar:
            rate, share = self.images / seconds, waiting / seconds
            with _to_whom_it_concerns():
                if self.bar is None:
                    self.bar = tqdm(total=self.total, initial=self.first, dynamic_ncols=True, bar_format=_BAR)
                self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s, {share:.0%} waiting", refresh=False)
                self.bar.update()
        if self.has_lines:
            self._line(step, epoch, loss, seconds)

    def _line(self, step: int, epoch: int, loss: float, seconds: float) -> None:
        now = self.clock()
        if self.began is None:
            self.began = self.said = now - seconds
        self.losses.append(loss)
        self.seconds += seconds
        if now - self.said >= EVERY or step == self.total:
            count = len(self.losses)
            loss, rate = sum(self.losses) / count, self.images * count / self.seconds
            # With the evaluations that were on the way, as there will be more.
            left = (now - self.began) / (step - self.first) * (self.total - step)
            say(progress_line(step, self.total, epoch, self.epochs, loss, rate, left))
            self.said, self.losses, self.seconds = now, [], 0.0

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            with _to_whom_it_concerns():
                self.bar.close()


def progress_line(step: int, total: int, epoch: int, epochs: int, loss: float, rate: float, left: float) -> str:
    """One line of progress; rate in images a second, left in seconds."""
    line = f"step {step}/{total}, epoch {epoch}/{epochs}: loss {loss:.4f}, {rate:.0f} images/s"
    return line if step == total else f"{line}, {duration(left)} left"


def duration(seconds: float) -> str:
    """Seconds in words: `12 s`, `3 min 05 s`, `2 h 40 min`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, rest = divmod(minutes, 60)
    if hours:
        return f"{hours} h {rest:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def say(line: str) -> None:
    """Prints a line above the bar, at once also where the output goes to a file."""
    if sys.stdout is None:  # Closed before the start.
        return
    with _to_whom_it_concerns():
        tqdm.write(line)
        sys.stdout.flush()
