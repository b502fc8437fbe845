"""InfoNCE against a queue of past keys: the loss of MoCo v1 and v2, and of InfoMin.

Shapes: b images of this process, B of all, K rows of the queue, d embedding.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .. import distributed, ops
from ..config.hints import Count, NonNegative, Positive, PositiveInt
from ..config.registry import register_criterion
from ..errors import UserError
from ..part import Context, Criterion, Nats, RunInfo
from ..types import Batch, Loss, Progress
from .pair import unit


@register_criterion("queue_nce")
class QueueNCE(Criterion):
    """Each query picks its image's key out of that key and the queue: cross-entropy of [q.k, q.queue] / temperature.

    Reads `projection` of the queries' views and `target` of the key's view, [b, d]; the key is a constant. After each
    batch its keys replace the oldest ones of the queue, which is the same in all processes. No b x K tensor is formed.
    Source: He et al., "Momentum Contrast", 2020, algorithm 1; several queries as in Tian et al., "What Makes for Good
    Views for Contrastive Learning", 2020, whose JigSaw query shares key and queue with the plain one.

    size:        K, the rows of the queue: a multiple of the images of a step over all processes. They start as random
                 unit vectors.
    queries:     numbers of the views that are queries, counted from 0.
    weights:     of the queries' losses; none for equal ones that add up to 1.
    key:         number of the view whose target is the positive and joins the queue; or one for each query, where
                 each view in the list has a queue of its own.
    temperature: divides the cosine similarity (0.07 with a linear head; MoCo v2 0.2; InfoMin 0.15).

    Watched: of the first query, `mi_nats`, log(K + 1) - its loss, a lower bound on the mutual information of query and
    key in nats, at most `mi_ceiling`, log(K + 1); and `positive_similarity`, its mean cosine with the key.
    """

    requires = frozenset({"projection", "target"})
    nats = {"mi_nats": Nats("lower bound", "what the first query and its key share", "mi_ceiling")}

    def __init__(
        self,
        info: RunInfo,
        size: PositiveInt = 65536,
        queries: tuple[Count, ...] = (0,),
        weights: tuple[NonNegative, ...] | None = None,
        key: Count | tuple[Count, ...] = 1,
        temperature: Positive = 0.07,
    ):
        super().__init__()
        self.queries, self.temperature = queries, temperature
        self.weights = check_queries(queries, weights)
        self.key = (key,) * len(queries) if isinstance(key, int) else key
        if len(self.key) != len(queries):
            raise UserError(f"key={list(key)}: expected one view, or one for each of the queries {list(queries)}")
        # The views that have a queue, in the order of the queues.
        self.views = tuple(sorted(set(self.key)))
        self.reads = {"projection": queries, "target": self.views}
        step, rows = info.batch_size * info.world_size, info.capped(size)
        if rows % step:
            raise UserError(
                f"size={size}: the queue takes the {step} keys of a forward pass at a time, so it needs a multiple of "
                f"{step} rows, such as {max(round(size / step), 1) * step}"
            )
        self.register_buffer("queue", unit(torch.randn(len(self.views), rows, info.width("target"))))
        self.register_buffer("oldest", torch.tensor(0))

    def forward(self, outputs: dict[str, list[Tensor]], batch: Batch, progress: Progress) -> Loss:
        queries = [unit(outputs["projection"][view]) for view in self.queries]
        keys = {view: unit(outputs["target"][view].detach()) for view in self.views}
        queues = dict(zip(self.views, self.queue, strict=True))
        losses = [
            ops.info_nce(query, queues[view], None, None, self.temperature, own=keys[view]).mean()
            for query, view in zip(queries, self.key, strict=True)
        ]
        candidates = self.queue.shape[1] + 1
        return weighted_queries(self.queries, losses, self.weights, candidates, queries[0], keys[self.key[0]])

    def after_forward(
        self, outputs: dict[str, list[Tensor]], batch: Batch, terms: dict[str, Tensor], ctx: Context
    ) -> None:
        size = self.queue.shape[1]
        for queue, view in zip(self.queue, self.views, strict=True):
            keys = distributed.gather(unit(outputs["target"][view]))[-size:]
            places = (self.oldest + torch.arange(len(keys), device=keys.device)) % size
            queue.index_copy_(0, places, keys.to(queue.dtype))
        self.oldest.add_(len(keys)).remainder_(size)


def check_queries(queries: tuple[int, ...], weights: tuple[float, ...] | None) -> tuple[float, ...]:
    """The weight of each query's loss. Raises UserError where there is no query, one twice, or no weight for each."""
    if not queries or len(set(queries)) < len(queries):
        raise UserError(f"queries={list(queries)}: expected numbers of different views, at least one")
    if weights is None:
        return (1 / len(queries),) * len(queries)
    if len(weights) != len(queries):
        raise UserError(f"weights={list(weights)}: expected one for each of the queries {list(queries)}")
    return weights


def weighted_queries(
    views: tuple[int, ...],
    losses: list[Tensor],
    weights: tuple[float, ...],
    candidates: int,
    first: Tensor,
    key: Tensor,
) -> Loss:
    """The loss of queries of these views, and what is watched of the first: its unit vectors and its keys', [b, d]."""
    names = [f"info_nce_{view}" for view in views]
    loss = Loss.weighted(**dict(zip(names, zip(losses, weights, strict=True), strict=True)))
    value, ceiling = losses[0].detach(), math.log(candidates)
    watched = {
        "mi_nats": ceiling - value,
        "mi_ceiling": torch.full_like(value, ceiling),
        "positive_similarity": (first.detach() * key).sum(dim=1).mean(),
    }
    return replace(loss, terms=loss.terms | watched)
