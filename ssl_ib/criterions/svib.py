"""SVIB: student and teacher agree on the assignment of their crops to a Gaussian mixture, with a bottleneck on it.

Shapes: B images, V student views of which the first G are also the teacher's, K prototypes, d embedding.
"""

from __future__ import annotations

import logging
import math
from typing import Literal

import torch
from torch import Tensor

from .. import distributed, ops
from ..config.hints import NonNegative, Positive, Probability
from ..config.registry import register_criterion
from ..errors import UserError
from ..models.prototypes import Prototypes
from ..part import Context, Criterion, Nats, RunInfo
from ..types import Batch, Loss, Progress
from .assignments import Assignments
from .crops import NumPrototypes, check_views, pairs

_logger = logging.getLogger(__name__)


@register_criterion("svib")
class SVIB(Criterion):
    """Cross-entropy of the teacher's assignment with the student's, plus beta times its divergence from a prior q.

    Reads `student` and `teacher`, unit vectors [B, d]. With unit prototypes c_k, p(k|z) is the softmax of
    z . c_k / tau; the cross-entropy is the mean over pairs of different views, the divergence that over the teacher's
    views. No B x K tensor is formed; a teacher's view is scored once. Source: SVIB, equations 17 to 20. With q uniform
    the loss is KL(p_t || p_s) + (1 - beta) H(p_t) + beta log K.

    K:               prototypes; at most as many as there are training images.
    sigma_s, sigma_t: widths of the mixture for student and teacher.
    tau_from:        the temperature is sigma squared ("sigma2"), or sigma itself.
    gauss_factor:    2 keeps the factor of (z - c)^2 = 2 - 2 z . c, which equation 20 leaves out.
    beta:            weight of the divergence; the paper's schedule is {from: 0.5, to: 0.01, shape: exponential}.
    kl_grad:         what the divergence moves: the "prototypes" (the teacher is a constant); the "student", whose
                     assignment of the global views it then scores, and the prototypes; or "none".
    ce_target_detach: the target of the cross-entropy is a constant; without it, the prototypes learn through it too.
    q:               "uniform", or the running mean of the teacher's assignments ("ema_marginal").
    reinit:          at the end of an epoch (but the last) the prototypes become features of random training images.
    reinit_src:      whose features; reinit_reset_opt: the optimiser forgets the old prototypes' moments.
    center:          subtracts the running mean of the teacher's cosines, as DINO does.
    usage_momentum:  of the running mean assignment, which q, the warnings and `dead_prototypes` read.

    Watched: the teacher's assignments (`Assignments.watch`), and `agreement`, the mean cosine of student and teacher
    over pairs.
    """

    requires = frozenset({"student", "teacher"})

    def __init__(
        self,
        info: RunInfo,
        K: NumPrototypes = 65536,
        sigma_s: Positive = 0.32,
        sigma_t: Positive = 0.2,
        tau_from: Literal["sigma2", "sigma"] = "sigma2",
        gauss_factor: Literal[1, 2] = 1,
        beta: NonNegative = 0.5,
        kl_grad: Literal["prototypes", "student", "none"] = "prototypes",
        ce_target_detach: bool = True,
        q: Literal["uniform", "ema_marginal"] = "uniform",
        reinit: bool = True,
        reinit_src: Literal["teacher", "student"] = "teacher",
        reinit_reset_opt: bool = True,
        center: bool = False,
        center_momentum: Probability = 0.9,
        usage_momentum: Probability = 0.99,
    ):
        super().__init__()
        check_views(info)
        self.sigma_s, self.sigma_t, self.tau_from, self.gauss_factor = sigma_s, sigma_t, tau_from, gauss_factor
        self.beta, self.kl_grad, self.ce_target_detach, self.q = beta, kl_grad, ce_target_detach, q
        self.reinit, self.reinit_src, self.reinit_reset_opt = reinit, reinit_src, reinit_reset_opt
        self.center, self.center_momentum, self.usage_momentum = center, center_momentum, usage_momentum
        images = info.images()
        if images and images < K:
            if images < 2:
                raise UserError(f"prototypes are made of images: expected at least 2 of them, got {images}")
            _logger.info("svib: %d prototypes in place of K=%d, one a training image", images, K)
        # A dry run does not embed an image for each of the paper's 65536.
        self.num_prototypes = info.capped(min(K, images) if images else K)
        width = info.width("student")
        self.prototypes = Prototypes(self.num_prototypes, width)
        self.register_buffer("mean_teacher", torch.zeros(width))
        self.assignments = Assignments(self.num_prototypes)
        told = Nats("upper bound", "what a view tells of its prototype")
        self.nats = {**self.assignments.nats, "kl_to_prior": told}

    def tau(self, sigma: float) -> float:
        """The temperature of a mixture of width sigma."""
        return (sigma**2 if self.tau_from == "sigma2" else sigma) / self.gauss_factor

    def forward(self, outputs: dict[str, list[Tensor]], batch: Batch, progress: Progress) -> Loss:
        student, teacher = outputs["student"], outputs["teacher"]
        prototypes, tau_s = self.prototypes.unit(), self.tau(self.sigma_s)
        log_prior = None if self.q == "uniform" else self.assignments.usage.clamp(min=1e-12).log()
        z = torch.cat([t.detach() for t in teacher]).to(prototypes.dtype)
        # (z - m) . c is the cosine less its running mean.
        z = z - self.mean_teacher if self.center else z
        taus = tau_s, self.tau(self.sigma_t)
        lse, means, entropy, expected, marginal = ops.gmm_crops(
            torch.cat(student), z, prototypes, *taus, log_prior, self.ce_target_detach
        )
        lse, means = lse.chunk(len(student)), means.chunk(len(teacher))
        found = pairs(len(student), len(teacher))
        cross_entropy = sum((lse[s] - (student[s] * means[t]).sum(dim=1) / tau_s).mean() for t, s in found) / len(found)
        if self.kl_grad == "student":
            seen = torch.cat(student[: len(teacher)])
            _, entropy_s, expected_s, _ = ops.gmm_posterior(seen, prototypes, tau_s, log_prior, marginal=False)
            divergence = self._divergence(entropy_s, expected_s)
        else:
            divergence = self._divergence(entropy, expected)
        divergence = divergence.detach() if self.kl_grad == "none" else divergence
        loss = Loss.weighted(cross_entropy=(cross_entropy, 1.0), kl_to_prior=(divergence, self.beta))
        agreement = sum((student[s] * teacher[t]).sum(dim=1).mean() for t, s in found) / len(found)
        loss.terms.update(self.assignments.watch(entropy, marginal), agreement=agreement.detach())
        return loss

    def _divergence(self, entropy: Tensor, expected_log_prior: Tensor) -> Tensor:
        """Mean KL divergence of assignments from q."""
        if self.q == "uniform":
            return math.log(self.num_prototypes) - entropy.mean()
        return -(entropy + expected_log_prior).mean()

    def after_forward(
        self, outputs: dict[str, list[Tensor]], batch: Batch, terms: dict[str, Tensor], ctx: Context
    ) -> None:
        self.assignments.update(self.usage_momentum)
        if self.center:
            mean = torch.cat(outputs["teacher"]).mean(dim=0).to(self.mean_teacher.dtype)
            self.mean_teacher.lerp_(distributed.all_reduce_mean(mean), 1 - self.center_momentum)

    def on_epoch_end(self, ctx: Context) -> None:
        """Says where the assignment has collapsed, keeps how it was spread, and makes new prototypes."""
        self.assignments.end_epoch("svib", ctx.progress)
        if self.reinit and ctx.progress.epoch + 1 < ctx.progress.total_epochs:
            self._reinitialise(ctx)

    def _reinitialise(self, ctx: Context) -> None:
        weight = self.prototypes.weight
        distributed.assign(weight, ctx.collect(self.reinit_src, self.num_prototypes, ctx.progress.epoch))
        self.prototypes.rescale()
        self.assignments.reset()
        if self.reinit_reset_opt:
            ctx.reset_optimizer_state(weight)
