"""Files of results, of evaluations and of encoders that are damaged: which one it is, and the rest goes on."""

import json
from pathlib import Path

import pytest
from harness import save_encoder

import ssl_ib
from ssl_ib import device
from ssl_ib.errors import UserError
from ssl_ib.evals.results import Results
from ssl_ib.record import backbone
from ssl_ib.record.log import RunLog
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
    "a number is none": (
        json.dumps(GOOD | {"trained": {"knn/top1": []}}).encode(),
        "results.json is damaged: knn/top1 of trained is no number",
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


@pytest.mark.parametrize("line", [b"[" * 100_000, b"3", b"{}", b'{"step": "1", "epoch": 0}', b'{"step": 1}'])
def test_damaged_metrics_are_named_by_what_resumes(tmp_path, line):
    """The last line alone may have been cut short; nothing is changed before that is known."""
    (tmp_path / "metrics.jsonl").write_bytes(line + b'\n{"step": 1, "epoch": 0.5}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 1: expected "):
        RunLog(tmp_path, ())
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(line)


def test_what_is_no_result_of_an_evaluation_is_computed_again(tmp_path):
    good = {"protocol": "knn", "settings": {}, "weights": "a", "metric": "top1", "ssl_ib": "1", "seconds": 2.0}
    others = [b"\xff", b"[" * 100_000, b"3", b"{}", json.dumps(good | {"settings": 3}).encode()]
    (tmp_path / "evals.jsonl").write_bytes(b"\n".join([*others, json.dumps(good).encode()]) + b"\n")
    assert Results(tmp_path / "evals.jsonl").lines == [good]


#: What describes no encoder, and what is said of it.
NO_ENCODERS = {
    "a network's": ({"model": "hf-hub:somebody/model"}, "timm has no model 'hf-hub:somebody/model'"),
    "arguments": ({"arguments": {"nonsense": 1}}, "nonsense"),
    "endless": ({"arguments": {"depth": 10**9}}, "arguments.depth: expected sizes from 1 to 1,024"),
    "statistics": ({"mean": ["a"]}, "describes no encoder: mean.0: Input should be a valid number"),
    "no spread": ({"std": [0.0, 1.0, 1.0]}, "expected a mean and a std above 0 for each channel"),
    "fewer channels": ({"mean": [0.5]}, "expected a mean and a std above 0 for each channel"),
    "another size": (
        {"preprocessing": {"size": 7, "crop_ratio": 1.0, "interpolation": "bilinear", "max_side": None}},
        "cut to 7 pixels, and that timm's 'vit_tiny_patch16_224' reads 224 x 224",
    ),
    "preprocessing": ({"preprocessing": {"size": 0}}, "describes no encoder: preprocessing.size: "),
}


@pytest.mark.parametrize("change, says", NO_ENCODERS.values(), ids=NO_ENCODERS)
def test_what_describes_no_encoder(tmp_path, change, says):
    out = Path(save_encoder(tmp_path / "run", "vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=3))
    file = out / "backbone.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=says):
        ssl_ib.load(out)


def test_an_encoder_beyond_the_memory_is_said_as_such(tmp_path, monkeypatch):
    out = Path(save_encoder(tmp_path / "run", "vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=3))
    file = out / "backbone.json"
    large = {"embed_dim": 3072, "depth": 64, "num_heads": 3}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"arguments": large}))
    monkeypatch.setattr(device, "free_memory", lambda device=None: 1e8)
    with pytest.raises(UserError, match="^(?!expected the weights).*memory"):
        ssl_ib.load(out)


def test_encoders_of_a_checkpoint_are_a_mapping():
    assert backbone.from_checkpoint({}) == {}
    with pytest.raises(UserError, match="describes no encoder: its backbones are no mapping"):
        backbone.from_checkpoint({"backbones": [3]})


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
