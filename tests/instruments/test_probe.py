"""`ssl-ib-info probe`: the factors are what they are called, and what can be read of them is read."""

import csv
import math

import pytest
import torch
from harness import finished
from torchvision.transforms.functional import resize

from ssl_ib.cli.info import main
from ssl_ib.data.sources.moving_mnist import MovingMNIST
from ssl_ib.evals.protocol import Split
from ssl_ib.info.decoding import Decoded
from ssl_ib.instruments.factors import AUGMENTATION, at_levels, chosen, drawn, known
from ssl_ib.instruments.probe_readings import Probed
from ssl_ib.ops.pixels import colour
from ssl_ib.types import Sample

KEPT = "checkpoint.keep=1", "eval.linear.enabled=false"


def pictures(count: int = 5, height: int = 20, width: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def made(images: torch.Tensor, name: str, level: int, **extra: torch.Tensor) -> torch.Tensor:
    """What would be encoded of images at a level, without the resizing of a plain view."""
    sample = Sample(images, torch.arange(len(images)), torch.zeros(len(images), dtype=torch.int64), extra)
    return at_levels(sample, torch.full((len(images),), level), AUGMENTATION[name], lambda s: s.images)


@pytest.mark.parametrize("name", AUGMENTATION)
def test_levels_differ_and_one_of_them_is_the_image_itself(name):
    images = pictures()
    found = [made(images, name, level) for level in range(len(AUGMENTATION[name].names))]
    for i, one in enumerate(found):
        assert one.dtype == torch.uint8 and one.shape[:2] == images.shape[:2]
        assert all(one.shape != other.shape or not torch.equal(one, other) for other in found[:i])
    if name != "crop_position":
        assert any(torch.equal(one, images) for one in found)


def test_what_the_factors_are():
    images = pictures()
    assert torch.equal(made(images, "rotation", 1), images.rot90(1, (2, 3)))
    assert torch.equal(made(images, "flip", 1), images.flip(3))
    for name, level, rows, columns in (
        ("crop_position", 2, slice(0, 14), slice(6, 20)),
        ("crop_position", 0, slice(3, 17), slice(3, 17)),
        ("crop_size", 3, slice(6, 14), slice(6, 14)),
    ):
        window = resize(images[:, :, rows, columns], [20, 20], antialias=True)
        assert (made(images, name, level).int() - window.int()).abs().max() <= 1
    grey = made(images, "grey", 1)
    assert torch.equal(grey[:, 0], grey[:, 1])
    half = made(images, "hue", 2).float() / 255
    # Half a turn of the hue leaves the largest and the smallest of the channels.
    assert (half.amax(1) - images.float().amax(1) / 255).abs().max() < 0.01
    assert (half - colour.adjust_hue(images.float() / 255, torch.full((5,), 0.5))).abs().max() < 0.01
    assert made(images, "brightness", 0).float().mean() == pytest.approx(0.6 * images.float().mean().item(), rel=0.01)
    spreads = [made(images, "contrast", level).float().std().item() for level in (0, 1)]
    assert spreads[0] == pytest.approx(0.6 * spreads[1], rel=0.02)
    spreads = [made(images, "blur", level).float().std().item() for level in range(3)]
    assert spreads[0] > spreads[1] > spreads[2]


def test_images_of_several_sizes_and_films():
    small, canvas = pictures(1, 10, 16), torch.zeros(2, 3, 20, 20, dtype=torch.uint8)
    canvas[0], canvas[1, :, :10, :16] = pictures(1)[0], small[0]
    sizes = torch.tensor([[20, 20], [10, 16]])

    def plain(sample: Sample) -> torch.Tensor:
        assert "size" not in sample.extra
        return sample.images.float().mean(dim=(2, 3))

    sample = Sample(canvas, torch.arange(2), torch.zeros(2, dtype=torch.int64), {"size": sizes})
    found = at_levels(sample, torch.tensor([0, 1]), AUGMENTATION["brightness"], plain)
    assert torch.allclose(found[1], small.float().mean(dim=(2, 3))[0])
    film = pictures(6).view(2, 3, 3, 20, 20)
    assert torch.equal(made(film, "rotation", 3), film.rot90(3, (3, 4)))


def test_each_level_is_drawn_as_often():
    levels = drawn(101, 4, seed=0)
    assert sorted(levels.bincount().tolist()) == [25, 25, 25, 26] and not torch.equal(levels, drawn(101, 4, seed=1))


def test_what_a_source_knows():
    source = MovingMNIST(size=16, sequences=200)
    sets = source.train(), source.val()
    splits = [Split("", images, torch.arange(len(images))) for images in sets]
    found = known(*splits)
    assert list(found) == ["class", "digit", "background", "position.0", "position.1"]
    down = found["position.0"][0]
    # Quarters but for ties: places are whole pixels.
    assert len(down.bincount()) == 4 and down.bincount().min() > 30
    assert sets[0].factors["position"][down == 3, 0].min() >= sets[0].factors["position"][down == 2, 0].max()
    sets[0].factors["rotation"] = sets[1].factors["rotation"] = torch.zeros(200, dtype=torch.int64)
    assert "source.rotation" in known(*splits)
    assert chosen(None, found) == [*found, *AUGMENTATION]
    assert chosen(["blur", "digit", "blur"], found) == ["blur", "digit"]


def test_the_command(tmp_path, capsys):
    run, out = finished(*KEPT), tmp_path / "new"
    names = ["class", "brightness", "hue"]
    assert main(["probe", str(run), "--factors", *names, "--images", "200", "--out", str(out)]) == 0
    table = list(csv.DictReader((out / "probe.csv").read_text().splitlines()))
    assert [(row["state"], row["factor"]) for row in table] == [
        (state, name) for state in ("untrained", "last") for name in names
    ]
    assert (out / "probe.png").stat().st_size > 10_000
    for row in table:
        nats, ceiling, error = (float(row[key]) for key in ("nats", "ceiling", "error"))
        if row["factor"] == "hue":
            # The digits are grey: turning their hue changes nothing, and nothing can be read.
            assert abs(nats) < 0.05 and ceiling == pytest.approx(math.log(4), abs=1e-4)
        else:
            assert 0.3 < nats < ceiling and 0 < error < 0.2
            assert float(row["accuracy"]) > float(row["chance"]) + 0.2
    assert "gained or dropped" in capsys.readouterr().out


def test_what_cannot_be_read_is_left_out_or_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "ssl_ib.data.sources.base.InMemory.factors", {"lamp": torch.ones(1438, dtype=torch.int64)}, raising=False
    )
    monkeypatch.setattr("ssl_ib.instruments.probe_readings.chosen", lambda names, own: names or ["lamp", "class"])
    arguments = ["probe", str(finished(*KEPT)), "--images", "50", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert "lamp is left out: the held-out images all have one value of it" in capsys.readouterr().out
    assert main([*arguments, "--factors", "lamp"]) == 2
    assert "--factors: lamp cannot be read" in capsys.readouterr().err


def test_verdicts():
    def read(nats: float) -> Decoded:
        return Decoded(nats, 0.01, 1.0, 0.5, 0.5, 1.0)

    before, after = {"a": read(0.1), "b": read(0.1), "c": read(0.1)}, {"a": read(0.2), "b": read(0.11), "c": read(0.0)}
    found = Probed("run", before, after, {}, {}, 10, 10)
    assert [found.verdict(name) for name in "abc"] == ["gained", "as before", "dropped"]
    assert Probed("run", {}, after, {}, {}, 10, 10).verdict("a") == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--factors", "rotatoin"], "unknown factor 'rotatoin'; did you mean 'rotation'? choices: "),
        (["--images", "3"], "classes (10) at least, got 3"),
    ],
)
def test_refusals(arguments, message, tmp_path, capsys):
    assert main(["probe", str(finished(*KEPT)), *arguments, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not any(tmp_path.iterdir())


def test_a_run_that_is_not_finished(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((finished(*KEPT) / "config.yaml").read_text())
    assert main(["probe", str(tmp_path)]) == 2
    assert "is not finished" in capsys.readouterr().err
