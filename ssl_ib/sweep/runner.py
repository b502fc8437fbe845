"""Runs of a sweep, each in a process of its own, so many at once, within a budget; a signal stops them politely."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..record.signals import StopRequest
from .points import Run

POLL = 0.05  # seconds
#: How a run ended in this call, and where runs stand: a begun one is running, or was stopped half way.
DONE, FAILED, STOPPED = "done", "failed", "stopped"
BEGUN, WAITING = "begun", "waiting"
#: Bytes of a log in which its last line is looked for.
_LAST_WORDS = 1 << 14
#: Exit codes of a run that stopped because it was asked to: after saving, or before it could save anything.
_ASKED = (128 + signal.SIGTERM, -signal.SIGTERM)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `done`, `stopped` or `failed`, and its last words where it failed."""

    status: str
    message: str = ""


@dataclass
class _Child:
    run: Run
    process: subprocess.Popen
    log: Path
    offset: int
    began: float


def log_of(run: Run, out: Path) -> Path:
    """What the run prints: beside its folder, since a new run's folder must be empty."""
    return out / run.folder.with_name(f"{run.folder.name}.log")


def is_done(run: Run, out: Path) -> bool:
    return (out / run.folder / "results.json").is_file()


def status_of(run: Run, out: Path, outcomes: dict[Run, Outcome]) -> str:
    """Where a run stands: `done`, `failed` in this call, `begun` or `waiting`."""
    if is_done(run, out):
        return DONE
    if run in outcomes and outcomes[run].status == FAILED:
        return FAILED
    return BEGUN if (out / run.folder / "config.yaml").is_file() else WAITING


def arguments(run: Run, out: Path, plugins: Sequence[str]) -> list[str]:
    """What `ssl-ib-train` is given: a run that was begun is continued."""
    folder = out / run.folder
    more = [word for plugin in plugins for word in ("--plugin", plugin)]
    more += ["--resume"] if (folder / "config.yaml").is_file() else []
    return [run.recipe, *run.overrides, "--out", str(folder), *more]


def command(run: Run, out: Path, plugins: Sequence[str]) -> list[str]:
    """The process of a run."""
    return [sys.executable, "-m", "ssl_ib.cli.train", *arguments(run, out, plugins)]


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

    At the end of the budget, and at SIGTERM or Ctrl-C, those that are running get SIGTERM, save and stop. A second
    Ctrl-C kills them and raises KeyboardInterrupt. ended: called after each run with all outcomes so far.
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
                    active.append(_start(waiting.popleft(), out, plugins, environment, lock))
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
                    outcome = _outcome(child, out, asked or stop.signum > 0)
                    outcomes[child.run] = outcome
                    durations += [time.monotonic() - child.began] if outcome.status == DONE else []
                    ended(child.run, outcome, outcomes)
        finally:
            for child in active:
                with suppress(ProcessLookupError):
                    os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()


def _environment(jobs: int) -> dict[str, str]:
    """Runs side by side share the cores, unless the user has said how many threads each may have."""
    # Unbuffered, so that the last line of the log is the last thing that happened.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if jobs > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // jobs)))
    return environment


def _start(run: Run, out: Path, plugins: Sequence[str], environment: dict[str, str], lock: int) -> _Child:
    log = log_of(run, out)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        offset = file.tell()
        # A session of its own: Ctrl-C reaches it only through us, once, as SIGTERM.
        process = subprocess.Popen(
            command(run, out, plugins),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=(lock,),
        )
    return _Child(run, process, log, offset, time.monotonic())


def _outcome(child: _Child, out: Path, asked: bool) -> Outcome:
    # Whatever the exit code: a signal may have come after the last file was written.
    if is_done(child.run, out):
        return Outcome(DONE)
    code = child.process.returncode
    if asked and code in _ASKED:
        return Outcome(STOPPED)
    how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    with child.log.open("rb") as file:
        file.seek(max(child.offset, child.log.stat().st_size - _LAST_WORDS))
        lines = file.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return Outcome(FAILED, f"{how}: {last}")
