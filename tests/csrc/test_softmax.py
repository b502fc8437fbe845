"""The softmax family's CUDA kernels, emulated, against float64 softmaxes over logits that are written out.

Shapes: N rows (t), M columns, K prototypes (c), d width.
"""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close, error

TEMPERATURE = 0.1
# Tiles are 64 x 64 or 64 x 32, pieces of the width 64, 128 or 256, and few rows make several splits.
SHAPES = [(70, 130, 8), (33, 150, 21), (1, 65, 64), (150, 40, 130), (20, 70, 300)]

pytestmark = pytest.mark.usefixtures("thread_order", "instructions", "_filled")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))
# With Hopper's instructions too. Of float32, which takes six products for one, test_shared.py multiplies a tile.
every_run = pytest.mark.parametrize(
    ("dtype", "instructions"),
    [(dtype, "mma") for dtype in DTYPES] + [(dtype, "wgmma") for dtype in DTYPES[1:]],
    indirect=["instructions"],
    ids=lambda x: str(x).removeprefix("torch."),
)


def every_shape_with(names, *values):
    """Every shape and every value is seen, not each with each: emulated threads are slow."""
    rounds = range(max(len(values), len(SHAPES)))
    cases = [(*SHAPES[i % len(SHAPES)], values[i % len(values)]) for i in rounds]
    return pytest.mark.parametrize(("num_rows", "num_cols", "width", names), cases)


@pytest.fixture
def instructions(request, csrc):
    """Which tensor-core instructions the emulated GPU has."""
    csrc.use_warpgroups(getattr(request, "param", "mma") == "wgmma")
    yield
    csrc.use_warpgroups(False)


