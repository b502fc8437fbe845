"""Every estimator on pairs whose mutual information is known, KSG and the Gaussian against references, refusals."""

import math

import numpy as np
import pytest
import torch
from sklearn.feature_selection import mutual_info_regression

from ssl_ib.errors import UserError
from ssl_ib.info.estimators import ESTIMATORS
from ssl_ib.info.gaussian import gaussian, gaussian_bias, gaussian_of_samples
from ssl_ib.info.known import KNOWN, gaussian_pairs
from ssl_ib.info.ksg import ksg
from ssl_ib.info.learning import LEARNERS, NOTHING_LEARNT, Training, learn
from ssl_ib.info.reading import jackknife, remarks

#: What CLUB reads with the true q(y|x), rho^2 / (1 - rho^2) a dimension, in two dimensions that share 1 nat.
CLUBS_VALUE = 2 * (math.e - 1)


@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_estimators_on_gaussians(name):
    """Three standard errors and 0.1 nats of bias: CLUB bounds from far above, and so its own value is what it reads."""
    x, y = gaussian_pairs(500, 2, 1.0, seed=0)
    reading = ESTIMATORS[name](x, y, seed=0)
    bound = reading.kind == "upper bound"
    assert reading.name == name and 0 < reading.spread < (0.8 if bound else 0.2)
    assert reading.nats == pytest.approx(CLUBS_VALUE if bound else 1.0, abs=3 * reading.spread + 0.1)
    assert reading.n == (100 if name in LEARNERS else 500)
    assert (reading.trained is not None) == (name in LEARNERS)


