"""I(X;Z) of a Gaussian mixture against numerical integration, and its limits."""

import math

import pytest
import torch

from ssl_ib.errors import UserError
from ssl_ib.info.mixture import mixture_information


def integrated(points: torch.Tensor, sigma: float, steps: int = 400) -> float:
    """h(Z) - h(Z|X) by adding up -p log p over a grid: points [n, D] with D = 1 or 2."""
    n, d = points.shape
    line = [
        torch.linspace(float(low) - 8 * sigma, float(high) + 8 * sigma, steps, dtype=torch.float64)
        for low, high in zip(points.amin(dim=0), points.amax(dim=0), strict=True)
    ]
    grid = torch.cartesian_prod(*line).view(-1, d)
    cell = math.prod(float(axis[1] - axis[0]) for axis in line)
    squares = (grid[:, None] - points.double()).square().sum(dim=2)
    log_p = (-squares / (2 * sigma**2)).logsumexp(dim=1) - math.log(n) - d / 2 * math.log(2 * math.pi * sigma**2)
    entropy = -(log_p.exp() * log_p).sum().item() * cell
    return entropy - d / 2 * math.log(2 * math.pi * math.e * sigma**2)


@pytest.mark.parametrize("points", [[[0.0], [0.3], [1.0], [1.1]], [[0.0, 0.0], [0.4, 0.1], [1.0, -0.5]]])
def test_it_is_the_integral(points):
    points, sigmas = torch.tensor(points), (0.1, 0.3, 1.0)
    found, error = mixture_information(points, sigmas, draws=2_000, seed=1)
    for value, spread, sigma in zip(found.tolist(), error.tolist(), sigmas, strict=True):
        assert spread < 0.02
        assert abs(value - integrated(points, sigma)) < 4 * spread


def test_the_error_is_that_of_the_noise():
    points = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    found, errors = zip(*(mixture_information(points, (0.7,), draws=8, seed=seed) for seed in range(200)), strict=True)
    assert torch.cat(found).std() == pytest.approx(torch.cat(errors).mean().item(), rel=0.25)


def test_limits_and_pieces():
    points = torch.nn.functional.normalize(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)))
    found, _ = mixture_information(points, (1e-3, 0.2, 1e3))
    assert found[0] == pytest.approx(math.log(50), abs=1e-9)
    assert 0.5 < found[1] < math.log(50)
    assert found[2] == pytest.approx(0, abs=1e-2)
    # Rows at a time: only the order in which the noise is drawn differs.
    pieces, error = mixture_information(points, (0.2,), numbers=7 * 50)
    assert abs(pieces - found[1]) < 4 * 2**0.5 * error
    # Two images with the same features are one: of 50 pairs, log 50 of log 100 can be known.
    twice, _ = mixture_information(points.repeat(2, 1), (1e-3,))
    assert twice.item() == pytest.approx(math.log(50), abs=1e-9)


def test_no_matrix_is_larger_than_asked(monkeypatch):
    largest = 0
    original = torch.Tensor.logsumexp

    def watched(self, *given, **more):
        nonlocal largest
        largest = max(largest, self.numel())
        return original(self, *given, **more)

    monkeypatch.setattr(torch.Tensor, "logsumexp", watched)
    mixture_information(torch.randn(300, 2), (0.5,), draws=2, numbers=10_000)
    assert 0 < largest <= 10_000


@pytest.mark.parametrize(
    ("more", "message"), [({"sigmas": (0.1, 0.0)}, "above 0, got 0"), ({"draws": 1}, "2 at least")]
)
def test_refusals(more, message):
    with pytest.raises(UserError, match=message):
        mixture_information(torch.randn(4, 2), **{"sigmas": (0.1,), **more})
