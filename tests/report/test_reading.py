"""A run's folder as the page reads it: streamed, without anything that must be there, and what is damaged is said."""

import json
import math

import numpy as np
import pytest
from written_run import write_run

from ssl_ib.errors import UserError
from ssl_ib.report.blocks import LEAST_POINTS, MOST_POINTS, curve, points_for, thin
from ssl_ib.report.reading import read_run


def test_steps_are_columns_and_evaluations_rows(tmp_path):
    run = read_run(write_run(tmp_path / "run"), "run")
    assert run.step.tolist() == list(range(1, 41)) and run.epoch[-1] == 4.0
    assert {len(column) for column in run.columns.values()} == {40} and "loss/info_nce" in run.columns
    assert [row["step"] for row in run.evaluations] == [0, 40]
    assert run.number("trained", "knn/top1") == 0.8 and run.number("initial", "knn/top1") is None
    assert run.series("knn/top1")[2].tolist() == [0.6, 0.8] and run.problems == []


def test_a_number_that_comes_late_or_is_not_finite(tmp_path):
    rows = [{"step": n, "epoch": n, "loss": 1.0} for n in range(3)]
    rows[1] |= {"loss/late": 2.0, "loss/lost": "Infinity", "loss/told": "words"}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = read_run(tmp_path, "run").columns
    np.testing.assert_equal(columns["loss/late"], [math.nan, 2.0, math.nan])
    assert columns["loss/lost"][1] == math.inf and "loss/told" not in columns


def test_what_is_damaged_is_said_and_the_rest_is_read(tmp_path):
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[3:5] = [b'{"step": 3\xff\n', b"[1]\n"]
    # The half line at the end is one that is being written.
    (run / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"step": 41, "ep')
    (run / "results.json").write_text("{")
    (run / "config.yaml").write_text("- a list")
    (run / "info" / "probe.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    found = read_run(run, "run")
    assert len(found.step) == 38 and found.results == found.config == {} and found.probe == []
    said = " ".join(found.problems)
    assert (
        "2 lines of metrics.jsonl" in said and "results.json" in said and "config.yaml" in said and "probe.csv" in said
    )


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_run(tmp_path, "run")
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "missing", "run")


def test_thinning_keeps_the_ends_and_the_extremes():
    y = np.random.default_rng(0).normal(size=100_000)
    y[777], y[50_001] = -40, 40
    kept = thin(y, 1000)
    assert len(kept) <= 1000 and (np.diff(kept) > 0).all()
    assert {0, 777, 50_001, 99_999} <= set(kept.tolist())
    assert thin(y[:10], 1000).tolist() == list(range(10))
    assert points_for(1) == MOST_POINTS and points_for(10**6) == LEAST_POINTS


def test_a_curve_leaves_out_what_is_not_finite():
    x, y = np.arange(100.0), np.ones(100)
    y[3] = math.nan
    raw, course = curve("loss", x, y, 0, 1000)
    assert raw.faint and not course.faint and len(raw.x) == len(course.x) == 99
    assert curve("loss", x, np.full(100, math.nan), 0, 1000) == []
