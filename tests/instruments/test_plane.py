"""`ssl-ib-info plane` on finished runs: the right encoders at the right times, the limits, and what is refused."""

import csv
import json
import math
import re
import shutil

import pytest
import torch
from harness import finished, rows
from torch.nn.functional import normalize

from ssl_ib.cli.info import main
from ssl_ib.errors import UserError
from ssl_ib.evals import health
from ssl_ib.instruments.encoders import Encoders, distinct, remark
from ssl_ib.instruments.output import folder_of
from ssl_ib.instruments.plane_points import at
from ssl_ib.record.folder import names_of

KEPT = "checkpoint.keep=1", "eval.linear.enabled=false"


def read(file) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def test_each_state_is_the_encoder_that_the_run_evaluated():
    out = finished(*KEPT)
    results = json.loads((out / "results.json").read_text())
    run, said = Encoders(out, "cpu"), []
    _, val = run.images(10_000, said.append)
    found = {
        (state.name, state.step, state.epoch): health.rankme(run.features(val)) for state in run.along(said.append)
    }
    assert not said
    # The last checkpoint is that of the last epoch, and is there once.
    assert list(found) == [("untrained", 0, 0), ("epoch_00001", 11, 1), ("epoch_00002", 22, 2)]
    evaluated = {row["step"]: row["health/rankme"] for row in rows(out) if "health/rankme" in row}
    assert evaluated == pytest.approx({step: rank for (_, step, _), rank in found.items()}, rel=1e-5)
    assert results["untrained"]["health/rankme"] == evaluated[0] != evaluated[22]


def test_the_command(tmp_path, capsys):
    run = finished(*KEPT)
    before = sorted(run.rglob("*"))
    widths = ["1e-4", "0.1", "1e4"]
    assert main(["plane", str(run), "--sigma", *widths, "--images", "100", "--out", str(tmp_path / "new")]) == 0
    table = read(tmp_path / "new" / "plane.csv")
    assert (tmp_path / "new" / "plane.png").stat().st_size > 10_000 and sorted(run.rglob("*")) == before
    kept = {
        sigma: [float(row["value"]) for row in table if row["quantity"] == "I(X;Z)" and float(row["sigma"]) == sigma]
        for sigma in map(float, widths)
    }
    assert kept[1e-4] == pytest.approx([math.log(100)] * 3, abs=1e-3)
    assert kept[1e4] == pytest.approx([0] * 3, abs=1e-3)
    assert all(0 < value < math.log(100) for value in kept[0.1])
    labels = [row for row in table if row["quantity"] == "I(Z;Y)"]
    assert len(labels) == 9 and {row["kind"] for row in labels} == {"lower bound"}
    assert all(float(row["value"]) < float(row["ceiling"]) < math.log(10) + 1e-4 for row in labels)
    assert all(row["remark"] == ("below 0" if float(row["value"]) < 0 else "") for row in labels)
    shared = {int(row["step"]): float(row["value"]) for row in table if row["quantity"] == "I(v1;v2)"}
    logged = {row["step"]: row["held_out/mi_nats"] for row in rows(run) if "held_out/mi_nats" in row}
    assert shared == pytest.approx(logged, abs=1e-5)
    printed = capsys.readouterr().out
    assert "100 held-out images; log n = 4.605" in printed and "untrained" in printed


def test_several_runs_have_one_plane(tmp_path, capsys):
    runs = [str(finished(*KEPT)), str(shutil.copytree(finished(*KEPT), tmp_path / "second"))]
    assert main(["plane", *runs, "--sigma", "0.1", "--images", "60", "--out", str(tmp_path)]) == 0
    table = read(tmp_path / "plane.csv")
    values = [[row["value"] for row in table if row["run"] == name] for name in (finished(*KEPT).name, "second")]
    assert values[0] == values[1] and len(values[0]) == len(table) / 2 == 9
    assert main(["plane", *runs, "--images", "60"]) == 2
    assert "with --out" in capsys.readouterr().err


def test_classes_that_lie_apart_are_known():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat(40)
    centres = normalize(torch.randn(5, 20, generator=generator, dtype=torch.float64))
    unit = [normalize(centres[labels] + 0.05 * torch.randn(200, 20, generator=generator)) for _ in range(2)]
    close, far = at(None, unit[0], labels, unit[1], labels, (0.05, 50.0))
    assert close.label.nats > 0.95 * math.log(5) and close.kept > close.label.nats
    assert abs(far.label.nats) < 0.05


