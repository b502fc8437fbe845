"""Processes that fetch a run's batches ahead of it.

Not torch's DataLoader: that tells of a worker's death by an error in whatever line the run happens to be at, and it
needs room in /dev/shm, which containers keep small. Here a death is known when the next batch is asked for, and the
images come through anonymous memory (`memfd_create`), which no mount bounds.
"""

from __future__ import annotations

import logging
import mmap
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import reduction, util
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..types import Sample
from .decode import Unreadable
from .sources.base import Streamed

log = logging.getLogger(__name__)

#: Batches that each worker is asked for ahead of the run.
AHEAD = 2
#: What reaches every process of a terminal or a job. The run needs its workers to end its step and save.
_LEFT_TO_THE_RUN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
#: Forked, so that the workers share the list of images with the run.
_CONTEXT = multiprocessing.get_context("fork")


class _Worker:
    """A process and the run's end of the socket to it; of the connections of `others`, its own run's, it keeps none."""

    def __init__(self, images: Streamed, others: Sequence[_Worker]):
        self.connection, theirs = _CONTEXT.Pipe()
        inherited = [self.connection, *(worker.connection for worker in others)]
        self.process = _CONTEXT.Process(target=_work, args=(images, theirs, inherited), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, message: Tensor | int) -> None:
        # That it is dead is seen when its answer is due.
        with suppress(OSError):
            self.connection.send_bytes(pickle.dumps(message))

    def end(self) -> None:
        # A stopped process does not end at less, and there is nothing that a worker would have to finish.
        self.process.kill()
        self.process.join(5)
        self.connection.close()


