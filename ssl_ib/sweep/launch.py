"""Runs of a sweep as jobs of submitit's: on a Slurm cluster, or to try that, in processes here.

The sweep's folder is the only state: `jobs.json` says which job has which run, and `jobs/` holds submitit's files and,
as JOB.json, how the run of each job ended. So another call can attach to the jobs of an earlier one.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.outside import NotYaml, parse_yaml, short
from ..errors import UserError, nearest
from ..record.files import replace
from ..record.signals import StopRequest
from . import runner
from .job import TORCHRUN, TrainJob
from .runner import DONE, FAILED, Outcome

if TYPE_CHECKING:
    from submitit import Executor, Job

    from .points import Run

SLURM, LOCAL, DEBUG = "slurm", "local", "debug"
LAUNCHERS = (SLURM, LOCAL, DEBUG)
JOBS, RECORD = "jobs", "jobs.json"
POLL = 1.0  # seconds
#: How often a run may reach the end of its job's time: each time it has got further.
RESTARTS = 1000
#: Seconds before the end of a job's time at which the run is asked to save: a step, a save, and what is on its way.
SIGNAL_DELAY = 300
#: Of submitit's keys for Slurm those that a sweep decides itself, and those that have a meaning without Slurm.
_OWN = {"nodes", "ntasks_per_node", "gpus_per_task", "num_gpus"}
_MEANT = {
    SLURM: None,
    LOCAL: {"time", "gpus_per_node", "signal_delay_s", "array_parallelism"},
    DEBUG: {"gpus_per_node"},
}
_COUNTS = ("time", "gpus_per_node", "signal_delay_s", "array_parallelism", "cpus_per_task")
_UNITS = {"time": "minutes", "signal_delay_s": "seconds"}
_LISTS = ("setup", "teardown", "srun_args")
#: Seconds for which the files of a job that has ended may be late, as they are on NFS.
_LATE = 10.0


@dataclass(frozen=True)
class Launch:
    """How runs are launched: by which launcher, and with which settings, under submitit's names for Slurm."""

    launcher: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """Processes of a run: one a GPU."""
        return self.settings.get("gpus_per_node", 1)

    @property
    def ignored(self) -> list[str]:
        """The settings that mean nothing to this launcher."""
        meant = _MEANT[self.launcher]
        return [] if meant is None else [key for key in self.settings if key not in meant]

    def check(self) -> None:
        """Raises UserError where there is no Slurm."""
        from submitit import SlurmExecutor

        if self.launcher == SLURM and SlurmExecutor.affinity() < 0:
            raise UserError(
                "--launch slurm: there is no srun here; call it on a machine of the cluster from which jobs can be "
                "submitted, or try the sweep with --launch local"
            )

    def executor(self, folder: Path, name: str) -> Executor:
        """submitit's executor; name: of the jobs."""
        import submitit

        given = self.settings
        if self.launcher == DEBUG:
            return submitit.DebugExecutor(folder)
        if self.launcher == LOCAL:
            executor = submitit.LocalExecutor(folder, max_num_timeout=RESTARTS)
            executor.update_parameters(
                # A week, where nothing else is said.
                timeout_min=given.get("time", 7 * 24 * 60),
                signal_delay_s=given.get("signal_delay_s", SIGNAL_DELAY),
                gpus_per_node=given.get("gpus_per_node", 0),
            )
            return executor
        executor = submitit.SlurmExecutor(folder, max_num_timeout=RESTARTS)
        more = {"requeue": True, **given.get("additional_parameters", {})}
        executor.update_parameters(
            **{"job_name": name, "signal_delay_s": SIGNAL_DELAY, **given, "additional_parameters": more}
        )
        return executor