@pytest.mark.parametrize("name", ["nwj", "club_sampled", "ksg"])
def test_a_reading_depends_on_the_seed_alone(name):
    x, y = gaussian_pairs(100, 2, 1.0, seed=0)
    given, readings = (x.clone(), y.clone()), []
    for state in (0, 1):
        torch.manual_seed(state)
        np.random.seed(state)
        before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
        readings.append(repr(ESTIMATORS[name](x, y, seed=5)))
        assert torch.equal(torch.random.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()
    assert readings[0] == readings[1]
    assert torch.equal(x, given[0]) and torch.equal(y, given[1])
    if name != "ksg":
        assert repr(ESTIMATORS[name](x, y, seed=6)) != readings[0]


@pytest.mark.parametrize("name", LEARNERS)
def test_independent_samples_share_nothing(name):
    x, y = gaussian_pairs(200, 8, 0.0, seed=1)
    assert abs(learn(name, x, y).nats) < 0.1


def test_both_numbers_are_shown_and_the_one_held_out_is_sane():
    """In 128 dimensions a critic learns its training part by heart; read there, it finds what is not."""
    x, y = gaussian_pairs(1000, 128, 4.0, seed=0)
    reading = learn("i_nce", x, y)
    assert reading.trained > 2 * reading.nats and 0 < reading.nats < 4
    assert f"{reading.trained:.2f} on its training part" in str(reading) and "lower bound" in str(reading)
    assert reading.ceiling == pytest.approx(math.log(200)) and "ceiling 5.30" in str(reading)


def test_a_joint_critic_reads_the_same_information():
    x, y = gaussian_pairs(300, 1, 1.0, seed=0)
    reading = learn("smile", x, y, critic="joint", training=Training(steps=100, learning_rate=3e-3))
    assert reading.nats == pytest.approx(1.0, abs=0.4)


def test_the_untrained_state_is_kept_where_nothing_holds():
    x, y = gaussian_pairs(60, 20, 0.0, seed=3)
    reading = learn("club", x, y)
    assert reading.nats == pytest.approx(0, abs=1e-6) and NOTHING_LEARNT in reading.remark


# --- the Gaussian closed form


def test_the_closed_form_is_that_of_correlations():
    covariance = torch.eye(5, dtype=torch.float64)
    covariance[0, 3] = covariance[3, 0] = 0.8
    covariance[1, 4] = covariance[4, 1] = -0.5
    expected = -0.5 * math.log(1 - 0.64) - 0.5 * math.log(1 - 0.25)
    assert gaussian(covariance, 3) == pytest.approx(expected)
    # Neither side's own coordinates matter.
    mixed = torch.block_diag(torch.randn(3, 3).double() + 3 * torch.eye(3), torch.tensor([[1.0, 2], [0, 3]]).double())
    assert gaussian(mixed @ covariance @ mixed.T, 3) == pytest.approx(expected)
    for broken in (torch.ones(2, 2), torch.ones(2, 3), torch.tensor([[1.0, 0.5], [0.1, 1.0]])):
        with pytest.raises(UserError, match="covariance"):
            gaussian(broken, 1)


@pytest.mark.parametrize("nats", [0.0, 2.0])
def test_the_bias_of_few_samples_is_exact(nats):
    """Forty samples of 2 x 8 dimensions read a nat too much; less the bias, their mean is the truth."""
    readings = [gaussian_of_samples(*gaussian_pairs(40, 8, nats, seed)) for seed in range(100)]
    values = torch.tensor([reading.nats for reading in readings])
    error = values.std().item() / 10
    assert readings[0].bias == gaussian_bias(40, 8, 8) > 1
    assert values.mean().item() == pytest.approx(nats, abs=3 * error)
    # The jackknife knows the spread of a single one.
    assert 0.5 < torch.tensor([reading.spread for reading in readings]).mean() / values.std() < 2


def test_the_bias_for_many_samples():
    assert gaussian_bias(100_000, 5, 7) == pytest.approx(35 / 200_000, rel=1e-3)


def test_dimensions_that_are_sums_of_others_change_nothing():
    x, y = gaussian_pairs(500, 3, 1.0, seed=0)
    more = torch.cat([x, x @ torch.randn(3, 2), torch.full((500, 1), 7.0)], dim=1)
    assert gaussian_of_samples(more, y).nats == pytest.approx(gaussian_of_samples(x, y).nats, abs=1e-6)


# --- KSG


@pytest.mark.parametrize("nats", [0.0, 0.7, 2.5])
def test_ksg_is_scikit_learns_in_one_dimension(nats):
    x, y = gaussian_pairs(400, 1, nats, seed=0)
    theirs = mutual_info_regression(x.double().numpy(), y[:, 0].double().numpy(), n_neighbors=3, random_state=0)[0]
    ours = ksg(x, y).nats
    assert max(ours, 0) == pytest.approx(theirs, abs=1e-4)
    assert ours == pytest.approx(nats, abs=0.15)


def test_ksg_warns_above_eight_dimensions():
    assert not ksg(*gaussian_pairs(200, 8, 1.0, seed=0)).remark
    reading = ksg(*gaussian_pairs(200, 9, 1.0, seed=0))
    assert "9 dimensions" in reading.remark and reading.nats < 0.6


def test_ksg_nears_its_ceiling_where_all_is_shared():
    x, _ = gaussian_pairs(300, 1, 0.0, seed=0)
    reading = ksg(x, x)
    assert reading.ceiling == pytest.approx(math.log(300) - 0.92, abs=0.01)
    assert reading.ceiling - 1 < reading.nats <= reading.ceiling + 1e-9


# --- readings and refusals


def test_readings_are_never_clipped_and_say_what_they_are():
    assert remarks(1.0, 4.0, 100) == ""
    assert "negative" in remarks(-0.1, 4.0, 100)
    assert "above its ceiling of 4.00" in remarks(4.5, 4.0, 100)
    assert "above log n = 4.61" in remarks(5.0, math.inf, 100)
    x, y = gaussian_pairs(300, 8, 0.0, seed=2)
    reading = gaussian_of_samples(x, y)
    assert reading.nats < 0 and "negative" in str(reading) and f"{reading.nats:.2f}" in str(reading)


def test_jackknife_of_a_mean_is_its_standard_error():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    found = jackknife(lambda kept: values[kept].mean().item(), 1000)
    assert found == pytest.approx(1 / math.sqrt(1000), rel=0.6)


@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_refusals(name):
    x, y = gaussian_pairs(100, 3, 1.0, seed=0)
    estimate = ESTIMATORS[name]
    with pytest.raises(UserError, match="expected at least .* pairs, got 1"):
        estimate(x[:1], y[:1])
    with pytest.raises(UserError, match=r"got \[100, 3\] and \[99, 3\]"):
        estimate(x, y[1:])
    with pytest.raises(UserError, match="y is constant"):
        estimate(x, torch.ones(100, 2))
    with pytest.raises(UserError, match="x holds values that are not finite"):
        estimate(x / 0, y)


def test_the_gaussian_needs_more_samples_than_dimensions():
    with pytest.raises(UserError, match=r"more pairs than the 60 \+ 60 dimensions of x and y, got 100"):
        gaussian_of_samples(*gaussian_pairs(100, 60, 1.0, seed=0))


# --- known pairs


def test_known_pairs_share_what_they_say():
    for name, draw in KNOWN.items():
        x, y = draw(4000, 3, 2.0, 0)
        assert x.shape == y.shape == (4000, 3) and x.dtype == torch.float32
        if name == "cubic":
            x, y = (side.sign() * side.abs() ** (1 / 3) for side in (x, y))
        assert gaussian_of_samples(x, y).nats == pytest.approx(2.0, abs=0.1)
    sparse = torch.corrcoef(torch.cat(KNOWN["sparse"](4000, 4, 2.0, 0), dim=1).T)[:4, 4:].diagonal()
    assert sparse[:2].min() > 0.9 and sparse[2:].abs().max() < 0.1
    with pytest.raises(UserError, match="cannot be shared by 2 pairs of coordinates"):
        gaussian_pairs(10, 2, 25.0, seed=0)
