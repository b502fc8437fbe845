"""Spearman's rho of label-free numbers: known values, ties, groups, and what the bootstrap's interval stands for."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from ssl_ib.info.ranking import Group, _weighted_rho, spearman, why_not


def group(x, y, seeds=1):
    return Group(x, y, [i // seeds for i in range(len(x))])


def test_known_values():
    # One swap of neighbours among 5: 1 - 6 * 2 / (5 * 24) = 0.9.
    rho = spearman(group([1, 2, 3, 4, 5], [1, 2, 3, 5, 4]))
    assert rho.value == pytest.approx(0.9) and (rho.n, rho.points) == (5, 5)
    assert spearman(group([1, 2, 3, 4], [9, 7, 5, 1])).value == pytest.approx(-1)
    # In nine of ten orders kNN and the number agree; an interval of 12 points is believed, one of 5 is not.
    x = list(range(12))
    y = [*range(10), 11, 10]
    assert spearman(group(x, y)).doubts == [] and "only 5 points" in rho.doubts[0]


def test_a_resample_is_ranked_as_its_own_sample():
    rng = np.random.default_rng(3)
    x, y = rng.integers(4, size=9).astype(float), rng.integers(5, size=9).astype(float)  # With ties.
    counts = rng.multinomial(9, np.full(9, 1 / 9), size=20)
    every = _weighted_rho(x, y, counts)
    assert np.isfinite(every).sum() > 15
    for found, count in zip(every, counts, strict=True):
        if np.ptp(x[count > 0]) == 0 or np.ptp(y[count > 0]) == 0:
            assert math.isnan(found)
            continue
        assert found == pytest.approx(spearmanr(x.repeat(count), y.repeat(count)).statistic)
    assert math.isnan(_weighted_rho(x, y, np.eye(9, dtype=int)[:1])[0])


def test_the_interval_is_deterministic_and_covers():
    """In 40 samples of 30 normal pairs with a correlation of 0.6, whose rho is 6/pi asin(0.3) = 0.582, an interval of
    95 % misses 2 times in the mean; 7 or more come once in 300."""
    truth = 6 / math.pi * math.asin(0.3)
    rng, missed = np.random.default_rng(0), 0
    for _ in range(40):
        a, b = rng.standard_normal((2, 30))
        rho = spearman(group(a, 0.6 * a + 0.8 * b), resamples=500)
        missed += not rho.low <= truth <= rho.high
    assert missed < 7
    again = [spearman(group(a, b), resamples=100, seed=seed) for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def test_seeds_of_a_point_are_no_further_points():
    rng = np.random.default_rng(1)
    x, noise = rng.standard_normal(8), rng.standard_normal(8)
    y = x + noise
    single, thrice = spearman(group(x, y)), spearman(group(x.repeat(3), y.repeat(3), seeds=3))
    assert (thrice.n, thrice.points) == (24, 8) and thrice.value == pytest.approx(single.value)
    assert (thrice.low, thrice.high) == pytest.approx((single.low, single.high))
    # Three points are too few to be drawn again.
    few = spearman(group([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5], seeds=2))
    assert math.isnan(few.low) and "no interval" in few.doubts[0] and str(few) == "+0.94 (no interval)"


def test_groups_are_never_compared():
    """Within each group the number ranks backwards; over both at once it would look right."""
    first, second = (
        group([1, 2, 3, 4], [0.14, 0.13, 0.12, 0.11]),
        group([5, 6, 7, 8, 9, 10], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]),
    )
    rho = spearman(first, second)
    assert rho.value == rho.low == rho.high == pytest.approx(-1) and (rho.n, rho.points) == (10, 10)
    assert "wrong way round" in rho.doubts[0]
    mixed = spearman(group([1, 2, 3, 4], [1, 2, 3, 4]), second)
    assert mixed.value == pytest.approx((4 * 1 - 6 * 1) / 10)


@pytest.mark.parametrize(
    "x, y, said",
    [
        ([1, 2, 3], [1, 2, 3], "too few runs: 3"),
        ([5] * 4, [1, 2, 3, 4], "no spread"),
        ([1, 2, 3, 4], [5] * 4, "accuracy"),
    ],
)
def test_what_has_no_rho(x, y, said):
    assert said in why_not(group(x, y))
    with pytest.raises(ValueError, match=said):
        spearman(group(x, y))