@pytest.fixture
def _filled():
    """New memory holds NaN, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def unit(*shape, dtype, seed=0):
    return F.normalize(draw(*shape, seed=seed), dim=1).to(dtype)


def masks_of(which, num_rows, num_cols):
    """self_index, row_label, col_label and drop as kernels take them. Some labels are alike in one of two words."""
    self_index = integers(num_cols + 1, num_rows, seed=3) - 1 if "self" in which else None
    labels = [integers(4, n, seed=4).long() for n in (num_rows, num_cols)]
    labels = [x // 2 + (x % 2 << 40) for x in labels] if "label" in which or "drop" in which else [None, None]
    return self_index, *labels, "drop" in which


NO_MASKS = (None, None, None, False)


def write_out(rows, cols, temperature, self_index=None, row_label=None, col_label=None, drop=False):
    """The logits [N, M], minus infinity where left out."""
    logits = rows @ cols.T / temperature
    if self_index is not None:
        logits = logits.masked_fill(self_index[:, None] == torch.arange(len(cols)), -torch.inf)
    if drop:
        logits = logits.masked_fill(row_label[:, None] == col_label, -torch.inf)
    return logits


def positives_of(num_rows, num_cols, self_index=None, row_label=None, col_label=None, drop=False):
    """[N, M], 1 where a column is a positive of the row."""
    same = torch.zeros(num_rows, num_cols) if row_label is None else (row_label[:, None] == col_label).float()
    if self_index is not None:
        same[self_index[:, None] == torch.arange(num_cols)] = 0
    return same


def softmax(logits):
    """(lse [N], probabilities [N, M]); minus infinity and zeros for a row with nothing left."""
    lse = logits.logsumexp(dim=1)
    return lse, (logits - lse.masked_fill(lse.isinf(), 0.0)[:, None]).exp()


def compare(answers, written_out, *tensors, temperature=TEMPERATURE):
    """The answers (by name) against written_out(*tensors), in float32 and in float64, in the order of the names.

    Tensors that are None stay None. The dtype is that of the first.
    """
    plain, true = ([None if x is None else x.to(kind) for x in tensors] for kind in (torch.float32, torch.float64))
    for (name, answer), reference, truth in zip(answers.items(), written_out(*plain), written_out(*true), strict=True):
        if answer is not None:
            dtype, scale = tensors[0].dtype, 1.0 if name in ("lse", "mean") else 1 / temperature
            assert_close(name, answer, reference.to(answer.dtype), truth, dtype, 1 / temperature, scale)


@every_run
@every_shape_with("masks", "self and drop", "", "self", "label", "self and label", "", "drop")
def test_lse_and_its_gradients(csrc, num_rows, num_cols, width, masks, dtype):
    rows, cols = unit(num_rows, width, dtype=dtype), unit(num_cols, width, dtype=dtype, seed=1)
    masks, grad, pull = masks_of(masks, num_rows, num_cols), draw(num_rows, seed=2), draw(num_rows, seed=5)
    same = positives_of(num_rows, num_cols, *masks)
    labelled = masks[1] is not None

    def written_out(rows, cols, grad, pull):
        lse, p = softmax(write_out(rows, cols, TEMPERATURE, *masks))
        weights = (p * grad[:, None] + same.to(pull) * pull[:, None]) / TEMPERATURE
        count = same.sum(dim=1)
        positive = (same.to(pull) * (rows @ cols.T)).sum(dim=1) / TEMPERATURE / count.clamp(min=1)
        return lse, p @ cols, positive, count.to(pull), weights @ cols, weights.T @ rows

    def check(lse, mean, positive, count, drows, dcols):
        answers = {"lse": lse, "mean": mean, "positive": positive, "count": count, "drows": drows, "dcols": dcols}
        compare(answers, written_out, rows, cols, grad, pull)

    def positives(positive, count):
        assert labelled or positive.numel() == count.numel() == 0
        return (positive, count) if labelled else (None, None)

    lse, mean, *others = csrc.lse(rows, cols, TEMPERATURE, *masks, True)
    drows, dcols = csrc.lse_backward(grad, lse, pull, mean, rows, cols, TEMPERATURE, *masks, True, True)
    assert lse.dtype == mean.dtype == torch.float32 and drows.dtype == dcols.dtype == dtype
    check(lse, mean, *positives(*others), drows, dcols)
    lse_alone, empty, *others = csrc.lse(rows, cols, TEMPERATURE, *masks, False)
    drows_alone, nothing = csrc.lse_backward(grad, lse, pull, empty, rows, cols, TEMPERATURE, *masks, True, False)
    assert empty.numel() == nothing.numel() == 0
    check(lse_alone, None, *positives(*others), drows_alone, None)
    nothing, dcols_alone = csrc.lse_backward(grad, lse, pull, mean, rows, cols, TEMPERATURE, *masks, False, True)
    assert nothing.numel() == 0 and torch.equal(dcols_alone, dcols)


@every_run
@pytest.mark.parametrize(
    ("num_cols", "first", "num_rows", "width"), [(70, 0, 70, 8), (130, 37, 60, 64), (40, 5, 9, 300)]
)
@pytest.mark.parametrize("masks", ["self", "label", "self and drop"])
def test_symmetric_gradient(csrc, num_cols, first, num_rows, width, masks, dtype):
    points, grad, pull = unit(num_cols, width, dtype=dtype), draw(num_cols, seed=2), draw(num_cols, seed=5)
    self_index, label, _, drop = masks_of(masks, num_cols, num_cols)
    mine = slice(first, first + num_rows)
    same = positives_of(num_cols, num_cols, self_index, label, label)

    def written_out(points, grad, pull):
        lse, p = softmax(write_out(points, points, TEMPERATURE, self_index, label, label, drop))
        weights = (p * grad[:, None] + same.to(pull) * pull[:, None]) / TEMPERATURE
        return (((weights + weights.T) @ points)[mine],)

    lse, *_ = csrc.lse(points, points, TEMPERATURE, self_index, label, label, drop, False)

    def part(tensor):
        return None if tensor is None else tensor[mine]

    sides = (points[mine], points, grad[mine], lse[mine], pull[mine], grad, lse, pull, TEMPERATURE)
    drows = csrc.lse_backward_symmetric(*sides, part(self_index), self_index, part(label), label, drop, first)
    assert drows.dtype == dtype
    compare({"drows": drows}, written_out, points, grad, pull)


@every_dtype
def test_short_vectors_need_no_maximum_and_long_ones_get_it(csrc, dtype):
    """Around the bound, and far beyond what float32 holds without a maximum."""
    for length in (1.0, 5.0, 300.0):
        rows, cols = length * unit(70, 24, dtype=dtype), unit(130, 24, dtype=dtype, seed=1)

        def written_out(rows, cols):
            lse, p = softmax(write_out(rows, cols, TEMPERATURE))
            return lse, p @ cols

        lse, mean, *_ = csrc.lse(rows, cols, TEMPERATURE, *NO_MASKS, True)
        compare({"lse": lse, "mean": mean}, written_out, rows, cols, temperature=TEMPERATURE / length)


def test_symmetric_gradient_is_autograd_s(csrc):
    """Of the sum of all rows' logsumexps, to points that are rows and columns at once."""
    points, grad = draw(50, 20).double().requires_grad_(), draw(50, seed=2).double()
    itself = torch.arange(50)
    lse = write_out(points, points, 1.0, itself).logsumexp(dim=1)
    (expected,) = torch.autograd.grad((grad * lse).sum(), points)
    points, grad, lse = points.detach().float(), grad.float(), lse.detach().float()
    side = (grad, lse, None)
    answer = csrc.lse_backward_symmetric(points, points, *side, *side, 1.0, itself, itself, None, None, False, 0)
    assert error(answer, expected) < 1e-5 * expected.abs().max()


