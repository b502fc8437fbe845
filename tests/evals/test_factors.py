"""What a linear layer reads off the representation beside the label, and scoring another source."""

import numpy as np
import pytest
import torch
from harness import rows, trainer

from ssl_ib import ConfigError
from ssl_ib.config.config import resolve
from ssl_ib.data.sources.digits import Digits
from ssl_ib.evals.linear import linear_distance
from ssl_ib.record.artifacts import summary


def test_linear_distance_is_that_of_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 5, generator=generator) * 3 + 1 for n in (60, 20))
    values, wanted = (x @ torch.ones(5, 2) + torch.randn(len(x), 2, generator=generator) for x in (train, test))
    ones = [np.concatenate([x.double().numpy(), np.ones((len(x), 1))], axis=1) for x in (train, test)]
    weight = np.linalg.lstsq(ones[0], values.double().numpy(), rcond=None)[0]
    expected = np.linalg.norm(ones[1] @ weight - wanted.double().numpy(), axis=1).mean()
    found = linear_distance(train, values, test, wanted, weight_decay=0.0)
    assert found == pytest.approx(expected, rel=1e-4)  # The standardisation adds 1e-6 to the variances.
    assert linear_distance(train, values, test, wanted, weight_decay=100.0) > found
    assert np.isnan(linear_distance(train.fill_(torch.inf), values, test, wanted))


@pytest.fixture
def with_factors(monkeypatch):
    """The source digits with two factors: whether a digit is odd, and the sum of its ink with a constant beside it."""
    sets = Digits._sets.func

    def named(self):
        both = sets(self)
        for images in both:
            ink = images.images[:, 0].float().mean(dim=(1, 2)) / 10
            images.factors = {"odd": images.labels % 2, "ink": torch.stack([ink, torch.ones_like(ink)], dim=1)}
        return both

    prop = type(Digits.__dict__["_sets"])(named)
    prop.__set_name__(Digits, "_sets")
    monkeypatch.setattr(Digits, "_sets", prop)


def test_probes_of_factors_stand_beside_their_constant_predictor(with_factors, tmp_path):
    instance = trainer("epochs=1", "masker=none", out=tmp_path)
    results = instance.fit()
    train, val = instance.run.source.train(), instance.run.source.val()
    assert {"probe/odd", "probe/ink"} <= results["untrained"].keys() & results["trained"].keys()
    assert results["chance"]["probe/odd"] == max(val.labels.bincount()[k::2].sum() for k in (0, 1)).item() / len(val)
    away = (val.factors["ink"] - train.factors["ink"].mean(dim=0)).norm(dim=1).mean().item()
    assert results["chance"]["probe/ink"] == pytest.approx(away)
    assert results["trained"]["probe/odd"] > 0.7 and results["trained"]["probe/ink"] < 0.5 * away
    assert results["trained"]["probe/ink"] < results["untrained"]["probe/ink"] + 0.1
    assert any("probe/ink" in row for row in rows(tmp_path))
    odd, ink = (line for line in summary(tmp_path, {**results, "seconds": 1.0}) if line.startswith("probe/"))
    assert (
        odd.startswith(f"probe/odd: constant {results['chance']['probe/odd']:.4f}, untrained 0.") and "trained" in ink
    )


def test_another_source_is_scored_with_the_runs_own_statistics():
    instance = trainer("eval.source=digits", "eval.source.limit=50", "eval.source.size=32")
    scored = instance.run.evaluated
    assert (scored.size, scored.limit, instance.run.source.size) == (32, 50, 16)
    plain, labels = instance.online._splits(), instance.online._chosen("train")
    assert len(next(plain)[1]) == len(labels) == 50
    assert instance.run.views.statistics[0] == pytest.approx(instance.run.source.statistics()[0])
    metrics = instance.online.evaluate(instance.progress())
    assert {"knn/top1", "health/rankme", "held_out/loss"} <= metrics.keys()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.source.sise=3", "eval.source: unknown argument 'sise'|eval.source.sise"),
        ("eval.source=digitz", "eval.source: unknown.*'digitz'; the nearest: digits|digitz"),
    ],
)
def test_a_wrong_source_of_the_evaluation_is_said_with_its_place(override, message):
    overrides = [override] if "digitz" in override else ["eval.source=digits", override]
    with pytest.raises(ConfigError, match=message) as caught:
        resolve("simclr_digits", overrides)
    assert "eval.source" in str(caught.value)


def test_the_configuration_repeats_the_evaluations_source():
    config = resolve("simclr_digits", ["eval.source={name: digits, limit: 50}"])
    assert config.eval.source == {"name": "digits", "size": 16, "limit": 50}
    assert resolve("simclr_digits").eval.source is None
