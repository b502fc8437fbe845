"""Attention over prototypes: the posterior of a mixture, its mean prototype and marginal, and their gradients.

The posterior p = softmax(t . c / temperature) [N, K] is never stored: every pass recomputes its tiles.

With the logits l[n, k] = t[n] . c[k] / temperature, the gradient of any loss of these answers is

    dl[n, k] = p[n, k] (a[n] . c[k] + e[n] u[k] + w[k] + h[n] l[n, k] - r[n])
    dt[n]    = sum_k dl[n, k] c[k] / temperature
    dc[k]    = sum_n dl[n, k] t[n] / temperature + p[n, k] v[n]

where every letter is None if its term is absent, and

    a [N, d]  the gradient of the mean prototype, to go through p; None where p is a constant in the mean
    v [N, d]  the same gradient, to go through the prototypes that the mean is of
    e [N]     the gradient of the expected log prior
    u [K]     the log prior itself
    w [K]     the gradient of the marginal
    h [N]     minus the gradient of the entropy
    r [N]     the mean under p[n] of the four terms before it, minus the gradient of the logsumexp

Shapes: N rows t, K prototypes c, d width; in the kernels X rows that programs own, Y rows that each walks over,
D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .softmax import (
    LOG2_E,
    add_product,
    first_unit,
    forward,
    inner_products,
    load_lse,
    load_tile,
    load_vector,
    outside,
    store_tile,
    summed,
)
from .variant import Variant, recording


@triton.jit(do_not_specialize=["X", "Y", "steps"])
def marginal(
    x_pointer,
    y_pointer,
    lse_pointer,
    out_pointer,
    X,
    Y,
    steps,
    inverse_temperature,
    D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
):
    """One part [S, X] of the posterior's sum over rows: x the prototypes, y the rows."""
    part = tl.program_id(2)
    x_start = tl.program_id(0) * BLOCK_X
    x_index = x_start + tl.arange(0, BLOCK_X)
    x = load_tile(x_pointer, x_start, X, 0, BLOCK_X, D, BLOCK_D)
    total = tl.zeros([BLOCK_X], dtype=tl.float32)
    first = part * steps * BLOCK_Y
    for start in range(first, tl.minimum(first + steps * BLOCK_Y, Y), BLOCK_Y):
        y_index = start + tl.arange(0, BLOCK_Y)
        y = load_tile(y_pointer, start, Y, 0, BLOCK_Y, D, BLOCK_D)
        products = inner_products(x, y, x_pointer, y_pointer, x_start, start, X, Y, D, STEP)
        lse = load_lse(lse_pointer, y_index, Y)[None, :]
        total += tl.sum(tl.exp2(products * (inverse_temperature * LOG2_E) - lse), axis=1)
    tl.store(out_pointer + tl.cast(part, tl.int64) * X + x_index, total, mask=x_index < X)


@triton.jit
def plain_score(logits, e, u, w, h, r):
    """e * u + w + h * logits - r, without the terms that are None."""
    score = tl.zeros_like(logits)
    if e is not None:
        score += e * u
    if w is not None:
        score += w
    if h is not None:
        score += h * logits
    if r is not None:
        score -= r
    return score


