"""What is read from finished runs, the numbers of the table, and the picture of each kind of grid."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from ssl_ib.record.log import RunLog
from ssl_ib.sweep import plot
from ssl_ib.sweep.points import Axis, Choice, Point, Run, shown
from ssl_ib.sweep.report import Cell, Report, read_metrics


def axis(name: str, *values) -> Axis:
    return Axis(name, tuple(Choice(shown(v), v, (f"{name}={v}",)) for v in values))


def report(axes, score, seeds=(0, 1), metrics=("knn/top1",)) -> Report:
    """A report whose runs have `score(seed, *values)` for each metric; None: the run is not done."""
    points = [Point((), "base")]
    for a in axes:
        points = [Point((*p.choices, c), f"{p.name},{c.label}") for p in points for c in a.choices]
    runs = [Run(p, seed, "tiny", (), None) for seed in seeds for p in points]
    scores = {run: score(run.seed, *(choice.value for choice in run.point.choices)) for run in runs}
    numbers = {
        run: {metric: value for metric in metrics} | {"untrained/knn/top1": 0.2, "raw_pixels/knn/top1": 0.4}
        for run, value in scores.items()
        if value is not None
    }
    statuses = {run: "done" if run in numbers else "waiting" for run in runs}
    return Report(axes, runs, statuses, numbers, ["knn/top1"], metrics)


def test_mean_and_deviation():
    cell = Cell.of([0.70, 0.74, 0.75])
    # Squared distances from 0.73: 9e-4, 1e-4, 4e-4; their sum over n - 1 = 2 is 7e-4.
    assert cell.mean == pytest.approx(0.73) and cell.deviation == pytest.approx(math.sqrt(7e-4)) and cell.n == 3
    assert str(cell) == "0.7300 ± 0.0265"
    assert str(Cell.of([0.5])) == "0.5000" and math.isnan(Cell.of([0.5]).deviation)
    assert str(Cell.of([])) == "-"
    assert [str(Cell.of([x])) for x in (0.0, 12.3456, 1234.56, -0.012346, 2e-9, math.nan, math.inf)] == [
        "0.0000",
        "12.35",
        "1235",
        "-0.01235",
        "2.00e-09",
        "nan",
        "inf",
    ]
    assert str(Cell.of([1.0, math.inf])) == "inf ± nan"


def test_the_numbers_of_a_run(tmp_path):
    log = RunLog(tmp_path)
    for step in range(1, 4000):
        log.write({"step": step, "epoch": step / 10, "loss": 1.0 / step, "loss/term": math.inf, "lr": 0.1})
    log.write({"step": 4000, "epoch": 400.0, "knn/top1": 0.75, "note": "text"})
    log.close()
    found = {"untrained": {"knn/top1": 0.25}, "raw_pixels": {}, "trained": {"knn/top1": 0.75, "health/std": "NaN"}}
    found["chance"] = {"knn/top1": 0.125}
    (tmp_path / "results.json").write_text(json.dumps({**found, "seconds": 90.0, "step": 4000}))
    numbers, trained = read_metrics(tmp_path)
    assert trained == ["knn/top1", "health/std"] and math.isnan(numbers.pop("health/std"))
    assert numbers == {
        "loss": 1 / 3999,
        "loss/term": math.inf,
        "lr": 0.1,
        "knn/top1": 0.75,
        "untrained/knn/top1": 0.25,
        "chance/knn/top1": 0.125,
        "seconds": 90.0,
        "minutes": 1.5,
        "step": 4000,
    }


def test_the_table_counts_the_runs_that_are_done():
    lr = axis("optim.lr", 0.1, 0.2, 0.3)
    made = report(
        [lr], lambda seed, x: None if x == 0.3 or (x, seed) == (0.2, 1) else x + seed, metrics=("knn/top1", "loss")
    )
    # A run without the metric: the cell says for how many it stands.
    del made.numbers[made.runs[0]]["loss"]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in made.table().splitlines()]
    assert lines[0] == ["optim.lr", "knn/top1", "loss", "n"]
    assert lines[2:] == [
        ["0.1", "0.6000 ± 0.7071", "1.100 (n=1)", "2"],
        ["0.2", "0.2000", "0.2000", "1"],
        ["0.3", "-", "-", "0"],
    ]


def test_a_bar_in_a_label_does_not_break_the_table():
    made = report([axis("a", "x|y", "z")], lambda seed, x: 0.5)
    assert "x\\|y" in made.table()


@pytest.mark.parametrize(
    "values, expected",
    [
        ([1e-4, 3e-4, 1e-3], True),
        ([1, 2, 4, 8], True),
        ([0.1, 0.2, 0.3], False),
        ([0, 1, 10], False),
        ([1, 2], False),
        ([0.01, 0.1], True),
        ([8, 1, 64], True),
        ([5], False),
    ],
)
def test_log_spaced(values, expected):
    assert plot.is_log_spaced(values) is expected


def test_numeric():
    assert plot.is_numeric(axis("a", 1, 0.5)) and not plot.is_numeric(axis("a", 1, True))
    assert not plot.is_numeric(axis("a", 1, "x")) and not plot.is_numeric(axis("a", 1, None))


def drawn(made, tmp_path, monkeypatch):
    """The picture's axes, after it was saved and looked at."""
    figures = []
    monkeypatch.setattr(plot, "chart", lambda *size: figures.append(CHART(*size)) or figures[0])
    path = tmp_path / "plot.png"
    assert plot.draw(made, path) is None
    with Image.open(path) as image:
        assert np.asarray(image.convert("RGB")).std() > 5
    return figures[0].axes