@every_run
@every_shape_with("with_prior", True, False, True, True, True)
def test_posterior(csrc, num_rows, num_cols, width, with_prior, dtype):
    t, c = unit(num_rows, width, dtype=dtype), unit(num_cols, width, dtype=dtype, seed=1)
    log_prior = draw(num_cols, seed=2).log_softmax(dim=0) if with_prior else None

    def written_out(t, c, log_prior):
        lse, p = softmax(write_out(t, c, TEMPERATURE))
        return lse, p @ c, torch.zeros_like(lse) if log_prior is None else p @ log_prior, p.sum(dim=0)

    answers = csrc.posterior(t, c, TEMPERATURE, log_prior, True)
    assert {x.dtype for x in answers} == {torch.float32}
    names = ("lse", "mean", "expected_log_prior", "marginal")
    compare(dict(zip(names, answers, strict=True)), written_out, t, c, log_prior)
    *alone, marginal = csrc.posterior(t, c, TEMPERATURE, log_prior, False)
    assert marginal.numel() == 0 and all(map(torch.equal, alone, answers[:3]))


@every_run
@every_shape_with("terms", "a v h e u w", "h", "v", "a v h e u w", "a v", "e u", "", "a", "w", "v h")
def test_posterior_gradients(csrc, num_rows, num_cols, width, terms, dtype):
    t, c = unit(num_rows, width, dtype=dtype), unit(num_cols, width, dtype=dtype, seed=1)
    shapes = {"a": (num_rows, width), "v": (num_rows, width), "h": (num_rows,), "e": (num_rows,), "r": (num_rows,)}
    shapes |= {"u": (num_cols,), "w": (num_cols,)}
    given = {
        name: draw(*shape, seed=i) * (0.1 if name == "h" else 1.0) if name in ("r", *terms.split()) else None
        for i, (name, shape) in enumerate(shapes.items(), start=2)
    }
    # The kernels may round these to the operands' dtype.
    given |= {name: given[name].to(dtype).float() for name in "av" if given[name] is not None}

    def written_out(t, c, a, v, h, e, r, u, w):
        logits = write_out(t, c, TEMPERATURE)
        p = softmax(logits)[1]
        slope = -r[:, None].expand_as(p)
        slope = slope + (0 if a is None else a @ c.T) + (0 if e is None else e[:, None] * u)
        slope = slope + (0 if w is None else w) + (0 if h is None else h[:, None] * logits)
        weights = p * slope / TEMPERATURE
        return weights @ c, weights.T @ t + (0 if v is None else p.T @ v)

    lse = csrc.posterior(t, c, TEMPERATURE, None, False)[0]
    order = [given[name] for name in ("r", "h", "a", "v", "e", "u", "w")]
    dt, dc = csrc.posterior_backward(t, c, TEMPERATURE, lse, *order, True, True)
    assert dt.dtype == dc.dtype == dtype
    compare({"dt": dt, "dc": dc}, written_out, t, c, *given.values())
    alone, nothing = csrc.posterior_backward(t, c, TEMPERATURE, lse, *order, True, False)
    assert torch.equal(alone, dt) and nothing.numel() == 0
    nothing, alone = csrc.posterior_backward(t, c, TEMPERATURE, lse, *order, False, True)
    assert torch.equal(alone, dc) and nothing.numel() == 0


