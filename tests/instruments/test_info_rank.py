"""`ssl-ib-info rank`: rho of hand-made sweeps, by method and over methods, and what is not scored or refused."""

import csv

import pytest
from PIL import Image
from written_sweep import curve, write

from ssl_ib.cli.info import main
from ssl_ib.errors import UserError
from ssl_ib.instruments.rank import ALL, examine
from ssl_ib.sweep.choice import choose
from ssl_ib.sweep.finished import read

BYOL = {"model": {"name": "siamese", "momentum": 0.99}, "criterion": {"name": "byol"}}


def rank(*arguments) -> int:
    return main(["rank", *map(str, arguments)])


def two_methods(out):
    """Ten runs: rankme ranks within both methods; the loss ranks within one, backwards within the other."""
    runs = []
    for i in range(5):
        numbers = {"health/rankme": 10.0 + i, "health/alignment": -float(i), "held_out/mi_ceiling": 4.85}
        runs.append(((f"n{i}",), 0, numbers | {"held_out/loss": 5.0 - i, "knn/top1": 0.2 + i / 100}, {}))
        runs.append(((f"b{i}",), 0, numbers | {"held_out/loss": 0.1 * i, "knn/top1": 0.3 + i / 100}, BYOL))
    return write(out, ["case"], runs)


def by_name(found, group, method):
    return {score.name: score.rho.value for score in found.of(group, method) if score.rho}


