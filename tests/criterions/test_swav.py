"""SwAV: Sinkhorn against plain matrices in float64, the queue, and several processes against one.

Shapes: B images, V views of which the first G are global crops, N rows, K prototypes, D embedding.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ranks import RANKS, answers_of, join

from ssl_ib import Batch, Progress, RunInfo, UserError, distributed
from ssl_ib.config.registry import check_part
from ssl_ib.criterions.swav import SwAV, sinkhorn
from ssl_ib.part import Context, detached

B, K, D, G, V = 4, 5, 3, 2, 4
PROGRESS = Progress(3, 1, 200, 100)
BATCH = Batch([], [], torch.arange(B), torch.arange(B))
#: By hand: (view whose assignment is the target, view that predicts it).
PAIRS = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 2), (1, 3)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_outputs(seed: int = 0, images: int = B, rows: slice = slice(None)) -> dict[str, list[torch.Tensor]]:
    views = [F.normalize(draw(images, D, seed=10 * seed + v), dim=1)[rows] for v in range(V)]
    return {"student": [z.requires_grad_() for z in views]}


def build(views: int = V, num_global: int | None = G, **given) -> SwAV:
    info = RunInfo(((3, 8, 8),) * views, B, width=lambda name: D, num_global=num_global)
    criterion = SwAV(info, **{"K": K, **given}).double()
    with torch.no_grad():
        criterion.prototypes.weight.copy_(draw(K, D, seed=99))
    criterion.prototypes.rescale()
    return criterion


def by_matrices(scores: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """SwAV's appendix: exp(scores / epsilon), scaled in turn to equal prototypes and equal rows."""
    q = (scores / epsilon).exp()
    q = q / q.sum()
    for _ in range(iterations):
        q = q @ torch.diag(1 / (q.sum(dim=0) * q.shape[1]))
        q = torch.diag(1 / (q.sum(dim=1) * q.shape[0])) @ q
    return q * q.shape[0]


def expected_loss(criterion: SwAV, outputs, past=None) -> torch.Tensor:
    c = criterion.prototypes.weight
    student, losses = outputs["student"], []
    for t, s in PAIRS:
        rows = student[t] if past is None else torch.cat([student[t], past[t]])
        q = by_matrices((rows @ c.T).detach(), criterion.epsilon, criterion.iterations)[: len(student[t])]
        p = (student[s] @ c.T / criterion.temperature).exp()
        losses.append(-(q * (p / p.sum(dim=1, keepdim=True)).log()).sum(dim=1).mean())
    return sum(losses) / len(losses)


def step(criterion: SwAV, outputs, progress=PROGRESS) -> None:
    context = Context(progress, lambda *a: None, lambda p: None)
    with torch.no_grad():
        loss = criterion(outputs, BATCH, progress)
        criterion.after_forward(detached(outputs), BATCH, detached(loss.terms), context)


# --- Sinkhorn


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_sinkhorn(epsilon, iterations):
    scores = torch.tanh(draw(7, K))
    torch.testing.assert_close(sinkhorn(scores, epsilon, iterations), by_matrices(scores, epsilon, iterations))


def test_marginals():
    q = sinkhorn(torch.tanh(draw(40, K)), 0.5, 50)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(q.sum(dim=0), torch.full((K,), 40 / K, dtype=torch.float64))
    # Rows are distributions after any number of rounds; the prototypes' shares become equal.
    few = sinkhorn(torch.tanh(draw(40, K)), 0.05, 1)
    torch.testing.assert_close(few.sum(dim=1), torch.ones(40, dtype=torch.float64))
    assert (few.sum(dim=0) - 40 / K).abs().max() > 1


def test_sinkhorn_does_not_overflow():
    scores = torch.tensor([[1.0, -1.0], [1.0, -1.0], [0.9, 0.9]])
    assert sinkhorn(scores, 0.002, 3).isfinite().all()


def test_sinkhorn_of_rounded_scores_is_not_rounded():
    q = sinkhorn(torch.tanh(draw(7, K)).bfloat16(), 0.05, 3)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q.sum(dim=1), torch.ones(7))


# --- the loss


