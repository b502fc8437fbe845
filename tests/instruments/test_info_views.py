"""`ssl-ib-info views`: the peak and its interval, what is refused, and the files."""

import csv
import math

import pytest
from PIL import Image
from written_sweep import CONFIG, curve, write

from ssl_ib.cli.info import main
from ssl_ib.instruments.views import examine

#: A peak at 0.4 that is far above both ends; the axis' order is by size, not as text.
HILL = [("0.05", 0.5, 0.20), ("10", 3.0, 0.21), ("0.2", 1.0, 0.26), ("0.4", 2.0, 0.30)]
#: More shared information is better all along.
SLOPE = [("1", 0.5, 0.20), ("2", 1.0, 0.25), ("3", 2.0, 0.30)]


def views(*arguments) -> int:
    return main(["views", *map(str, arguments)])


def test_a_peak_between_the_ends(tmp_path, capsys):
    sweep = curve(tmp_path / "sweep", HILL)
    assert views(sweep) == 0
    output = capsys.readouterr().out
    assert "interior peak at 0.4: 0.3000 at 2.000 nats" in output and "100 % of the resamples" in output
    assert "H(Y) is at least 2.303 nats" in output and "log(candidates) = 4.852 nats" in output
    rows = list(csv.DictReader((sweep / "views.csv").open()))
    assert [row["views.scale"] for row in rows] == [label for label in ("0.05", "0.2", "0.4", "10") for _ in range(3)]
    assert float(rows[0]["held_out/mi_nats"]) == pytest.approx(0.499)
    with Image.open(sweep / "views.png") as image:
        assert image.convert("L").getextrema() != (255, 255)
    (peak,) = csv.DictReader((sweep / "views_peaks.csv").open())
    assert peak["at"] == "0.4" and float(peak["gap"]) == pytest.approx(0.09)
    # Means over three resampled seeds stay within their range.
    assert 0.088 <= float(peak["low"]) < 0.09 < float(peak["high"]) <= 0.092
    before = (sweep / "views_peaks.csv").read_text()
    assert views(sweep) == 0 and (sweep / "views_peaks.csv").read_text() == before


def test_no_peak_between_the_ends(tmp_path, capsys):
    (found,) = examine([curve(tmp_path / "slope", SLOPE)]).peaks
    assert not found.interior and found.share == 0 and found.gap == pytest.approx(-0.05)
    assert str(found).startswith("knn/top1: no interior peak: the highest is 0.3000 at 3, an end")
    # 0.001 above an end, where seeds move each mean by more.
    flat = [("1", 0.5, 0.20), ("2", 1.0, 0.301), ("3", 2.0, 0.300)]
    (found,) = examine([curve(tmp_path / "flat", flat, spread=0.02)]).peaks
    assert found.interior and found.low < 0 < found.high and 0 < found.share < 1
    assert "no interior peak that these seeds can tell" in str(found)
    (found,) = examine([curve(tmp_path / "two", SLOPE[:2])]).peaks
    assert "fewer than 3 points" in str(found)


def test_one_seed_has_no_interval(tmp_path, capsys):
    assert views(curve(tmp_path / "sweep", HILL, seeds=(0,)), "--out", tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert "cannot be said (no interval: a point has one seed)" in output and "one seed at 0.05; 0.2; 0.4; 10" in output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"views.csv", "views_peaks.csv", "views.png"}


def test_sweeps_of_one_axis_are_joined_and_later_seeds_are_found(tmp_path):
    first, second = curve(tmp_path / "a", HILL, seeds=(0,)), curve(tmp_path / "b", HILL, seeds=(1,))
    assert [len(runs) for _, runs in examine([first, second]).points] == [2] * 4
    # The table is that of the latest call, with its seeds alone.
    other = curve(tmp_path / "c", HILL)
    lines = (other / "results.csv").read_text().splitlines(keepends=True)
    (other / "results.csv").write_text("".join(line for line in lines if ",0,done" not in line))
    assert [len(runs) for _, runs in examine([other]).points] == [3] * 4


def test_readings_beyond_their_limits_are_shown(tmp_path):
    found = examine([curve(tmp_path / "sweep", [("1", -0.5, 0.2), ("2", 1.0, 0.3), ("3", 5.0, 0.2)], seeds=(0,))])
    assert "views.scale 1 seed 0: I_NCE is -0.5, below 0" in found.remarks[0]
    assert "5.0000, above its ceiling 4.8520" in found.remarks[1]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"criterion": {"name": "info_nce", "temperature": 0.5}}, "criterion.temperature: 0.2"),
        ({"model": {"name": "siamese", "head_dim": 16}}, "model.head_dim: 8"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, capsys, changes, said):
    first, second = curve(tmp_path / "a", HILL), curve(tmp_path / "b", HILL, **changes)
    assert views(first, second) == 2
    error = capsys.readouterr().err
    assert "cannot be compared" in error and said in error and "b: views.scale 0.05 seed 0 and 11 more" in error
    assert not (first / "views.csv").exists()


def test_another_number_of_candidates(tmp_path, capsys):
    def numbers(candidates):
        return {"held_out/mi_nats": 1.0, "held_out/mi_ceiling": math.log(candidates), "knn/top1": 0.2}

    runs = [((str(n),), 0, numbers(n), {}) for n in (64, 128)]
    assert views(write(tmp_path / "sweep", ["batch_size"], runs)) == 2
    assert "candidates (exp of held_out/mi_ceiling): 64" in capsys.readouterr().err


def test_what_is_refused(tmp_path, capsys):
    good = curve(tmp_path / "good", HILL)
    (tmp_path / "folder").mkdir()
    numbers = {"held_out/mi_nats": 1.0, "knn/top1": 0.3}
    cases = {
        (tmp_path / "nowhere",): "there is no such folder",
        (tmp_path / "folder",): "is no sweep: it has no sweep.yaml",
        (good / "results.csv",): "views needs the sweep's folder",
        (write(tmp_path / "waits", ["a"], [(("1",), 0, None, {})]),): "none of its 1 runs is done",
        (write(tmp_path / "one", ["a"], [(("1",), 0, numbers, {})]),): "expected one axis that varies, got none",
        (good, curve(tmp_path / "jitter", HILL, axis="views.strength")): "of one and the same axis",
        (write(tmp_path / "blind", ["a"], [((a,), 0, {"held_out/mi_nats": 1.0}, {}) for a in "12"]),): "no run has knn",
        (write(tmp_path / "mae", ["a"], [((a,), 0, {"knn/top1": 0.2}, {}) for a in "12"]),): "siamese + info_nce",
        (
            write(tmp_path / "grid", ["a", "b"], [((a, a), 0, numbers, {}) for a in "12"]),
        ): "expected one axis that varies, got a, b",
    }
    for paths, said in cases.items():
        assert views(*paths) == 2, said
        error = capsys.readouterr().err
        assert said in error and error.startswith("ssl-ib-info: ") and "Traceback" not in error
    (good / "views.scale_0.4" / "seed_0" / "results.json").write_text("{")
    assert views(good) == 2 and "results.json is damaged" in capsys.readouterr().err
    assert CONFIG["criterion"]["temperature"] == 0.2
