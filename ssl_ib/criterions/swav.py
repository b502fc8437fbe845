"""SwAV: each view predicts the balanced assignment of another (Caron et al., NeurIPS 2020).

Shapes: B images of this process, V views of which the first G are global crops, N rows, K prototypes, d embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import distributed
from ..config.hints import Count, Positive, PositiveInt
from ..config.registry import register_criterion
from ..models.prototypes import Prototypes
from ..part import Context, Criterion, RunInfo
from ..types import Batch, Loss, Progress
from .assignments import Assignments
from .crops import NumPrototypes, check_views, pairs, same_top


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assignments that use every prototype alike: scores [N, K] -> [N, K], whose rows are distributions.

    Over the rows of all processes. Source: SwAV, section 3.1 and appendix A (Cuturi, 2013).
    """
    # In logarithms, because exp(1 / 0.05) squared is near float32's end.
    log_q = scores.double() / epsilon
    for _ in range(iterations):
        top = distributed.largest_of(log_q.amax(dim=0))
        columns = distributed.all_reduce_sum((log_q - top).exp().sum(dim=0)).log() + top
        log_q = log_q - columns
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp().to(torch.promote_types(scores.dtype, torch.float32))


@register_criterion("swav")
class SwAV(Criterion):
    """Cross-entropy of a global view's Sinkhorn assignment with the softmax of every other view, mean over pairs.

    Reads `student`, unit vectors [B, d] of every view.

    K:             prototypes.   temperature: of the prediction.
    epsilon, iterations: of Sinkhorn's algorithm.
    queue:         rows of past embeddings a global view, over all processes, that help to balance the assignment (0:
                   none), used from `queue_epoch` on, once it is full.
    freeze_epochs: the prototypes do not learn before this epoch (SwAV: 1).

    Watched: the student's own assignments of the global views (`Assignments.watch`; the targets are balanced whatever
    it does), and `top_agreement`, the share of pairs of views whose likeliest prototype is the same in target and
    prediction.
    """

    requires = frozenset({"student"})

    def __init__(
        self,
        info: RunInfo,
        K: NumPrototypes = 3000,
        temperature: Positive = 0.1,
        epsilon: Positive = 0.05,
        iterations: PositiveInt = 3,
        queue: Count = 0,
        queue_epoch: Count = 15,
        freeze_epochs: Count = 1,
    ):
        super().__init__()
        check_views(info)
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.queue_epoch, self.freeze_epochs = queue_epoch, freeze_epochs
        width = info.width("student")
        self.num_global = info.global_views
        self.prototypes = Prototypes(K, width, tangent=False)
        self.assignments = Assignments(K)
        self.nats = self.assignments.nats
        rows = info.capped(queue)
        self.register_buffer("past", torch.zeros(self.num_global, rows, width))
        self.register_buffer("filled", torch.tensor(0))

    def forward(self, outputs: dict[str, list[Tensor]], batch: Batch, progress: Progress) -> Loss:
        student = outputs["student"]
        found = pairs(len(student), self.num_global)
        cosines = [self.prototypes(z) for z in student]
        past = self._past() if progress.epoch >= self.queue_epoch else None
        targets = []
        for number in range(self.num_global):
            scores = cosines[number].detach()
            if past is not None:
                scores = torch.cat([scores, self.prototypes(past[number]).detach()])
            targets.append(sinkhorn(scores, self.epsilon, self.iterations)[: len(student[number])])
        log_p = [F.log_softmax(c.float() / self.temperature, dim=1) for c in cosines]
        value = sum(-(targets[t] * log_p[s]).sum(dim=1).mean() for t, s in found) / len(found)
        loss = Loss.weighted(swav=(value, 1.0))
        p = torch.cat(log_p[: self.num_global]).detach().exp()
        watched = self.assignments.watch(torch.special.entr(p).sum(dim=1), p.mean(dim=0))
        loss.terms.update(watched, top_agreement=same_top(targets, log_p, found))
        return loss

    def _past(self) -> Tensor | None:
        """This process's share of the queue, [G, rows, d], or None until there is a full one."""
        rows = self.past.shape[1]
        if not rows or int(self.filled) < rows:
            return None
        return self.past[:, distributed.rank() :: distributed.world_size()]

    def after_forward(
        self, outputs: dict[str, list[Tensor]], batch: Batch, terms: dict[str, Tensor], ctx: Context
    ) -> None:
        self.assignments.update()
        rows = self.past.shape[1]
        if not rows:
            return
        # Every process keeps the rows of all, so that the main one's checkpoint has them.
        fresh = distributed.gather(torch.stack(outputs["student"][: self.num_global], dim=1)).unbind(dim=1)
        for queue, z in zip(self.past, fresh, strict=True):
            # The newest first; the oldest fall off the end.
            queue.copy_(torch.cat([z.to(queue.dtype), queue])[:rows])
        self.filled.add_(len(fresh[0])).clamp_(max=rows)

    def before_step(self, ctx: Context) -> None:
        if ctx.progress.epoch < self.freeze_epochs:
            self.prototypes.weight.grad = None

    def on_epoch_end(self, ctx: Context) -> None:
        self.assignments.end_epoch("swav", ctx.progress)
