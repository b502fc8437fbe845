"""Tiny runs in processes of their own, to which a test does what it likes; forked from a server, so that they start
at once."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from harness import TINY, train
from ranks import PRELOADED

from ssl_ib.cli import exits

#: Slow enough that a test meets it half way, and short where it is let go on.
SLOW = ("criterion=queued", "checkpoint.every_steps=1")
#: Seconds that a run may take to go on or to end.
PATIENCE = 300.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([*PRELOADED, "harness", "ssl_ib.api"])


class Running:
    """A run that was started in the folder `out`, beside which its output lies in a file.

    pause: seconds by which the steps of some criterions are slowed down. variables: of the environment.
    """

    def __init__(
        self,
        out: Path,
        *arguments: str,
        pause: float = 0.0,
        stdout: str | None = None,
        recipe: str = TINY,
        **variables: str,
    ):
        self.out = out
        variables["SSL_IB_TEST_PAUSE"] = str(pause)
        self.log = out.with_name(f"{out.name}.{time.monotonic_ns()}.log")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            self.process = _CONTEXT.Process(target=_run, args=(out, arguments, variables, self.log, stdout, recipe))
            self.process.start()

    def send(self, signum: signal.Signals) -> None:
        os.kill(self.process.pid, signum)

    def code(self) -> int:
        """The exit code, when it has ended; -n where signal n has killed it."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            # Of all runs, as the one that is waited for may itself wait for another.
            for run in _CONTEXT.active_children():
                os.kill(run.pid, signal.SIGUSR2)
            time.sleep(2.0)
            logs = [f"{log.name}:\n{log.read_text(encoding='utf-8')}" for log in self.out.parent.glob("*.log")]
            raise AssertionError("\n".join([f"no end within {PATIENCE:g} s", *logs]))
        return self.process.exitcode

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def reach(self, step: int) -> None:
        """Waits until the run has recorded the step."""
        metrics = self.out / "metrics.jsonl"
        begun = time.monotonic()
        while time.monotonic() - begun < PATIENCE:
            with suppress(FileNotFoundError):
                if f'"step": {step},' in metrics.read_text():
                    return
            assert self.process.exitcode is None, self.said()
            time.sleep(0.01)
        raise AssertionError("the run does not move")

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _run(
    out: Path, arguments: tuple[str, ...], variables: dict[str, str], log: Path, stdout: str | None, recipe: str
) -> None:
    os.environ |= variables
    # There is no torchrun, which would end the others.
    exits.PATIENCE = 0.0
    # The tests may have been started with it ignored, as `nohup` does.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # As in the tests' own process: with other threads sums are rounded otherwise.
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)
    os.dup2(file if stdout is None else os.open(stdout, os.O_WRONLY | os.O_NOCTTY), 1)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)
    faulthandler.register(signal.SIGUSR2, file=2)
    sys.exit(train(out, *arguments, recipe=recipe))
