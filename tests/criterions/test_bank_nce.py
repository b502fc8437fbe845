"""The memory bank: brute force in float64, which rows move, the draw of negatives, and a run that is stopped.

Shapes: B images, V views, N training images, M negatives, D embedding.
"""

import math
import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from harness import assert_same_run, checkpoint, evaluations, finished, train

from ssl_ib import Batch, Progress, RunInfo, UserError
from ssl_ib.criterions.bank_nce import BankNCE
from ssl_ib.criterions.queue_nce import QueueNCE
from ssl_ib.part import Context, detached

B, V, N, M, D = 4, 3, 9, 30, 5
PROGRESS = Progress(3, 0, 10, 1, seed=7)
INDEX = torch.tensor([5, 0, 8, 2])


def batch(index: torch.Tensor = INDEX) -> Batch:
    return Batch([], [], index, torch.zeros_like(index))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_outputs(seed: int = 0) -> dict[str, list[torch.Tensor]]:
    return {"projection": [draw(B, D, seed=10 * seed + view).requires_grad_() for view in range(V)]}


def build(images: int = N, **given) -> BankNCE:
    torch.manual_seed(0)
    info = RunInfo(((3, 8, 8),) * V, B, width=lambda name: D, images=lambda: images)
    return BankNCE(info, **{"num_negatives": M, **given}).double()


def update(criterion: BankNCE, outputs, index: torch.Tensor = INDEX) -> None:
    context = Context(PROGRESS, lambda *a: None, lambda p: None)
    criterion.after_forward(detached(outputs), batch(index), {}, context)


def by_hand(query, bank, columns, temperature):
    """Cross-entropy of each image's own row of the bank with the columns, or with all other rows; a row at a time."""
    losses = []
    for number, z in enumerate(F.normalize(query, dim=1)):
        own = int(INDEX[number])
        others = [c for c in range(len(bank)) if c != own] if columns is None else columns
        logits = bank[[own, *others]] @ z / temperature
        losses.append(logits.logsumexp(dim=0) - logits[0])
    return torch.stack(losses).mean()


PUBLISHED = {
    "instdis": dict(queries=(0,), banks=(0,)),
    "pirl": dict(queries=(0, 1), banks=(0, 0)),
    "cmc": dict(queries=(0, 1), banks=(1, 0)),
    "weights": dict(queries=(2, 0), banks=(0, 2), weights=(0.9, 0.2)),
}


@pytest.mark.parametrize("negatives", ["all", "sampled"])
@pytest.mark.parametrize("given", PUBLISHED.values(), ids=PUBLISHED)
def test_the_loss_and_its_gradient(given, negatives):
    criterion, outputs = build(negatives=negatives, temperature=0.2, **given), draw_outputs()
    columns = None if negatives == "all" else criterion._sampled(PROGRESS).tolist()
    bank = dict(zip(sorted(set(given["banks"])), criterion.bank, strict=True))
    losses = [
        by_hand(outputs["projection"][query], bank[view], columns, 0.2)
        for query, view in zip(given["queries"], given["banks"], strict=True)
    ]
    weights = given.get("weights", (1 / len(losses),) * len(losses))
    expected = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    loss = criterion(outputs, batch(), PROGRESS)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)
    leaves = [outputs["projection"][view] for view in given["queries"]]
    for found, wanted in zip(
        torch.autograd.grad(loss.total, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        assert wanted.abs().max() > 1e-3
    ceiling = math.log(N if negatives == "all" else M + 1)
    assert float(loss.terms["mi_ceiling"]) == pytest.approx(ceiling)
    assert float(loss.terms["mi_nats"]) == pytest.approx(ceiling - losses[0].item())


@pytest.mark.parametrize("given", PUBLISHED.values(), ids=PUBLISHED)
def test_each_bank_is_moved_by_its_own_view(given):
    criterion, outputs = build(momentum=0.25, **given), draw_outputs()
    before = criterion.bank.clone()
    update(criterion, outputs)
    others = [row for row in range(N) if row not in INDEX]
    for bank, old, view in zip(criterion.bank, before, sorted(set(given["banks"])), strict=True):
        fresh = F.normalize(outputs["projection"][view].detach(), dim=1)
        torch.testing.assert_close(bank[INDEX], F.normalize(0.25 * old[INDEX] + 0.75 * fresh, dim=1))
        assert torch.equal(bank[others], old[others])
    assert criterion.reads == {"projection": given["queries"]} and not criterion.held_out


def test_of_an_image_that_comes_twice_the_first_embedding_counts():
    criterion, outputs = build(), draw_outputs()
    expected = build()
    update(criterion, outputs, torch.tensor([5, 0, 5, 5]))
    update(expected, {"projection": [z[:2] for z in outputs["projection"]]}, torch.tensor([5, 0]))
    assert torch.equal(criterion.bank, expected.bank)


def test_negatives_are_drawn_anew_each_step_with_replacement():
    criterion = build()
    drawn = criterion._sampled(PROGRESS)
    assert len(drawn) == M and 0 <= int(drawn.min()) and int(drawn.max()) < N
    assert torch.equal(drawn, criterion._sampled(PROGRESS))
    assert not torch.equal(drawn, criterion._sampled(replace(PROGRESS, step=4)))
    assert not torch.equal(drawn, criterion._sampled(replace(PROGRESS, seed=8)))
    counts = build(num_negatives=90_000)._sampled(PROGRESS).bincount(minlength=N)
    assert (counts - 10_000).abs().max() < 500


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"queries": (0, 1)}, r"banks=\[0\]: expected one view for each of the queries \[0, 1\]"),
        ({"queries": (0, 0), "banks": (0, 0)}, r"queries=\[0, 0\]: expected numbers of different views"),
        ({"queries": (0, 1), "banks": (2, 0)}, r"banks=\[2, 0\]: the views 2 are no queries"),
        ({"weights": (1.0, 1.0)}, r"weights=\[1.0, 1.0\]: expected one for each of the queries \[0\]"),
    ],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(UserError, match=message):
        build(**given)


@pytest.mark.parametrize(
    "given",
    [
        ("criterion={name: bank_nce, queries: [0, 1], banks: [1, 0], num_negatives: 256}",),
        ("criterion={name: queue_nce, size: 256}", "model.momentum=0.9", "accumulate=2"),
    ],
    ids=["bank", "queue"],
)
def test_a_stopped_run_goes_on_with_what_it_remembers(tmp_path, monkeypatch, given):
    def stop(self, ctx):
        if ctx.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    out, given = tmp_path / "run", (*given, "epochs=1", "source.limit=512")
    for criterion in (BankNCE, QueueNCE):
        monkeypatch.setattr(criterion, "after_step", stop)
    assert train(out, *given) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert train(out, *given, "--resume") == 0
    assert_same_run(out, finished(*given))
    kept = checkpoint(out)["parts"]["criterion." + ("bank" if "bank" in given[0] else "queue")]
    torch.testing.assert_close(kept.norm(dim=-1), torch.ones(kept.shape[:-1]))
    assert ("held_out/loss" in evaluations(out)[-1]) == ("queue" in given[0])
