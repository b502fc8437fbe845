"""Tasks of benchmark-mi (Czyz et al., NeurIPS 2023), rebuilt: their published information, and what estimators read.

tests/info/benchmark_mi.json holds the reference; tools/mi_reference.py writes it.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from scipy.special import gammaln
from scipy.stats import spearmanr

from ssl_ib.info.gaussian import gaussian, gaussian_of_samples
from ssl_ib.info.ksg import ksg
from ssl_ib.info.learning import learn

REFERENCE = json.loads((Path(__file__).parent / "benchmark_mi.json").read_text())
#: What a task's name begins with, and what it does to samples [n, d] of one side; `side` is 0 for x and 1 for y.
TRANSFORMS = {
    "half_cube": lambda x, side: x * x.abs().sqrt(),
    "asinh": lambda x, side: x.asinh(),
    "spiral": lambda x, side: spiral(x, side),
}


def spiral(x: torch.Tensor, side: int) -> torch.Tensor:
    """Turns two neighbouring coordinates, (1, 2) of x and (2, 3) of y, by the angle |x|^2 / d."""
    angle = x.square().sum(dim=1) / x.shape[1]
    out = x.clone()
    a, b = x[:, side], x[:, side + 1]
    out[:, side] = angle.cos() * a - angle.sin() * b
    out[:, side + 1] = angle.sin() * a + angle.cos() * b
    return out


def covariance(name: str, d: int) -> torch.Tensor:
    """Of (x, y), [2 d, 2 d]: all correlations 0.5, or 0.8 between two pairs of coordinates, or 0.75, or none."""
    if "dense" in name:
        return 0.5 * torch.eye(2 * d, dtype=torch.float64) + 0.5
    out = torch.eye(2 * d, dtype=torch.float64)
    pairs, correlation = (2, 0.8) if "sparse" in name else (1, 0.75) if "normal" in name else (0, 0.0)
    for i in range(pairs):
        out[i, d + i] = out[d + i, i] = correlation
    return out


def student_entropy(d: int, freedom: float) -> float:
    """Differential entropy of a d-dimensional Student distribution with unit dispersion, in nats."""
    half = (freedom + d) / 2
    digamma = torch.digamma(torch.tensor([half, freedom / 2], dtype=torch.float64))
    return (
        gammaln(freedom / 2)
        - gammaln(half)
        + d / 2 * math.log(freedom * math.pi)
        + half * (digamma[0] - digamma[1]).item()
    )


def truth(name: str, d: int) -> float:
    if "student" in name:
        freedom = float(name.rsplit("-", 1)[1])
        return 2 * student_entropy(d, freedom) - student_entropy(2 * d, freedom)
    return gaussian(covariance(name, d), d)


def draw(name: str, d: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(n, 2 * d, generator=generator, dtype=torch.float64)
    both = both @ torch.linalg.cholesky(covariance(name, d)).T
    if "student" in name:
        freedom = int(name.rsplit("-", 1)[1])
        chi2 = torch.randn(n, freedom, generator=generator, dtype=torch.float64).square().sum(dim=1, keepdim=True)
        both = both / (chi2 / freedom).sqrt()
    transform = TRANSFORMS.get(name.partition("-")[0], lambda x, side: x)
    return transform(both[:, :d], 0), transform(both[:, d:], 1)


@pytest.mark.parametrize("name", REFERENCE["tasks"])
def test_rebuilt_tasks_are_the_published_ones(name):
    task = REFERENCE["tasks"][name]
    d = task["dim_x"]
    assert truth(name, d) == pytest.approx(task["nats"], abs=2e-6)
    x, y = draw(name, d, REFERENCE["samples"])
    medians = [side[:, place].abs().median().item() for side in (x, y) for place in (0, -1)]
    assert medians == pytest.approx(task["medians"], rel=0.04)
    ranks = [spearmanr(f(x[:, 0]), f(y[:, 0])).statistic for f in (torch.clone, torch.abs)]
    assert ranks == pytest.approx(task["spearman"], abs=0.03)


@pytest.mark.parametrize("name", REFERENCE["tasks"])
def test_what_needs_no_training_reads_of_them(name):
    """Gaussians are read by their correlations; turned or uncorrelated ones are not, where KSG still sees something."""
    task = REFERENCE["tasks"][name]
    nats, (x, y) = task["nats"], draw(name, task["dim_x"], 1000)
    assert 0.3 * nats < ksg(x, y).nats < nats + 0.05
    reading = gaussian_of_samples(x, y)
    if name.startswith(("1v1", "multinormal")):
        assert reading.nats == pytest.approx(nats, abs=3 * reading.spread)
    elif name.startswith(("spiral", "asinh")):
        assert reading.nats < 0.3 * nats


@pytest.mark.parametrize("name", ["spiral-multinormal-sparse-3-3-2-2.0", "student-identity-3-3-2"])
def test_a_critic_sees_what_correlation_does_not(name):
    """A lower bound: below the truth but for its error, and most of it."""
    task = REFERENCE["tasks"][name]
    reading = learn("i_nce", *draw(name, task["dim_x"], 1000))
    assert 0.5 * task["nats"] < reading.nats < task["nats"] + 2 * reading.spread
