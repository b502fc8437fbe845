"""The counter-based generator: its distribution, its independence of everything but the key, and its exact values."""

import itertools
import math

import pytest
import torch
from scipy import stats

from ssl_ib.random import bits, fold, image_keys, permutation, randint, shuffled, uniform

INDEX = torch.arange(20000)

#: Draws of seed 3, epoch 2, images 0, 1 and 49999, stream 1.
KEYS = [4286381828962332031, -4885159590845485091, -1192347569594193925]
UNIFORM = [
    [0.5165657997131348, 0.02315288782119751],
    [0.8491981625556946, 0.0049547553062438965],
    [0.5399727821350098, 0.4842963218688965],
]
INTEGERS = [[0, 9, 1], [1, 1, 6], [8, 7, 4]]
PERMUTATIONS = [[1, 5, 2, 3, 0, 4], [1, 2, 3, 4, 5, 0], [3, 2, 1, 0, 4, 5]]
SHUFFLED = [1, 2, 5, 4, 0, 6, 7, 3]


def p_value(counts) -> float:
    return stats.chisquare(counts).pvalue


def test_moments():
    x = uniform(image_keys(0, 0, INDEX), 8).double()
    assert x.min() >= 0 and x.max() < 1
    for power in range(1, 5):
        # E[x^k] = 1/(k+1), with variance 1/(2k+1) - 1/(k+1)^2; four standard errors.
        error = math.sqrt((1 / (2 * power + 1) - 1 / (power + 1) ** 2) / x.numel())
        assert (x**power).mean().item() == pytest.approx(1 / (power + 1), abs=4 * error)


@pytest.mark.parametrize("seed, epoch, stream", [(0, 0, 0), (0, 0, 1), (7, 300, 1000), (2**32 - 1, 10**6, -1)])
def test_buckets(seed, epoch, stream):
    keys = image_keys(seed, epoch, INDEX, stream)
    fine = (uniform(keys, 4) * 256).long().flatten()
    assert p_value(torch.bincount(fine, minlength=256)) > 1e-3
    # The lowest bits that a uniform number uses are random too.
    low = (uniform(keys, 4) * 2**24).long().flatten() % 256
    assert p_value(torch.bincount(low, minlength=256)) > 1e-3
    # Neighbours in the counter, jointly.
    pairs = (uniform(keys, 2) * 16).long()
    assert p_value(torch.bincount(pairs[:, 0] * 16 + pairs[:, 1], minlength=256)) > 1e-3


def test_single_bits_are_fair():
    drawn = bits(image_keys(3, 1, INDEX), 2).flatten()
    ones = torch.stack([(drawn >> bit & 1).sum() for bit in range(64)]).double()
    assert ((ones - len(drawn) / 2).abs() / math.sqrt(len(drawn) / 4)).max() < 4.5


def related():
    """Keys that differ in one thing alone from those of seed 0, epoch 0, stream 0."""
    yield "seed", image_keys(1, 0, INDEX)
    yield "epoch", image_keys(0, 1, INDEX)
    yield "stream", image_keys(0, 0, INDEX, 1)
    yield "index", image_keys(0, 0, INDEX + 1)
    yield "far stream", image_keys(0, 0, INDEX, 1000)


@pytest.mark.parametrize("keys", [pytest.param(keys, id=name) for name, keys in related()])
def test_what_differs_in_one_thing_is_independent(keys):
    first = image_keys(0, 0, INDEX)
    assert not (first == keys).any()
    x, y = uniform(first, 2), uniform(keys, 2)
    joint = (x * 16).long() * 16 + (y * 16).long()
    assert p_value(torch.bincount(joint.flatten(), minlength=256)) > 1e-3
    assert torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].abs() < 4 / math.sqrt(x.numel())


def test_no_two_keys_are_alike():
    keys = [image_keys(s, e, INDEX[:5000], v) for s, e, v in itertools.product(range(3), range(3), (0, 1, 1000))]
    assert len(torch.cat(keys).unique()) == 27 * 5000


def test_a_draw_depends_on_its_key_alone():
    keys = image_keys(0, 2, INDEX[:50], 1)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    for draw in (uniform, bits, lambda k, n: randint(k, n, 9), permutation):
        whole = draw(keys, 6)
        assert torch.equal(draw(keys[order], 6), whole[order])
        assert torch.equal(torch.cat([draw(keys[:7], 6), draw(keys[7:], 6)]), whole)
        assert torch.equal(draw(keys[31:32], 6)[0], whole[31])


def test_more_draws_begin_with_the_fewer():
    keys = image_keys(0, 0, INDEX[:10])
    assert torch.equal(uniform(keys, 9)[:, :4], uniform(keys, 4))


def test_ranges():
    keys = image_keys(0, 0, INDEX)
    x = uniform(keys, 1, -2.0, 3.0)
    assert x.min() >= -2 and x.max() <= 3 and x.mean().item() == pytest.approx(0.5, abs=0.05)
    n = randint(keys, 1, 7)
    assert n.min() == 0 and n.max() == 6 and p_value(torch.bincount(n.flatten())) > 1e-3
    high = torch.tensor([[1, 2, 5]])
    n = randint(keys, 3, high)
    assert (n >= 0).all() and n.amax(dim=0).tolist() == [0, 1, 4]


def test_permutations_are_uniform():
    drawn = permutation(image_keys(0, 0, INDEX), 4)
    assert torch.equal(drawn.sort(dim=1).values, torch.arange(4).expand(len(INDEX), 4))
    number = (drawn * torch.tensor([64, 16, 4, 1])).sum(dim=1)
    counts = torch.tensor([(number == code).sum() for code in number.unique()])
    assert len(counts) == math.factorial(4) and p_value(counts) > 1e-3


def test_epochs_are_shuffled():
    orders = [shuffled(0, 0, 100), shuffled(0, 1, 100), shuffled(1, 0, 100)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(100))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(orders, 2))
    assert torch.equal(shuffled(0, 1, 100), orders[1])


def splitmix64(state: int) -> int:
    """The published generator in Python's own integers: the output of the state."""
    mask = 2**64 - 1
    z = state & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


def test_the_integers_are_splitmix64():
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x1234567])
    drawn = bits(keys, 3)
    for row, key in zip(drawn.tolist(), keys.tolist(), strict=True):
        for k, value in enumerate(row, start=1):
            assert value % 2**64 == splitmix64(key + k * 0x9E3779B97F4A7C15)
    # The generator's published first outputs from seed 0.
    assert [x % 2**64 for x in drawn[0].tolist()] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_fold_takes_numbers_and_tensors():
    keys = image_keys(0, 0, INDEX[:3])
    assert torch.equal(fold(keys, 5), fold(keys, torch.tensor([5, 5, 5])))
    assert not torch.equal(fold(keys, 5), fold(keys, 6))


def test_golden_values():
    """A run's views and masks are these numbers: whoever changes them changes every published result."""
    keys = image_keys(seed=3, epoch=2, index=torch.tensor([0, 1, 49999]), stream=1)
    assert keys.tolist() == KEYS
    assert uniform(keys, 2).tolist() == UNIFORM
    assert randint(keys, 3, 10).tolist() == INTEGERS
    assert permutation(keys, 6).tolist() == PERMUTATIONS
    assert shuffled(3, 2, 8).tolist() == SHUFFLED