CHART = plot.chart


def test_a_curve(tmp_path, monkeypatch):
    lr = axis("optim.lr", 1e-2, 1e-4, 1e-3)
    made = report([lr], lambda seed, x: -math.log10(x) / 10 + seed / 5, metrics=("knn/top1", "loss", "minutes"))
    first, second = drawn(made, tmp_path, monkeypatch)
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("knn/top1", "loss")
    assert first.get_xscale() == "log" and list(first.get_xticks()) == [1e-4, 1e-3, 1e-2]
    ((line, *_),) = first.containers
    assert line.get_xdata().tolist() == [1e-4, 1e-3, 1e-2]
    assert line.get_ydata() == pytest.approx([0.5, 0.4, 0.3])
    (bars,) = first.containers[0][2]
    half = 0.2 / math.sqrt(2)
    assert bars.get_segments()[0][:, 1] == pytest.approx([0.5 - half, 0.5 + half])
    heights = {text.get_text(): float(ref.get_ydata()[0]) for text, ref in references(first)}
    assert (
        heights == {"untrained": pytest.approx(0.2), "raw pixels": pytest.approx(0.4)} and second.get_legend() is None
    )


def references(panel):
    legend = panel.get_legend()
    return [(text, handle) for text, handle in zip(legend.get_texts(), legend_lines(panel), strict=True)]


def legend_lines(panel):
    return [line for line in panel.lines if not line.get_label().startswith("_")]


def test_a_heat_map(tmp_path, monkeypatch):
    grid = [axis("a", "x", "y"), axis("one", 5), axis("b", 1, 2, 3)]
    made = report(grid, lambda seed, a, one, b: None if (a, b) == ("y", 3) else b / 10 + (a == "y") / 2 + seed / 50)
    panel, scale = drawn(made, tmp_path, monkeypatch)
    assert panel.get_title(loc="left") == "knn/top1 (n = 2)" and scale.get_ylim() == pytest.approx((0.11, 0.71))
    assert {(t.get_position(), t.get_text()) for t in panel.texts} == {
        ((0, 0), "0.1100"),
        ((1, 0), "0.2100"),
        ((2, 0), "0.3100"),
        ((0, 1), "0.6100"),
        ((1, 1), "0.7100"),
    }
    assert [t.get_text() for t in panel.get_xticklabels()] == ["1", "2", "3"] and panel.get_xlabel() == "b"
    assert [t.get_text() for t in panel.get_yticklabels()] == ["x", "y"] and panel.get_ylabel() == "a"


def test_a_heat_map_of_which_some_runs_are_missing(tmp_path, monkeypatch):
    made = report([axis("a", 1, 2), axis("b", 1, 2)], lambda seed, a, b: None if (seed, a, b) == (1, 2, 2) else a / 4)
    panel, _ = drawn(made, tmp_path, monkeypatch)
    assert panel.get_title(loc="left") == "knn/top1"
    assert [t.get_text() for t in panel.texts] == ["0.2500\nn = 2"] * 2 + ["0.5000\nn = 2", "0.5000\nn = 1"]


def test_dots(tmp_path, monkeypatch):
    made = report([axis("masker", "none", "block", "grid")], lambda seed, a: len(a) / 10 + seed / 10)
    (panel,) = drawn(made, tmp_path, monkeypatch)
    assert [t.get_text() for t in panel.get_yticklabels()] == ["none", "block", "grid"]
    assert [c[0].get_xdata().tolist() for c in panel.containers] == [[pytest.approx(x)] for x in (0.45, 0.55, 0.45)]
    assert panel.get_ylim()[0] > panel.get_ylim()[1]


def test_three_axes_are_dots_up_to_a_number(tmp_path, monkeypatch):
    few = report([axis("a", 1, 2), axis("b", 1, 2), axis("c", 1, 2)], lambda seed, a, b, c: a * b * c / 10)
    (panel,) = drawn(few, tmp_path, monkeypatch)
    assert [t.get_text() for t in panel.get_yticklabels()][:2] == ["1, 1, 1", "1, 1, 2"]
    many = report([axis("a", *range(4)), axis("b", *range(4)), axis("c", *range(3))], lambda seed, a, b, c: 0.5)
    monkeypatch.undo()
    assert "48 points on 3 axes are too many" in plot.draw(many, tmp_path / "many.png")
    assert not (tmp_path / "many.png").exists()


def test_nothing_to_draw(tmp_path):
    assert plot.draw(report([axis("a", 1, 2)], lambda seed, a: None), tmp_path / "x.png") == "no plot: no run is done"
    assert "only one point" in plot.draw(report([], lambda seed: 0.5), tmp_path / "x.png")
