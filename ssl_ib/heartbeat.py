"""Where each process of a run is, so that one that hangs is named.

A process that waits for another in a collective cannot be woken, and cannot say for whom it waits. So a thread of each
process tells the group's store every few seconds at which step it is, what it does there, and how many collectives it
has begun. Where no process has got further for so long, the one that hangs is silent, or has begun
fewer collectives than the others, which wait for it. It is named by one process, and all end with exit code 2.

A single process has no thread. In a step this costs a few assignments.
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .errors import EndedElsewhere, UserError

#: Seconds from one beat to the next, where `process_timeout` is long.
EVERY = 5.0
#: How often within `process_timeout` a process that waits looks at the others' beats, and how often it may find no new
#: one of a process before that counts as silent.
LOOKS, MISSED = 10, 3
#: Seconds that the process which speaks outlives the others; and that these wait for it to speak.
_LAST, _PATIENCE = 2.0, 15.0
_OVER = "over"

#: Where this process is.
_step, _doing, _marks = 0, "the start", 0


def at(step: int, doing: str) -> None:
    """Says where this process is: the steps that are done, and what it does now."""
    global _step, _doing, _marks
    _step, _doing, _marks = step, doing, _marks + 1


def alive() -> None:
    """Says that this process got further in work that takes long and in which it meets no other."""
    global _marks
    _marks += 1


@dataclass(frozen=True)
class Beat:
    """What a process tells of itself.

    number: counts its beats.
    idle:   seconds for which it has not got further.
    where:  its innermost line of Python, where it is idle.
    begun:  collectives that it has begun, by group.
    left:   whether it has left the run.
    silent: whether it tells nothing any more; found by who reads it.
    """

    rank: int
    process: str
    number: int = 0
    idle: float = 0.0
    step: int = 0
    doing: str = ""
    where: str = ""
    begun: dict[str, int] = field(default_factory=dict)
    left: bool = False
    silent: bool = False


def hanging(beats: Sequence[Beat], timeout: float) -> list[Beat]:
    """The processes for which the others wait: none where one has got further within `timeout` seconds."""
    there = [beat for beat in beats if not beat.left]
    if any(beat.idle < timeout for beat in there):
        return []
    if silent := [beat for beat in there if beat.silent]:
        return silent
    groups: dict[str, list[int]] = {}
    for beat in there:
        for group, count in beat.begun.items():
            groups.setdefault(group, []).append(count)
    behind = [beat for beat in there if any(count < max(groups[group]) for group, count in beat.begun.items())]
    # One that is behind in one group and ahead in another waits itself.
    return [beat for beat in behind if all(n == min(groups[group]) for group, n in beat.begun.items())] or behind


class Heartbeat:
    """While entered, a process of several that hangs for `timeout` seconds ends the run and is named.

    folder: the run's, to which a process that hangs writes its stack, as hung_rank_N.txt; or None.

    All processes enter it at once. It does nothing in a single process.
    """

    def __init__(self, timeout: float, folder: Path | None):
        self.timeout, self.folder = timeout, folder
        self._look_every = timeout / LOOKS
        self._every = min(EVERY, self._look_every)
        self._left, self._ending = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._asking: threading.Thread | None = None
        #: Whether who keeps the store has ended, and with it the run.
        self._store_has_gone = False

    def __enter__(self) -> Heartbeat:
        at(0, "the start")
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self
        # A store may be that of earlier attempts, too.
        token = [secrets.token_hex(8)]
        dist.broadcast_object_list(token, 0)
        # A connection of its own, since the other may be busy.
        self._store = dist.PrefixStore(token[0], dist.distributed_c10d._get_default_store().clone())
        self._ranks = range(dist.get_world_size())
        self._run = threading.get_ident()
        self._mine = Beat(dist.get_rank(), f"process {os.getpid()} on host {socket.gethostname()}")
        self._tell(0.0)
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        if self._thread is None:
            return
        if self._ending.is_set():
            self._thread.join()  # It ends the process.
        self._left.set()
        self._thread.join(self._every + 1.0)
        self._mine = replace(self._mine, left=True)
        with suppress(RuntimeError):
            if not self._is_asking:
                self._tell(0.0)
        if isinstance(error, RuntimeError) and (told := self._ask()) is not None and told[1]:
            raise EndedElsewhere("another process hangs, and one has said so") from error

    # The thread

    def _watch(self) -> None:
        before, since, looked, seen = None, time.monotonic(), 0.0, {}
        answered = since
        while not self._left.wait(self._every):
            now = time.monotonic()
            if (position := (_marks, _begun())) != before:
                before, since, seen = position, now, {}
            idle = now - since
            try:
                # A store that has not answered yet does not listen either.
                if not self._is_asking:
                    self._tell(idle)
            except RuntimeError:  # Who keeps the store has ended, and with it the run.
                return
            if min(idle, now - looked) < self._look_every:
                continue
            looked, told = now, self._ask()
            if self._store_has_gone:
                return
            if told is None:
                if idle >= self.timeout and now - max(answered, since) > MISSED * self._look_every:
                    self._end_without_store()
                continue
            answered, (beats, over) = now, told
            if over:
                self._end()
            for beat in beats:
                if beat.rank not in seen or seen[beat.rank][0] != beat.number:
                    seen[beat.rank] = beat.number, now
            quiet = {beat.rank: now - seen[beat.rank][1] for beat in beats}
            beats = [
                replace(beat, idle=beat.idle + quiet[beat.rank], silent=quiet[beat.rank] > MISSED * self._look_every)
                for beat in beats
            ]
            if idle >= self.timeout and (found := hanging(beats, self.timeout)):
                self._end_with(found, [beat for beat in beats if not (beat.left or beat.silent)])

    def _tell(self, idle: float) -> None:
        where = self._where() if idle >= self._every else ""
        number = self._mine.number + 1
        self._mine = replace(
            self._mine, number=number, idle=idle, step=_step, doing=_doing, where=where, begun=_begun()
        )
        self._store.set(str(self._mine.rank), json.dumps(asdict(self._mine)))

    def _where(self) -> str:
        frame = sys._current_frames().get(self._run)
        if frame is None:
            return ""
        place = traceback.extract_stack(frame)[-1]
        return f"{place.filename}:{place.lineno} in {place.name}"

    def _ask(self) -> tuple[list[Beat], bool] | None:
        """What all processes have told last, and whether one has ended the run; None where nobody answers.

        In a thread of its own, because it would wait for a stopped store for ever.
        """
        answers: list[tuple[list[Beat], bool]] = []

        def ask() -> None:
            try:
                over = self._store.check([_OVER])
                told = self._store.multi_get([str(rank) for rank in self._ranks])
                answers.append(([Beat(**json.loads(text)) for text in told], over))
            except dist.DistNetworkError:
                self._store_has_gone = True
            except RuntimeError:  # It is slow.
                pass

        if self._is_asking:
            return None
        self._asking = threading.Thread(target=ask, daemon=True)
        self._asking.start()
        self._asking.join(max(self._look_every, 1.0))
        return answers[0] if answers else None

    @property
    def _is_asking(self) -> bool:
        return self._asking is not None and self._asking.is_alive()

    # The end

    def _end_with(self, found: list[Beat], here: list[Beat]) -> None:
        """Ends the run for those that hang: a process that does and can writes its stack, and the first one speaks."""
        self._ending.set()
        mine = self._mine.rank
        if mine in [beat.rank for beat in found]:
            self._write_stack()
        if mine != min((beat.rank for beat in here), default=mine):
            deadline = time.monotonic() + self.timeout + _PATIENCE
            while time.monotonic() < deadline:
                time.sleep(min(self._every, 0.2))
                told = self._ask()
                if self._store_has_gone or (told is not None and told[1]):
                    break
            self._end()
        # They may find out a little later.
        files = [self._stack_of(beat.rank) for beat in found if not beat.silent]
        deadline = time.monotonic() + MISSED * self._look_every
        while time.monotonic() < deadline and not all(file is None or file.exists() for file in files):
            time.sleep(0.1)
        self._say("; ".join(self._told_of(beat) for beat in found))
        with suppress(RuntimeError):
            self._store.set(_OVER, "")
        time.sleep(_LAST)
        self._end()

    def _end_without_store(self) -> None:
        """Ends the run where the store does not answer, which one process says that does not keep it."""
        self._ending.set()
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        keeper = "torchrun's own process" if agent else "rank 0"
        if self._mine.rank == (0 if agent else 1):
            self._say(
                f"{keeper} does not answer any more: it was stopped, or its machine is gone. The others wait in "
                f"{_doing} at step {_step}"
            )
        time.sleep(_LAST)
        self._end()

    def _told_of(self, beat: Beat) -> str:
        place = f"in {beat.doing} at step {beat.step}"
        if beat.silent:
            return (
                f"rank {beat.rank} ({beat.process}) gives no sign of life any more: it was stopped, or its machine is "
                f"gone. It was last heard of {beat.idle:.0f} seconds ago, {place}"
            )
        file = self._stack_of(beat.rank)
        stack = f". Its stack is in {file}" if file is not None and file.exists() else ""
        return (
            f"rank {beat.rank} ({beat.process}) hangs: it has not got further for {beat.idle:.0f} seconds, {place}, at "
            f"{beat.where}{stack}"
        )

    def _say(self, what: str) -> None:
        on = "; continue it with --auto-resume" if self.folder is not None else ""
        ending = f"Nothing has moved for process_timeout={self.timeout:g} seconds, and the run ends{on}"
        print(f"ssl-ib-train: {what}. {ending}", file=sys.stderr, flush=True)

    def _stack_of(self, rank: int) -> Path | None:
        """Where a process writes its stack; None without a run's folder."""
        if self.folder is None or not (self.folder / "config.yaml").is_file():
            return None
        return self.folder / f"hung_rank_{rank}.txt"

    def _write_stack(self) -> None:
        file = self._stack_of(self._mine.rank)
        if file is None:
            return
        with suppress(OSError), file.open("w", encoding="utf-8") as opened:
            opened.write(f"rank {self._mine.rank}, {self._mine.process}: {_doing} at step {_step}\n\n")
            traceback.print_stack(sys._current_frames().get(self._run), file=opened)
            opened.write("\nAll threads, the innermost lines first:\n\n")
            opened.flush()
            faulthandler.dump_traceback(opened, all_threads=True)

    def _end(self) -> None:
        # The main thread waits in a collective, which nothing but the process's end ends.
        self._ending.set()
        with suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
        os._exit(2)


def _begun() -> dict[str, int]:
    """How many collectives this process has begun, by group and kind of device."""
    found = {}
    for group, name in list(dist.distributed_c10d._world.pg_names.items()):
        for device in group._device_types:
            with suppress(RuntimeError, AttributeError):  # Of a backend that does not count.
                found[f"{name} {device.type}"] = group._get_backend(device)._get_sequence_number_for_group()
    return found


# The start


def roll_call(store: Any, rank: int, count: int, timeout: float) -> None:
    """Waits until all processes have come to the store. Raises UserError that names those which have not in time."""
    store.set(f"here_{rank}", "")
    names = [f"here_{number}" for number in range(count)]
    try:
        store.wait(names, timedelta(seconds=timeout))
    except RuntimeError:
        missing = [str(number) for number, name in enumerate(names) if not store.check([name])]
        raise UserError(
            f"of {count} processes {len(missing)} did not come within process_timeout={timeout:g} seconds: rank "
            f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}. Start as many as were said, with the same "
            "address"
        ) from None