def parse(launcher: str | None, words: Sequence[str] | None, problems: list[str]) -> Launch | None:
    """What `--launch` and `--slurm KEY=VALUE ...` ask for; what is wrong is added to `problems`.

    Raises UserError where submitit is not installed.
    """
    if launcher is None:
        if words is not None:
            problems.append("--slurm: says how jobs are submitted; give --launch slurm as well")
        return None
    try:
        from submitit import SlurmExecutor
    except ModuleNotFoundError:
        raise UserError("--launch: submitit is not installed: pip install 'ssl-ib[slurm]'") from None
    known, given = SlurmExecutor._valid_parameters() - _OWN, {}
    for word in words or ():
        key, equals, text = word.partition("=")
        if not equals:
            problems.append(f"--slurm: expected KEY=VALUE, such as time=240, got {word!r}")
        elif key in _OWN:
            problems.append(f"--slurm {key}: a run of a sweep is one task on one machine, with gpus_per_node processes")
        elif key not in known:
            problems.append(
                f"--slurm: unknown key {key!r}{nearest(key, known)} (RECIPE and its KEY=VALUE stand before --slurm)"
            )
        elif key in given:
            problems.append(f"--slurm {key}: is given twice")
        elif key in _COUNTS and not (text.isascii() and text.isdecimal() and int(text)):
            unit = _UNITS.get(key, "")
            problems.append(f"--slurm {key}: expected a whole number{unit and ' of ' + unit} above 0, got {text!r}")
        else:
            try:
                given[key] = parse_yaml(text)
            except NotYaml as error:
                problems.append(f"--slurm {key}: expected a YAML value, got {short(text)}: {error.problem}")
    for key in _LISTS:
        if key in given and not isinstance(given[key], list):
            given[key] = [str(given[key])]
    if not isinstance(given.get("additional_parameters", {}), dict):
        problems.append("--slurm additional_parameters: expected {NAME: VALUE, ...}, options of sbatch")
    if launcher == SLURM and not any(word.startswith("time=") for word in words or ()):
        problems.append("--slurm time=MINUTES is missing: how long a job may take before its run is saved and requeued")
    delay = given.get("signal_delay_s", SIGNAL_DELAY)
    if "time" in given and 60 * given["time"] <= delay:
        problems.append(
            f"--slurm time={given['time']}: the run is asked to save {delay} seconds before its end (signal_delay_s), "
            "which leaves it no time"
        )
    return Launch(launcher, given)


