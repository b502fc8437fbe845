"""The Triton softmax kernels against float64 autograd on the materialised logits.

Shapes: N rows, M columns, K prototypes, d width.
"""

import math

import many_columns
import out_of_range
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from optional_tensors import ARGUMENTS, absences, check, extremes
from parameters import spread

pytest.importorskip("triton")

from ssl_ib_kernels import lse as lse_kernels
from ssl_ib_kernels import posterior as posterior_kernels
from ssl_ib_kernels import softmax as softmax_kernels
from ssl_ib_kernels import tiling

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURE = 0.1

#: Rows in one piece and in several, which for float32 begin at half the width; some do not begin on 16 bytes.
WIDTHS = [
    *((torch.float32, width) for width in (1, 7, 136)),
    *((torch.bfloat16, width) for width in (136, 300)),
    (torch.float16, 136),
]

KINDS = ["", "self", "self and label", "label", "self and drop", "drop"]

KERNELS = {
    **{name: getattr(lse_kernels, name) for name in ("lse", "lse_backward", "lse_backward_symmetric")},
    **{name: getattr(posterior_kernels, name) for name in ("posterior", "posterior_backward")},
}


@pytest.fixture(autouse=True)
def memory_full_of_nan():
    """What a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def unit(num, width, dtype, seed, device):
    """Unit vectors, in front of NaN that a kernel must not read."""
    storage = torch.full((num + 300, width), torch.nan, device=device, dtype=dtype)
    storage[:num] = F.normalize(draw(num, width, seed=seed), dim=1).to(device, dtype)
    return storage[:num]


def masks(kind, num_rows, num_cols, device):
    """(self_index, row_label, col_label, drop); int32 labels and columns where positives are dropped, else int64."""
    generator = torch.Generator().manual_seed(7)
    kinds = dict(generator=generator, dtype=torch.int32 if "drop" in kind else torch.int64)
    itself = torch.randint(-1, num_cols, (num_rows,), **kinds).to(device)
    labels = [torch.randint(0, 5, (n,), **kinds).to(device) for n in (num_rows, num_cols)]
    if "drop" not in kind:
        # Beyond 32 bits, of which the low ones are alike.
        labels = [label << 40 for label in labels]
    labelled = "label" in kind or "drop" in kind
    return itself if "self" in kind else None, *(labels if labelled else (None, None)), "drop" in kind


def written_out(rows, cols, temperature, self_index=None, row_label=None, col_label=None, drop=False):
    """The logits [N, M] with -inf where something is left out, the mean logit of the positives, and their number."""
    logits = rows @ cols.T / temperature
    own = torch.zeros_like(logits, dtype=torch.bool)
    same = torch.zeros_like(own)
    if self_index is not None:
        own = self_index[:, None] == torch.arange(len(cols), device=cols.device)
    if row_label is not None:
        same = (row_label[:, None] == col_label) & ~own
    count = same.sum(dim=1)
    positive = torch.where(same, logits, 0.0).sum(dim=1) / count.clamp(min=1)
    return logits.masked_fill(own | same if drop else own, -torch.inf), positive, count


def plain_lse(dtype, rows, cols, temperature, grad, pull, *left_out):
    """(lse, mean, positive, count, d_rows, d_cols) computed in `dtype`, the gradients rounded as the kernels' are."""
    x, y = rows.to(dtype).requires_grad_(), cols.to(dtype).requires_grad_()
    logits, positive, count = written_out(x, y, temperature, *left_out)
    lse, mean = logits.logsumexp(dim=1), logits.softmax(dim=1) @ y
    through_positives = (positive * count * pull).sum()
    gradients = torch.autograd.grad((lse * grad.to(dtype)).sum() + through_positives, (x, y))
    rounded = gradients if dtype == torch.float64 else [g.to(rows.dtype) for g in gradients]
    return lse.detach(), mean.detach(), positive.detach(), count.to(dtype), *rounded


