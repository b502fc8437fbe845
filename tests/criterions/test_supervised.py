"""The supervised criterion against its formulas, and a whole run of it with the probes of its factors."""

import json

import pytest
import torch
import torch.nn.functional as F

from ssl_ib import Batch, RunInfo, UserError
from ssl_ib.cli.train import main
from ssl_ib.criterions.supervised import Supervised

GENERATOR = torch.Generator().manual_seed(0)
FACTORS = {
    "colour": torch.tensor([0, 2, 1, 2, 0, 1]),
    "place": 5 + 3 * torch.randn(6, 2, generator=GENERATOR),
}


def criterion(**more) -> Supervised:
    torch.manual_seed(0)
    return Supervised(RunInfo(((3, 8, 8),), 6, factors=lambda: FACTORS, width=lambda name: 4), **more)


def loss(part: Supervised, features: torch.Tensor):
    index = torch.arange(len(features))
    return part({"features": [features, None]}, Batch([], [], index, index, FACTORS))


@pytest.mark.parametrize("error", ["square", "absolute"])
def test_is_the_sum_of_the_factors_errors(error):
    part, features = criterion(error=error), torch.randn(6, 4, generator=GENERATOR)
    found = loss(part, features)
    colour = F.cross_entropy(part.heads["colour"](features), FACTORS["colour"])
    standard = (FACTORS["place"] - FACTORS["place"].mean(0)) / FACTORS["place"].std(0, unbiased=False)
    difference = part.heads["place"](features) - standard
    place = difference.square().mean() if error == "square" else difference.abs().mean()
    assert torch.allclose(found.terms["colour"], colour) and torch.allclose(found.terms["place"], place)
    assert torch.allclose(found.total, colour + place) and found.weights == {"colour": 1.0, "place": 1.0}
    right = part.heads["colour"](features).argmax(1) == FACTORS["colour"]
    assert float(found.terms["colour_accuracy"]) == pytest.approx(float(right.float().mean()))


def test_reads_the_first_view_alone_and_the_chosen_factors():
    part = criterion(factors=("place",))
    assert part.reads == {"features": (0,)} and set(part.heads) == {"place"}
    assert set(loss(part, torch.zeros(6, 4)).terms) == {"place"}
    with pytest.raises(UserError, match="factors=colur: unknown factor; did you mean 'colour'"):
        criterion(factors=("colur",))
    with pytest.raises(UserError, match="needs a source that has factors"):
        Supervised(RunInfo(((3, 8, 8),), 6))


def test_a_run_reports_what_its_features_hold(tmp_path, capsys):
    arguments = ["moving_mnist_supervised", "--out", str(tmp_path / "run"), "device=cpu", "logger=[]"]
    arguments += ["source.size=16", "source.sequences=160", "epochs=1", "batch_size=32"]
    assert main(arguments) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for name in ("chance", "untrained", "trained"):
        assert {"probe/digit", "probe/background", "probe/position"} <= results[name].keys()
    assert 0 < results["chance"]["probe/digit"] < 0.5 and 1 < results["chance"]["probe/position"] < 5
    # A factor of classes that every image shows: two photographs, told apart by anything.
    assert results["trained"]["probe/background"] > results["chance"]["probe/background"]
    assert "held_out/position" in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "probe/position" in capsys.readouterr().out
