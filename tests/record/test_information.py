"""What a run says of information: every number with what it is worth, and nothing hidden."""

import math

from PIL import Image

from ssl_ib import Nats
from ssl_ib.record import information

NATS = {
    "mi_nats": Nats("lower bound", "what the two views share", "mi_ceiling"),
    "club_nats": Nats("estimate", "what a latent holds of its patches"),
    "kl": Nats("upper bound", "what a view tells of its prototype", 3.0),
}
ROW = {
    "step": 10,
    "epoch": 1.0,
    "information/labels": 1.2,
    "information/labels_error": 0.05,
    "information/labels_ceiling": math.log(10),
    "held_out/mi_nats": 3.21,
    "held_out/mi_ceiling": 5.54,
    "held_out/club_nats": -0.5,
    "held_out/kl": 3.5,
}


def test_the_lines():
    probe = {"information/labels_linear": 1.5, "information/labels_linear_error": 0.04}
    assert information.summary(ROW | probe, NATS) == [
        "kept of the classes: at least 1.50 ± 0.04 by the linear probe, 1.20 ± 0.05 by kNN, of 2.30 nats; so dropped "
        "at most 0.80",
        "what the two views share: at least 3.21 of 5.54 nats (mi_nats, held out, a lower bound)",
        "what a latent holds of its patches: about -0.50 nats, which is below 0 and says nothing (club_nats, held out, "
        "an estimate)",
        "what a view tells of its prototype: at most 3.50 of 3.00 nats, which is above its ceiling (kl, held out, an "
        "upper bound)",
    ]


def test_a_bound_below_0_says_nothing_of_what_is_dropped():
    (line,) = information.summary(ROW | {"information/labels": -0.1}, {})
    assert line == (
        "kept of the classes: at least -0.10 ± 0.05 by kNN, of 2.30 nats, which is below 0 and says nothing"
    )
    assert information.summary({"health/rankme": 3.0}, NATS) == []


def test_the_figure(tmp_path):
    rows = [ROW, ROW | {"step": 20, "epoch": 2.0, "information/labels": 1.6}, {"step": 15, "epoch": 1.5, "loss": 1.0}]
    sizes = {}
    for name, nats in (("all", NATS), ("classes", {})):
        information.draw(rows, nats, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            sizes[name] = image.size
    # Five panels in two lines of three, and two in one line.
    assert sizes["all"][1] == 2 * sizes["classes"][1] and sizes["all"][0] > sizes["classes"][0]
    information.draw([{"step": 1, "epoch": 0.1, "loss": 1.0}], NATS, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
