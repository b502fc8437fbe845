"""Does faults to tiny real runs for hours, has the runs continued, and compares them with runs that nothing disturbed.

    python tools/faults.py --hours 2
    python tools/faults.py --seed 1234 --trials 1      # repeats a trial that failed
    python tools/faults.py --trials 20 --only "kill in a save"

Each trial starts a run of the digits in processes of its own, does one kind of fault to it at a random time, and
continues it to its end. It fails where a process ends in a traceback or not at all, or with another exit code than
docs/reliability.md has, and where the losses and the final weights are not bit for bit those of an undisturbed run.
What a trial does follows from its seed, but for the clock: repeated, a fault may hit another instruction.

Exit codes: 0 all survived, 1 some trial failed; its folder is kept.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# In the place of this file's own folder, in which `faults` would be this file.
sys.path[:1] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "kernels")]

from faults import processes  # noqa: E402
from faults.processes import Running  # noqa: E402
from harness import TINY, assert_same_run, assert_same_state, checkpoint, losses  # noqa: E402

SMALL = ["model.backbone_args={patch_size: 8, embed_dim: 24, depth: 1, num_heads: 3}", "epochs=2", "batch_size=128"]
SMALL += ["eval.every_epochs=1", "eval.linear.epochs=5", "workers=0"]
#: What is trained, by name: recipe and overrides. IMAGES stands for a folder of images, which are streamed.
RECIPES = {
    "two views": (TINY, ["criterion={name: recorded, inner: {name: info_nce, temperature: 0.2}}"]),
    "queue": (TINY, ["criterion=queued"]),
    "masks": ("mae_digits", [*SMALL, "optim.warmup_epochs=1", "model.decoder_dim=16"]),
    "teacher": ("svib_digits", [*SMALL, "optim.warmup_epochs=1", "criterion.K=32"]),
    "streamed": (
        TINY,
        ["criterion={name: recorded, inner: {name: info_nce}}", "batch_size=32", "worker_timeout=5", "workers=2"]
        + ["source={name: folder, path: IMAGES, memory_gb: 1e-6}"],
    ),
}
#: Seconds that a process may take to go on or to end.
PATIENCE = 600.0


class NotHere(Exception):
    """This machine does not let a fault be done."""


class TooLate(Exception):
    """The run was done before the fault was."""


class Trial:
    """One run and what is done to it. All that is random comes from its seed."""

    def __init__(self, seed: int, place: Path, fault: str | None):
        self.seed, self.random = seed, random.Random(seed)
        self.fault = fault or list(FAULTS)[seed % len(FAULTS)]
        asked = FAULTS[self.fault][1]
        self.recipe = asked.get("recipe") or self.random.choice([name for name in RECIPES if name != "streamed"])
        self.ranks = asked.get("ranks") or self.random.choice((1, 1, 2))
        if self.ranks > 1 and self.recipe == "queue":
            # Each process has a queue of its own, of which the main one's is saved.
            self.recipe = "two views"
        self.saves = asked.get("saves") or self.random.choice((1, 1, 3, None))
        self.place, self.out = place, place / f"trial_{seed}" / "run"
        self.runs: list[Running] = []

    def __str__(self) -> str:
        return f"{self.fault}, {self.recipe}, {self.ranks} process{'es' * (self.ranks > 1)}"

    def start(self, *more: str, out: Path | None = None, saves: int | None = None, stdout: str | None = None):
        """Starts the run's processes."""
        recipe, overrides = RECIPES[self.recipe]
        words = [word.replace("IMAGES", str(self.place / "images")) for word in overrides]
        words += [f"checkpoint.every_steps={saves}"] if saves else []
        variables = [{}]
        if self.ranks > 1:
            words.append("parallel=ddp")
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            group["WORLD_SIZE"] = str(self.ranks)
            variables = [{**group, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(self.ranks)]
        out = out or self.out
        out.parent.mkdir(parents=True, exist_ok=True)
        pause = 0.02 if saves or stdout else 0.0
        found = [Running(out, *words, *more, pause=pause, stdout=stdout, recipe=recipe, **one) for one in variables]
        self.runs += found
        return found

    def begin(self, **more) -> list[Running]:
        """Starts the run, and waits until it is somewhere in its steps."""
        runs = self.start(saves=self.saves, **more)
        try:
            runs[0].reach(self.random.randrange(1, len(losses(self.undisturbed())) - 2))
        except AssertionError:
            if runs[0].process.exitcode == 0:
                raise TooLate from None
            raise
        time.sleep(self.random.uniform(0, 0.05))
        return runs

    def undisturbed(self) -> Path:
        """The folder of the same run, which nothing is done to."""
        out = self.place / "undisturbed" / f"{self.recipe.replace(' ', '_')}_{self.ranks}" / "run"
        if not (out / "results.json").is_file():
            shutil.rmtree(out.parent, ignore_errors=True)
            self.expect(self.start(out=out), 0)
        return out

    def expect(self, runs: list[Running], *codes: int) -> None:
        """Waits for processes; asserts that they end, with one of these exit codes, and without a traceback."""
        for run in runs:
            code = run.code()
            assert "Traceback" not in run.said(), run.said()
            assert code in codes, f"exit code {code}, expected {codes}: {run.said()[-1500:]}"

    def finish(self, how: str = "--auto-resume", out: Path | None = None, losses_too: bool = True) -> None:
        """Continues the run to its end, and compares it with the undisturbed one."""
        out = out or self.out
        self.expect(self.start(how, out=out), 0)
        if losses_too:
            assert_same_run(out, self.undisturbed())
        else:
            assert_same_state(checkpoint(out), checkpoint(self.undisturbed()))
        assert not list(out.rglob("*.tmp")), list(out.rglob("*.tmp"))

    def stop(self) -> None:
        """Ends whatever is left."""
        for run in self.runs:
            with suppress(OSError):
                run.send(signal.SIGCONT)
            run.end()


def kill(trial: Trial) -> None:
    """All processes of the run are killed, up to three times."""
    for _ in range(trial.random.choice((1, 1, 2, 3))):
        kill_once(trial, trial.begin() if not trial.out.exists() else _continued(trial))
    trial.finish()


def _continued(trial: Trial) -> list[Running]:
    runs = trial.start("--auto-resume", saves=trial.saves)
    time.sleep(trial.random.uniform(0.2, 1.5))
    return runs


def kill_once(trial: Trial, runs: list[Running]) -> None:
    for run in runs:
        run.send(signal.SIGKILL)
    for run in runs:
        run.process.join()
    if (trial.out / "results.json").exists():
        raise TooLate


def kill_in_a_save(trial: Trial) -> None:
    """Killed while a checkpoint is written."""
    runs = trial.begin()
    fresh, begun = trial.out / "checkpoints" / "last.pt.tmp", time.monotonic()
    while not fresh.exists():
        if runs[0].process.exitcode is not None or time.monotonic() - begun > PATIENCE:
            raise TooLate
    time.sleep(trial.random.uniform(0, 0.004))
    kill_once(trial, runs)
    trial.finish("--resume")


def polite(trial: Trial) -> None:
    """One process is asked to stop; all of them save and leave."""
    runs, signum = trial.begin(), trial.random.choice((signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1))
    trial.random.choice(runs).send(signum)
    trial.expect(runs, 128 + signum, 0)
    trial.finish()


def killed_rank(trial: Trial) -> None:
    """One of two processes is killed: the other one says so in a line, and ends."""
    runs = trial.begin()
    dead = trial.random.choice(runs)
    dead.send(signal.SIGKILL)
    others = [run for run in runs if run is not dead]
    if all(run.code() == 0 for run in others):
        raise TooLate
    trial.expect(others, 2)
    trial.finish()


def double_start(trial: Trial) -> None:
    """The same command twice: one of them trains."""
    first = trial.start(saves=trial.saves)
    time.sleep(trial.random.choice((0.0, 0.0, trial.random.uniform(0, 1))))
    second = trial.start(saves=trial.saves)
    codes = [{run.code() for run in runs} for runs in (first, second)]
    for run in (*first, *second):
        assert "Traceback" not in run.said(), run.said()
    assert sorted(codes, key=max) == [{0}, {2}], (codes, [run.said()[-800:] for run in (*first, *second)])
    assert_same_run(trial.out, trial.undisturbed())


def beside(how: str) -> Callable[[Trial], None]:
    def fault(trial: Trial) -> None:
        """Another command on a live run's folder is refused."""
        runs = trial.begin()
        others = trial.start(how)
        trial.expect(others, 2)
        assert any("another run is at work in" in run.said() for run in others), others[0].said()
        trial.expect(runs, 0)
        assert_same_run(trial.out, trial.undisturbed())

    return fault


def deleted(trial: Trial) -> None:
    """The folder is removed under the run; it is begun anew."""
    runs = trial.begin()
    aside = trial.out.with_name("aside")
    trial.out.rename(aside)
    shutil.rmtree(aside)
    trial.expect(runs, 2)
    assert not trial.out.exists()
    trial.finish()


def renamed(trial: Trial) -> None:
    """The folder is renamed under the run, which is resumed where it went."""
    runs = trial.begin()
    aside = trial.out.with_name("aside")
    trial.out.rename(aside)
    trial.expect(runs, 2)
    assert not trial.out.exists()
    trial.finish(out=aside)


def torn(trial: Trial) -> None:
    """The last checkpoint is cut short, or ends in zeros: the one before is used."""
    kill_once(trial, trial.begin())
    last = trial.out / "checkpoints" / "last.pt"
    data = last.read_bytes()
    place = trial.random.randrange(len(data))
    before = last.with_name("previous.pt").exists()
    last.unlink()
    last.write_bytes(data[:place] + bytes(len(data) - place) * trial.random.randrange(2))
    if before:
        trial.finish("--resume")
    else:
        trial.expect(trial.start("--resume"), 2)


def cut_record(trial: Trial) -> None:
    """Metrics are cut short: rows are lost, and no step of the training is."""
    kill_once(trial, trial.begin())
    record = trial.out / "metrics.jsonl"
    data = record.read_bytes()
    record.write_bytes(data[: trial.random.randrange(len(data))])
    trial.finish("--resume", losses_too=False)


def full_disk(trial: Trial) -> None:
    """The disk fills at some file; then there is room again."""
    folder = trial.out.parent
    folder.mkdir(parents=True)
    size = trial.random.randrange(100, 2000)
    if _mount(folder, f"size={size}k"):
        raise NotHere("a small tmpfs cannot be mounted")
    try:
        # Logs lie beside the run: they have to fit.
        (folder / "room").write_bytes(bytes(40_000))
        runs = trial.start(saves=trial.saves)
        for run in runs:
            run.process.join(PATIENCE / 2)
        (folder / "room").unlink()
        trial.expect(runs, 0, 2)
        assert not list(trial.out.rglob("*.tmp")), list(trial.out.rglob("*.tmp"))
        _mount(folder, "remount,size=100m")
        trial.finish()
    finally:
        trial.stop()
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _mount(folder: Path, options: str) -> int:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True).returncode
    except OSError:
        return 1