def test_names():
    assert names_of([finished(*KEPT)]) == [finished(*KEPT).name]
    sweep = [finished(*KEPT).parent / f"case_{case}" / f"seed_{seed}" for case in ("A", "B") for seed in (0, 1)]
    assert names_of(sweep[::2]) == ["A", "B"]
    assert names_of(sweep[:2]) == ["seed_0", "seed_1"] and names_of(sweep[:1]) == ["A"]
    assert names_of(sweep) == ["A/seed_0", "A/seed_1", "B/seed_0", "B/seed_1"]


def test_impossible_readings_are_marked():
    assert [remark(value, 2.3) for value in (-0.1, 1.0, 2.4)] == ["below 0", "", "above its ceiling"]


def refused(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_refusals(tmp_path, capsys):
    run = finished(*KEPT)
    assert "no config.yaml" in refused(capsys, "plane", tmp_path)
    shutil.copy(run / "config.yaml", tmp_path)
    assert f"not finished (no results.json): finish it with ssl-ib-train {tmp_path} --resume" in refused(
        capsys, "plane", tmp_path
    )
    plain = finished()
    assert f"ssl-ib-train {plain} checkpoint.keep=1 --out {plain}_kept" in refused(capsys, "plane", plain)
    for sigma in ("0", "-0.1", "nan", "inf"):
        assert "--sigma: expected" in refused(capsys, "plane", run, "--sigma", "0.1", sigma, "--out", tmp_path)
    assert "classes (10) at least, got 9" in refused(capsys, "plane", run, "--images", "9", "--out", tmp_path)
    assert "each run once" in refused(capsys, "plane", run, run, "--out", tmp_path)
    other = shutil.copytree(run, tmp_path / "other")
    config = (other / "config.yaml").read_text()
    assert "name: digits\n  size: " in config
    (other / "config.yaml").write_text(re.sub(r"(name: digits\n  size: )\d+", r"\g<1>12", config))
    assert "other held-out images" in refused(capsys, "plane", run, other, "--images", "20", "--out", tmp_path)


def test_features_that_are_no_numbers(tmp_path, capsys):
    run = shutil.copytree(finished(*KEPT), tmp_path / "run")
    file = run / "checkpoints" / "epoch_00001.pt"
    saved = torch.load(file, weights_only=True)
    weight = next(value for name, value in saved["parts"].items() if name.endswith("backbone.norm.weight"))
    weight.fill_(math.nan)
    file.unlink()
    torch.save(saved, file)
    said = refused(capsys, "plane", run, "--images", "50", "--sigma", "0.1")
    assert "epoch_00001" in said and "not finite numbers" in said
    weight.fill_(0)
    torch.save(saved, file)
    said = refused(capsys, "plane", run, "--images", "50", "--sigma", "0.1")
    assert "epoch_00001" in said and "point the same way" in said


def test_one_class():
    run = Encoders(finished(*KEPT), "cpu")
    run.run.evaluated.val().labels.fill_(3)
    with pytest.raises(UserError, match=r"all of the class 3: H\(Y\) = 0"):
        run.images(100, print)
    run.run.evaluated.train().labels.fill_(3)
    with pytest.raises(UserError, match=r"got one class: H\(Y\) = 0"):
        run.images(100, print)


def test_a_rare_class_is_not_lost_unsaid():
    run = Encoders(finished(*KEPT), "cpu")
    labels = run.run.evaluated.train().labels
    labels[(labels == 7).nonzero()[3:]] = 0
    with pytest.raises(UserError, match="--images: 40 training images leave out the class 7"):
        run.images(40, print)
    assert len(run.images(2000, print)[0]) == 1438


def test_first_weights_that_are_gone(tmp_path, capsys):
    run = shutil.copytree(finished(*KEPT), tmp_path / "run")
    config = (run / "config.yaml").read_text()
    assert "\ninit: null\n" in config
    (run / "config.yaml").write_text(config.replace("\ninit: null\n", "\ninit: nowhere\n"))
    assert main(["plane", str(run), "--images", "50", "--sigma", "0.1"]) == 0
    assert {row["epoch"] for row in read(run / "info" / "plane.csv")} == {"1", "2"}
    assert "the encoder as it started is left out: init: expected" in capsys.readouterr().out


def test_directions_not_lengths():
    distinct(torch.randn(5, 3))
    with pytest.raises(UserError, match="collapsed"):
        distinct(torch.arange(1.0, 6)[:, None] * torch.tensor([1.0, 2.0, 0.0]))


def test_where_files_go(tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert (
        folder_of(None, [run]) == run / "info" and folder_of(tmp_path / "a" / "b", [run, run]) == tmp_path / "a" / "b"
    )
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file"):
        folder_of(tmp_path / "file", [run])
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match="cannot be written to"):
        folder_of(tmp_path / "a" / "b", [run])
