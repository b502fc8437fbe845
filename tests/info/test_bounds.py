"""The bounds' formulas against loops over pairs in float64, and each against what it must read of a known ratio."""

import math

import pytest
import torch

from ssl_ib.info.bounds import Mine, i_nce, jensen_shannon, mine, nwj, smile
from ssl_ib.info.known import gaussian_pairs

N = 7


def scores(n: int = N, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(name: str, s: torch.Tensor) -> float:
    """The formula of each docstring, a pair at a time."""
    s, n = s.tolist(), len(s)
    together = sum(s[i][i] for i in range(n)) / n
    apart = [s[i][j] for i in range(n) for j in range(n) if i != j]

    def mean(values):
        return sum(values) / len(values)

    if name == "i_nce":
        return mean([math.log(math.exp(s[i][i]) / mean([math.exp(s[i][j]) for j in range(n)])) for i in range(n)])
    if name == "nwj":
        return together - mean([math.exp(v - 1) for v in apart])
    if name == "mine":
        return together - math.log(mean([math.exp(v) for v in apart]))
    if name == "smile":
        return together - math.log(mean([math.exp(min(max(v, -1.5), 1.5)) for v in apart]))
    return -mean([math.log1p(math.exp(-s[i][i])) for i in range(n)]) - mean([math.log1p(math.exp(v)) for v in apart])


BOUNDS = {
    "i_nce": i_nce,
    "nwj": nwj,
    "mine": mine,
    "smile": lambda s: smile(s, tau=1.5),
    "jensen_shannon": jensen_shannon,
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_are_their_formulas(name):
    s = scores().requires_grad_()
    assert BOUNDS[name](s).item() == pytest.approx(by_loops(name, s.detach()), rel=1e-12)
    assert torch.autograd.gradcheck(BOUNDS[name], s)


def log_ratio(x: torch.Tensor, y: torch.Tensor, nats: float) -> torch.Tensor:
    """log p(x, y) / p(x) p(y) of gaussian_pairs in one dimension, for all pairs: [n, n]."""
    r2 = 1 - math.exp(-2 * nats)
    x, y = x.double(), y.double().T
    return nats - (r2 * (x.square() + y.square()) - 2 * math.sqrt(r2) * x * y) / (2 * (1 - r2))


@pytest.mark.parametrize("nats", [0.0, 0.5, 1.5])
def test_the_true_ratio_reads_the_truth(nats):
    ratio = log_ratio(*gaussian_pairs(2000, 1, nats, seed=0), nats)
    for value in (i_nce(ratio), nwj(ratio + 1), mine(ratio), smile(ratio, tau=20)):
        assert value.item() == pytest.approx(nats, abs=0.05)


def test_only_i_nce_has_a_ceiling():
    s = 100 * torch.eye(N, dtype=torch.float64)
    assert i_nce(s).item() == pytest.approx(math.log(N)) and i_nce(1000 * scores()) <= math.log(N)
    assert nwj(s) > 90 and mine(s) == 100 and smile(s) == 100
    # Clipping bounds what the independent pairs can take away.
    assert smile(scores() + 50 * (1 - torch.eye(N))).item() == pytest.approx(scores().diagonal().mean().item() - 5)


def test_shifts_that_cancel():
    s = scores()
    of_x = torch.arange(N, dtype=torch.float64)[:, None]
    torch.testing.assert_close(i_nce(s + of_x), i_nce(s))
    torch.testing.assert_close(mine(s + 3), mine(s))
    assert (nwj(s + 3) - nwj(s)).abs() > 0.1


def test_the_gradient_of_mine_divides_by_a_moving_average():
    """The first batch has no past: the bound's own gradient. The second divides by 0.9 old + 0.1 new."""
    objective, first, second = Mine(decay=0.9), scores().requires_grad_(), scores(seed=1).requires_grad_()
    (ours,) = torch.autograd.grad(objective(first), first)
    (plain,) = torch.autograd.grad(mine(first), first)
    torch.testing.assert_close(ours, plain)
    off = ~torch.eye(N, dtype=torch.bool)
    means = [s.detach().exp()[off].mean() for s in (first, second)]
    (ours,) = torch.autograd.grad(objective(second), second)
    expected = -second.detach().exp() / (N * (N - 1)) / (0.9 * means[0] + 0.1 * means[1])
    torch.testing.assert_close(ours[off], expected[off])
    torch.testing.assert_close(ours.diagonal(), torch.full((N,), 1 / N, dtype=torch.float64))


def test_scores_that_overflow_an_exponential_are_still_numbers():
    s = 500 * scores().float()
    objective = Mine()
    objective(s)
    assert all(value.isfinite() for value in (i_nce(s), mine(s), smile(s), jensen_shannon(s), objective(s)))