def worker(signum: signal.Signals) -> Callable[[Trial], None]:
    def fault(trial: Trial) -> None:
        """A worker that decodes images is stopped or killed: the run ends in one message, or goes on."""
        runs = trial.begin()
        children = list(_children(runs[0].process.pid))
        if not children:
            raise TooLate
        with suppress(ProcessLookupError):
            os.kill(trial.random.choice(children), signum)
        trial.expect(runs, 0, 2)
        trial.finish()

    return fault


def _children(parent: int) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"\nPPid:\t{parent}\n" in (folder / "status").read_text():
                yield int(folder.name)


def closed_pipe(trial: Trial) -> None:
    """Who reads the output ends."""
    pipe = trial.out.with_name("pipe")
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    # Open for writing too, so that neither side waits for the other.
    reader = os.open(pipe, os.O_RDWR)
    try:
        runs = trial.begin(stdout=str(pipe))
    finally:
        os.close(reader)
    trial.expect(runs, 128 + signal.SIGPIPE, 0)
    trial.finish()


#: What is done, by name: the function, and what it needs of recipe, ranks and steps between saves.
FAULTS: dict[str, tuple[Callable[[Trial], None], dict]] = {
    "kill in a step": (kill, {}),
    "kill in a save": (kill_in_a_save, {"saves": 1}),
    "SIGTERM, SIGHUP, SIGUSR1": (polite, {}),
    "one rank killed": (killed_rank, {"ranks": 2}),
    "two starts at once": (double_start, {}),
    "--resume beside": (beside("--resume"), {}),
    "--overwrite beside": (beside("--overwrite"), {}),
    "folder deleted": (deleted, {}),
    "folder renamed": (renamed, {}),
    "last.pt torn": (torn, {}),
    "metrics.jsonl cut": (cut_record, {"saves": 1}),
    "disk full": (full_disk, {}),
    "worker stopped": (worker(signal.SIGSTOP), {"recipe": "streamed", "ranks": 1}),
    "worker killed": (worker(signal.SIGKILL), {"recipe": "streamed", "ranks": 1}),
    "pipe closed": (closed_pipe, {"ranks": 1}),
}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--hours", type=float, help="start trials for so long")
    p.add_argument("--trials", type=int, help="start so many trials")
    p.add_argument("--seed", type=int, default=0, help="of the first trial; the next ones have the next numbers")
    p.add_argument("--only", choices=FAULTS, help="one kind of fault alone")
    p.add_argument("--out", type=Path, help="where the runs go, and those that failed stay (default: a new folder)")
    options = p.parse_args()
    if options.hours is None and options.trials is None:
        p.error("for how long? give --hours or --trials")
    processes.PATIENCE = PATIENCE
    place = (options.out or Path(tempfile.mkdtemp(prefix="faults_"))).resolve()
    _images(place / "images")
    tried, survived, failures = Counter(), Counter(), []
    skipped: dict[str, str] = {}
    begun, seed = time.monotonic(), options.seed
    while (options.hours is None or time.monotonic() - begun < 3600 * options.hours) and (
        options.trials is None or seed < options.seed + options.trials
    ):
        trial = Trial(seed, place, options.only)
        seed += 1
        try:
            with _cleaned(trial):
                trial.undisturbed()
                FAULTS[trial.fault][0](trial)
        except TooLate:
            continue
        except NotHere as reason:
            skipped[trial.fault] = str(reason)
            continue
        except Exception as error:
            tried[trial.fault] += 1
            again = f"python tools/faults.py --seed {trial.seed} --trials 1"
            again += f' --only "{options.only}"' if options.only else ""
            lines = traceback.format_exc() if not isinstance(error, AssertionError) else str(error)
            failures.append(f"FAILED: {trial}; repeat with: {again}; see {trial.out.parent}\n{lines.strip()[-3000:]}")
            print(failures[-1], flush=True)
            continue
        tried[trial.fault] += 1
        survived[trial.fault] += 1
        print(f"{time.monotonic() - begun:6.0f} s  survived: {trial} (seed {trial.seed})", flush=True)
    print(_table(tried, survived, skipped, options.seed, seed))
    for line in failures:
        print(line.splitlines()[0])
    if not failures and options.out is None:
        shutil.rmtree(place)
    return 1 if failures else 0


