"""A run of a sweep as a job of submitit's: what is done with it on the machine where the job comes to stand.

Little is imported here, since a job starts with it: the run itself is a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING, Any

from ..record.files import replace
from .runner import DONE, ELSEWHERE, FAILED, RESULTS, Outcome, begin, live, outcome

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

#: Seconds that a run which another process holds is waited for: the lock of a machine that died outlives it.
PATIENCE = 60.0
#: Seconds after a SIGTERM of Slurm's, in which the signal to requeue comes, or the end.
GRACE = 120.0
#: torchrun's module, whose exit code is not the run's.
TORCHRUN = "torch.distributed.run"


class TrainJob:
    """Trains one run to its end. Called again, as after a requeue, it goes on from the last checkpoint.

    command:  of the run's process.
    folder:   the run's.
    log:      to which the run prints.
    outcomes: the folder in which JOB.json says how the run ended.
    """

    def __init__(self, command: Sequence[str], folder: Path, log: Path, outcomes: Path):
        self.command, self.folder, self.log, self.outcomes = list(command), folder, log, outcomes
        self._process: Popen | None = None

    def __call__(self) -> None:
        """For submitit. Raises nothing of its own: how the run ended is in the file."""
        from submitit import JobEnvironment

        job = JobEnvironment()
        told = self.outcomes / f"{job.job_id}.json"
        told.unlink(missing_ok=True)
        try:
            found = self._train(on_slurm=job.cluster == "slurm")
        except OSError as error:
            found = Outcome(FAILED, str(error))
        replace(told, json.dumps(asdict(found)))

    def checkpoint(self) -> DelayedSubmission | None:
        """For submitit, before the job's time is over or where its place is needed: the run saves and stops.

        Answers what goes on with it when the job has been requeued, or None where there is nothing left to do.
        """
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            # Not by the methods of Popen, which this signal may have interrupted with their lock held.
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._process.pid, signal.SIGTERM)
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        if (self.folder / RESULTS).is_file():
            return None
        return DelayedSubmission(TrainJob(self.command, self.folder, self.log, self.outcomes))

    def _train(self, on_slurm: bool) -> Outcome:
        if (self.folder / RESULTS).is_file():
            return Outcome(DONE)
        deadline = time.monotonic() + PATIENCE
        while who := live(self.folder):
            if time.monotonic() >= deadline:
                return Outcome(ELSEWHERE, who)
            time.sleep(1)
        several, asked = TORCHRUN in self.command, False

        def ask(signum: int, frame: Any) -> None:
            nonlocal asked
            asked = True
            # Slurm sends it to all processes of a job, and a second one would have torchrun leave at once.
            if not several and self._process is not None:
                with suppress(ProcessLookupError):
                    os.kill(self._process.pid, signum)
            if callable(former):
                former(signum, frame)

        former = signal.signal(signal.SIGTERM, ask)
        # Newer versions of torchrun wait for their processes so many seconds, where they would kill them after 30.
        environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240", **os.environ}
        try:
            self._process, offset = begin(self.command, self.log, environment, preexec_fn=_leave_usr2_to_submitit)
            code = self._process.wait()
        finally:
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()
                self._process.wait()
            signal.signal(signal.SIGTERM, former)
        found = outcome(self.folder, self.log, offset, -signal.SIGTERM if several and asked else code, asked=True)
        if asked and on_slurm and found.status != DONE:
            # A job that ends by itself now would be a finished one, and not requeued.
            time.sleep(GRACE)
        return found


def _leave_usr2_to_submitit() -> None:
    """In the run's process and all that it starts: Slurm sends the signal to requeue to every process of the job."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
