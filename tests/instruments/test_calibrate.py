"""`ssl-ib-info calibrate`: its table, file and figure, what it advises, and what it refuses."""

import csv
import math

import pytest

from ssl_ib.cli.info import main
from ssl_ib.info.reading import Reading
from ssl_ib.instruments.calibrate import Row, table, verdict


def calibrate(*arguments: str) -> int:
    return main(["calibrate", "--workers", "1", *arguments])


def row(task: str, truth: float, estimator: str, *nats: float, trained: float | None = None, remark: str = "") -> Row:
    given = [Reading(estimator, "estimate", value, trained, math.inf, 100, 0.1, remark=remark) for value in nats]
    return Row(16, 500, task, truth, estimator, tuple(given))


def test_calibrate_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "calibration"
    arguments = "--dim 2 9 --samples 60 --mi 1 0.5 --seeds 2 --estimators gaussian ksg --out".split()
    assert calibrate(*arguments, str(out)) == 0
    printed = capsys.readouterr().out
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    # Two kinds of pairs in 2 dimensions, where a sparse one is no other, and three in 9.
    assert len(rows) == (2 + 3) * 2 * 2 and (out / "calibration.png").stat().st_size > 10_000
    first = rows[0]
    assert (first["task"], first["estimator"], first["truth"], first["seeds"]) == ("gaussian", "gaussian", "1", "2")
    assert float(first["bias"]) == pytest.approx(float(first["estimate"]) - 1, abs=1e-4)
    assert f"{float(first['estimate']):.2f}   {float(first['bias']):+.2f}  " in printed
    assert "ksg, 12 readings: 9 dimensions" in printed
    last = printed.splitlines()[-1]
    assert last.startswith("At 9 dimensions and 60 samples trust")


def test_the_table_hides_nothing():
    shown = table([row("gaussian", 1.0, "nwj", -0.5, -1.5, trained=1.25, remark="negative")])
    assert "-1.00   -2.00    0.71              1.25     none" in shown and shown.endswith("nwj, 2 readings: negative")


def test_the_advice_is_the_smallest_worst_error():
    good = [row("gaussian", 1.0, "ksg", 1.05), row("cubic", 2.0, "ksg", 1.7)]
    better = [row("gaussian", 1.0, "i_nce", 0.9), row("cubic", 2.0, "i_nce", 1.9)]
    poor = [row("gaussian", 1.0, "gaussian", 1.0), row("cubic", 2.0, "gaussian", 0.5)]
    line = verdict(good + better + poor)
    assert line == (
        "At 16 dimensions and 500 samples trust i_nce: its worst error is 10% of the truth (gaussian, 1 nats); "
        "within 20% too: ksg."
    )
    line = verdict(poor)
    assert "trust none of these to 20%: the best, gaussian, is off by up to 75% of the truth (cubic, 2 nats)" in line
    assert line.endswith("within 20%: gaussian on gaussian pairs.")
    # A mean that is right does not excuse draws that are not.
    assert "trust none" in verdict([row("gaussian", 1.0, "mine", 0.5, 1.5)])
    # Of nothing to find, 0.1 nats are 20 % of half a nat.
    assert "trust ksg" in verdict([row("gaussian", 0.0, "ksg", 0.09)])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--dim 2 --samples 1", "--samples 1: expected at least 50"),
        ("--dim 2 128 --samples 200", "--samples 200: fewer than the 2 x 128 dimensions of a pair"),
        ("--dim 0 --samples 200", "expected --dim and --seeds of at least 1, got --dim 0"),
        ("--dim 2 --samples 200 --workers 0", "--workers 0: expected at least 1"),
        ("--dim 2 --samples 200 --seeds 0", "and --seeds 0"),
        ("--dim 1 4 --samples 200 --mi 1 11", "--mi 11: expected 0 to 10 nats, which --dim 1 can share"),
        ("--dim 4 --samples 200 --mi -1", "--mi -1: expected 0 to 20 nats"),
        ("--dim 4 --samples 200 --mi nan", "--mi nan: expected 0 to 20 nats"),
        ("--dim 4 --samples 200 --estimators ksh", "unknown estimator 'ksh'; did you mean 'ksg'?"),
    ],
)
def test_refusals(arguments, message, tmp_path, capsys):
    out = tmp_path / "nothing"
    assert calibrate(*arguments.split(), "--out", str(out)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()


def test_a_file_where_the_folder_should_be(tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert calibrate("--dim", "2", "--samples", "60", "--out", str(taken)) == 2
    assert f"--out {taken}: expected a folder, got a file" in capsys.readouterr().err and taken.read_text() == "mine"