@triton.jit(do_not_specialize=["X", "Y", "steps"])
def row_gradient(
    x_pointer,
    y_pointer,
    a_pointer,
    a_unit_pointer,
    lse_pointer,
    r_pointer,
    h_pointer,
    e_pointer,
    u_pointer,
    w_pointer,
    out_pointer,
    X,
    Y,
    steps,
    inverse_temperature,
    D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
):
    """One part [S, X, D] of the gradient to the rows: x the rows, y the prototypes."""
    piece, part = tl.program_id(1), tl.program_id(2)
    x_start = tl.program_id(0) * BLOCK_X
    x_index = x_start + tl.arange(0, BLOCK_X)
    x = load_tile(x_pointer, x_start, X, piece, BLOCK_X, D, BLOCK_D)
    lse = load_lse(lse_pointer, x_index, X)[:, None]
    r = load_vector(r_pointer, x_index, X, 1)
    h = load_vector(h_pointer, x_index, X, 1)
    e = load_vector(e_pointer, x_index, X, 1)
    a_unit = load_vector(a_unit_pointer, x_index, X, 1)
    if a_pointer is not None:
        a = load_tile(a_pointer, x_start, X, piece, BLOCK_X, D, BLOCK_D)
    total = tl.zeros([BLOCK_X, BLOCK_D], dtype=tl.float32)
    unit = first_unit(BLOCK_X, x.dtype)
    first = part * steps * BLOCK_Y
    for start in range(first, tl.minimum(first + steps * BLOCK_Y, Y), BLOCK_Y):
        y_index = start + tl.arange(0, BLOCK_Y)
        y = load_tile(y_pointer, start, Y, piece, BLOCK_Y, D, BLOCK_D)
        products = inner_products(x, y, x_pointer, y_pointer, x_start, start, X, Y, D, STEP)
        p = tl.exp2(products * (inverse_temperature * LOG2_E) + outside(y_index, Y) - lse)
        u = load_vector(u_pointer, y_index, Y, 0)
        w = load_vector(w_pointer, y_index, Y, 0)
        score = plain_score(products * inverse_temperature, e, u, w, h, r)
        if a_pointer is not None:
            along = inner_products(a, y, a_pointer, y_pointer, x_start, start, X, Y, D, STEP)
            score += along if a_unit_pointer is None else along * a_unit
        total, unit = add_product(total, unit, p * score, y)
    total *= (unit * inverse_temperature)[:, None]
    store_tile(out_pointer, total, x_index, X, part, piece, D, BLOCK_D)


@triton.jit(do_not_specialize=["X", "Y", "steps"])
def prototype_gradient(
    x_pointer,
    y_pointer,
    a_pointer,
    a_unit_pointer,
    v_pointer,
    v_unit_pointer,
    lse_pointer,
    r_pointer,
    h_pointer,
    e_pointer,
    u_pointer,
    w_pointer,
    out_pointer,
    X,
    Y,
    steps,
    inverse_temperature,
    D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    V_IS_A: tl.constexpr,
    LOGITS_MATTER: tl.constexpr,
):
    """One part [S, X, D] of the gradient to the prototypes, through the logits and as values: x they, y the rows.

    V_IS_A: v is a, and read once. LOGITS_MATTER: there is a gradient to the logits, not to the values alone.
    """
    piece, part = tl.program_id(1), tl.program_id(2)
    x_start = tl.program_id(0) * BLOCK_X
    x_index = x_start + tl.arange(0, BLOCK_X)
    x = load_tile(x_pointer, x_start, X, piece, BLOCK_X, D, BLOCK_D)
    u = load_vector(u_pointer, x_index, X, 1)
    w = load_vector(w_pointer, x_index, X, 1)
    total = tl.zeros([BLOCK_X, BLOCK_D], dtype=tl.float32)
    unit = first_unit(BLOCK_X, x.dtype)
    first = part * steps * BLOCK_Y
    for start in range(first, tl.minimum(first + steps * BLOCK_Y, Y), BLOCK_Y):
        y_index = start + tl.arange(0, BLOCK_Y)
        y = load_tile(y_pointer, start, Y, piece, BLOCK_Y, D, BLOCK_D)
        products = inner_products(x, y, x_pointer, y_pointer, x_start, start, X, Y, D, STEP)
        p = tl.exp2(products * (inverse_temperature * LOG2_E) - load_lse(lse_pointer, y_index, Y)[None, :])
        if a_pointer is not None:
            a = load_tile(a_pointer, start, Y, piece, BLOCK_Y, D, BLOCK_D)
        if LOGITS_MATTER:
            r = load_vector(r_pointer, y_index, Y, 0)
            h = load_vector(h_pointer, y_index, Y, 0)
            e = load_vector(e_pointer, y_index, Y, 0)
            score = plain_score(products * inverse_temperature, e, u, w, h, r)
            if a_pointer is not None:
                along = inner_products(x, a, x_pointer, a_pointer, x_start, start, X, Y, D, STEP)
                score += along if a_unit_pointer is None else along * load_vector(a_unit_pointer, y_index, Y, 0)
            total, unit = add_product(total, unit, p * score * inverse_temperature, y)
        if v_pointer is not None:
            v = a if V_IS_A else load_tile(v_pointer, start, Y, piece, BLOCK_Y, D, BLOCK_D)
            if v_unit_pointer is not None:
                p *= load_vector(v_unit_pointer, y_index, Y, 0)
            total, unit = add_product(total, unit, p, v)
    store_tile(out_pointer, total * unit[:, None], x_index, X, part, piece, D, BLOCK_D)


