"""Assignment of features to the components of a Gaussian mixture with equal weights and widths.

Between unit vectors a component's log-density is x . c / tau up to a constant, so the posterior is a softmax over
prototypes: p_k = exp(x . c_k / tau) / sum_j exp(x . c_j / tau). Nothing is normalised here. No backend but the
reference makes an N x K tensor.

Shapes: N rows, K prototypes, d embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from . import mixture_operators as operators
from . import softmax_operators
from .backend import ran
from .products import operands


def gmm_lse(x: Tensor, prototypes: Tensor, tau: float) -> Tensor:
    """Log-normaliser of the assignment, logsumexp over prototypes of x . c / tau: [N].

    x [N, d], prototypes [K, d] with K >= 1, tau > 0. The answer is float32 (float64 for float64 operands).
    Raises UserError for arguments that do not fit. Source: SVIB, equations 17 to 20.
    """
    _check("gmm_lse", x, prototypes, tau)
    backend, x, prototypes = operands("gmm_lse", x, prototypes)
    if backend == "reference":
        return _logits("gmm_lse", x, prototypes, tau).logsumexp(dim=1)
    with_mean = x.requires_grad and torch.is_grad_enabled()
    return softmax_operators.lse(x, prototypes, tau, None, None, None, False, with_mean, backend)[0]


def gmm_posterior(
    t: Tensor,
    prototypes: Tensor,
    tau: float,
    log_prior: Tensor | None = None,
    detach_p: bool = False,
    marginal: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a loss needs of the posterior p [N, K], without p: (mean, entropy, expected_log_prior, marginal).

    t [N, d], prototypes c [K, d] with K >= 1, tau > 0; log_prior [K], a constant. mean [N, d] is E_p[c], entropy [N] in
    nats, expected_log_prior [N] is E_p[log_prior] (0 without one), marginal [K] the mean of p over the rows, empty
    with marginal=False, which saves a third of the forward.
    With E_p[c], the cross-entropy of p with any student s is gmm_lse(s, c, tau_s) - s . mean / tau_s, and
    -entropy - expected_log_prior is the KL divergence from the prior.
    detach_p: p is a constant in the mean, whose gradient then reaches the prototypes as its values alone.
    Answers are float32 (float64 for float64 operands). Raises UserError for arguments that do not fit.
    Source: SVIB, equations 17 to 20.
    """
    _check("gmm_posterior", t, prototypes, tau)
    log_prior = _constant("gmm_posterior", log_prior, prototypes)
    return posterior(t, prototypes, tau, log_prior, detach_p, marginal)[1:]


def gmm_crops(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    tau_s: float,
    tau_t: float,
    log_prior: Tensor | None = None,
    detach_p: bool = False,
    marginal: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`gmm_lse` of the student's rows and `gmm_posterior` of the teacher's: (lse, mean, entropy, expected, marginal).

    student [S, d] and teacher [T, d]: crops of any number, in any order. The answers and gradients are those of the two
    ops, but the gradient to the prototypes, which may be larger than all else, is made once and not once a reading.
    Raises UserError for arguments that do not fit. Source: SVIB, equations 17 to 20.
    """
    _check("gmm_crops", student, prototypes, tau_s)
    _check("gmm_crops", teacher, prototypes, tau_t)
    log_prior = _constant("gmm_crops", log_prior, prototypes)
    backend, s, c = operands("gmm_lse", student, prototypes)
    backend_t, t, c_t = operands("gmm_posterior", teacher, prototypes)
    if "reference" in (backend, backend_t) or backend != backend_t or c.dtype != c_t.dtype:
        read = posterior(teacher, prototypes, tau_t, log_prior, detach_p, marginal)[1:]
        return gmm_lse(student, prototypes, tau_s), *read
    del c_t
    with_mean = student.requires_grad and torch.is_grad_enabled()
    answers = operators.crops(s, t, c, tau_s, tau_t, log_prior, detach_p, marginal, with_mean, backend)
    return answers[0], *answers[3:]


def gmm_assign(
    student: Tensor, teacher: Tensor, prototypes: Tensor, tau_s: float, tau_t: float, detach_p: bool = False
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the teacher's assignment with the student's, and the teacher's entropy: both [N], in nats.

    student, teacher [N, d], row by row a pair; prototypes [K, d]; detach_p: the teacher's assignment is a constant in
    the cross-entropy. For more than one student a teacher, use `gmm_crops`.
    Raises UserError for arguments that do not fit. Source: SVIB, equation 17.
    """
    check_pairs("gmm_assign", student, teacher)
    lse, mean, entropy, _, _ = gmm_crops(student, teacher, prototypes, tau_s, tau_t, None, detach_p, marginal=False)
    return lse - (student * mean).sum(dim=1) / tau_s, entropy


def check_pairs(op: str, student: Tensor, teacher: Tensor) -> None:
    """Raises UserError unless both have one shape."""
    if student.shape != teacher.shape:
        shapes = f"{list(student.shape)} and {list(teacher.shape)}"
        raise UserError(f"{op}: expected student and teacher of one shape, got {shapes}")


def _check(op: str, x: Tensor, prototypes: Tensor, tau: float) -> None:
    if x.ndim != 2:
        raise UserError(f"{op}: expected rows [N, d], got {list(x.shape)}")
    if prototypes.ndim != 2 or prototypes.shape[1] != x.shape[1] or len(prototypes) == 0:
        raise UserError(
            f"{op}: expected prototypes [K, {x.shape[1]}] with K of 1 or more, got {list(prototypes.shape)}"
        )
    if tau <= 0:
        raise UserError(f"{op}: expected a temperature above 0, got {tau}")


def _constant(op: str, log_prior: Tensor | None, prototypes: Tensor) -> Tensor | None:
    if log_prior is not None and log_prior.shape != (len(prototypes),):
        raise UserError(f"{op}: expected log_prior [{len(prototypes)}], got {list(log_prior.shape)}")
    # Kernels read numbers of the sums' dtype.
    return None if log_prior is None else log_prior.detach().to(torch.promote_types(prototypes.dtype, torch.float32))


def _logits(op: str, x: Tensor, prototypes: Tensor, tau: float) -> Tensor:
    ran(op, "reference")
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Autocast would round the logits to bfloat16: an error of some hundredths at small temperatures.
    with torch.autocast(x.device.type, enabled=False):
        return x.to(dtype) @ prototypes.to(dtype).T / tau


def posterior(
    t: Tensor, prototypes: Tensor, tau: float, log_prior: Tensor | None, detach_p: bool, marginal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logsumexp, mean, entropy, expected log prior, marginal)."""
    backend, t, prototypes = operands("gmm_posterior", t, prototypes)
    if backend != "reference":
        return operators.posterior(t, prototypes, tau, log_prior, detach_p, marginal, backend)
    logits = _logits("gmm_posterior", t, prototypes, tau)
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    with torch.autocast(t.device.type, enabled=False):
        mean = (p.detach() if detach_p else p) @ prototypes.to(p.dtype)
        expected = p.new_zeros(len(p)) if log_prior is None else p @ log_prior.to(p.dtype)
    average = p.sum(dim=0) / max(len(p), 1) if marginal else p.new_empty(0)
    return logits.logsumexp(dim=1), mean, -(p * log_p).sum(dim=1), expected, average
