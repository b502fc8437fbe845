"""The Gaussian mixture's kernels as torch operators: fake tensors and gradients for every backend but the reference.

`posterior` is attention over prototypes. `crops` reads the prototypes for student and teacher at once, so that their
gradient, the largest tensor of such a loss, is made once: autograd would make one a reading and add them up.

Shapes: N rows, S student's and T teacher's rows, K prototypes, d embedding.
"""

from __future__ import annotations

import torch
from torch.library import custom_op

from .backend import function
from .chunked.gather import accumulator, piece, spans
from .gather_operators import apart
from .softmax_operators import lse, lse_backward


@custom_op(
    "ssl_ib::posterior",
    mutates_args=(),
    schema="(Tensor t, Tensor c, float temperature, Tensor? log_prior, bool detach_p, bool want_marginal, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def posterior(t, c, temperature, log_prior, detach_p, want_marginal, backend):
    """Logsumexp [N], mean prototype [N, d], entropy [N], mean log prior [N], mean posterior [K] (empty if unwanted)."""
    kernel = function("posterior", "posterior", backend, t)
    lse, mean, expected, marginal = kernel(t, c, temperature, log_prior, want_marginal)
    # The mean logit is the row's product with the mean prototype; rounding must not make an entropy negative.
    entropy = (lse - (t * mean).sum(dim=1) / temperature).clamp_(min=0)
    return lse, mean, entropy, expected, marginal / max(len(t), 1)


@posterior.register_fake
def _(t, c, temperature, log_prior, detach_p, want_marginal, backend):
    dtype, rows = accumulator(t.dtype), t.shape[0]
    shapes = (rows,), t.shape, (rows,), (rows,), (c.shape[0] if want_marginal else 0,)
    return tuple(t.new_empty(shape, dtype=dtype) for shape in shapes)


@custom_op(
    "ssl_ib::posterior_backward",
    mutates_args=(),
    schema="(Tensor t, Tensor c, float temperature, Tensor lse, Tensor? r, Tensor? h, Tensor? a, Tensor? v, Tensor? e, "
    "Tensor? u, Tensor? w, bool want_t, bool want_c, str backend) -> (Tensor, Tensor)",
)
def posterior_backward(t, c, temperature, lse, r, h, a, v, e, u, w, want_t, want_c, backend):
    """Gradients for a posterior p whose logits l receive p (a.c + e u + w + h l - r), and whose mean receives v."""
    kernel = function("posterior", "posterior_backward", backend, t)
    return apart(kernel(t, c, temperature, lse, r, h, a, v, e, u, w, want_t, want_c), (want_t, want_c))


@posterior_backward.register_fake
def _(t, c, temperature, lse, r, h, a, v, e, u, w, want_t, want_c, backend):
    return t.new_empty(t.shape if want_t else (0,)), c.new_empty(c.shape if want_c else (0,))


def _save_posterior(ctx, inputs, output):
    t, c, ctx.temperature, log_prior, ctx.detach_p, _, ctx.backend = inputs
    ctx.save_for_backward(t, c, log_prior, *output[:4])
    ctx.set_materialize_grads(False)


def _slopes(t, c, temperature, answers, log_prior, detach_p, backend, d_lse, d_mean, d_entropy, d_expected, d_marginal):
    """r, h, a, v, e, u, w of `posterior_backward`, from the gradients of the answers of `posterior` (None: unused)."""
    lse, mean, entropy, expected = answers
    a = None if detach_p else d_mean
    h = None if d_entropy is None else -d_entropy
    u = None if d_expected is None else log_prior
    e = None if u is None else d_expected
    w = None if d_marginal is None or d_marginal.numel() == 0 else d_marginal / max(len(t), 1)
    # r is the mean of all that, under p: the gradient of a softmax's logits adds up to 0 but for that of lse.
    parts = [] if d_lse is None else [-d_lse]
    parts += [] if a is None else [(a * mean).sum(dim=1)]
    parts += [] if h is None else [h * (lse - entropy)]
    parts += [] if e is None else [e * expected]
    if w is not None:
        parts.append(posterior(t, c, temperature, w, False, False, backend)[3])
    return sum(parts[1:], parts[0]) if parts else None, h, a, d_mean, e, u, w


def _posterior_gradient(ctx, *gradients):
    t, c, log_prior, *answers = ctx.saved_tensors
    want_t, want_c = ctx.needs_input_grad[:2]
    slopes = _slopes(t, c, ctx.temperature, answers, log_prior, ctx.detach_p, ctx.backend, *gradients)
    moved = want_t and slopes[0] is not None
    d_t, d_c = posterior_backward(t, c, ctx.temperature, answers[0], *slopes, moved, want_c, ctx.backend)
    return (_or_zeros(d_t if moved else None, t, want_t), d_c if want_c else None, *[None] * 5)


def _or_zeros(gradient, x, wanted):
    """The gradient to x, zeros where there is none, or None where it is not wanted."""
    return gradient if gradient is not None or not wanted else torch.zeros_like(x)


posterior.register_autograd(_posterior_gradient, setup_context=_save_posterior)


def _crops(s, t, c, tau_s, tau_t, log_prior, detach_p, want_marginal, with_mean, backend):
    """What `lse` gives for student's rows s [S, d], then what `posterior` gives for teacher's t [T, d]."""
    student = lse(s, c, tau_s, None, None, None, False, with_mean, backend)[:2]
    return *student, *posterior(t, c, tau_t, log_prior, detach_p, want_marginal, backend)


# Its parts are operators, with fakes of their own.
crops = custom_op(
    "ssl_ib::crops",
    _crops,
    mutates_args=(),
    schema="(Tensor s, Tensor t, Tensor c, float tau_s, float tau_t, Tensor? log_prior, bool detach_p, "
    "bool want_marginal, bool with_mean, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
crops.register_fake(_crops)


@custom_op(
    "ssl_ib::add_posterior_backward",
    mutates_args=("d_c",),
    schema="(Tensor(a!) d_c, Tensor t, Tensor c, float temperature, Tensor lse, Tensor? r, Tensor? h, Tensor? a, "
    "Tensor? v, Tensor? e, Tensor? u, Tensor? w, str backend) -> ()",
)
def add_posterior_backward(d_c, t, c, temperature, lse, r, h, a, v, e, u, w, backend):
    """Adds the gradient to the prototypes of `posterior_backward` to d_c [K, d], for some prototypes at a time."""
    step = piece(c) // (4 * max(c.shape[1], 1))
    # Whole tiles, and addresses that vectors of 16 bytes can be read at.
    for span in spans(len(c), step - step % 64 if step > 64 else step):
        some = c[span], temperature, lse, r, h, a, v, e, *(None if x is None else x[span] for x in (u, w))
        d_c[span].add_(posterior_backward(t, *some, False, True, backend)[1])


@add_posterior_backward.register_fake
def _(d_c, t, c, temperature, lse, r, h, a, v, e, u, w, backend):
    return None


def _save_crops(ctx, inputs, output):
    s, t, c, ctx.tau_s, ctx.tau_t, log_prior, ctx.detach_p, _, _, ctx.backend = inputs
    ctx.save_for_backward(s, t, c, log_prior, *output[:6])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _crops_gradient(ctx, d_lse, _, *gradients):
    s, t, c, log_prior, lse_s, mean_s, *answers = ctx.saved_tensors
    want_s, want_t, want_c = ctx.needs_input_grad[:3]
    d_s = d_t = d_c = None
    if d_lse is not None:
        no_masks, wanted = (None, None, None, False), (want_s, want_c)
        both = lse_backward(d_lse, lse_s, None, mean_s, s, c, ctx.tau_s, *no_masks, *wanted, ctx.backend)
        d_s, d_c = (x if want else None for x, want in zip(both, wanted, strict=True))
    if any(gradient is not None for gradient in gradients):
        slopes = _slopes(t, c, ctx.tau_t, answers, log_prior, ctx.detach_p, ctx.backend, *gradients)
        read = t, c, ctx.tau_t, answers[0], *slopes
        if d_c is not None:
            add_posterior_backward(d_c, *read, ctx.backend)
        wanted = want_t and slopes[0] is not None, want_c and d_c is None
        if any(wanted):
            both = posterior_backward(*read, *wanted, ctx.backend)
            d_t, d_c = (x if want else y for x, want, y in zip(both, wanted, (None, d_c), strict=True))
    found = (d_s, s, want_s), (d_t, t, want_t), (d_c, c, want_c)
    return (*(_or_zeros(*one) for one in found), *[None] * 7)


crops.register_autograd(_crops_gradient, setup_context=_save_crops)