@pytest.mark.parametrize("given", [{}, {"temperature": 0.3}, {"epsilon": 0.5}, {"iterations": 1}])
def test_the_loss_and_its_gradient(given):
    criterion, outputs = build(**given), draw_outputs()
    loss, expected = criterion(outputs, BATCH, PROGRESS).total, expected_loss(criterion, outputs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    leaves = [*outputs["student"], criterion.prototypes.weight]
    for found, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert wanted.abs().max() > 1e-3


def test_without_word_of_global_crops_every_view_is_one():
    criterion = build(views=2, num_global=None)
    assert criterion.num_global == 2
    outputs = {"student": draw_outputs()["student"][:2]}
    swapped = {"student": outputs["student"][::-1]}
    assert criterion(outputs, BATCH, PROGRESS).total.item() == pytest.approx(
        criterion(swapped, BATCH, PROGRESS).total.item()
    )


def test_prototypes_are_frozen_for_an_epoch():
    criterion = build(freeze_epochs=1)
    for epoch, frozen in ((0, True), (1, False)):
        criterion.zero_grad()
        criterion(draw_outputs(), BATCH, PROGRESS).total.backward()
        criterion.before_step(Context(replace(PROGRESS, epoch=epoch), lambda *a: None, lambda p: None))
        assert (criterion.prototypes.weight.grad is None) == frozen


# --- the queue


def test_the_queue_holds_the_newest_first():
    criterion = build(queue=6, queue_epoch=0)
    seen = [draw_outputs(seed) for seed in range(3)]
    step(criterion, seen[0])
    assert int(criterion.filled) == 4
    step(criterion, seen[1])
    assert int(criterion.filled) == 6
    for g in range(G):
        assert torch.equal(criterion.past[g], torch.cat([seen[1]["student"][g], seen[0]["student"][g][:2]]))
    step(criterion, seen[2])
    for g in range(G):
        assert torch.equal(criterion.past[g], torch.cat([seen[2]["student"][g], seen[1]["student"][g][:2]]))
    assert {"past", "filled"} <= set(criterion.state_dict())


def test_the_queue_counts_once_it_is_full_and_from_its_epoch_on():
    criterion, plain, last = build(queue=6, queue_epoch=2), build(), draw_outputs(2)
    late = replace(PROGRESS, epoch=2)
    step(criterion, draw_outputs(0))
    # 4 of the 6 rows are filled.
    assert criterion(last, BATCH, late).total.item() == pytest.approx(expected_loss(plain, last).item(), rel=1e-6)
    step(criterion, draw_outputs(1))
    early = criterion(last, BATCH, replace(PROGRESS, epoch=1)).total
    assert early.item() == pytest.approx(expected_loss(plain, last).item(), rel=1e-6)
    past = [torch.cat([draw_outputs(1)["student"][g], draw_outputs(0)["student"][g][:2]]).detach() for g in range(G)]
    value = criterion(last, BATCH, late).total
    assert value.item() == pytest.approx(expected_loss(plain, last, past).item(), rel=1e-6)
    assert abs(value.item() - early.item()) > 1e-3


def test_a_queue_of_fewer_rows_than_a_batch():
    criterion, outputs = build(queue=3), draw_outputs()
    step(criterion, outputs)
    assert torch.equal(criterion.past[1], outputs["student"][1][:3]) and int(criterion.filled) == 3


# --- what is watched


def test_what_is_watched_are_the_students_own_assignments():
    criterion, outputs = build(), draw_outputs()
    terms = criterion.eval()(outputs, BATCH, PROGRESS).terms
    c = F.normalize(criterion.prototypes.weight, dim=1)
    p = (torch.cat(outputs["student"][:G]) @ c.T / criterion.temperature).softmax(dim=1)
    assert terms["assignment_entropy"].item() == pytest.approx(-(p * p.log()).sum(dim=1).mean().item(), rel=1e-6)
    assert terms["marginal_entropy"].item() == pytest.approx(-(p.mean(0) * p.mean(0).log()).sum().item(), rel=1e-6)
    q = [by_matrices((z @ c.T).detach(), 0.05, 3).argmax(dim=1) for z in outputs["student"][:G]]
    same = [(q[t] == (outputs["student"][s] @ c.T).argmax(dim=1)).double().mean() for t, s in PAIRS]
    assert terms["top_agreement"].item() == pytest.approx(sum(same).item() / len(PAIRS))
    assert 0 < terms["top_agreement"] < 1


def test_collapse_is_named(caplog, tmp_path):
    criterion, outputs = build(), draw_outputs()
    context = Context(PROGRESS, lambda *a: None, lambda p: None)
    step(criterion, outputs)
    criterion.on_epoch_end(context)
    assert not caplog.text
    with torch.no_grad():
        criterion.prototypes.weight[:] = criterion.prototypes.weight[0]
    step(criterion, outputs)
    criterion.on_epoch_end(context)
    assert "swav: collapse to the uniform assignment" in caplog.text
    criterion.assignments.draw(tmp_path)
    assert (tmp_path / "occupancy.png").stat().st_size > 1000


# --- mistakes


@pytest.mark.parametrize(
    "key, value", [("K", 1), ("temperature", 0.0), ("epsilon", 0.0), ("iterations", 0), ("queue", -1)]
)
def test_mistakes(key, value):
    problems: list[str] = []
    check_part("criterion", {"name": "swav", key: value}, "criterion", problems)
    assert len(problems) == 1 and problems[0].startswith(f"criterion.{key}: expected greater than")


def test_a_model_that_leaves_views_out():
    outputs = {"student": draw_outputs()["student"][:1]}
    with pytest.raises(UserError, match="got 1 of the student and 2 of the teacher"):
        build()(outputs, BATCH, PROGRESS)


def test_one_view_has_nobody_to_teach_it():
    with pytest.raises(UserError, match="at least 2 views"):
        build(views=1)


# --- several processes


def learned(rows: slice) -> dict[str, torch.Tensor]:
    """Assignments, loss, gradient and queue after steps with a queue that fills up."""
    scores = torch.tanh(draw(6, K))[rows]
    criterion = build(queue=9, queue_epoch=0)
    for seed in range(2):
        step(criterion, draw_outputs(seed, 6, rows))
    loss = criterion(draw_outputs(5, 6, rows), BATCH, PROGRESS).total
    loss.backward()
    return {
        "assigned": distributed.gather(sinkhorn(scores, 0.05, 3)),
        "loss": distributed.all_reduce_mean(loss.detach()),
        "gradient": distributed.all_reduce_mean(criterion.prototypes.weight.grad),
        "queue": criterion.past.clone(),
        "filled": criterion.filled.clone(),
    }


def work(rank: int, port: int, path: str, ranks: int) -> None:
    join(rank, ranks, port)
    share = 6 // ranks
    torch.save(learned(slice(share * rank, share * (rank + 1))), f"{path}/{rank}.pt")
    distributed.shutdown()


@pytest.mark.parametrize("ranks", RANKS)
def test_processes_are_one(tmp_path, ranks):
    """The queue is everybody's, so that the main process's checkpoint is enough to go on from."""
    expected = learned(slice(0, 6))
    assert int(expected["filled"]) == 9
    # The softmax is in float32, which has halves and no thirds.
    near = 1e-9 if ranks == 2 else 1e-6
    for found in answers_of(partial(work, ranks=ranks), ranks, tmp_path):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=near, atol=near / 10)
