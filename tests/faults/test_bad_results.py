"""A sweep with a damaged file of results: which file it is, and the other runs in the table."""

import json

import pytest

from ssl_ib.errors import UserError
from ssl_ib.sweep import report
from ssl_ib.sweep.points import Point, Run
from ssl_ib.sweep.report import Report, read_metrics

GOOD = {"trained": {"knn/top1": 0.5}, "seconds": 60.0, "step": 4}

RESULTS = {
    "cut": (b'{"trained": {', "results.json is damaged: "),
    "no text": (b"\xff\xfe\x00", "results.json is damaged: "),
    "deep": (b"[" * 100_000, "results.json is damaged: "),
    "a list": (b"[]", "results.json is damaged: expected an object, got list"),
    "digits": (b'{"seconds": ' + b"9" * 5000 + b"}", "results.json is damaged: "),
    "a part is no object": (
        json.dumps(GOOD | {"trained": 3}).encode(),
        "results.json is damaged: trained is no object",
    ),
    "no seconds": (b"{}", "results.json is damaged: it has no seconds or no step"),
    "seconds in words": (json.dumps(GOOD | {"seconds": "a"}).encode(), "it has no seconds or no step"),
}


@pytest.mark.parametrize("data, says", RESULTS.values(), ids=RESULTS)
def test_damaged_results_are_named(tmp_path, data, says):
    (tmp_path / "results.json").write_bytes(data)
    with pytest.raises(UserError, match=says):
        read_metrics(tmp_path)


@pytest.mark.parametrize("line", [b"{", b"3", b"\xff", b'{"step": 1}\n[]'])
def test_damaged_metrics_are_named(tmp_path, line):
    (tmp_path / "results.json").write_text(json.dumps(GOOD))
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n' + line + b"\n")
    with pytest.raises(UserError, match="metrics.jsonl is damaged: "):
        read_metrics(tmp_path)


def test_one_damaged_run_costs_the_sweep_no_other(tmp_path, capsys):
    report._say_once.cache_clear()
    runs = [Run(Point((), "base"), seed, "tiny", (), None) for seed in (0, 1)]
    for run, data in zip(runs, (b"{", json.dumps(GOOD).encode()), strict=True):
        (tmp_path / run.folder).mkdir(parents=True)
        (tmp_path / run.folder / "results.json").write_bytes(data)
    for _ in range(2):
        found = Report.read(tmp_path, [], runs, dict.fromkeys(runs, "done"), ["knn/top1"])
    assert [found.statuses[run] for run in runs] == ["damaged", "done"]
    assert found.numbers[runs[1]]["knn/top1"] == 0.5 and "damaged" in found.csv()
    said = capsys.readouterr().err
    assert said.count("results.json is damaged") == 1 and str(runs[0].folder) in said