def command(run: Run, out: Path, plugins: Sequence[str], processes: int) -> list[str]:
    """The process of a run, or torchrun with several of them."""
    python, *words = runner.command(run, out, plugins)
    several = ["-m", TORCHRUN, "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [python, *several, *words]


def run_all(
    launch: Launch,
    runs: Sequence[Run],
    out: Path,
    plugins: Sequence[str],
    name: str,
    ended: Callable[[Run, Outcome, dict[Run, Outcome]], None],
) -> tuple[dict[Run, Outcome], int]:
    """Submits a job for each run that has none on its way, and waits for all; how they ended, and the signal or 0.

    At SIGTERM and Ctrl-C this ends and says so; the jobs go on. name: of the jobs; ended: called after each run with
    all outcomes so far. Raises UserError where Slurm refuses the jobs.
    """
    folder = out.absolute() / JOBS
    executor, outcomes = launch.executor(folder, name), {}
    record = _read(out / RECORD)
    jobs = _attached(launch, runs, folder, record)
    if jobs:
        print(f"attached to {_counted(jobs)} of an earlier call ({_standing(jobs)})", flush=True)
    waiting = deque(run for run in runs if run not in jobs)
    # On a cluster Slurm decides; here so many are at work at once.
    room = launch.settings.get("array_parallelism", 1) if launch.launcher == LOCAL else len(runs)
    with StopRequest() as stop:
        while (jobs or waiting) and not stop.signum:
            if batch := [waiting.popleft() for _ in range(min(len(waiting), room - len(jobs)))]:
                jobs |= _submitted(launch, executor, batch, out, plugins, record)
            for run, job in list(jobs.items()):
                if not _is_over(job, folder):
                    continue
                del jobs[run]
                outcomes[run] = _outcome(job, folder) if not runner.is_done(run, out) else Outcome(DONE)
                ended(run, outcomes[run], outcomes)
                if stop.signum:
                    break
            if jobs and not stop.signum:
                time.sleep(POLL)
    if stop.signum and jobs and launch.launcher != DEBUG:
        print(f"ssl-ib-sweep: {_farewell(launch, jobs, len(waiting))}", file=sys.stderr, flush=True)
    return outcomes, stop.signum


def _attached(launch: Launch, runs: Sequence[Run], folder: Path, record: dict[str, Any]) -> dict[Run, Job]:
    """The jobs of an earlier call that are pending or running."""
    from submitit import LocalJob, SlurmJob

    kind = {SLURM: SlurmJob, LOCAL: LocalJob}.get(launch.launcher)
    found = {}
    for run in runs:
        entry = record.get(str(run.folder))
        if kind is not None and entry is not None and entry["launcher"] == launch.launcher:
            job = kind(folder=folder, job_id=entry["job"])
            if not _is_over(job, folder):
                found[run] = job
    return found


def _submitted(
    launch: Launch, executor: Executor, runs: Sequence[Run], out: Path, plugins: Sequence[str], record: dict[str, Any]
) -> dict[Run, Job]:
    """Submits a job for each run, on a cluster as one array, and writes down which has which."""
    folder = out.absolute() / JOBS
    tasks = [
        TrainJob(
            command(run, out.absolute(), plugins, launch.processes),
            out.absolute() / run.folder,
            runner.log_of(run, out.absolute()),
            folder,
        )
        for run in runs
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with _undisturbed():
        try:
            jobs = dict(zip(runs, executor.submit_array(tasks), strict=True))
        except (RuntimeError, OSError) as error:
            raise UserError(f"--launch {launch.launcher}: the jobs were refused: {error}") from None
        if launch.launcher != DEBUG:
            record |= {str(run.folder): {"launcher": launch.launcher, "job": job.job_id} for run, job in jobs.items()}
            replace(out / RECORD, json.dumps(record, indent=1) + "\n")
            ids = [job.job_id for job in jobs.values()]
            named = ids[0] if len(ids) == 1 else f"{ids[0]} to {ids[-1]}"
            print(f"submitted {_counted(jobs)}: {named}", flush=True)
    return jobs


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Jobs are written down as soon as they are submitted; and those here outlive Ctrl-C and a closed terminal."""
    former = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


def _is_over(job: Job, folder: Path) -> bool:
    """Whether a job has ended; a debug job is run for that."""
    from submitit import DebugJob, LocalJob

    if not isinstance(job, DebugJob) and (folder / f"{job.job_id}.json").is_file():
        return True
    if isinstance(job, LocalJob) and job._process is None:
        # Of an earlier call: submitit's process of it, whose number is the job's.
        try:
            return b"submitit.local._local" not in Path("/proc", job.job_id, "cmdline").read_bytes()
        except OSError:
            return True
    return job.done()


def _outcome(job: Job, folder: Path) -> Outcome:
    """How the run of a job that is over has ended, by the job's own word where it has left one."""
    told, late = folder / f"{job.job_id}.json", time.monotonic() + _LATE
    while not told.is_file() and job.state == "COMPLETED" and time.monotonic() < late:
        time.sleep(0.5)
    try:
        found = json.loads(told.read_text(encoding="utf-8"))
        return Outcome(str(found["status"]), str(found["message"]))
    except (OSError, ValueError, TypeError, KeyError):
        return Outcome(FAILED, f"job {job.job_id} is over ({job.state}) without a word; its files are in {folder}")


def _farewell(launch: Launch, jobs: dict[Run, Job], waiting: int) -> str:
    ids = sorted({job.job_id.split("_")[0] for job in jobs.values()})
    said = f"{_counted(jobs)} {'goes' if len(jobs) == 1 else 'go'} on without this command ({_standing(jobs)})"
    said += f", and {waiting} more were not submitted" if waiting else ""
    said += ". The same command attaches to them again"
    if launch.launcher == SLURM:
        said += f"; `squeue --me` shows them, and `scancel {' '.join(ids)}` ends them"
    return said


def _standing(jobs: dict[Run, Job]) -> str:
    """How many jobs are in which state: `2 running, 1 pending`."""
    from submitit import LocalJob

    # Of a process here that is not over there is nothing else to say, and Slurm may add who cancelled a job.
    states = ("running" if isinstance(job, LocalJob) else job.state.split(" ")[0].lower() for job in jobs.values())
    counts = Counter(states)
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def _counted(jobs: dict[Run, Job]) -> str:
    return f"{len(jobs)} job{'s' * (len(jobs) != 1)}"


def _read(path: Path) -> dict[str, Any]:
    """Which job has which run, by the run's folder. Raises UserError where the file is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(entry["launcher"], str) and isinstance(entry["job"], str) for entry in record.values()):
            return record
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise UserError(
        f"{path} cannot be read, so it is not known which runs have a job; see with `squeue --me` that none has, and "
        "remove the file"
    )
