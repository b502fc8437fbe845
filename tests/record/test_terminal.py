"""What a run shows while it trains, with and without a terminal, on a clock of the test's own."""

import io
import sys

import pytest

from ssl_ib.record.terminal import Terminal, duration, progress_line


class Stream(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.isatty = lambda: terminal


def shown(monkeypatch, stdout: bool, stderr: bool, columns: int = 80, main: bool = True, first: int = 0) -> list[str]:
    """What 20 steps of 7 seconds leave on (stdout, stderr), each a terminal or not; an evaluation of 60 s after 10."""
    streams = Stream(stdout), Stream(stderr)
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (columns, 24))
    time = [1000.0]
    terminal = Terminal(first, 20, epochs=4, images=14, main=main, clock=lambda: time[0])
    time[0] += 500  # The untrained encoder is evaluated.
    for step in range(first + 1, 21):
        time[0] += 7
        terminal.update(step, (step - 1) // 5 + 1, loss=float(step), seconds=7.0, waiting=0.7)
        time[0] += 60 * (step == 10)
    terminal.close()
    return [stream.getvalue() for stream in streams]


def test_lines_where_there_is_no_terminal(monkeypatch):
    out, err = shown(monkeypatch, False, False)
    assert err == ""
    assert out.splitlines() == [
        # 35 s for 5 steps; the mean loss of the steps since the last line.
        "step 5/20, epoch 1/4: loss 3.0000, 2 images/s, 1 min 45 s left",
        "step 10/20, epoch 2/4: loss 8.0000, 2 images/s, 1 min 10 s left",
        # Evaluations count for the time left, and not for the speed: 137 s for 11 steps.
        "step 11/20, epoch 3/4: loss 11.0000, 2 images/s, 1 min 52 s left",
        "step 16/20, epoch 4/4: loss 14.0000, 2 images/s, 43 s left",
        "step 20/20, epoch 4/4: loss 18.5000, 2 images/s",
    ]


def test_a_resumed_run_counts_its_own_steps(monkeypatch):
    out, _ = shown(monkeypatch, False, False, first=11)
    assert out.splitlines()[0] == "step 16/20, epoch 4/4: loss 14.0000, 2 images/s, 28 s left"


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_a_bar_that_fits_its_terminal(monkeypatch, columns):
    out, err = shown(monkeypatch, True, True, columns)
    assert out == ""
    states = [state for state in err.replace("\n", "\r").split("\r") if state.strip()]
    assert len(states) > 1 and all(len(state) <= columns for state in states)
    assert "20/20" in states[-1] and ("loss 20.0000, 2 images/s, 10% waiting" in states[-1]) == (columns > 50)


def test_lines_too_where_only_stdout_goes_to_a_file(monkeypatch):
    out, err = shown(monkeypatch, False, True)
    assert len(out.splitlines()) == 5 and "20/20" in err
    out, err = shown(monkeypatch, True, False)
    assert len(out.splitlines()) == 5 and err == ""


def test_other_processes_show_nothing(monkeypatch):
    assert shown(monkeypatch, False, True, main=False) == ["", ""]


def test_times():
    assert [duration(s) for s in (0.4, 59.6, 185, 3599.7, 9600)] == [
        "0 s",
        "1 min 00 s",
        "3 min 05 s",
        "1 h 00 min",
        "2 h 40 min",
    ]
    line = progress_line(1200, 9000, 2, 10, 0.12345, 812.4, 4000)
    assert line == "step 1200/9000, epoch 2/10: loss 0.1235, 812 images/s, 1 h 06 min left"
