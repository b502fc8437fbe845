"""Bounds on what features hold of labels, against what is known."""

import math

import pytest
import torch

from ssl_ib.info.labels import cross_entropy_bound, entropy, fano

LABELS = torch.arange(4).repeat(250)


def test_entropy():
    assert entropy(LABELS) == pytest.approx(math.log(4))
    assert entropy(torch.tensor([3, 3, 3, 7])) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert entropy(torch.tensor([5, 5])) == 0


def test_a_perfect_reader_reaches_the_ceiling_and_guessing_gives_nothing():
    assert fano(1.0, LABELS, 4) == (pytest.approx(math.log(4)), 0)
    assert fano(0.25, LABELS, 4)[0] == pytest.approx(0, abs=1e-12)
    sure = 50.0 * torch.nn.functional.one_hot(LABELS)
    assert cross_entropy_bound(sure, LABELS) == (pytest.approx(math.log(4)), pytest.approx(0, abs=1e-12))
    assert cross_entropy_bound(torch.zeros(1000, 4), LABELS)[0] == pytest.approx(0, abs=1e-12)
    # Surer than right: below 0, and shown so.
    assert cross_entropy_bound(sure.roll(1, dims=0), LABELS)[0] < -10


def test_both_are_below_a_known_information_and_their_errors_cover_other_samples():
    """Z is Y with probability 0.7, else any other class: both bounds are tight there."""
    generator = torch.Generator().manual_seed(0)
    true = math.log(4) + 0.7 * math.log(0.7) + 0.3 * math.log(0.1)
    found = {"fano": [], "posterior": []}
    for _ in range(40):
        right = torch.rand(1000, generator=generator) < 0.7
        z = torch.where(right, LABELS, (LABELS + torch.randint(1, 4, (1000,), generator=generator)) % 4)
        found["fano"].append(fano(right.double().mean().item(), LABELS, 4))
        posterior = torch.full((1000, 4), 0.1).scatter_(1, z[:, None], 0.7).log()
        found["posterior"].append(cross_entropy_bound(posterior, LABELS))
    for each in found.values():
        values, errors = torch.tensor(each, dtype=torch.float64).T
        assert values.mean().item() == pytest.approx(true, abs=4 * errors.mean().item() / math.sqrt(40))
        assert values.std().item() == pytest.approx(errors.mean().item(), rel=0.4)