@every_dtype
def test_gradients_of_small_upstream_gradients(csrc, dtype):
    """1e-5 times a probability of 1/60 is lost in float16, and so it must not be in between."""
    rows, cols, small = unit(90, 40, dtype=dtype), unit(60, 40, dtype=dtype, seed=1), 1e-5
    grad, a, v = draw(90, seed=2) * small, draw(90, 40, seed=3) * small, draw(90, 40, seed=4) * small
    lse, mean, *_ = csrc.lse(rows, cols, TEMPERATURE, *NO_MASKS, True)
    answers = [*csrc.lse_backward(grad, lse, None, mean, rows, cols, TEMPERATURE, *NO_MASKS, True, True)]
    answers += csrc.posterior_backward(
        rows, cols, TEMPERATURE, lse, grad, grad, a, v, grad, torch.ones(60), grad[:60], True, True
    )
    itself = torch.arange(90)
    answers += [
        csrc.lse_backward_symmetric(
            rows, rows, *(grad, lse, None) * 2, TEMPERATURE, itself, itself, None, None, False, 0
        )
    ]

    def written_out(rows, cols, grad, a, v, lse):
        logits = write_out(rows, cols, TEMPERATURE)
        p = (logits - lse[:, None]).exp()
        weights = p * grad[:, None] / TEMPERATURE
        yield from (weights @ cols, weights.T @ rows)
        slope = a @ cols.T + grad[:, None] + grad[:60] + grad[:, None] * logits - grad[:, None]
        yield from ((p * slope / TEMPERATURE) @ cols, (p * slope / TEMPERATURE).T @ rows + p.T @ v)
        itself = (write_out(rows, rows, TEMPERATURE, torch.arange(90)) - lse[:, None]).exp() * grad[:, None]
        yield (itself + itself.T) @ rows / TEMPERATURE

    tensors = [x.double() for x in (rows, cols, grad, a, v, lse)]
    for i, (answer, truth) in enumerate(zip(answers, written_out(*tensors), strict=True)):
        # Float16's smallest step is 6e-8: what rounding the answer costs.
        allowed = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype] * truth.abs().max() + 3e-8
        assert error(answer, truth) <= allowed, f"answer {i}: off by {error(answer, truth)}, allowed {allowed}"


@every_dtype
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_an_overflown_gradient_stays_one(csrc, bad, dtype):
    """Loss scaling looks for it."""
    rows, cols = unit(5, 8, dtype=dtype), unit(6, 8, dtype=dtype, seed=1)
    grad = torch.ones(5)
    grad[2] = bad
    lse, mean, *_ = csrc.lse(rows, cols, TEMPERATURE, *NO_MASKS, True)
    drows, dcols = csrc.lse_backward(grad, lse, None, mean, rows, cols, TEMPERATURE, *NO_MASKS, True, True)
    assert not drows[2].isfinite().any() and not dcols.isfinite().any()
    assert drows[[0, 1, 3, 4]].isfinite().all()
    rest = (None,) * 6
    dt, dc = csrc.posterior_backward(rows, cols, TEMPERATURE, lse, grad, *rest, True, True)
    assert not dt[2].isfinite().any() and not dc.isfinite().any()


@every_dtype
def test_rows_with_nothing_left(csrc, dtype):
    """Their logsumexp is minus infinity, and everything else exactly zero."""
    rows, cols = unit(70, 24, dtype=dtype), unit(130, 24, dtype=dtype, seed=1)
    row_label, col_label = torch.arange(70, dtype=torch.int32) % 2, torch.ones(130, dtype=torch.int32)
    masks, empty = (None, row_label, col_label, True), row_label == 1
    lse, mean, *_ = csrc.lse(rows, cols, TEMPERATURE, *masks, True)
    truth = write_out(rows.double(), cols.double(), TEMPERATURE).logsumexp(dim=1)
    assert (lse[empty] == -torch.inf).all() and (mean[empty] == 0).all()
    assert error(lse[~empty], truth[~empty]) < 1e-5
    drows, dcols = csrc.lse_backward(torch.ones(70), lse, None, mean, rows, cols, TEMPERATURE, *masks, True, True)
    assert (drows[empty] == 0).all() and (drows[~empty] != 0).any(dim=1).all() and (dcols != 0).any(dim=1).all()
    only_empty = torch.where(empty, 1.0, 0.0)
    # Even without the mask that made them so.
    for left_out in (masks, NO_MASKS):
        for mean_or_none in (mean, torch.empty(0)):
            parts = csrc.lse_backward(
                only_empty, lse, None, mean_or_none, rows, cols, TEMPERATURE, *left_out, True, True
            )
            assert all((part == 0).all() for part in parts)
    single = csrc.lse(rows[:1], cols[:1], TEMPERATURE, torch.zeros(1, dtype=torch.int64), None, None, False, True)
    assert single[0].item() == -torch.inf and (single[1] == 0).all()


