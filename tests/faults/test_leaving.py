"""Signals, closed pipes and terminals, poor locales: a run saves, and ends without a traceback."""

import os
import pty
import signal
import subprocess
import sys

import pytest
import torch
from faults.processes import SLOW
from harness import STEPS, assert_same_run, checkpoint, environment, finished, parts, train

from ssl_ib.cli.exits import exit_code


@pytest.mark.parametrize("by", [signal.SIGHUP, signal.SIGUSR1])
def test_signals_that_ask_politely(tmp_path, begin, by):
    out = tmp_path / "run"
    run = begin(out, *SLOW[:1], pause=0.05)
    run.reach(2)
    run.send(by)
    assert run.code() == 128 + by
    assert f"stopped by {by.name} at step {checkpoint(out)['step']}; saved" in run.said()
    assert 2 <= checkpoint(out)["step"] < 2 * STEPS
    assert train(out, *SLOW, "--resume") == 0
    assert_same_run(out, finished(*SLOW[:1]))


def test_a_hang_up_that_was_ignored_at_the_start_stays_ignored(tmp_path):
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        parts().SIGNALS[3] = signal.SIGHUP
        assert train(tmp_path / "run", "criterion=recorded", "criterion.inner=info_nce") == 0
        assert checkpoint(tmp_path / "run")["step"] == 2 * STEPS
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_closed_pipe_saves_and_stops(tmp_path, begin):
    os.mkfifo(tmp_path / "pipe")
    run = begin(tmp_path / "run", *SLOW[:1], pause=0.05, stdout=str(tmp_path / "pipe"))
    reader = os.open(tmp_path / "pipe", os.O_RDONLY)
    run.reach(2)
    os.close(reader)
    assert run.code() == 128 + signal.SIGPIPE
    step = checkpoint(tmp_path / "run")["step"]
    assert 2 <= step < 2 * STEPS
    assert f"stopped by SIGPIPE at step {step}; saved" in run.said() and "Traceback" not in run.said()


def test_a_closed_terminal_without_a_signal_ends_nothing(tmp_path, begin):
    """As after `setsid` or `disown`: the run goes on in silence."""
    terminal, side = pty.openpty()
    run = begin(tmp_path / "run", *SLOW[:1], pause=0.05, stdout=os.ttyname(side))
    run.reach(2)
    os.close(side)
    os.close(terminal)
    assert run.code() == 0, run.said()
    assert "Traceback" not in run.said() and (tmp_path / "run" / "results.json").is_file()


#: What a command does: it prints a name.
PRINTS = """
import sys
from ssl_ib.cli.exits import exit_code
def run():
    print('B\\xe4r \\udcff', flush=True)
    return 0
"""


def python(code: str, redirected: str = "", **variables: str) -> subprocess.CompletedProcess:
    command = ["sh", "-c", f'exec "$0" "$@" {redirected}', sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, env=environment(**variables), timeout=60)


def test_an_ascii_locale(tmp_path):
    poor = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    done = python(PRINTS + "sys.exit(exit_code('p', run))", **poor)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"B\\xe4r \\udcff\n", b"")


def test_streams_that_were_closed_before_the_start(tmp_path):
    """What is opened next must not take their place: the next library's warning would go into it."""
    file = tmp_path / "file"
    code = f"def opens():\n    held = open({str(file)!r}, 'w'); run()\n    return held.fileno()\n"
    done = python(PRINTS + code + "sys.exit(exit_code('p', opens))", "<&- >&- 2>&-")
    assert done.returncode > 2 and file.read_text() == ""


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_no_bug(capsys, error):
    def runs_out():
        raise error

    assert exit_code("p", runs_out) == 2
    said = capsys.readouterr().err
    assert said.startswith("p: out of memory") and said.count("\n") == 1 and str(error) in said
    error.args = ("Boolean value of Tensor is ambiguous",)
    if type(error) is RuntimeError:
        with pytest.raises(RuntimeError):
            exit_code("p", runs_out)


@pytest.mark.parametrize("redirected", ["> /dev/full", "2> /dev/full", "> /dev/full 2>&1"])
def test_output_that_cannot_be_written(redirected):
    done = python(PRINTS + "sys.exit(exit_code('p', run))", redirected)
    assert done.returncode in (0, 2) and b"Traceback" not in done.stdout + done.stderr


def test_ctrl_c_from_the_first_import_on(tmp_path):
    """The first module after the package's own, as slow as a cold disk makes it."""
    (tmp_path / "argparse.py").write_text(
        "import sys, time\nsys.stdout.write('here\\n'); sys.stdout.flush()\ntime.sleep(30)\n"
    )
    command = [sys.executable, "-m", "ssl_ib.cli.train", "tiny"]
    env = environment()
    env["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{env['PYTHONPATH']}"
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "ssl-ib-train: interrupted\n" and process.returncode == 130
