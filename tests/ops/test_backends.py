"""Every backend that this machine can run against the float64 truth: answers and all gradients, whatever the shape.

On a machine without a GPU that is "chunked" on the CPU, and "triton" where its interpreter is on; with one, all of them
there too.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close

from ssl_ib import ops
from ssl_ib.ops import crossover

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RUNS = [("cpu", "chunked", dtype) for dtype in (torch.float64, *DTYPES)]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if torch.cuda.is_available() and not INTERPRETED:
    RUNS += [("cuda", "chunked", torch.float64)]
    RUNS += [("cuda", name, dtype) for name in ("chunked", "cuda") for dtype in DTYPES]
if torch.cuda.is_available() or INTERPRETED:
    # Each dtype is compiled anew, and the kernels' own tests have all of them. Here it is how the ops use kernels.
    RUNS += [
        pytest.param("cpu" if INTERPRETED else "cuda", "triton", dtype, marks=() if exact else pytest.mark.slow)
        for dtype, exact in zip(DTYPES, (True, False, False), strict=True)
    ]
every_run = pytest.mark.parametrize(("device", "name", "dtype"), RUNS, ids=lambda x: str(x).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _deterministic_and_filled(monkeypatch):
    """New memory holds NaN, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def pieces(monkeypatch, name):
    """Pieces small enough that these shapes need several; whole tiles of 16 prototypes where kernels run."""
    from ssl_ib.ops.chunked import gather

    for piece in ("CPU_PIECE", "GPU_PIECE"):
        monkeypatch.setattr(gather, piece, 64 if name == "chunked" else 16 * 4 * 20)


