"""Runs of a sweep, each in a process of its own, so many at once, within a budget; a signal stops them politely."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING, Any

from ..record.lock import LOCK, holder
from ..record.signals import StopRequest

if TYPE_CHECKING:
    from .points import Run

POLL = 0.05  # seconds
#: The last file that a run writes.
RESULTS = "results.json"
#: How a run ended in this call: one that is running elsewhere was passed over.
DONE, FAILED, STOPPED, ELSEWHERE = "done", "failed", "stopped", "running elsewhere"
#: Where else a run may stand: a begun one is running, or was stopped half way.
BEGUN, WAITING = "begun", "waiting"
#: Bytes of a log in which its last line is looked for.
_LAST_WORDS = 1 << 14
#: Exit codes of a run that stopped because it was asked to: after saving, or before it could save anything.
_ASKED = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `done`, `stopped`, `failed` with its last words, or `running elsewhere` with who runs it."""

    status: str
    message: str = ""


@dataclass
class _Child:
    run: Run
    process: Popen
    log: Path
    offset: int
    began: float


def log_of(run: Run, out: Path) -> Path:
    """What the run prints: beside its folder, since a new run's folder must be empty."""
    return out / run.folder.with_name(f"{run.folder.name}.log")


def is_done(run: Run, out: Path) -> bool:
    return (out / run.folder / RESULTS).is_file()


def status_of(run: Run, out: Path, outcomes: dict[Run, Outcome]) -> str:
    """Where a run stands: `done`, `failed` in this call, `begun` or `waiting`."""
    if is_done(run, out):
        return DONE
    if run in outcomes and outcomes[run].status == FAILED:
        return FAILED
    return BEGUN if (out / run.folder / "config.yaml").is_file() else WAITING


def arguments(run: Run, out: Path, plugins: Sequence[str]) -> list[str]:
    """What `ssl-ib-train` is given: a run that was begun is continued."""
    more = [word for plugin in plugins for word in ("--plugin", plugin)]
    return [run.recipe, *run.overrides, "--out", str(out / run.folder), *more, "--auto-resume"]


def command(run: Run, out: Path, plugins: Sequence[str]) -> list[str]:
    """The process of a run."""
    return [sys.executable, "-m", "ssl_ib.cli.train", *arguments(run, out, plugins)]


def live(folder: Path) -> str:
    """Who is training the run of a folder now, in words; "" where nobody is."""
    return holder(folder, LOCK)


def may_start(left: float | None, durations: Sequence[float]) -> bool:
    """Whether there is time for one more run: as much as those that finished took in the mean (seconds)."""
    if left is None:
        return True
    return left > 0 and (not durations or left >= sum(durations) / len(durations))


def run_all(
    runs: Iterable[Run],
    out: Path,
    plugins: Sequence[str],
    jobs: int,
    budget: float | None,
    lock: int,
    ended: Callable[[Run, Outcome, dict[Run, Outcome]], None],
) -> tuple[dict[Run, Outcome], int]:
    """Runs them in order, `jobs` at once, for at most `budget` seconds; returns how they ended, and the signal or 0.

    A run that another process is training is passed over. At the end of the budget, and at SIGTERM or Ctrl-C, those
    that are running get SIGTERM, save and stop. A second Ctrl-C kills them and raises KeyboardInterrupt. ended: called
    after each run with all outcomes so far.
    """
    waiting, active = deque(runs), []
    outcomes: dict[Run, Outcome] = {}
    durations: list[float] = []
    began, asked = time.monotonic(), False
    environment = _environment(jobs)
    with StopRequest() as stop:
        try:
            while True:
                left = None if budget is None else budget - (time.monotonic() - began)
                while waiting and len(active) < jobs and not stop.signum and may_start(left, durations):
                    run = waiting.popleft()
                    if who := live(out / run.folder):
                        outcomes[run] = Outcome(ELSEWHERE, who)
                        ended(run, outcomes[run], outcomes)
                    else:
                        active.append(_start(run, out, plugins, environment, lock))
                if not active:
                    return outcomes, stop.signum
                if not asked and (stop.signum or (left is not None and left <= 0)):
                    asked = True
                    print(f"ssl-ib-sweep: stopping; {len(active)} running, which save first", file=sys.stderr)
                    for child in active:
                        child.process.terminate()
                time.sleep(POLL)
                for child in [child for child in active if child.process.poll() is not None]:
                    active.remove(child)
                    code, told = child.process.returncode, asked or stop.signum > 0
                    found = outcome(out / child.run.folder, child.log, child.offset, code, told)
                    outcomes[child.run] = found
                    durations += [time.monotonic() - child.began] if found.status == DONE else []
                    ended(child.run, found, outcomes)
        finally:
            for child in active:
                with suppress(ProcessLookupError):
                    os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()


def _environment(jobs: int) -> dict[str, str]:
    """Runs side by side share the cores, unless the user has said how many threads each may have."""
    environment = dict(os.environ)
    if jobs > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // jobs)))
    return environment


def begin(command: Sequence[str], log: Path, environment: Mapping[str, str], **more: Any) -> tuple[Popen, int]:
    """Starts the process of a run, which appends to its log; with it, how long the log was before."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        offset = file.tell()
        # Unbuffered, so that the last line of the log is the last thing that happened.
        environment = {**environment, "PYTHONUNBUFFERED": "1"}
        process = Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment, **more
        )
    return process, offset


def _start(run: Run, out: Path, plugins: Sequence[str], environment: dict[str, str], lock: int) -> _Child:
    log = log_of(run, out)
    # A session of its own: Ctrl-C reaches it only through us, once, as SIGTERM.
    process, offset = begin(command(run, out, plugins), log, environment, start_new_session=True, pass_fds=(lock,))
    return _Child(run, process, log, offset, time.monotonic())


def outcome(folder: Path, log: Path, offset: int, code: int, asked: bool) -> Outcome:
    """How the run of a folder ended, by what it left.

    offset: where in its log it began; code: its exit code, or -n where signal n killed it; asked: whether it was told
    to stop.
    """
    # Whatever the exit code: a signal may have come after the last file was written.
    if (folder / RESULTS).is_file():
        return Outcome(DONE)
    if asked and code in _ASKED:
        return Outcome(STOPPED)
    if who := live(folder):  # It was begun elsewhere in the same moment, and here it was refused.
        return Outcome(ELSEWHERE, who)
    how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    with log.open("rb") as file:
        file.seek(max(offset, log.stat().st_size - _LAST_WORDS))
        lines = file.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return Outcome(FAILED, f"{how}: {last}")