def check_lse(rows, cols, grad, *left_out, temperature=TEMPERATURE, **tolerance):
    pull = draw(len(rows), seed=9, device=rows.device) * grad.abs().max().nan_to_num(1.0)
    truth = plain_lse(torch.float64, rows, cols, temperature, grad, pull, *left_out)
    reference = plain_lse(torch.float32, rows, cols, temperature, grad, pull, *left_out)
    lse, mean, *positives = lse_kernels.lse(rows, cols, temperature, *left_out, True)
    alone, empty, *others = lse_kernels.lse(rows, cols, temperature, *left_out, False)
    assert empty.numel() == 0 and lse.dtype == mean.dtype == torch.float32
    backward = lse_kernels.lse_backward
    arguments = (rows, cols, temperature, *left_out)
    kept = backward(grad, lse, pull, mean, *arguments, True, True)
    again = backward(grad, lse, pull, empty, *arguments, True, False)
    assert again[1].numel() == 0 and backward(grad, lse, pull, mean, *arguments, False, True)[0].numel() == 0
    assert all(x.dtype == rows.dtype and x.is_contiguous() for x in (*kept, again[0]))
    assert_close("lse", lse, reference[0], truth[0], torch.float32, **tolerance)
    assert_close("lse alone", alone, reference[0], truth[0], torch.float32, **tolerance)
    assert_close("mean", mean, reference[1], truth[1], rows.dtype, **tolerance)
    if left_out[1] is None:
        assert all(x.numel() == 0 for x in (*positives, *others))
    else:
        assert_close("positive", positives[0], reference[2], truth[2], torch.float32, **tolerance)
        assert torch.equal(positives[1], reference[3]) and all(map(torch.equal, positives, others))
    assert_close("d_rows", kept[0], reference[4], truth[4], rows.dtype, **tolerance)
    assert_close("d_rows without mean", again[0], reference[4], truth[4], rows.dtype, **tolerance)
    assert_close("d_cols", kept[1], reference[5], truth[5], rows.dtype, **tolerance)


@pytest.mark.parametrize(("kind", "dtype"), spread(KINDS, DTYPES))
def test_lse(dtype, kind, device):
    rows, cols = unit(70, 24, dtype, 0, device), unit(135, 24, dtype, 1, device)
    check_lse(rows, cols, draw(70, seed=2, device=device), *masks(kind, 70, 135, device))


@pytest.mark.parametrize(("dtype", "width"), WIDTHS)
def test_lse_of_any_width(dtype, width, device):
    rows, cols = unit(9, width, dtype, 0, device), unit(67, width, dtype, 1, device)
    check_lse(rows, cols, draw(9, seed=2, device=device), *masks("", 9, 67, device))


def test_strides(device):
    rows = unit(24, 20, torch.float32, 0, device).T
    cols = unit(40, 48, torch.float32, 1, device)[:, ::2]
    itself = torch.arange(20, device=device)
    check_lse(rows, cols, torch.ones(1, device=device).expand(20), itself, None, None, False)