@every_dtype
def test_nothing_at_all(csrc, dtype):
    rows, cols, none = unit(3, 8, dtype=dtype), unit(4, 8, dtype=dtype), NO_MASKS
    lse, mean, *_ = csrc.lse(rows, cols[:0], 1.0, *none, True)
    assert lse.tolist() == [-torch.inf] * 3 and torch.equal(mean, torch.zeros(3, 8))
    drows, dcols = csrc.lse_backward(torch.ones(3), lse, None, mean, rows, cols[:0], 1.0, *none, True, True)
    assert torch.equal(drows, torch.zeros_like(rows)) and dcols.shape == (0, 8)
    lse, mean, *_ = csrc.lse(rows[:0], cols, 1.0, *none, True)
    assert lse.shape == (0,) and mean.shape == (0, 8)
    drows, dcols = csrc.lse_backward(lse, lse, None, mean, rows[:0], cols, 1.0, *none, True, True)
    assert drows.shape == (0, 8) and torch.equal(dcols, torch.zeros_like(cols))
    sides = (lse, lse, None, torch.ones(4), torch.ones(4), None)
    drows = csrc.lse_backward_symmetric(rows[:0], cols, *sides, 1.0, *([None] * 4), False, 0)
    assert drows.shape == (0, 8) and drows.dtype == dtype
    lse, mean, expected, marginal = csrc.posterior(rows[:0], cols, 1.0, torch.zeros(4), True)
    assert lse.shape == expected.shape == (0,) and mean.shape == (0, 8) and torch.equal(marginal, torch.zeros(4))
    dt, dc = csrc.posterior_backward(rows[:0], cols, 1.0, lse, lse, *([None] * 6), True, True)
    assert dt.shape == (0, 8) and torch.equal(dc, torch.zeros_like(cols))


@every_dtype
@pytest.mark.parametrize(("length", "temperature"), [(1.0, 1e-4), (100.0, 1.0), (1e-3, 1e3)])
def test_extreme_logits(csrc, length, temperature, dtype):
    """Up to 1e4, far beyond what exponentials of float32 hold; and all alike."""
    rows, cols = unit(70, 16, dtype=dtype) * length, unit(100, 16, dtype=dtype, seed=1) * length
    grad = draw(70, seed=2)
    lse, mean, *_ = csrc.lse(rows, cols, temperature, *NO_MASKS, True)
    gradients = csrc.lse_backward(grad, lse, None, mean, rows, cols, temperature, *NO_MASKS, True, True)
    logits = write_out(rows.double(), cols.double(), temperature)
    true_lse, p = softmax(logits)
    largest = logits.abs().max().item()
    # A logit is a float32: it may be off by some roundings, and a probability by as much of itself.
    slack = 1e-6 * largest
    assert error(lse, true_lse) <= slack + 1e-6
    share = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype] + slack
    assert error(mean, p @ cols.double()) <= share * length
    weights = p * grad[:, None].double() / temperature
    for gradient, truth in zip(gradients, (weights @ cols.double(), weights.T @ rows.double()), strict=True):
        assert error(gradient, truth) <= 2 * share * truth.abs().max() + 6e-8


