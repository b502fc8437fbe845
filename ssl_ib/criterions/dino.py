"""DINO: the student predicts the teacher's sharpened and centred assignment (Caron et al., ICCV 2021).

Shapes: B images, V student views of which the first G are also the teacher's, K prototypes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import distributed
from ..config.hints import Positive, Probability
from ..config.registry import register_criterion
from ..part import Context, Criterion, RunInfo
from ..types import Batch, Loss, Progress
from .assignments import Assignments
from .crops import check_views, pairs, same_top


@register_criterion("dino")
class DINO(Criterion):
    """Cross-entropy of softmax((teacher - centre) / tau_t) with softmax(student / tau_s), mean over pairs of views.

    Reads `student_logits` and `teacher_logits`, cosines with prototypes [B, K], which `model.prototypes=K` gives. A
    view is not compared with itself.

    tau_s, tau_t:    temperatures of student and teacher (DINO: 0.1; 0.04, or 0.04 rising to 0.07 over 30 epochs).
    center_momentum: of the running mean of the teacher's outputs, over all processes.

    Watched: the teacher's assignments (`Assignments.watch`), and `top_agreement`, the share of pairs of views whose
    likeliest prototype is the same.
    """

    requires = frozenset({"student_logits", "teacher_logits"})

    def __init__(
        self, info: RunInfo, tau_s: Positive = 0.1, tau_t: Positive = 0.04, center_momentum: Probability = 0.9
    ):
        super().__init__()
        check_views(info)
        self.tau_s, self.tau_t, self.center_momentum = tau_s, tau_t, center_momentum
        width = info.width("teacher_logits")
        self.register_buffer("center", torch.zeros(width))
        self.assignments = Assignments(width)
        self.nats = self.assignments.nats

    def forward(self, outputs: dict[str, list[Tensor]], batch: Batch, progress: Progress) -> Loss:
        student, teacher = outputs["student_logits"], outputs["teacher_logits"]
        targets = [((t.detach().float() - self.center) / self.tau_t).softmax(dim=1) for t in teacher]
        log_p = [F.log_softmax(s.float() / self.tau_s, dim=1) for s in student]
        found = pairs(len(student), len(teacher))
        value = sum(-(targets[t] * log_p[s]).sum(dim=1).mean() for t, s in found) / len(found)
        loss = Loss.weighted(dino=(value, 1.0))
        p = torch.cat(targets)
        watched = self.assignments.watch(torch.special.entr(p).sum(dim=1), p.mean(dim=0))
        loss.terms.update(watched, top_agreement=same_top(targets, log_p, found))
        return loss

    def after_forward(
        self, outputs: dict[str, list[Tensor]], batch: Batch, terms: dict[str, Tensor], ctx: Context
    ) -> None:
        mean = torch.cat(outputs["teacher_logits"]).to(self.center.dtype).mean(dim=0)
        self.center.lerp_(distributed.all_reduce_mean(mean), 1 - self.center_momentum)
        self.assignments.update()

    def on_epoch_end(self, ctx: Context) -> None:
        self.assignments.end_epoch("dino", ctx.progress)