def compare(op, leaves, device, name, dtype, expected, logits=0.0):
    """op(*leaves) on a backend, against float64 and against the reference in the same dtype; all gradients too.

    leaves: float64 tensors, rounded to `dtype` first: the truth is of what the kernel was given.
    expected: the functions that must have run. logits: the largest that a softmax is taken of.
    """
    rounded = [x.to(device=device, dtype=dtype) for x in leaves]
    answers = []
    for library, kind in (("reference", torch.float64), ("reference", dtype), (name, dtype)):
        inputs = [x.to(kind).requires_grad_() for x in rounded]
        with ops.use_backend(library), ops.record() as ran:
            outputs = op(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            weights = [torch.linspace(-1, 2, x.numel(), device=device, dtype=torch.float64).view_as(x) for x in outputs]
            total = sum(
                (x.masked_fill(x.isinf(), 0.0).double() * w).sum() for x, w in zip(outputs, weights, strict=True)
            )
            gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
        answers.append(([x.detach() for x in outputs], gradients))
    assert ran == {(f, crossover.INSTEAD.get((f.removesuffix("_backward"), name), name)) for f in expected}
    for kind, (true, plain, answer) in zip(("output", "gradient"), zip(*answers, strict=True), strict=True):
        for i, (t, p, a) in enumerate(zip(true, plain, answer, strict=True)):
            assert a.dtype == p.dtype, f"{kind} {i}: {a.dtype}, expected {p.dtype}"
            assert_close(f"{kind} {i}", a, p, t, dtype, logits, 1.0 if kind == "output" else max(logits, 1.0))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def distinct(batch: int, num_tokens: int, kept: int) -> torch.Tensor:
    return draw(batch, num_tokens, seed=7).argsort(dim=1)[:, :kept]


KEEPS = {
    "some": distinct(3, 7, 4),
    "all": distinct(3, 7, 7),
    "none": distinct(3, 7, 0),
    "repeats": torch.tensor([[1, 1, 5, 1], [0, 6, 6, 0], [2, 3, 4, 5]]),
}
INT32 = distinct(3, 7, 3).int()


def every_keep(names: str, cases: list):
    """All cases with all indices; int32 ones, for which a GPU compiles the kernels anew, with the last case alone."""
    pairs = [(name, keep, case) for name, keep in KEEPS.items() for case in cases] + [("int32", INT32, cases[-1])]
    params = [pytest.param(keep, *case, id="-".join(map(str, (name, *case)))) for name, keep, case in pairs]
    return pytest.mark.parametrize(f"keep, {names}", params)


@every_run
@every_keep("width", [(1,), (24,)])
def test_token_gather(device, name, dtype, keep, width, pieces):
    expected = {"token_gather", "token_gather_backward"}
    compare(lambda x: ops.token_gather(x, keep.to(device)), [draw(3, 7, width)], device, name, dtype, expected)


@every_run
@every_keep("num_prefix, with_pos, width", [(0, False, 24), (2, True, 5), (1, True, 24)])
def test_token_scatter(device, name, dtype, keep, num_prefix, with_pos, width, pieces):
    leaves = [draw(3, num_prefix + keep.shape[1], width), draw(width, seed=1)]
    leaves += [draw(num_prefix + 7, width, seed=2)] if with_pos else []

    def op(latents, mask_token, pos=None):
        return ops.token_scatter(latents, keep.to(device), mask_token, 7, pos, num_prefix)

    compare(op, leaves, device, name, dtype, {"token_scatter", "token_scatter_backward"})


@every_run
@every_keep(
    "channels, side, grid, width, num_prefix, with_bias",
    [(3, 2, (7, 1), 5, 0, False), (1, 4, (1, 7), 16, 2, True)],
)
def test_patch_embed_gather(device, name, dtype, keep, channels, side, grid, width, num_prefix, with_bias, pieces):
    leaves = [draw(3, channels, grid[0] * side, grid[1] * side), draw(width, channels, side, side, seed=1)]
    leaves += [draw(7, width, seed=2)]
    leaves += [draw(width, seed=3)] if with_bias else []
    leaves += [draw(num_prefix, width, seed=4)] if num_prefix else []

    def op(images, weight, pos, *rest):
        rest = list(rest)
        bias = rest.pop(0) if with_bias else None
        return ops.patch_embed_gather(images, keep.to(device), weight, bias, pos, *rest)

    compare(op, leaves, device, name, dtype, {"patch_embed_gather", "patch_embed_gather_backward"})


@every_run
@pytest.mark.parametrize("num_masks", [1, 3])
@pytest.mark.parametrize("hidden", ["some", "all", "none"])
@pytest.mark.parametrize(("channels", "side", "norm_pix"), [(3, 2, True), (1, 4, False)])
def test_masked_patch_mse(device, name, dtype, norm_pix, num_masks, hidden, channels, side, pieces):
    images = draw(2, channels, 2 * side, 3 * side).to(device=device, dtype=dtype)
    pred = draw(2 * num_masks, 6, channels * side * side, seed=1)
    mask = {"some": draw(2 * num_masks, 6) > 0.3, "all": draw(1) == draw(1), "none": draw(1) != draw(1)}[hidden]
    mask = mask.expand(2 * num_masks, 6).to(device)

    def op(pred):
        return ops.masked_patch_mse(pred, images.to(pred.dtype), mask, norm_pix)

    compare(op, [pred], device, name, dtype, {"masked_patch_mse", "masked_patch_mse_backward"})


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(draw(*shape, seed=seed), dim=-1)


SYMMETRIC = {"lse", "lse_backward_symmetric"}
ONE_WAY = {"lse", "lse_backward"}
NCE = {
    "nt_xent": dict(n=14, m=None, self_index=torch.arange(14)),
    "groups_of_three": dict(n=21, m=None, self_index=torch.arange(21), groups=3),
    "some_selves": dict(n=9, m=13, self_index=integers(14, 9) - 1),
    "other_selves": dict(n=9, m=None, self_index=integers(10, 9) - 1),
    "cross": dict(n=11, m=17),
    "queue": dict(n=6, m=19, own=True),
    "queue_without_labels": dict(n=6, m=19, own=True, unlabelled=True),
    "bank_without_labels": dict(n=6, m=19, own=True, unlabelled=True, self_index=integers(20, 6) - 1),
    "one_row": dict(n=1, m=None, self_index=torch.arange(1)),
    "no_columns": dict(n=3, m=0),
    "no_rows": dict(n=0, m=3),
}


@every_run
@pytest.mark.parametrize("drop_group", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 0.01])
@pytest.mark.parametrize("case", NCE.values(), ids=NCE)
def test_info_nce_parts(device, name, dtype, case, temperature, drop_group, pieces):
    n, m = case["n"], case["m"]
    row_labels = integers(10**12, 5, seed=3)[torch.arange(n) // case.get("groups", 2) % 5].to(device)
    col_labels = None if m is None else integers(10**12, 5, seed=3)[torch.arange(m) % 5].to(device)
    if case.get("unlabelled"):
        row_labels = col_labels = None
    self_index = case["self_index"].to(device) if "self_index" in case else None
    leaves = (
        [unit(n, 20)] + ([] if m is None else [unit(m, 20, seed=1)]) + ([unit(n, 20, seed=2)] if "own" in case else [])
    )

    def op(rows, *rest):
        rest = list(rest)
        cols = None if m is None else rest.pop(0)
        labels = row_labels, col_labels
        return ops.info_nce_parts(rows, cols, *labels, temperature, self_index, *rest, drop_group=drop_group)

    compare(op, leaves, device, name, dtype, SYMMETRIC if m is None else ONE_WAY, 1 / temperature)


@every_run
def test_info_nce_of_rows_without_positives(device, name, dtype):
    labels = torch.tensor([0, 0, 1, 2, 3, 3, 3]).to(device)

    def op(rows):
        return ops.info_nce(rows, None, labels, None, 0.2, torch.arange(7, device=device))

    compare(op, [unit(7, 20)], device, name, dtype, SYMMETRIC, 5.0)
    with ops.use_backend(name):
        assert torch.equal(op(unit(7, 20).to(device=device, dtype=dtype))[2:4], torch.zeros(2, device=device))


@every_run
@pytest.mark.parametrize("length", [1.0, 30.0])
@pytest.mark.parametrize(("n", "k", "d"), [(9, 23, 20), (1, 1, 1), (0, 4, 3), (5, 40, 17)])
def test_gmm_lse(device, name, dtype, n, k, d, length, pieces):
    leaves = [length * unit(n, d), unit(k, d, seed=1)]
    compare(lambda x, c: ops.gmm_lse(x, c, 0.1), leaves, device, name, dtype, ONE_WAY, 10 * length)


@every_run
@pytest.mark.parametrize("tau", [0.04, 0.5, 0.005])
@pytest.mark.parametrize(("n", "k", "d"), [(9, 23, 20), (1, 1, 17), (0, 4, 3), (5, 40, 20)])
@pytest.mark.parametrize(
    ("with_prior", "detach_p", "marginal"), [(False, False, True), (True, True, True), (True, False, False)]
)
def test_gmm_posterior(device, name, dtype, n, k, d, tau, with_prior, detach_p, marginal, pieces):
    log_prior = draw(k, seed=5).log_softmax(dim=0).to(device) if with_prior else None

    def op(t, c):
        return ops.gmm_posterior(t, c, tau, log_prior, detach_p, marginal)

    expected = {"posterior", "posterior_backward"}
    compare(op, [unit(n, d), unit(k, d, seed=1)], device, name, dtype, expected, 1 / tau)


@every_run
def test_gmm_posterior_whose_mean_alone_is_used(device, name, dtype, pieces):
    """The hot path of a student-teacher loss: the assignment is a constant, its mean's values are not."""

    def op(c):
        return ops.gmm_posterior(teacher.to(c.dtype), c, 0.1, detach_p=True, marginal=False)[0]

    teacher = unit(9, 20).to(device=device, dtype=dtype)
    compare(op, [unit(23, 20, seed=1)], device, name, dtype, {"posterior", "posterior_backward"}, 10.0)


@every_run
@pytest.mark.parametrize(
    ("s", "t", "k", "d"), [(9, 5, 23, 20), (1, 1, 1, 17), (3, 0, 4, 17), (0, 3, 4, 17), (5, 7, 40, 20)]
)
@pytest.mark.parametrize(
    ("with_prior", "detach_p", "marginal"), [(False, False, True), (True, True, True), (True, False, False)]
)
def test_gmm_crops(device, name, dtype, s, t, k, d, with_prior, detach_p, marginal, pieces):
    log_prior = draw(k, seed=5).log_softmax(dim=0).to(device) if with_prior else None

    def op(student, teacher, c):
        return ops.gmm_crops(student, teacher, c, 0.1, 0.04, log_prior, detach_p, marginal)

    leaves = [unit(s, d), unit(t, d, seed=1), unit(k, d, seed=2)]
    compare(op, leaves, device, name, dtype, {"posterior", "posterior_backward", *ONE_WAY}, 25.0)


@every_run
@pytest.mark.parametrize("used", ["lse", "posterior", "constant teacher", "constant prototypes"])
def test_gmm_crops_of_which_a_part_is_used(device, name, dtype, used, pieces):
    fixed = [unit(n, 20, seed=seed).to(device=device, dtype=dtype) for seed, n in enumerate((9, 5, 23))]
    moving = {"constant teacher": (0, 2), "constant prototypes": (0, 1)}.get(used, (0, 1, 2))

    def op(*leaves):
        rows = [x.to(leaves[0].dtype) for x in fixed]
        for place, x in zip(moving, leaves, strict=True):
            rows[place] = x
        lse, *read = ops.gmm_crops(*rows, 0.1, 0.04)
        return lse if used == "lse" else tuple(read) if used == "posterior" else (lse, *read)

    parts = {"lse": {"lse_backward"}, "posterior": {"posterior_backward"}}
    expected = {"lse", "posterior"} | parts.get(used, {"lse_backward", "posterior_backward"})
    compare(op, [unit(len(fixed[i]), 20, seed=i) for i in moving], device, name, dtype, expected, 25.0)


def test_gmm_crops_makes_one_gradient_to_the_prototypes(monkeypatch):
    """The second reading's is added to the first's a few prototypes at a time."""
    from ssl_ib.ops import chunked
    from ssl_ib.ops.chunked import gather

    monkeypatch.setattr(gather, "CPU_PIECE", 64)
    seen = []

    def spy(t, c, *rest):
        seen.append(len(c))
        return original(t, c, *rest)

    original = chunked.posterior_backward
    monkeypatch.setattr(chunked, "posterior_backward", spy)
    with ops.use_backend("chunked"):
        student, teacher, c = (unit(n, 6, seed=n).requires_grad_() for n in (9, 5, 23))
        lse, mean, *_ = ops.gmm_crops(student, teacher.detach(), c, 0.1, 0.04, detach_p=True)
        torch.autograd.backward(lse.sum() + mean.square().sum())
    assert seen == [2] * 11 + [1]


@every_run
@pytest.mark.parametrize("detach_p", [False, True])
def test_gmm_assign(device, name, dtype, detach_p, pieces):
    leaves = [unit(9, 20), unit(9, 20, seed=1), unit(23, 20, seed=2)]
    expected = {"posterior", "posterior_backward", *ONE_WAY}
    compare(lambda s, t, c: ops.gmm_assign(s, t, c, 0.1, 0.04, detach_p), leaves, device, name, dtype, expected, 25.0)

    def cross_entropy_alone(s, t, c):
        return ops.gmm_assign(s, t, c, 0.1, 0.04, detach_p)[0]

    compare(cross_entropy_alone, leaves, device, name, dtype, expected, 25.0)


@every_run
def test_inputs_need_not_be_contiguous(device, name, dtype):
    def twisted(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    keep = KEEPS["some"].to(device).T.contiguous().T
    mask = (draw(6, 3) > 0).to(device).T
    arguments = [
        (lambda x: ops.token_gather(twisted(x), keep), [draw(3, 7, 24)]),
        (lambda x, m: ops.token_scatter(twisted(x), keep, m, 7), [draw(3, 4, 24), draw(24)]),
        (
            lambda i, w, p: ops.patch_embed_gather(twisted(i), keep, twisted(w), None, twisted(p)),
            [draw(3, 3, 14, 2), draw(5, 3, 2, 2), draw(7, 5)],
        ),
        (lambda p: ops.masked_patch_mse(twisted(p), twisted(draw(3, 1, 8, 12)).to(p), mask), [draw(3, 6, 16)]),
        (lambda x: ops.info_nce(twisted(x), None, torch.arange(6, device=device) // 2, None, 0.2), [unit(6, 20)]),
        (lambda x, c: ops.gmm_posterior(twisted(x), twisted(c), 0.5), [unit(6, 20), unit(9, 20)]),
    ]
    for op, leaves in arguments:
        with ops.record() as ran, ops.use_backend(name):
            op(*[x.to(device=device, dtype=dtype) for x in leaves])
        functions = {function for function, _ in ran}
        gradients = {f"{f}_backward" + "_symmetric" * (f == "lse") for f in functions}
        compare(op, leaves, device, name, dtype, functions | gradients, 25.0)


@every_run
def test_twice_is_bit_equal(device, name, dtype):
    rows, labels = unit(64, 24).to(device=device, dtype=dtype), torch.arange(64, device=device) // 2
    c, keep = unit(33, 24, seed=1).to(rows), distinct(8, 6, 3).to(device)

    def everything(rows, c):
        full = ops.token_scatter(rows.view(8, 8, 24)[:, :3], keep, c[0], 6, c[:6])
        loss = ops.info_nce(rows, None, labels, None, 0.1, torch.arange(64, device=device)).sum()
        return loss + sum(x.sum() for x in ops.gmm_posterior(rows, c, 0.1)) + full.float().square().sum()

    answers = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (rows, c)]
        with ops.use_backend(name):
            total = everything(*leaves)
        answers.append((total.detach(), *torch.autograd.grad(total, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