@pytest.mark.parametrize("far", [10**6, -7, 2**32 + 1])
def test_a_self_index_out_of_range_leaves_nothing_out(far, device):
    rows, cols = unit(5, 24, torch.float32, 0, device), unit(6, 24, torch.float32, 1, device)
    itself = torch.full((5,), far, device=device)
    out_of_range.check_columns(lse_kernels.lse, device)
    labels = torch.arange(5, device=device), torch.arange(6, device=device), True
    answer = lse_kernels.lse(rows, cols, TEMPERATURE, itself, *labels, False)
    assert all(map(torch.equal, answer, lse_kernels.lse(rows, cols, TEMPERATURE, None, *labels, False)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits(dtype, sign, device):
    """Columns close to (or opposite to) the rows at a low temperature: nothing overflows, padding does not show."""
    rows = F.normalize(1 + 0.1 * draw(5, 24, device=device), dim=1).to(dtype)
    cols = (sign * F.normalize(1 + 0.1 * draw(67, 24, seed=1, device=device), dim=1)).to(dtype)
    grad = draw(5, seed=2, device=device)
    check_lse(rows, cols, grad, None, None, None, False, temperature=1e-3, logits=1e3, scale=1e3)


def test_rows_with_nothing_left_give_exactly_zero(device):
    rows, cols = unit(3, 24, torch.float32, 0, device), unit(70, 24, torch.float32, 1, device)
    row_label = torch.tensor([4, 5, 5], dtype=torch.int32, device=device)
    col_label = torch.full((70,), 5, dtype=torch.int32, device=device)
    grad = torch.tensor([1.0, torch.nan, torch.inf], device=device)
    lse, mean, *_ = lse_kernels.lse(rows, cols, TEMPERATURE, None, row_label, col_label, True, True)
    assert lse[0].isfinite() and lse[1:].tolist() == [-math.inf] * 2 and (mean[1:] == 0).all()
    for kept in (mean, mean.new_empty(0)):
        arguments = (rows, cols, TEMPERATURE, None, row_label, col_label, True, True, True)
        d_rows, d_cols = lse_kernels.lse_backward(grad, lse, None, kept, *arguments)
        assert (d_rows[1:] == 0).all() and d_rows[0].abs().max() > 0
        only_first = lse_kernels.lse_backward(
            grad[:1], lse[:1], None, kept[:1], rows[:1], cols, TEMPERATURE, None, row_label[:1], col_label, True,
            False, True,
        )  # fmt: skip
        assert_close("d_cols", d_cols, only_first[1], only_first[1].double(), torch.float32)


@pytest.mark.parametrize(("num_rows", "num_cols"), [(0, 5), (5, 0), (0, 0)])
def test_lse_of_nothing(num_rows, num_cols, device):
    rows, cols = torch.ones(num_rows, 12, device=device), torch.ones(num_cols, 12, device=device)
    none = (None, None, None, False)
    lse, mean, *_ = lse_kernels.lse(rows, cols, TEMPERATURE, *none, True)
    labels = (torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_cols, dtype=torch.int64))
    labelled = lse_kernels.lse(rows, cols, TEMPERATURE, None, *(x.to(device) for x in labels), False, False)
    assert all(torch.equal(x, torch.zeros_like(lse)) for x in labelled[2:])
    assert lse.shape == (num_rows,) and (lse == -math.inf).all() and torch.equal(mean, torch.zeros_like(rows))
    grad = torch.ones(num_rows, device=device)
    for kept in (mean, mean.new_empty(0)):
        gradients = lse_kernels.lse_backward(grad, lse, None, kept, rows, cols, TEMPERATURE, *none, True, True)
        assert torch.equal(gradients[0], torch.zeros_like(rows)) and torch.equal(gradients[1], torch.zeros_like(cols))


def square(dtype, kind, width, device, scale=1.0):
    """A problem whose columns are its rows: (z, grad and pull, masks, truth, reference)."""
    z = unit(75, width, dtype, 0, device)
    grad, pull = (scale * draw(75, seed=seed, device=device) for seed in (2, 3))
    itself = torch.arange(75, device=device) if "self" in kind else None
    labelled = "label" in kind or "drop" in kind
    label = torch.arange(75, device=device) // 4 if labelled else None
    left_out = (itself, label, label, "drop" in kind)

    def gradient(compute):
        x = z.to(compute).requires_grad_()
        logits, positive, count = written_out(x, x, TEMPERATURE, *left_out)
        total = (logits.logsumexp(dim=1) * grad).sum() + (positive * count * pull).sum()
        (answer,) = torch.autograd.grad(total, x)
        return answer if compute == torch.float64 else answer.to(dtype)

    return z, (grad, pull if labelled else None), left_out, gradient(torch.float64), gradient(torch.float32)


def whole(z, vectors, left_out):
    """The symmetric gradient of all rows."""
    itself, label, _, drop = left_out
    lse, *_ = lse_kernels.lse(z, z, TEMPERATURE, *left_out, False)
    side = (vectors[0], lse, vectors[1])
    answer = lse_kernels.lse_backward_symmetric(
        z, z, *side, *side, TEMPERATURE, itself, itself, label, label, drop, 0
    )  # fmt: skip
    return lse, answer


@pytest.mark.parametrize(("kind", "dtype"), spread(KINDS, DTYPES))
def test_symmetric_gradient(dtype, kind, device):
    z, vectors, left_out, truth, reference = square(dtype, kind, 20, device)
    lse, answer = whole(z, vectors, left_out)
    assert_close("whole", answer, reference, truth, dtype)
    itself, label, _, drop = left_out
    # Vectors that do not begin on 16 bytes are a compilation of their own.
    middle = 10 if kind == "self" else 16
    for first, last in ((0, middle), (middle, 75)):
        mine = [None if x is None else x[first:last] for x in (vectors[0], lse, vectors[1], itself, label)]
        strip = lse_kernels.lse_backward_symmetric(
            z[first:last], z, *mine[:3], vectors[0], lse, vectors[1], TEMPERATURE, mine[3], itself, mine[4], label,
            drop, first,
        )  # fmt: skip
        assert_close(f"strip {first}", strip, reference[first:last], truth[first:last], dtype)


def test_symmetric_gradient_of_wide_rows(device):
    z, vectors, left_out, truth, reference = square(torch.bfloat16, "self and label", 300, device)
    assert_close("whole", whole(z, vectors, left_out)[1], reference, truth, torch.bfloat16)


def test_short_vectors_need_no_maximum_and_long_ones_get_it(device, monkeypatch):
    """What the kernels measure decides: unit vectors need none down to a temperature of 2 / 87, and long ones do."""
    rows, cols = unit(20, 24, torch.float32, 0, device), unit(70, 24, torch.float32, 1, device)
    bound = softmax_kernels.longest(rows, 3 * cols).view(torch.float32)
    assert_close("bound", bound, bound, torch.tensor([1.0, 9.0], device=device).double(), torch.float32)
    cases = {(1.0, 2 / 87): True, (1.0, 2 / 90): False, (3.0, 2 / 87): False, (300.0, 2 / 87): False}
    for length, temperature in cases:
        check_lse(length * rows, cols, draw(20, seed=2, device=device), None, None, None, False,
                  temperature=temperature, logits=length / temperature, scale=length / temperature)  # fmt: skip
    launch_walk, no_number = softmax_kernels.launch_walk, torch.tensor(torch.nan, device=device)

    def without_a_maximum(kernel, walk, sizes, temperature, integers, **tensors):
        if integers["BOUNDED"]:
            tensors["lse"].copy_(no_number)
            launch_walk(kernel, walk, sizes, temperature, integers, **tensors)

    monkeypatch.setattr(softmax_kernels, "launch_walk", without_a_maximum)
    for (length, temperature), runs in cases.items():
        answer = softmax_kernels.forward(length * rows, cols, temperature, with_mean=False)[0]
        assert answer.isfinite().all() if runs else answer.isnan().all(), (length, temperature)


@pytest.mark.parametrize(
    ("temperature", "dtype"), list(zip(many_columns.TEMPERATURES, [torch.float32, torch.bfloat16], strict=True))
)
def test_sums_over_65536_columns(dtype, temperature, device, not_compiled, monkeypatch):
    """With large tiles: a step takes the interpreter the same time whatever its size."""
    few, many = tiling.Tiles(16, 2048, 32, 32, 4, 1), tiling.Tiles(4096, 16, 32, 32, 4, 1)
    of_rows, row_tile = ("softmax_forward", "gradient_from_mean"), softmax_kernels.row_tile
    monkeypatch.setattr(softmax_kernels, "tiles", lambda kernel, *_: few if kernel in of_rows else many)
    monkeypatch.setattr(softmax_kernels, "row_tile", lambda width, _: row_tile(width, 2**19))
    many_columns.check_answers(posterior_kernels.posterior, dtype, temperature, device)
    functions = lse_kernels.lse, lse_kernels.lse_backward, posterior_kernels.posterior_backward
    many_columns.check_gradients(*functions, dtype, temperature, device)


def test_rows_that_are_no_numbers_are_not_bounded(device):
    rows, cols = unit(20, 24, torch.float32, 0, device), unit(70, 24, torch.float32, 1, device)
    rows[3, 2] = -torch.nan
    lse = lse_kernels.lse(rows, cols, TEMPERATURE, None, None, None, False, False)[0]
    assert lse.isnan().tolist() == [i == 3 for i in range(20)]


def test_small_gradients_survive_float16(device):
    """Weights of 1e-5 / M are far below the least number of float16."""
    z, vectors, left_out, truth, reference = square(torch.float16, "label", 24, device, scale=1e-5)
    assert_close("symmetric", whole(z, vectors, left_out)[1], reference, truth, torch.float16)
    rows, cols = unit(70, 24, torch.float16, 0, device), unit(200, 24, torch.float16, 1, device)
    check_lse(rows, cols, 1e-5 * draw(70, seed=2, device=device), *masks("label", 70, 200, device))
    tiny = {name: 1e-5 * x for name, x in gradients_of_posterior(70, 130, 24, device).items()}
    check_posterior_backward(torch.float16, 70, 130, 24, device, tiny)
    tiny |= {"v": tiny["a"], "u": 1e5 * tiny["u"]}
    check_posterior_backward(torch.float16, 70, 130, 24, device, tiny)


@pytest.mark.parametrize(("dtype", "width"), WIDTHS)
def test_posterior(dtype, width, device):
    t, c = unit(33, width, dtype, 0, device), unit(70, width, dtype, 1, device)
    prior = draw(70, seed=2, device=device)

    def plain(compute):
        logits = t.to(compute) @ c.to(compute).T / TEMPERATURE
        p = logits.softmax(dim=1)
        return logits.logsumexp(dim=1), p @ c.to(compute), p @ prior.to(compute), p.sum(dim=0)

    truth, reference = plain(torch.float64), plain(torch.float32)
    answer = posterior_kernels.posterior(t, c, TEMPERATURE, prior, True)
    for name, *values in zip(("lse", "mean", "expected", "marginal"), answer, reference, truth, strict=True):
        assert values[0].dtype == torch.float32
        assert_close(name, *values, dtype if name == "mean" else torch.float32)
    plainer = posterior_kernels.posterior(t, c, TEMPERATURE, None, False)
    assert torch.equal(plainer[0], answer[0]) and torch.equal(plainer[1], answer[1])
    assert torch.equal(plainer[2], torch.zeros(33, device=device)) and plainer[3].numel() == 0


def test_posterior_of_no_rows(device):
    t, c = torch.ones(0, 12, device=device), torch.ones(5, 12, device=device)
    lse, mean, expected, marginal = posterior_kernels.posterior(t, c, 1.0, torch.ones(5, device=device), True)
    assert lse.shape == expected.shape == (0,) and mean.shape == (0, 12) and marginal.tolist() == [0.0] * 5
    gradients = posterior_kernels.posterior_backward(
        t, c, 1.0, lse, expected, None, mean, mean, None, None, None, True, True
    )
    assert gradients[0].shape == (0, 12) and torch.equal(gradients[1], torch.zeros_like(c))


def gradients_of_posterior(num_rows, num_prototypes, width, device):
    """Every term that the gradient of a posterior can have."""
    shapes = {"r": num_rows, "h": num_rows, "e": num_rows, "u": num_prototypes, "w": num_prototypes}
    vectors = {name: draw(size, seed=10 + i, device=device) for i, (name, size) in enumerate(shapes.items())}
    return vectors | {name: draw(num_rows, width, seed=20 + i, device=device) for i, name in enumerate("av")}


def check_posterior_backward(dtype, num_rows, num_prototypes, width, device, terms):
    t, c = unit(num_rows, width, dtype, 0, device), unit(num_prototypes, width, dtype, 1, device)
    names = ("r", "h", "a", "v", "e", "u", "w")

    def plain(compute):
        x, y = t.to(compute).requires_grad_(), c.to(compute).requires_grad_()
        r, h, a, v, e, u, w = (None if terms.get(n) is None else terms[n].to(compute) for n in names)
        logits = x @ y.T / TEMPERATURE
        p = logits.softmax(dim=1).detach()
        score = torch.zeros_like(p)
        score += 0 if a is None else a @ y.detach().T
        score += 0 if e is None else e[:, None] * u
        score += 0 if w is None else w
        score += 0 if h is None else h[:, None] * logits.detach()
        score -= 0 if r is None else r[:, None]
        d_t, d_c = torch.autograd.grad(logits, (x, y), p * score)
        d_c = d_c if v is None else d_c + p.T @ v
        return (d_t, d_c) if compute == torch.float64 else (d_t.to(dtype), d_c.to(dtype))

    truth, reference = plain(torch.float64), plain(torch.float32)
    lse = posterior_kernels.posterior(t, c, TEMPERATURE, None, False)[0]
    arguments = (t, c, TEMPERATURE, lse, *(terms.get(n) for n in names))
    answer = posterior_kernels.posterior_backward(*arguments, True, True)
    assert all(x.dtype == dtype and x.is_contiguous() for x in answer)
    assert_close("d_t", answer[0], reference[0], truth[0], dtype)
    assert_close("d_c", answer[1], reference[1], truth[1], dtype)
    alone = [posterior_kernels.posterior_backward(*arguments, *want) for want in ((True, False), (False, True))]
    assert torch.equal(alone[0][0], answer[0]) and alone[0][1].numel() == 0
    assert torch.equal(alone[1][1], answer[1]) and alone[1][0].numel() == 0


TERMS = ["rhaveuw", "ra", "v", "av", "rhv", "reu", "w"]


@pytest.mark.parametrize(("terms", "dtype"), spread(TERMS, DTYPES, when_slow=["rh", "rw"]))
def test_posterior_backward(dtype, terms, device):
    given = gradients_of_posterior(70, 135, 20, device)
    check_posterior_backward(dtype, 70, 135, 20, device, {name: given[name] for name in terms})


@pytest.mark.parametrize(("dtype", "width"), WIDTHS)
def test_posterior_backward_of_any_width(dtype, width, device):
    given = gradients_of_posterior(9, 67, width, device)
    check_posterior_backward(dtype, 9, 67, width, device, given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_is_also_the_direction(dtype, device):
    """v is a, as where the mean's gradient goes through the posterior too: read once, the same answer."""
    given = gradients_of_posterior(20, 70, 24, device)
    check_posterior_backward(dtype, 20, 70, 24, device, given | {"v": given["a"]})


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_any_split_gives_the_same_answers(parts, device, monkeypatch):
    used = []

    def split(programs, steps, most, multiprocessors):
        used.append(min(parts, most))
        return used[-1]

    monkeypatch.setattr(tiling, "split", split)
    rows, cols = unit(20, 24, torch.float32, 0, device), unit(300, 24, torch.float32, 1, device)
    check_lse(rows, cols, draw(20, seed=2, device=device), *masks("label", 20, 300, device))
    given = gradients_of_posterior(150, 200, 24, device)
    check_posterior_backward(torch.bfloat16, 150, 200, 24, device, given)
    t, c = unit(150, 24, torch.float32, 0, device), unit(200, 24, torch.float32, 1, device)
    prior = draw(200, seed=2, device=device)
    answer = posterior_kernels.posterior(t, c, TEMPERATURE, prior, True)
    p = (t.double() @ c.double().T / TEMPERATURE).softmax(dim=1)
    assert_close("expected", answer[2], (p @ prior.double()).float(), p @ prior.double(), torch.float32)
    assert_close("marginal", answer[3], p.sum(dim=0).float(), p.sum(dim=0), torch.float32)
    assert max(used) == parts


def test_answers_repeat_bit_for_bit(device):
    rows, cols = unit(70, 20, torch.bfloat16, 0, device), unit(300, 20, torch.bfloat16, 1, device)
    left_out, grad = masks("self and label", 70, 300, device), draw(70, seed=2, device=device)

    def everything():
        lse, mean, *positives = lse_kernels.lse(rows, cols, TEMPERATURE, *left_out, True)
        gradients = lse_kernels.lse_backward(grad, lse, grad, mean, rows, cols, TEMPERATURE, *left_out, True, True)
        return (
            lse,
            mean,
            *positives,
            *gradients,
            *posterior_kernels.posterior(rows, cols, TEMPERATURE, cols[:, 0].float(), True),
        )

    assert all(torch.equal(x, y) for x, y in zip(everything(), everything(), strict=True))


def test_the_walk_is_split_where_rows_alone_leave_multiprocessors_idle(device):
    sizes = tiling.tiles("softmax_forward", torch.bfloat16, 256, torch.device("cpu"))
    for num_rows, num_cols in ((1, 1), (128, 65536), (2048, 2048), (6144, 65536), (8192, 8192), (32768, 32768)):
        walk = tiling.grid(num_rows, num_cols, 256, sizes, torch.device("cpu"))
        blocks = math.ceil(num_cols / sizes.block_y)
        assert walk.parts * walk.steps >= blocks > (walk.parts - 1) * walk.steps
        assert walk.parts == 1 or walk.parts * num_rows * 256 * 4 <= tiling.WORKSPACE
        busy = math.prod(walk.programs)
        assert busy >= 96 or walk.parts == blocks, (num_rows, num_cols, walk)
    assert tiling.grid(32768, 32768, 256, sizes, torch.device("cpu")).parts == 1


every_kernel = pytest.mark.parametrize("name", [name for name in ARGUMENTS if name in KERNELS])


@every_kernel
def test_absent_tensors_are_neutral_ones(device, name):
    for absent in extremes(KERNELS[name]):
        check(KERNELS[name], name, absent, device, torch.float32)


@every_kernel
def test_an_absent_tensor_is_a_neutral_one(device, name, not_compiled):
    for absent in absences(KERNELS[name])[1:-1]:
        check(KERNELS[name], name, absent, device, torch.float32)
