"""The ops over several processes: answers and gradients of one process with all rows, however they are shared."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ranks import answers_of, join

from ssl_ib import UserError, distributed, ops
from ssl_ib.ops import distributed as several

SHARES = {2: [(4, 4), (5, 2)], 3: [(3, 3, 3), (4, 1, 2), (0, 5, 3)]}


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def mine(x: torch.Tensor, shares: tuple[int, ...], rank: int) -> torch.Tensor:
    return x.split(list(shares))[rank]


def problems(shares: tuple[int, ...], rank: int | None) -> dict[str, tuple]:
    """Name -> (function of the leaves, leaves), for a rank's share, or for one process with all rows (rank None)."""
    total, world = sum(shares), len(shares)
    part = (lambda x: x) if rank is None else (lambda x: mine(x, shares, rank))
    rows, cols = part(unit(total, 5)), part(unit(total, 5, seed=1))
    labels, itself = part(torch.arange(total) // 2), torch.arange(len(rows))
    some = torch.where(torch.arange(total) % 3 == 0, -1, torch.arange(total))
    some = part(some) - (0 if rank is None else sum(shares[:rank]))
    some = some.where(part(torch.arange(total) % 3 != 0), -1)
    prototypes = unit(world * (world + 1) // 2 + 2 * world, 5, seed=2)
    widths = [r + 3 for r in range(world)]
    own = prototypes if rank is None else prototypes.split(widths)[rank]
    known = None if rank is None else shares
    info_nce, gmm_assign = several.info_nce, several.gmm_assign
    return {
        "nt_xent": (lambda z: info_nce(z, None, labels, None, 0.2, itself), [rows]),
        "nt_xent_some_selves": (lambda z: info_nce(z, None, labels, None, 0.2, some), [rows]),
        "no_selves": (lambda z: info_nce(z, None, labels, None, 0.2), [rows]),
        "one_way": (lambda q, k: info_nce(q, k, labels, labels, 0.2, itself), [rows, cols]),
        "one_way_known": (lambda q, k: info_nce(q, k, labels, labels, 0.2, shares=known), [rows, cols]),
        "gmm_assign": (lambda s, t, c: torch.stack(gmm_assign(s, t, c, 0.3, 0.1), dim=1), [rows, cols, own]),
        "gmm_assign_detached": (
            lambda s, t, c: torch.stack(gmm_assign(s, t, c, 0.3, 0.1, detach_p=True), dim=1),
            [rows, cols, own],
        ),
    }


def solve(shares: tuple[int, ...], rank: int | None, backend: str) -> dict[str, list[torch.Tensor]]:
    """Answers and gradients of every problem; each row's answer has its own weight in the loss."""
    total = sum(shares)
    weight = torch.linspace(-1, 2, total, dtype=torch.float64)
    weight = weight if rank is None else mine(weight, shares, rank)
    answers = {}
    for name, (function, leaves) in problems(shares, rank).items():
        leaves = [x.clone().requires_grad_() for x in leaves]
        with ops.use_backend(backend):
            value = function(*leaves)
            scale = weight if value.ndim == 1 else weight[:, None] * torch.tensor([1.0, 0.5], dtype=torch.float64)
            answers[name] = [value.detach(), *torch.autograd.grad((value * scale).sum(), leaves)]
    return answers


def work(rank: int, port: int, path: str, world: int) -> None:
    join(rank, world, port)
    answers = {(s, b): solve(s, rank, b) for s in SHARES[world] for b in ("reference", "chunked")}
    torch.save(answers, f"{path}/{rank}.pt")
    distributed.shutdown()


@pytest.fixture(scope="module", params=SHARES)
def ranks(request, tmp_path_factory) -> list[dict]:
    return answers_of(partial(work, world=request.param), request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_ranks_together_answer_what_one_process_does(ranks, backend):
    for shares in SHARES[len(ranks)]:
        whole = solve(shares, None, "reference")
        for name, tensors in whole.items():
            for i, expected in enumerate(tensors):
                together = torch.cat([rank[shares, backend][name][i] for rank in ranks])
                difference = (together - expected).abs().max().item()
                assert difference <= 1e-9 * expected.abs().max().item(), f"{name} [{i}] of {shares}: {difference}"


def test_mistakes_are_told():
    with pytest.raises(UserError, match="student and teacher of one shape"):
        several.gmm_assign(unit(3, 2), unit(2, 2), unit(4, 2), 0.1, 0.1)
    with pytest.raises(UserError, match=r"expected row_labels \[3\]"):
        several.info_nce(unit(3, 2), None, torch.arange(2), None, 0.1)
