"""What the softmax kernels share: tiles, inner products, weighted sums, and the forward pass.

Every kernel here has the shape of flash attention with the values equal to the keys. A program owns BLOCK_X rows of x
and one piece, BLOCK_D wide, of an output; it walks over y in steps of BLOCK_Y rows, recomputes that tile's logits,
turns them into weights, and adds weights @ y to what it accumulates. No X x Y tensor is ever stored, nothing is added
to by two programs, and every sum has a fixed order: answers repeat bit for bit.

Shapes: X rows that programs own, Y rows that each walks over, D width of both, S parts that the walk is split into.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import row_tile
from .tiling import WORKSPACE, Grid, Tiles, grid, tiles
from .variant import launch

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
INFINITY: tl.constexpr = tl.constexpr(float("inf"))

#: Logits within this bound, in powers of two, need no maximum: sums of 2^40 weights, and weights that are small beside
#: them, are inside float32. Unit vectors stay within it where 2 / temperature < 87, a temperature of 0.023 or more.
SAFE: tl.constexpr = tl.constexpr(64.0)

#: Triton's interpreter takes the bits of bfloat16 for integers when it multiplies matrices.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)

#: The tensors [..., D] that the kernels read.
OPERANDS = ("x", "y", "a", "v", "x_mean")

#: Float16 overflows at 2**16 and loses what is below 2**-24: weights are brought up to 2**14 before they become one.
FLOAT16_TOP: tl.constexpr = tl.constexpr(2.0**14)


@triton.jit
def load_tile(pointer, start, length, piece, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] of a contiguous [length, D]: rows `start` and on, columns piece * BLOCK_D on; zeros outside."""
    row, column = tl.arange(0, BLOCK), piece * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < length - start)[:, None]
    if D % BLOCK_D != 0:
        inside = inside & (column < D)[None, :]
    # Only the beginning of a tile can lie beyond 2**31 numbers.
    return tl.load(
        pointer + tl.cast(start, tl.int64) * D + (row[:, None] * D + column[None, :]), mask=inside, other=0.0
    )