def test_by_method_and_over_methods(tmp_path, capsys):
    sweep = two_methods(tmp_path / "sweep")
    found = examine([sweep])
    ones = {"health/rankme": pytest.approx(1), "health/alignment": pytest.approx(1)}
    assert by_name(found, str(sweep), "siamese + info_nce") == ones | {"held_out/loss": pytest.approx(1)}
    assert by_name(found, str(sweep), "siamese + byol") == ones | {"held_out/loss": pytest.approx(-1)}
    # Over methods each rankme comes twice, once with either's accuracy.
    over = by_name(found, str(sweep), ALL)
    assert 0 < over["health/rankme"] < 1 and over["held_out/loss"] > -1 and "held_out/mi_ceiling" not in over
    assert rank(sweep, "--out", tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert "10 runs, 10 points, 2 methods" in output and "+1.00 [+1.00, +1.00]*" in output
    rows = list(csv.DictReader((tmp_path / "out" / "rank.csv").open()))
    chosen = next(row for row in rows if row["method"] == "siamese + byol" and row["number"] == "held_out/loss")
    assert (chosen["better"], chosen["n"], chosen["points"]) == ("lower", "5", "5") and float(chosen["rho"]) < -0.99
    with Image.open(tmp_path / "out" / "rank.png") as image:
        assert image.convert("L").getextrema() != (255, 255)


def test_a_table_alone_and_its_copy(tmp_path):
    """A results.csv is a group of its own; runs that are there twice count once, with their configuration."""
    sweep = two_methods(tmp_path / "sweep")
    table = tmp_path / "copy.csv"
    table.write_text((sweep / "results.csv").read_text())
    both = examine([table, sweep])
    assert list(both.groups) == [str(sweep)] and both.remarks == ["runs that are there twice, and count once: 10"]
    alone = examine([table])
    assert [run.method for run in alone.groups[str(table)]][:2] == ["n0", "b0"]
    assert {score.reason for score in alone.of(str(table), "n0")} == {"too few runs: 1, and 4 are needed"}
    other = tmp_path / "infomin_crop.csv"
    lines = "".join(f"{i},0,done,{0.1 * i},{9 - i},7\n" for i in range(4)) + "9,0,failed,,,\n"
    other.write_text("views.scale,seed,status,knn/top1,health/rankme,health/std\n" + lines)
    found = examine([table, other])
    # Ten runs at the rho of the first file, four at -1.
    first = by_name(found, str(table), ALL)["health/rankme"]
    assert by_name(found, ALL, ALL)["health/rankme"] == pytest.approx((10 * first - 4) / 14)
    reasons = {score.name: score.reason for score in found.of(str(other), ALL)}
    assert reasons == {"health/rankme": "", "health/std": "no spread: it is the same for all runs"}


def test_sweeps_of_the_same_images_are_compared(tmp_path):
    points = [(str(i), 1.0 + i / 10, 0.2 + i / 100) for i in range(4)]
    same = [
        curve(tmp_path / "a", points, seeds=(0,)),
        curve(tmp_path / "b", points, axis="views.b", seeds=(1,), spread=0),
    ]
    other = curve(tmp_path / "c", points, seeds=(2,), source={"name": "archive"})
    groups = examine([*same, other]).groups
    assert {place: len(runs) for place, runs in groups.items()} == {str(same[0]): 8, str(other): 4}


def test_runs_that_used_labels_are_left_out(tmp_path):
    points = [((str(i),), 0, {"health/rankme": float(i), "knn/top1": i / 10}, {}) for i in range(4)]
    taught = {"health/rankme": 9.0, "knn/top1": 0.1, "held_out/digit_accuracy": 0.9, "held_out/loss": 1.0}
    found = examine([write(tmp_path / "sweep", ["case"], [*points, (("taught",), 0, taught, {})])])
    assert found.remarks == ["runs whose criterion uses labels, which are left out: 1 of 5"]
    assert by_name(found, str(tmp_path / "sweep"), ALL) == {"health/rankme": pytest.approx(1)}


def test_what_is_refused(tmp_path, capsys):
    def table(name, text):
        path = tmp_path / name
        path.write_text(text)
        return path

    few = "a,seed,status,knn/top1,health/rankme\n" + "".join(f"{i},0,done,0.{i},{i}\n" for i in range(3))
    cases = {
        table("blind.csv", "a,seed,status,health/rankme\n1,0,done,3\n2,0,done,4\n"): "has knn/top1: there is nothing",
        table("columns.csv", "epoch,loss\n1,2\n"): "it has no seed and no status; it has epoch, loss",
        table("empty.csv", ""): "it has none",
        table("few.csv", few): "at least 4 finished runs to rank, got 3",
        table("text.csv", "a,seed,status,knn/top1\n1,0,done,good\n"): "a number in the column knn/top1, got 'good'",
        table("none.csv", "a,seed,status,knn/top1\n1,0,failed,\n"): "none of its 1 runs is done",
        table(
            "flat.csv", "a,seed,status,knn/top1,health/rankme\n" + "".join(f"{i},0,done,0.1,{i}\n" for i in range(4))
        ): "no number could be scored: health/rankme: no spread in the accuracy",
        tmp_path: "is no sweep",
    }
    for path, said in cases.items():
        assert rank(path) == 2, said
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_a_choice_says_why_it_is_not_to_be_trusted(tmp_path):
    runs = read(two_methods(tmp_path / "methods"))
    found = choose(runs, "held_out/loss")
    assert found.run.title == "case b0 seed 0" and "of 2 methods" in found.doubts[-1]
    assert choose(runs, "health/rankme").run.title == "case n4 seed 0"
    blind = read(write(tmp_path / "blind", ["a"], [((a,), 0, {"health/rankme": float(a)}, {}) for a in "123"]))
    found = choose(blind, "health/rankme")
    assert found.run.title == "a 3 seed 0" and "never measured" in str(found)
    assert "too few runs: 1" in str(choose(runs[:1], "health/rankme"))
    good = [((str(i),), 0, {"health/rankme": float(i), "knn/top1": i / 20}, {}) for i in range(9)]
    found = choose(read(write(tmp_path / "good", ["a"], good)), "health/rankme")
    assert found.doubts == [] and "do not trust" not in str(found)
    taught = [((a,), 0, {"held_out/loss": 1.0, "held_out/digit_accuracy": 0.5}, {}) for a in "12"]
    with pytest.raises(UserError, match="needs labels"):
        choose(read(write(tmp_path / "taught", ["a"], taught)), "held_out/loss")