@contextmanager
def _cleaned(trial: Trial) -> Iterator[None]:
    """Ends the trial's processes, and removes its folder unless it failed."""
    try:
        yield
    except (TooLate, NotHere):
        trial.stop()
        shutil.rmtree(trial.out.parent, ignore_errors=True)
        raise
    finally:
        trial.stop()
    shutil.rmtree(trial.out.parent, ignore_errors=True)


def _images(folder: Path) -> None:
    """Some hundred digits as files."""
    from PIL import Image
    from sklearn.datasets import load_digits

    if folder.is_dir():
        return
    digits = load_digits()
    for number in range(300):
        file = folder / str(digits.target[number]) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 15).astype("uint8")).resize((16, 16)).save(file)


def _table(tried: Counter, survived: Counter, skipped: dict[str, str], first: int, end: int) -> str:
    import torch

    lines = ["", "| fault | tried | survived | failed |", "|---|---|---|---|"]
    for fault in FAULTS:
        if fault in skipped and not tried[fault]:
            lines.append(f"| {fault} | not possible here: {skipped[fault]} | | |")
        elif tried[fault]:
            lines.append(f"| {fault} | {tried[fault]} | {survived[fault]} | {tried[fault] - survived[fault]} |")
    total, good = sum(tried.values()), sum(survived.values())
    lines.append(f"| all | {total} | {good} | {total - good} |")
    when = datetime.now().date().isoformat()
    lines.append(f"\n{when}, Python {platform.python_version()}, torch {torch.__version__}, seeds {first} to {end - 1}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