def test_operands_of_any_layout(csrc):
    """Strided, transposed, at odd addresses; indices of either width; gradients that are expanded."""
    rows, cols = unit(40, 24, dtype=torch.bfloat16), unit(50, 24, dtype=torch.bfloat16, seed=1)
    self_index, label = integers(50, 40, seed=3), integers(4, 50, seed=4)
    odd = torch.empty(40 * 24 + 1, dtype=torch.bfloat16)[1:].view(40, 24).copy_(rows)
    wide = torch.empty(50, 48, dtype=torch.bfloat16)[:, ::2].copy_(cols)
    tall = torch.empty(24, 50, dtype=torch.bfloat16).T.copy_(cols)
    masks = (self_index, label[:40], label, False)
    expected = csrc.lse(rows, cols, TEMPERATURE, *masks, True)
    for r, c in ((odd, wide), (odd, tall)):
        twisted = label.long().repeat_interleave(2)[::2][:40]
        answer = csrc.lse(r, c, TEMPERATURE, self_index.long(), twisted, label, False, True)
        assert all(map(torch.equal, answer, expected))
    grad = torch.ones(()).expand(40)
    lse, mean, *_ = expected
    answer = csrc.lse_backward(grad, lse, grad, mean, odd, tall, TEMPERATURE, *masks, True, True)
    same = csrc.lse_backward(
        torch.ones(40), lse, torch.ones(40), mean, rows, cols, TEMPERATURE, *masks, True, True
    )  # fmt: skip
    assert all(map(torch.equal, answer, same))


def test_indices_out_of_range_are_harmless(csrc):
    rows, cols = unit(40, 8, dtype=torch.float32), unit(50, 8, dtype=torch.float32, seed=1)
    labels = torch.arange(40) % 5, torch.arange(50) % 5, True
    for far in (torch.tensor([2**31 - 1, -(2**31), 50, -7] * 10, dtype=torch.int32), torch.full((40,), 2**32 + 3)):
        answer = csrc.lse(rows, cols, TEMPERATURE, far, *labels, True)
        assert all(map(torch.equal, answer, csrc.lse(rows, cols, TEMPERATURE, None, *labels, True)))


@every_dtype
def test_answers_repeat_bit_by_bit(csrc, dtype):
    """Whatever order threads and blocks come in."""
    masks = masks_of("self and label", 70, 130)
    rows, cols, grad = unit(70, 20, dtype=dtype), unit(130, 20, dtype=dtype, seed=1), draw(70, seed=2)

    def run():
        lse, mean, *positives = csrc.lse(rows, cols, TEMPERATURE, *masks, True)
        yield from (lse, mean, *positives)
        yield from csrc.lse_backward(grad, lse, grad, mean, rows, cols, TEMPERATURE, *masks, True, True)
        yield from csrc.posterior(rows, cols, TEMPERATURE, grad.repeat(2)[:130], True)
        rest = (None, rows.float(), rows.float(), None, None, None)
        yield from csrc.posterior_backward(rows, cols, TEMPERATURE, lse, grad, *rest, True, True)

    once = list(run())
    csrc.set_thread_order("random")
    assert all(map(torch.equal, run(), once))


@pytest.mark.parametrize("instructions", ["mma", "wgmma"], indirect=True)
def test_wide_embeddings(csrc):
    """Three pieces of 256, the last of them ragged, each through several tiles."""
    t, c = unit(140, 530, dtype=torch.bfloat16), unit(70, 530, dtype=torch.bfloat16, seed=1)
    a, r = draw(140, 530, seed=2).bfloat16().float(), draw(140, seed=3)
    lse, mean, _, marginal = csrc.posterior(t, c, TEMPERATURE, None, True)
    dt, dc = csrc.posterior_backward(t, c, TEMPERATURE, lse, r, None, a, a, None, None, None, True, True)

    def written_out(t, c, a, r):
        lse, p = softmax(write_out(t, c, TEMPERATURE))
        weights = p * (a @ c.T - r[:, None]) / TEMPERATURE
        return lse, p @ c, p.sum(dim=0), weights @ c, weights.T @ t + p.T @ a

    compare({"lse": lse, "mean": mean, "marginal": marginal, "dt": dt, "dc": dc}, written_out, t, c, a, r)


def test_operands_of_two_dtypes_are_refused(csrc):
    with pytest.raises(RuntimeError, match="one dtype"):
        csrc.lse(torch.ones(2, 3), torch.ones(2, 3).bfloat16(), 1.0, *NO_MASKS, False)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        csrc.lse(torch.ones(2, 3).double(), torch.ones(2, 3).double(), 1.0, *NO_MASKS, False)
