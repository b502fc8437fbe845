"""The lower bound of a classifier against channels whose information is known."""

import math

import pytest
import torch

from ssl_ib.errors import UserError
from ssl_ib.info.decoding import decode


def channel(rows: int, kept: float, values: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """F of so many values, and Z, a one-hot vector that names F with probability `kept`, else any value."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randint(values, (rows,), generator=generator)
    other = torch.randint(values, (rows,), generator=generator)
    named = torch.where(torch.rand(rows, generator=generator) < kept, factor, other)
    return torch.nn.functional.one_hot(named, values).float(), factor


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.9])
def test_a_channel_of_known_information(kept):
    right = kept + (1 - kept) / 4
    lost = -right * math.log(right) - (1 - right) * math.log((1 - right) / 3)
    truth = math.log(4) - lost
    found = decode(*channel(4000, kept), *channel(4000, kept, seed=1))
    assert 0 < found.error < 0.03
    assert abs(found.nats - truth) < 3 * found.error + 0.005
    assert found.ceiling == pytest.approx(math.log(4), abs=0.01)
    assert found.accuracy == pytest.approx(max(right, 0.25), abs=0.03) and found.chance < 0.3


def test_more_dimensions_than_rows_read_little_into_noise():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 100, 300, generator=generator)
    values = torch.randint(3, (2, 100), generator=generator)
    found = decode(rows[0], values[0], rows[1], values[1])
    assert -0.1 < found.nats < 0.05


def test_draws_of_the_noise_are_no_further_images():
    (train, values), (test, wanted) = channel(500, 0.7), channel(400, 0.7, seed=1)
    once = decode(train, values, test, wanted, strengths=(0.1,))
    # Four equal blocks weigh against the penalty like one of four times the strength.
    four = decode(train.repeat(4, 1), values, test.repeat(4, 1), wanted, draws=4, strengths=(0.025,))
    assert four.nats == pytest.approx(once.nats, abs=1e-3)
    assert four.error == pytest.approx(once.error, rel=0.01)


@pytest.mark.parametrize(("wanted", "message"), [([1, 1], "H = 0"), ([0, 5], "no training image has the value 5")])
def test_refusals(wanted, message):
    with pytest.raises(UserError, match=message):
        decode(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]), torch.randn(2, 2), torch.tensor(wanted))
