"""MoCo's queue: the published formula by hand, the order of the queue, and what it costs.

Shapes: B images, V views, K rows of the queue, D embedding.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from harness import trainer

from ssl_ib import Batch, Progress, RunInfo, UserError, ops
from ssl_ib.criterions.queue_nce import QueueNCE
from ssl_ib.part import Context, detached

B, V, K, D = 4, 3, 12, 5
PROGRESS = Progress(0, 0, 10, 1)
BATCH = Batch([], [], torch.arange(B), torch.arange(B))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_outputs(seed: int = 0, images: int = B) -> dict[str, list[torch.Tensor]]:
    return {
        name: [draw(images, D, seed=100 * seed + 10 * place + view).requires_grad_() for view in range(V)]
        for place, name in enumerate(("projection", "target"))
    }


def info(batch: int = B, world: int = 1, cap: int | None = None) -> RunInfo:
    return RunInfo(((3, 8, 8),) * V, batch, world, width=lambda name: D, cap=cap)


def build(**given) -> QueueNCE:
    torch.manual_seed(0)
    return QueueNCE(info(), **{"size": K, **given}).double()


def step(criterion: QueueNCE, outputs) -> None:
    loss = criterion(outputs, BATCH, PROGRESS)
    context = Context(PROGRESS, lambda *a: None, lambda p: None)
    criterion.after_forward(detached(outputs), BATCH, detached(loss.terms), context)


def moco(query, key, queue, temperature):
    """Algorithm 1 of the paper, with its names: one cross-entropy whose right answer is column 0."""
    q, k = F.normalize(query, dim=1), F.normalize(key, dim=1).detach()
    l_pos = torch.einsum("nc,nc->n", q, k)[:, None]
    l_neg = torch.einsum("nc,ck->nk", q, queue.T)
    logits = torch.cat([l_pos, l_neg], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ({}, {0: 1.0}),
        ({"temperature": 0.2, "key": 2}, {0: 1.0}),
        ({"queries": (0, 2)}, {0: 0.5, 2: 0.5}),
        ({"queries": (1, 0), "weights": (0.7, 0.1), "key": 2}, {1: 0.7, 0: 0.1}),
        ({"queries": (0, 1), "key": (1, 0)}, {0: 0.5, 1: 0.5}),
    ],
)
def test_the_loss_and_its_gradient(given, weights):
    criterion, outputs = build(**given), draw_outputs()
    keys = given.get("key", 1)
    keys = dict(zip(weights, keys if isinstance(keys, tuple) else (keys,) * len(weights), strict=True))
    queues = dict(zip(sorted(set(keys.values())), criterion.queue, strict=True))
    losses = {
        view: moco(
            outputs["projection"][view],
            outputs["target"][keys[view]],
            queues[keys[view]],
            given.get("temperature", 0.07),
        )
        for view in weights
    }
    expected = sum(weight * losses[view] for view, weight in weights.items())
    loss = criterion(outputs, BATCH, PROGRESS)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)
    leaves = [outputs["projection"][view] for view in weights]
    for found, wanted in zip(
        torch.autograd.grad(loss.total, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        assert wanted.abs().max() > 1e-3
    first = next(iter(weights))
    assert float(loss.terms["mi_ceiling"]) == pytest.approx(math.log(K + 1))
    assert float(loss.terms["mi_nats"]) == pytest.approx(math.log(K + 1) - losses[first].item())
    cosine = F.cosine_similarity(outputs["projection"][first], outputs["target"][keys[first]]).mean()
    assert float(loss.terms["positive_similarity"]) == pytest.approx(cosine.item())


def test_the_queue_is_read_before_its_oldest_keys_are_replaced():
    criterion = build()
    start = criterion.queue[0].clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(K, dtype=torch.float64))
    seen = [draw_outputs(seed) for seed in range(5)]
    keys = [F.normalize(outputs["target"][1].detach(), dim=1) for outputs in seen]
    address = criterion.queue.data_ptr()
    for number, outputs in enumerate(seen[:3]):
        before = criterion.queue[0].clone()
        assert criterion(outputs, BATCH, PROGRESS).total.item() == pytest.approx(
            moco(outputs["projection"][0], outputs["target"][1], before, 0.07).item()
        )
        step(criterion, outputs)
        filled = B * (number + 1)
        assert torch.equal(criterion.queue[0], torch.cat([*keys[: number + 1], start[filled:]]))
    # It is full, and begins anew at its oldest keys.
    step(criterion, seen[3])
    assert torch.equal(criterion.queue[0], torch.cat([keys[3], keys[1], keys[2]]))
    step(criterion, seen[4])
    assert torch.equal(criterion.queue[0], torch.cat([keys[3], keys[4], keys[2]]))
    assert criterion.queue.data_ptr() == address


def test_more_keys_than_rows_leave_the_last_ones():
    criterion, outputs = build(size=B), draw_outputs(images=3 * B)
    step(criterion, outputs)
    assert torch.equal(criterion.queue[0], F.normalize(outputs["target"][1].detach(), dim=1)[-B:])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 10}, r"size=10: the queue takes the 4 keys .* multiple of 4 rows, such as 8"),
        ({"queries": ()}, r"queries=\[\]: expected numbers of different views, at least one"),
        ({"queries": (0, 0)}, r"queries=\[0, 0\]: expected numbers of different views"),
        ({"queries": (0, 2), "weights": (1.0,)}, r"weights=\[1.0\]: expected one for each of the queries \[0, 2\]"),
        ({"queries": (0, 2), "key": (1,)}, r"key=\[1\]: expected one view, or one for each of the queries"),
    ],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(UserError, match=message):
        build(**given)


def test_the_step_of_all_processes_has_to_divide_the_queue():
    with pytest.raises(UserError, match="the 24 keys of a forward pass"):
        QueueNCE(info(8, world=3), size=64)
    assert QueueNCE(info(8, world=2), size=64).queue.shape == (1, 64, D)
    # A dry run's is small.
    assert QueueNCE(info(8, cap=32), size=65536).queue.shape == (1, 32, D)


def test_a_view_that_is_not_drawn():
    with pytest.raises(UserError, match="reads 'target' of the views 5 .counted from 0., but views .* draws 2"):
        trainer("model={momentum: 0.9}", "criterion={name: queue_nce, key: 5, size: 1024}")


def largest_allocation(criterion: QueueNCE, outputs) -> int:
    """Bytes of the largest allocation of one operation, forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        criterion(outputs, BATCH, PROGRESS).total.backward()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_no_tensor_of_images_by_queue():
    images, rows = 128, 65536
    criterion = QueueNCE(info(images), size=rows)
    outputs = {name: [z.detach().float().requires_grad_() for z in v] for name, v in draw_outputs(0, images).items()}
    found = {}
    for backend in ("chunked", "reference"):
        with ops.use_backend(backend), ops.record() as ran:
            found[backend] = largest_allocation(criterion, outputs)
        assert {used for _, used in ran} == {backend}
    # The logits would have 32 MB.
    assert found["reference"] >= 4 * images * rows >= 3 * found["chunked"]
    with ops.record() as ran:
        criterion(outputs, BATCH, PROGRESS).total.backward()
    assert {used for _, used in ran} == {"chunked"}
