"""What a run shows of its assignments: running means, the collapses they show, and the occupancy over time.

Shapes: N rows, K prototypes.
"""

import math
from functools import partial

import pytest
import torch
from ranks import RANKS, answers_of, join

from ssl_ib import Progress, distributed
from ssl_ib.criterions.assignments import OCCUPANCY_EPOCHS, Assignments


def softmax(*shape: int, seed: int = 0, sharp: float = 1.0) -> torch.Tensor:
    return (sharp * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).double().softmax(dim=-1)


def entropy(p: torch.Tensor) -> torch.Tensor:
    return -(p * p.clamp(min=1e-300).log()).sum(dim=-1)


def seen(part: Assignments, p: torch.Tensor, steps: int = 1) -> dict[str, torch.Tensor]:
    """The terms of the last of some steps with the same assignments p [N, K]."""
    for _ in range(steps):
        terms = part.watch(entropy(p), p.mean(dim=0))
        part.update()
    return terms


def test_in_evaluation_the_terms_are_the_batchs():
    part, p = Assignments(5).double().eval(), softmax(7, 5)
    p = torch.cat([p, torch.zeros(7, 1)], dim=1)[:, [0, 1, 5, 3, 4]]
    p = p / p.sum(dim=1, keepdim=True)
    terms = part.watch(entropy(p), p.mean(dim=0))
    assert terms["assignment_entropy"].item() == pytest.approx(entropy(p).mean().item())
    assert terms["kl_to_uniform"].item() == pytest.approx((p * (5 * p).clamp(min=1e-300).log()).sum(1).mean().item())
    assert terms["marginal_entropy"].item() == pytest.approx(entropy(p.mean(dim=0)).item())
    assert terms["dead_prototypes"].item() == pytest.approx(0.2)


def test_in_training_they_are_the_running_means():
    part, total, weight = Assignments(5).double(), torch.zeros(5, dtype=torch.float64), 0.0
    assert part.watch(torch.ones(2).double(), softmax(5))["marginal_entropy"].item() == pytest.approx(math.log(5))
    for seed in range(4):
        marginal = softmax(5, seed=seed, sharp=2.0)
        terms = part.watch(torch.ones(3).double(), marginal)
        if seed:
            assert terms["marginal_entropy"].item() == pytest.approx(entropy(total / weight).item())
        part.update(momentum=0.7)
        total, weight = 0.7 * total + 0.3 * marginal, 0.7 * weight + 0.3
        torch.testing.assert_close(part.shares(), total / weight)
    torch.testing.assert_close(part.usage, total + (1 - weight) / 5)
    part.reset()
    torch.testing.assert_close(part.usage, torch.full((5,), 0.2).double())
    assert float(part.seen) == float(part.rows) == 0 and part.collapse() is None


def with_entropies(num: int, used: int, each: int, rows: int = 4096) -> torch.Tensor:
    """Rows that are uniform over `each` of the first `used` prototypes, which are so used alike."""
    first = each * (torch.arange(rows) % (used // each))
    return (((torch.arange(num) - first[:, None]) // each) == 0).double() / each


@pytest.mark.parametrize(
    "num, used, each, named",
    [
        (1024, 1024, 256, None),
        (1024, 1024, 1, None),
        (1024, 64, 8, None),
        (1024, 1024, 1024, "the uniform assignment: 6.931 of at most 6.931 nats, of which an image decides 0.000"),
        (1024, 900, 900, "the uniform assignment"),
        (1024, 100, 100, "one assignment for all images: 4.605 of at most 6.931"),
        (1024, 20, 10, "few prototypes: 20.0 of 1024 in use"),
        (1024, 20, 20, "few prototypes: 20.0 of 1024"),
        (1024, 1, 1, "one prototype: 1.0 of 1024"),
        (8, 1, 1, "one prototype: 1.0 of 8"),
        (8, 2, 1, None),
    ],
)
def test_collapse(num, used, each, named):
    part = Assignments(num).double()
    seen(part, with_entropies(num, used, each), steps=3)
    assert named in part.collapse() if named else part.collapse() is None


def test_most_of_the_mass_on_one_of_many_prototypes_is_a_collapse():
    p = torch.full((8, 65536), 0.06 / 65535, dtype=torch.float64)
    p[:, 3] = 0.94
    part = Assignments(65536).double()
    seen(part, p, steps=100)
    assert "few prototypes: 2.4 of 65536" in part.collapse()


def test_rows_too_few_for_all_prototypes_are_no_collapse():
    """An epoch of 128 sharp assignments cannot use 65,536 prototypes."""
    part = Assignments(65536).double()
    seen(part, with_entropies(65536, 128, 1, rows=64), steps=1)
    assert part.collapse() is None


@pytest.mark.parametrize("epochs", [3, 200])
def test_occupancy(epochs):
    part = Assignments(4).double()
    for epoch in range(epochs):
        part.usage.copy_(torch.tensor([1, 0, 0, 0] if epoch < epochs // 2 else [0.25] * 4))
        part.seen.fill_(1.0)
        part.end_epoch("mine", Progress(epoch, epoch, epochs, epochs))
    kept = part.occupancy[part.occupancy[:, 0] >= 0]
    assert len(kept) == min(epochs, OCCUPANCY_EPOCHS)
    one_of_all, equal = torch.zeros(16).double(), torch.zeros(16).double()
    one_of_all[[0, 10]], equal[8] = torch.tensor([0.75, 0.25]).double(), 1.0
    half = epochs // 2 * len(kept) // epochs
    assert torch.equal(kept[:half], one_of_all.expand(half, -1))
    assert torch.equal(kept[half + 1 :], equal.expand(len(kept) - half - 1, -1))


def share(rank: int, port: int, folder: str, ranks: int) -> None:
    join(rank, ranks, port)
    rows = 6 // ranks
    part, p = Assignments(5).double(), softmax(6, 5)[rows * rank : rows * (rank + 1)]
    seen(part, p, steps=2)
    torch.save(part.state_dict(), f"{folder}/{rank}.pt")
    distributed.shutdown()


@pytest.mark.parametrize("ranks", RANKS)
def test_processes_are_one(tmp_path, ranks):
    part = Assignments(5).double()
    seen(part, softmax(6, 5), steps=2)
    for answer in answers_of(partial(share, ranks=ranks), ranks, tmp_path):
        for name, value in part.state_dict().items():
            torch.testing.assert_close(answer[name], value, msg=name, equal_nan=True)