def _end(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()


class Workers:
    """`count` processes that take turns to fetch batches of `images`.

    One that dies is replaced, which is said once, and its batches are fetched anew; what a batch holds does not depend
    on who fetches it. Raises UserError where another one dies within the batches that were asked for ahead, where no
    batch comes for `timeout` seconds, and where processes cannot be started.
    """

    def __init__(self, images: Streamed, count: int, timeout: float):
        self.images, self.count, self.timeout = images, count, timeout
        self._workers: list[_Worker] = []
        #: Batches that are still to come before a death counts as the first one again.
        self._probation = 0
        #: Ends the workers, at the latest when the process ends.
        self.close = util.Finalize(self, _end, args=(self._workers,), exitpriority=0)

    def fetch(self, plan: Tensor) -> Iterator[tuple[Sample | None, list[Unreadable]]]:
        """What `Streamed.fetch` gives for each row of the plan, int64 [steps, B], in order."""
        for number, worker in enumerate(self._workers):
            worker.send(plan[number :: self.count].clone())
        while len(self._workers) < self.count:
            self._workers.append(self._start(plan, len(self._workers)))
        ahead = AHEAD * self.count
        for step in range(min(ahead, len(plan))):
            self._workers[step % self.count].send(step // self.count)
        step = 0
        try:
            for step in range(len(plan)):
                answer = self._answer(plan, step)
                if step + ahead < len(plan):
                    self._workers[step % self.count].send((step + ahead) // self.count)
                yield answer
            step = len(plan)
        finally:
            # What was asked for and not taken would be taken for answers to the next plan.
            if step < len(plan):
                _end(self._workers)

    def _start(self, plan: Tensor, number: int) -> _Worker:
        try:
            worker = _Worker(self.images, self._workers)
        except OSError as error:
            raise UserError(
                f"workers: cannot start {self.count} of them: {error}; lower workers, or use workers=0, which reads in "
                "the run's own process"
            ) from None
        worker.send(plan[number :: self.count].clone())
        return worker

    def _answer(self, plan: Tensor, step: int) -> tuple[Sample | None, list[Unreadable]]:
        number = step % self.count
        while True:
            connection = self._workers[number].connection
            if not connection.poll(self.timeout):
                raise UserError(self._late(plan[step]))
            try:
                answer = _receive(connection)
                break
            except (EOFError, OSError):
                self._replace(plan, step)
        self._probation = max(self._probation - 1, 0)
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(f"a worker has failed:\n{answer}")
        return answer

    def _replace(self, plan: Tensor, step: int) -> None:
        """Puts a new process in the place of the one that owes the batch `step` and has died."""
        number, ahead = step % self.count, AHEAD * self.count
        dead = self._workers[number]
        dead.process.join(5)
        code = dead.process.exitcode
        how = f"ended by itself with exit code {code}"
        if code is None:
            how = "no longer answers"
        elif code < 0:
            how = f"was ended by signal {-code} ({signal.strsignal(-code)})"
            how += ", as happens where memory runs out" if -code == signal.SIGKILL else ""
        said = f"the loader's worker {dead.process.pid} {how}; its batch begins with {self._named(plan[step])}"
        dead.end()
        if self._probation:
            raise UserError(
                f"{said}. Another one had died at most {ahead} batches before. Where memory runs out, lower workers, "
                "source.max_side or batch_size; workers=0 reads in the run's own process"
            )
        # Of any process, the main one or not.
        log.error("%s; another takes its place, and the batches stay the same", said)
        self._probation = ahead + 1
        self._workers[number] = self._start(plan, number)
        for owed in range(step, min(step + ahead, len(plan)), self.count):
            self._workers[number].send(owed // self.count)

    def _late(self, batch: Tensor) -> str:
        said = [f"{worker.process.pid} ({_state(worker.process.pid)})" for worker in self._workers]
        return (
            f"no worker gave the next batch within worker_timeout={self.timeout:g} seconds; workers: "
            f"{', '.join(said)}; the batch begins with {self._named(batch)}. Where reading is only slow, raise "
            "worker_timeout; workers=0 reads in the run's own process"
        )

    def _named(self, batch: Tensor) -> str:
        return ", ".join(self.images.names[number] for number in batch[:3].tolist())


def _state(pid: int) -> str:
    """What a process does, in a word: stopped, waiting for a disk, or what the kernel calls it."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "ended"
    return {"T": "stopped", "D": "waiting for a disk", "R": "running", "S": "waiting", "Z": "ended"}.get(letter, letter)


# In the worker


def _work(images: Streamed, connection: Connection, inherited: list[Connection]) -> None:
    """Is told a plan, int64 [steps, B], then which rows of it to fetch, until the run is there no more."""
    for signum in _LEFT_TO_THE_RUN:
        signal.signal(signum, signal.SIG_IGN)
    for other in inherited:
        other.close()
    torch.set_num_threads(1)
    plan = torch.empty(0, 0)
    with suppress(EOFError, OSError):
        while True:
            asked = pickle.loads(connection.recv_bytes())
            if isinstance(asked, Tensor):
                plan = asked
            else:
                _send(connection, *_fetched(images, plan[asked].tolist()))


def _fetched(images: Streamed, numbers: list[int]) -> tuple[UserError | str | None, Sample | None, list[Unreadable]]:
    try:
        return None, *images.fetch(numbers)
    except UserError as error:
        return error, None, []
    except Exception:
        return traceback.format_exc(), None, []


def _send(
    connection: Connection, failure: UserError | str | None, sample: Sample | None, unreadable: list[Unreadable]
) -> None:
    if sample is None:
        connection.send_bytes(pickle.dumps((failure, None, unreadable, None)))
        return
    images = sample.images.contiguous()
    descriptor = os.memfd_create("batch")
    with open(descriptor, "wb") as file:
        file.write(images.view(torch.uint8).numpy())
        file.flush()
        rest = replace(sample, images=images.new_empty(0))
        connection.send_bytes(pickle.dumps((failure, rest, unreadable, images.shape)))
        reduction.send_handle(connection, descriptor, os.getppid())


def _receive(connection: Connection) -> UserError | str | tuple[Sample | None, list[Unreadable]]:
    """What `_send` has sent. Raises EOFError or OSError where the worker died on the way."""
    failure, rest, unreadable, shape = pickle.loads(connection.recv_bytes())
    if failure is not None:
        return failure
    if rest is None:
        return None, unreadable
    descriptor = reduction.recv_handle(connection)
    try:
        # The tensor keeps it.
        buffer = mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)
    images = torch.frombuffer(buffer, dtype=rest.images.dtype).view(shape)
    return replace(rest, images=images), unreadable
