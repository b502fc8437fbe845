"""InfoNCE against a memory bank with a row for each training image: the loss of InstDis, PIRL and CMC.

Shapes: b images of this process, B of all, n training images, M negatives, d embedding.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import distributed, ops, random
from ..config.hints import Count, NonNegative, Positive, PositiveInt, Probability
from ..config.registry import register_criterion
from ..errors import UserError
from ..part import Context, Criterion, Nats, RunInfo
from ..types import Batch, Loss, Progress
from .pair import unit
from .queue_nce import check_queries, weighted_queries

#: Stream of the draws of negatives, apart from those of views (from 0) and masks (from 1000).
NEGATIVES = -2


@register_criterion("bank_nce")
class BankNCE(Criterion):
    """Each query picks its image's row out of a bank of past embeddings: cross-entropy of cosines / temperature.

    Reads `projection` [b, d] of the queries' views. A bank has one unit vector for each training image, found by the
    image's number; it starts at random, and after each batch the rows of its images move towards their new embeddings.
    All processes have the same banks. There is no held-out loss, since only training images have a row. A bank takes
    4 n d bytes, in memory and in checkpoints: 656 MB for ImageNet's 1,281,167 images and d = 128. Sources: Wu et al.,
    "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018 (queries [0], banks [0]); Misra and
    van der Maaten, "PIRL", 2020 (queries [0, 1], banks [0, 0], where view 1 is the jigsaw one); Tian, Krishnan and
    Isola, "Contrastive Multiview Coding", 2020 (queries [0, 1], banks [1, 0]).

    queries:       numbers of the views that are queries, counted from 0.
    banks:         for each query, the number of the view whose past embeddings it is compared with. Each view in this
                   list is a query too, and has a bank, which its own embeddings update.
    weights:       of the queries' losses; none for equal ones that add up to 1.
    negatives:     "all" other rows of the bank, or rows "sampled" from it.
    num_negatives: how many rows are sampled, with replacement. A step draws once for all its images, so an image's own
                   row may be among them.
    temperature:   divides the cosine similarity.
    momentum:      share of the old row in the new one, which is then scaled to length 1.

    Watched: of the first query, `mi_nats`, log(candidates) - its loss, a lower bound on the mutual information of the
    two views in nats, at most `mi_ceiling`, log(candidates); the candidates are the n rows, or num_negatives + 1; and
    `positive_similarity`, its mean cosine with the image's row.
    """

    requires = frozenset({"projection"})
    held_out = False
    nats = {"mi_nats": Nats("lower bound", "what the first query and its image's row share", "mi_ceiling")}

    def __init__(
        self,
        info: RunInfo,
        queries: tuple[Count, ...] = (0,),
        banks: tuple[Count, ...] = (0,),
        weights: tuple[NonNegative, ...] | None = None,
        negatives: Literal["all", "sampled"] = "sampled",
        num_negatives: PositiveInt = 65536,
        temperature: Positive = 0.07,
        momentum: Probability = 0.5,
    ):
        super().__init__()
        self.queries, self.banks, self.temperature, self.momentum = queries, banks, temperature, momentum
        self.weights = check_queries(queries, weights)
        if len(banks) != len(queries):
            raise UserError(f"banks={list(banks)}: expected one view for each of the queries {list(queries)}")
        if idle := sorted(set(banks) - set(queries)):
            raise UserError(
                f"banks={list(banks)}: the views {', '.join(map(str, idle))} are no queries, so that what embeds them "
                "would learn nothing: expected banks of views that are queries too"
            )
        self.negatives, self.num_negatives = negatives, info.capped(num_negatives)
        # The views that have a bank, in the order of the banks.
        self.views = tuple(sorted(set(banks)))
        self.reads = {"projection": queries}
        # Without a source there are no images, which is a problem of its own.
        rows = torch.randn(len(self.views), max(info.images(), 1), info.width("projection"))
        self.register_buffer("bank", unit(rows))

    def forward(self, outputs: dict[str, list[Tensor]], batch: Batch, progress: Progress) -> Loss:
        queries = [unit(outputs["projection"][view]) for view in self.queries]
        rows = dict(zip(self.views, self.bank, strict=True))
        positives = [rows[view][batch.index] for view in self.banks]
        # Against all rows, an image's own is taken out of the columns, because it is there as the positive.
        itself, candidates = batch.index, self.bank.shape[1]
        if self.negatives == "sampled":
            chosen = self._sampled(progress)
            itself, candidates, rows = None, len(chosen) + 1, {view: bank[chosen] for view, bank in rows.items()}
        losses = [
            ops.info_nce(query, rows[view], None, None, self.temperature, itself, positive).mean()
            for query, view, positive in zip(queries, self.banks, positives, strict=True)
        ]
        return weighted_queries(self.queries, losses, self.weights, candidates, queries[0], positives[0])

    def _sampled(self, progress: Progress) -> Tensor:
        """Numbers of the negatives of a step, the same in all processes: int64 [M]."""
        zero = torch.zeros(1, dtype=torch.int64, device=self.bank.device)
        key = random.image_keys(progress.seed, progress.step, zero, NEGATIVES)
        return random.randint(key, self.num_negatives, self.bank.shape[1])[0]

    def after_forward(
        self, outputs: dict[str, list[Tensor]], batch: Batch, terms: dict[str, Tensor], ctx: Context
    ) -> None:
        index = distributed.gather(batch.index)
        # An image may be in a batch twice: its first embedding counts, wherever it is written.
        first = (index[:, None] == index).int().argmax(dim=1)
        for bank, view in zip(self.bank, self.views, strict=True):
            fresh = distributed.gather(unit(outputs["projection"][view])).to(bank.dtype)[first]
            bank.index_copy_(0, index, unit(fresh.lerp(bank[index], self.momentum)))