@triton.jit
def store_tile(pointer, values, index, length, part, piece, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes `values` where `load_tile` would read them, in part `part` of [S, length, D]."""
    column = piece * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.cast(part, tl.int64) * length + index
    inside = (index < length)[:, None] & (column < D)[None, :]
    tl.store(pointer + row[:, None] * D + column[None, :], values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_vector(pointer, index, length, axis: tl.constexpr):
    """[len(index)] of a [length] with zeros outside, and a new dimension `axis`; None without a pointer."""
    vector = None
    if pointer is not None:
        vector = tl.expand_dims(tl.load(pointer + index, mask=index < length, other=0), axis)
    return vector


@triton.jit
def load_index(pointer, index, length, axis: tl.constexpr):
    """What `load_vector` loads, as int32: what int32 cannot hold names no row or column, and becomes -1."""
    vector = load_vector(pointer, index, length, axis)
    if vector is not None:
        if vector.dtype == tl.int64:
            vector = tl.where((vector < 0) | (vector > 0x7FFFFFFF), -1, vector).to(tl.int32)
    return vector


@triton.jit
def load_lse(pointer, index, length):
    """[len(index)] logsumexps in powers of two; +inf outside and for empty rows, so that exp2(logit - lse) is 0."""
    lse = tl.load(pointer + index, mask=index < length, other=-INFINITY)
    return tl.where(lse == -INFINITY, INFINITY, lse * LOG2_E)


@triton.jit
def outside(index, length):
    """[1, len(index)] to add to logits: -inf where the index is not below `length`, so that exp2 gives 0; else 0."""
    return tl.where(index < length, 0.0, -INFINITY)[None, :]


@triton.jit
def dot(x, y, total):
    """total + x @ y, in float32 and for float32 operands with its accuracy."""
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="tf32x3")


@triton.jit
def inner_products(x, y, x_pointer, y_pointer, x_start, y_start, X, Y, D: tl.constexpr, STEP: tl.constexpr):
    """x @ y.T in float32, [BLOCK_X, BLOCK_Y]: of the tiles where they are whole rows, else read in steps of D."""
    products = tl.zeros([x.shape[0], y.shape[0]], dtype=tl.float32)
    if D <= STEP:
        products = dot(x, tl.trans(y), products)
    else:
        for step in range(tl.cdiv(D, STEP)):
            x_step = load_tile(x_pointer, x_start, X, step, x.shape[0], D, STEP)
            y_step = load_tile(y_pointer, y_start, Y, step, y.shape[0], D, STEP)
            products = dot(x_step, tl.trans(y_step), products)
    return products


@triton.jit
def first_unit(BLOCK_X: tl.constexpr, dtype: tl.constexpr):
    """The unit that `add_product` starts from: 1, or for float16 below any weight that matters, and not 0."""
    return tl.full([BLOCK_X], 1e-30 if dtype == tl.float16 else 1.0, dtype=tl.float32)


@triton.jit
def add_product(total, unit, weights, y):
    """Adds weights @ y to a sum kept as total * unit[:, None]; returns the new total and unit.

    The unit stays 1 but for float16, whose few exponent bits would lose small weights: there it follows the largest
    weight of each row so far, as an online softmax follows the largest logit.
    """
    if y.dtype == tl.float16:
        larger = tl.maximum(unit, tl.max(tl.abs(weights), axis=1) / FLOAT16_TOP)
        weights = weights * (1.0 / larger)[:, None]
        total = total * (unit / larger)[:, None]
        unit = larger
    return dot(weights.to(y.dtype), y, total), unit


@triton.jit
def label_range(label, there):
    """The least and the greatest label of those that are there: scalars."""
    far = 0x7FFFFFFFFFFFFFFF if label.dtype == tl.int64 else 0x7FFFFFFF
    return tl.min(tl.where(there, label, far), axis=0), tl.max(tl.where(there, label, -far), axis=0)


@triton.jit
def meet(low, high, label, there):
    """Whether labels may equal one between low and high. Labels in order let most tiles be passed over."""
    least, greatest = label_range(label, there)
    return (least <= high) & (greatest >= low)


@triton.jit
def same_label(x_label, y_label, y_there):
    """[BLOCK_X, BLOCK_Y]: the pairs of one label; x_label [BLOCK_X], y_label and y_there [BLOCK_Y]."""
    return (x_label[:, None] == y_label[None, :]) & y_there[None, :]


@triton.jit
def squared_lengths(pointer, start, length, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """[ROWS] of a [length, D]; zeros outside, and infinity where a number is none."""
    total = tl.zeros([ROWS], dtype=tl.float32)
    for piece in range(tl.cdiv(D, BLOCK_D)):
        tile = load_tile(pointer, start, length, piece, ROWS, D, BLOCK_D).to(tl.float32)
        total += tl.sum(tile * tile, axis=1)
    return tl.where(total == total, total, INFINITY)


@triton.jit(do_not_specialize=["X", "Y"])
def longest_kernel(
    x_pointer,
    y_pointer,
    bound_pointer,
    X,
    Y,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Raises bound[0] to the greatest squared length of rows of x, and bound[1] to that of y (None: y is x).

    bound int32 [2], zeros at first. It holds the bits of float32 numbers, which are ordered as the numbers are: the
    order in which programs come changes nothing.
    """
    blocks = tl.cdiv(X, ROWS)
    block = tl.program_id(0)
    if y_pointer is None:
        greatest = tl.max(squared_lengths(x_pointer, block * ROWS, X, D, ROWS, BLOCK_D), axis=0)
        tl.atomic_max(bound_pointer, greatest.to(tl.int32, bitcast=True))
        tl.atomic_max(bound_pointer + 1, greatest.to(tl.int32, bitcast=True))
    elif block < blocks:
        greatest = tl.max(squared_lengths(x_pointer, block * ROWS, X, D, ROWS, BLOCK_D), axis=0)
        tl.atomic_max(bound_pointer, greatest.to(tl.int32, bitcast=True))
    else:
        greatest = tl.max(squared_lengths(y_pointer, (block - blocks) * ROWS, Y, D, ROWS, BLOCK_D), axis=0)
        tl.atomic_max(bound_pointer + 1, greatest.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["X", "Y", "steps"])
def softmax_forward(
    x_pointer,
    y_pointer,
    prior_pointer,
    self_pointer,
    x_label_pointer,
    y_label_pointer,
    bound_pointer,
    lse_pointer,
    mean_pointer,
    expected_pointer,
    X,
    Y,
    steps,
    inverse_temperature,
    D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """One part's logsumexp [S, X], mean of y [S, X, D], expectation of the prior [S, X]; the last two may be None.

    bound [2]: what `longest_kernel` found. A BOUNDED kernel takes no maximum, and runs where the bound keeps every
    logit within SAFE; the other one runs where it does not, and everywhere without a bound.
    """
    if bound_pointer is not None:
        x_longest = tl.load(bound_pointer).to(tl.float32, bitcast=True)
        y_longest = tl.load(bound_pointer + 1).to(tl.float32, bitcast=True)
        bounded = tl.sqrt(x_longest) * tl.sqrt(y_longest) * (inverse_temperature * LOG2_E) <= SAFE
        if bounded != BOUNDED:
            return
    piece, part = tl.program_id(1), tl.program_id(2)
    x_start = tl.program_id(0) * BLOCK_X
    x_index = x_start + tl.arange(0, BLOCK_X)
    x = load_tile(x_pointer, x_start, X, piece, BLOCK_X, D, BLOCK_D)
    # Float16's weights all carry this power of two, which cancels in the end.
    headroom = 14.0 if x.dtype == tl.float16 and not BOUNDED else 0.0
    highest = tl.full([BLOCK_X], 0.0 if BOUNDED else -INFINITY, dtype=tl.float32)
    total = tl.zeros([BLOCK_X], dtype=tl.float32)
    expected = tl.zeros([BLOCK_X], dtype=tl.float32)
    mean = tl.zeros([BLOCK_X, BLOCK_D], dtype=tl.float32)
    own = load_index(self_pointer, x_index, X, 1)
    x_label = load_vector(x_label_pointer, x_index, X, 1)
    first = part * steps * BLOCK_Y
    for start in range(first, tl.minimum(first + steps * BLOCK_Y, Y), BLOCK_Y):
        y_index = start + tl.arange(0, BLOCK_Y)
        y = load_tile(y_pointer, start, Y, piece, BLOCK_Y, D, BLOCK_D)
        products = inner_products(x, y, x_pointer, y_pointer, x_start, start, X, Y, D, STEP)
        logits = products * (inverse_temperature * LOG2_E) + outside(y_index, Y)
        if self_pointer is not None:
            logits = tl.where(own == y_index[None, :], -INFINITY, logits)
        if x_label_pointer is not None:
            logits = tl.where(x_label == load_vector(y_label_pointer, y_index, Y, 0), -INFINITY, logits)
        if BOUNDED:
            weights = tl.exp2(logits)
        else:
            higher = tl.maximum(highest, tl.max(logits, axis=1))
            # A row that has met nothing yet has no maximum to subtract.
            base = tl.where(higher == -INFINITY, 0.0, higher) - headroom
            weights = tl.exp2(logits - base[:, None])
            shrink = tl.exp2(highest - headroom - base)
            total *= shrink
            expected *= shrink
            mean *= shrink[:, None]
            highest = higher
        total += tl.sum(weights, axis=1)
        if prior_pointer is not None:
            expected += tl.sum(weights * load_vector(prior_pointer, y_index, Y, 0), axis=1)
        if mean_pointer is not None:
            mean = dot(weights.to(y.dtype), y, mean)

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    if piece == 0:
        row, inside = tl.cast(part, tl.int64) * X + x_index, x_index < X
        lse = tl.where(empty, -INFINITY, (highest - headroom + tl.log2(total)) * LN_2)
        tl.store(lse_pointer + row, lse, mask=inside)
        if prior_pointer is not None:
            tl.store(expected_pointer + row, expected / total, mask=inside)
    if mean_pointer is not None:
        store_tile(mean_pointer, mean / total[:, None], x_index, X, part, piece, D, BLOCK_D)


@triton.jit(do_not_specialize=["X", "S"])
def merge_parts(
    lse_parts_pointer,
    mean_parts_pointer,
    expected_parts_pointer,
    lse_pointer,
    mean_pointer,
    expected_pointer,
    X,
    S,
    D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The parts of `softmax_forward` [S, ...] as one: each counts by its share of the whole sum."""
    piece = tl.program_id(1)
    x_start = tl.program_id(0) * BLOCK_X
    x_index = x_start + tl.arange(0, BLOCK_X)
    inside = x_index < X
    highest = tl.full([BLOCK_X], -INFINITY, dtype=tl.float32)
    for part in range(S):
        lse = tl.load(lse_parts_pointer + tl.cast(part, tl.int64) * X + x_index, mask=inside, other=-INFINITY)
        highest = tl.maximum(highest, lse)
    base = tl.where(highest == -INFINITY, 0.0, highest)
    total = tl.zeros([BLOCK_X], dtype=tl.float32)
    expected = tl.zeros([BLOCK_X], dtype=tl.float32)
    mean = tl.zeros([BLOCK_X, BLOCK_D], dtype=tl.float32)
    for part in range(S):
        row = tl.cast(part, tl.int64) * X + x_index
        share = tl.exp(tl.load(lse_parts_pointer + row, mask=inside, other=-INFINITY) - base)
        total += share
        if expected_pointer is not None:
            expected += share * tl.load(expected_parts_pointer + row, mask=inside, other=0.0)
        if mean_pointer is not None:
            mean += share[:, None] * load_tile(
                mean_parts_pointer + tl.cast(part, tl.int64) * X * D, x_start, X, piece, BLOCK_X, D, BLOCK_D
            )
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    if piece == 0:
        tl.store(lse_pointer + x_index, tl.where(empty, -INFINITY, base + tl.log(total)), mask=inside)
        if expected_pointer is not None:
            tl.store(expected_pointer + x_index, expected / total, mask=inside)
    if mean_pointer is not None:
        store_tile(mean_pointer, mean / total[:, None], x_index, X, 0, piece, D, BLOCK_D)


def forward(
    rows: Tensor,
    cols: Tensor,
    temperature: float,
    log_prior: Tensor | None = None,
    self_index: Tensor | None = None,
    row_label: Tensor | None = None,
    col_label: Tensor | None = None,
    with_mean: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logsumexp [N], mean column [N, d] or empty, expected log prior [N] or empty) of rows [N, d], cols [M, d].

    Pairs of one label are left out.
    """
    num_rows, width = rows.shape
    float32 = {"dtype": torch.float32, "device": rows.device}
    lse = torch.empty(num_rows, **float32)
    mean = torch.empty((num_rows, padded_width(width)) if with_mean else (0,), **float32)
    expected = torch.empty(0 if log_prior is None else num_rows, **float32)
    if len(cols) == 0 or num_rows == 0:
        return lse.fill_(-torch.inf), mean.zero_()[..., :width].contiguous(), expected.zero_()
    bound = None
    if rows.dtype != torch.float16 or not with_mean:
        bound = longest(rows, None if rows is cols else cols)
    # Without a bound: float16 cannot hold the weights of a mean of which no maximum was taken.
    sizes = tiles("softmax_forward" if with_mean else "logsumexp", rows.dtype, width, rows.device)
    walk = grid(num_rows, len(cols), width if with_mean else 0, sizes, rows.device)
    whole = {"lse": lse, "mean": mean if with_mean else None, "expected": None if log_prior is None else expected}
    parts = whole
    if walk.parts > 1:
        parts = {name: None if x is None else x.new_empty(walk.parts, *x.shape) for name, x in whole.items()}
    tensors = {"prior": log_prior, "self": self_index, "x_label": row_label, "y_label": col_label, "bound": bound}
    tensors |= {"x": rows, "y": cols}
    for bounded in (False,) if bound is None else (True, False):
        launch_walk(softmax_forward, walk, sizes, temperature, {"BOUNDED": bounded}, **tensors, **parts)
    if walk.parts > 1:
        _merge(parts, whole, sizes.block_d)
    return lse, mean[..., :width].contiguous(), expected


def longest(x: Tensor, y: Tensor | None) -> Tensor:
    """The greatest squared lengths of rows of x [X, D] and of y [Y, D] (None: of x again), as `longest_kernel` does."""
    x, y = x.contiguous(), None if y is None else y.contiguous()
    bound = torch.zeros(2, dtype=torch.int32, device=x.device)
    tile = row_tile(x.shape[1], 8192)
    blocks = triton.cdiv(len(x), tile["ROWS"]) + (0 if y is None else triton.cdiv(len(y), tile["ROWS"]))
    tensors = {"x_pointer": x, "y_pointer": y, "bound_pointer": bound}
    launch(longest_kernel, (blocks,), **tensors, X=len(x), Y=0 if y is None else len(y), **tile)
    return bound


def _merge(parts: dict[str, Tensor | None], whole: dict[str, Tensor | None], block_d: int) -> None:
    """Fills `whole` with what the parts make together."""
    num_parts, num_rows = parts["lse"].shape
    width = 1 if parts["mean"] is None else parts["mean"].shape[2]
    block_x = 16
    launch(
        merge_parts,
        (math.ceil(num_rows / block_x), math.ceil(width / block_d)),
        num_warps=4,
        num_stages=1,
        **{f"{name}_parts_pointer": tensor for name, tensor in parts.items()},
        **{f"{name}_pointer": tensor for name, tensor in whole.items()},
        X=num_rows,
        S=num_parts,
        D=width,
        BLOCK_X=block_x,
        BLOCK_D=block_d,
    )


def summed(
    kernel: Any,
    dtype: torch.dtype,
    wide: bool,
    temperature: float,
    integers: dict[str, int] | None = None,
    **tensors: Tensor | None,
) -> Tensor:
    """What a kernel gives whose parts add up, in `dtype`: [X, D] if wide, else [X]; zeros where there is no y."""
    x, y = tensors["x"], tensors["y"]
    num_x, width = x.shape
    shape = (num_x, padded_width(width)) if wide else (num_x,)
    if num_x == 0 or len(y) == 0:
        return x.new_zeros((num_x, width) if wide else (num_x,), dtype=dtype)
    sizes = tiles(kernel.fn.__name__, x.dtype, width, x.device)
    walk = grid(num_x, len(y), width if wide else 0, sizes, x.device, WORKSPACE // 2)
    out = x.new_empty((walk.parts, *shape), dtype=dtype if walk.parts == 1 else torch.float32)
    launch_walk(kernel, walk, sizes, temperature, integers, **tensors, out=out)
    answer = out[0] if walk.parts == 1 else out.sum(dim=0).to(dtype)
    return answer[:, :width].contiguous() if wide else answer


def launch_walk(
    kernel: Any,
    walk: Grid,
    sizes: Tiles,
    temperature: float,
    integers: dict[str, int] | None = None,
    **tensors: Tensor | None,
) -> None:
    """Launches a kernel whose programs walk over y; the tensors, x [X, D] and y [Y, D] among them, by name."""
    tensors |= {name: padded(x) for name, x in tensors.items() if name in OPERANDS and x is not None}
    for pair in (("x_label", "y_label"), ("x_drop", "y_drop")):
        if any(tensors.get(name) is None for name in pair):
            # One side's labels alone say nothing.
            tensors |= {name: None for name in pair if name in tensors}
    x, y = tensors["x"], tensors["y"]
    launch(
        kernel,
        walk.programs,
        sizes.num_warps,
        sizes.num_stages,
        **{f"{name}_pointer": None if tensor is None else tensor.contiguous() for name, tensor in tensors.items()},
        X=len(x),
        Y=len(y),
        steps=walk.steps,
        inverse_temperature=1 / temperature,
        D=x.shape[1],
        **sizes.constants,
        **(integers or {}),
    )


def padded_width(width: int) -> int:
    """The width that kernels see: rows begin on 16 bytes in every dtype, as the widest loads want."""
    return math.ceil(width / 8) * 8


def padded(x: Tensor) -> Tensor:
    """x [N, D] with columns of zeros up to `padded_width`; they change no inner product."""
    missing = padded_width(x.shape[1]) - x.shape[1]
    return torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()