def posterior(
    t: Tensor, c: Tensor, temperature: float, log_prior: Tensor | None, want_marginal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logsumexp [N], mean prototype [N, d], expected log prior [N], marginal [K]), float32, of t [N, d] and c [K, d].

    log_prior float32 [K]; without one its expectation is 0. The marginal is the posterior's sum over the rows, empty
    if not wanted. A log prior of -inf where p is 0 gives NaN.
    """
    lse, mean, expected = forward(t, c, temperature, log_prior)
    if log_prior is None:
        expected = torch.zeros_like(lse)
    total = lse.new_empty(0)
    if want_marginal:
        total = summed(marginal, torch.float32, False, temperature, x=c, y=t, lse=lse)
    return lse, mean, expected, total


def posterior_backward(
    t: Tensor,
    c: Tensor,
    temperature: float,
    lse: Tensor,
    r: Tensor | None,
    h: Tensor | None,
    a: Tensor | None,
    v: Tensor | None,
    e: Tensor | None,
    u: Tensor | None,
    w: Tensor | None,
    want_t: bool,
    want_c: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to t [N, d] and c [K, d] in their dtype, empty where not wanted.

    lse [N]: what `posterior` gave; r, h, a, v, e, u, w: as at the top of this file, float32; the term e u is absent
    without one of them. a and v are rounded to the dtype of t.
    """
    d_t, d_c = t.new_empty(0), c.new_empty(0)
    if e is None or u is None:
        e = u = None
    vectors = {"lse": lse, "r": r, "h": h, "e": e, "u": u, "w": w}
    logits_matter = any(x is not None for x in (r, h, a, e, w))
    tensors = vectors | _operand("a", a, t.dtype)
    if want_t and logits_matter:
        d_t = summed(row_gradient, t.dtype, True, temperature, x=t, y=c, **tensors)
    elif want_t:
        d_t = t.new_zeros(t.shape)
    if want_c:
        shared = v is not None and v is a
        tensors |= {"v": tensors["a"], "v_unit": tensors["a_unit"]} if shared else _operand("v", v, t.dtype)
        flags = {"V_IS_A": shared, "LOGITS_MATTER": logits_matter}
        d_c = summed(prototype_gradient, c.dtype, True, temperature, flags, x=c, y=t, **tensors)
    return d_t, d_c


def _operand(name: str, x: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """A float32 x [N, d] as an operand of the matrix units, and for float16, whose range is short, each row's unit."""
    unit = None
    if x is not None and dtype == torch.float16:
        unit = torch.linalg.vector_norm(x, ord=torch.inf, dim=1).clamp(min=1e-30)
        x = torch.div(x, unit[:, None], out=torch.empty_like(x, dtype=dtype))
    return {name: None if x is None else x.to(dtype), f"{name}_unit": unit}


def variants(capability: int) -> list[Variant]:
    """What a student-teacher loss compiles (constant rows, with and without a prior), and every term at once."""
    widths = ((torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float16, 256), (torch.float32, 128))
    with recording(capability) as listed:
        for dtype, width in widths:
            t = torch.empty(20000, width, dtype=dtype, device="meta")
            wide = torch.empty(20000, width, device="meta")
            n = torch.empty(20000, device="meta")
            posterior(t, t, 0.1, None, True)
            posterior(t, t, 0.1, n, False)
            posterior_backward(t, t, 0.1, n, None, None, None, wide, None, None, None, False, True)
            posterior_backward(t, t, 0.1, n, n, n, None, wide, None, None, None, False, True)
            posterior_backward(t, t, 0.1, n, n, n, wide, wide, n, n, n, True, True)
    return listed
