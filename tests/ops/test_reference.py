"""The reference ops against Python loops in float64, and their gradients to the second order."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from ssl_ib import UserError, ops


@pytest.fixture(autouse=True)
def _reference():
    with ops.use_backend("reference"), ops.record() as ran:
        yield
    assert {backend for _, backend in ran} <= {"reference"}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_keep(batch: int, num_tokens: int, kept: int) -> torch.Tensor:
    noise = draw(batch, num_tokens, seed=99)
    return noise.argsort(dim=1)[:, :kept]  # unsorted on purpose


def assert_differentiable(function, *tensors):
    leaves = tuple(t.clone().requires_grad_() for t in tensors)
    assert gradcheck(function, leaves) and gradgradcheck(function, leaves)


@pytest.mark.parametrize(("batch", "num_tokens", "kept"), [(3, 7, 4), (1, 1, 1), (2, 5, 5), (2, 4, 0)])
def test_token_gather(batch, num_tokens, kept):
    x, keep = draw(batch, num_tokens, 3), draw_keep(batch, num_tokens, kept)
    answer = ops.token_gather(x, keep)
    assert answer.shape == (batch, kept, 3)
    for b in range(batch):
        for k in range(kept):
            assert torch.equal(answer[b, k], x[b, keep[b, k]])
    assert torch.equal(ops.token_gather(x, keep.int()), answer)
    assert_differentiable(lambda x: ops.token_gather(x, keep), x)


@pytest.mark.parametrize("with_pos", [False, True])
@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize("kept", [0, 3, 6])
def test_token_scatter(with_pos, num_prefix, kept):
    batch, num_tokens, width = 3, 6, 4
    latents, mask_token = draw(batch, num_prefix + kept, width), draw(width, seed=1)
    keep, pos = draw_keep(batch, num_tokens, kept), draw(num_prefix + num_tokens, width, seed=2)
    pos = pos if with_pos else None
    answer = ops.token_scatter(latents, keep, mask_token, num_tokens, pos, num_prefix)
    expected = mask_token.repeat(batch, num_prefix + num_tokens, 1)
    for b in range(batch):
        for p in range(num_prefix):
            expected[b, p] = latents[b, p]
        for k in range(kept):
            expected[b, num_prefix + keep[b, k]] = latents[b, num_prefix + k]
    assert torch.equal(answer, expected if pos is None else expected + pos)
    if with_pos:
        assert_differentiable(
            lambda z, m, p: ops.token_scatter(z, keep, m, num_tokens, p, num_prefix), latents, mask_token, pos
        )


def test_token_scatter_undoes_token_gather():
    x, keep = draw(2, 5, 3), draw_keep(2, 5, 5)
    assert torch.equal(ops.token_scatter(ops.token_gather(x, keep), keep, torch.zeros(3).double(), 5), x)


def test_token_scatter_keeps_a_bfloat16_stream():
    latents, keep = draw(2, 3, 4).bfloat16(), draw_keep(2, 5, 3)
    assert ops.token_scatter(latents, keep, torch.zeros(4), 5, torch.zeros(5, 4)).dtype == torch.bfloat16


def test_patchify_orders_rows_columns_channels():
    images, side = draw(2, 3, 4, 6), 2
    patches = ops.patchify(images, side)
    assert patches.shape == (2, 6, 12)
    for row in range(2):
        for column in range(3):
            pixels = [
                images[:, c, row * side + i, column * side + j]
                for i in range(side)
                for j in range(side)
                for c in range(3)
            ]
            assert torch.equal(patches[:, row * 3 + column], torch.stack(pixels, dim=1))


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
def test_patch_embed_gather_is_convolution_then_gather(num_prefix):
    images, keep = draw(2, 3, 4, 6), draw_keep(2, 6, 4)
    weight, bias, pos = draw(5, 3, 2, 2, seed=1), draw(5, seed=2), draw(6, 5, seed=3)
    prefix = draw(num_prefix, 5, seed=4) if num_prefix else None
    tokens = F.conv2d(images, weight, bias, stride=2).flatten(2).transpose(1, 2) + pos
    expected = torch.stack([tokens[b, keep[b]] for b in range(2)])
    if num_prefix:
        expected = torch.cat([prefix.expand(2, -1, -1), expected], dim=1)
    torch.testing.assert_close(ops.patch_embed_gather(images, keep, weight, bias, pos, prefix), expected)
    leaves = (images, weight, bias, pos) + (() if prefix is None else (prefix,))
    assert_differentiable(lambda i, w, *rest: ops.patch_embed_gather(i, keep, w, *rest), *leaves)


def test_patch_embed_gather_follows_autocast():
    arguments = (draw(2, 3, 4, 4).float(), draw_keep(2, 4, 2), draw(5, 3, 2, 2).float(), draw(5).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = ops.patch_embed_gather(*arguments, draw(4, 5).float(), draw(1, 5).float())
    assert answer.dtype == torch.bfloat16
    exact = ops.patch_embed_gather(*arguments, draw(4, 5).float(), draw(1, 5).float())
    torch.testing.assert_close(answer.float(), exact, atol=0.05, rtol=0.05)


def mse_by_hand(pred, images, mask, norm_pix):
    """Sums over Python numbers; pred [G, L, P]."""
    num_masks = len(pred) // len(images)
    side = math.isqrt(pred.shape[-1] // images.shape[1])
    groups = {True: [], False: []}
    for g in range(len(pred)):
        for patch in range(pred.shape[1]):
            row, column = divmod(patch, images.shape[3] // side)
            pixels = [
                images[g // num_masks, c, row * side + i, column * side + j].item()
                for i in range(side)
                for j in range(side)
                for c in range(images.shape[1])
            ]
            if norm_pix:
                mean = sum(pixels) / len(pixels)
                var = sum((x - mean) ** 2 for x in pixels) / (len(pixels) - 1)
                pixels = [(x - mean) / math.sqrt(var + 1e-6) for x in pixels]
            error = [(a - b) ** 2 for a, b in zip(pred[g, patch].tolist(), pixels, strict=True)]
            groups[bool(mask[g, patch])].append(sum(error) / len(error))
    return [sum(groups[hidden]) / max(len(groups[hidden]), 1) for hidden in (True, False)]


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("num_masks", [1, 3])
def test_masked_patch_mse(norm_pix, num_masks):
    images, pred = draw(2, 3, 4, 6), draw(2 * num_masks, 6, 12, seed=1)
    mask = draw(2 * num_masks, 6, seed=2) > 0.3
    answer = ops.masked_patch_mse(pred, images, mask, norm_pix)
    assert [x.item() for x in answer] == pytest.approx(mse_by_hand(pred, images, mask, norm_pix), rel=1e-12)
    assert all(x.shape == () and x.dtype == torch.float64 for x in answer)
    assert_differentiable(lambda p: ops.masked_patch_mse(p, images, mask, norm_pix), pred[:, :, :])


@pytest.mark.parametrize("hidden", [True, False])
def test_masked_patch_mse_of_an_empty_group_is_zero(hidden):
    images, pred = draw(2, 1, 4, 4), draw(2, 4, 4, seed=1).requires_grad_()
    masked, unmasked = ops.masked_patch_mse(pred, images, torch.full((2, 4), hidden))
    full, empty = (masked, unmasked) if hidden else (unmasked, masked)
    assert empty.item() == 0 and full.item() == pytest.approx(F.mse_loss(pred, ops.patchify(images, 2)).item())
    (gradient,) = torch.autograd.grad(empty, pred)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_masked_patch_mse_takes_images_as_constants_and_computes_in_float32():
    images, pred = draw(1, 1, 4, 4).float().requires_grad_(), draw(1, 4, 4).bfloat16().requires_grad_()
    masked, unmasked = ops.masked_patch_mse(pred, images, torch.tensor([[True, False, True, False]]))
    (masked + unmasked).backward()
    assert masked.dtype == torch.float32 and images.grad is None and pred.grad.dtype == torch.bfloat16


def nce_by_hand(rows, cols, row_labels, col_labels, temperature, self_index, own, drop_group):
    """(lse, mean positive logit, number of positives) of every row, in Python numbers."""
    answer = []
    for n in range(len(rows)):
        candidates, positives = [], []
        for m in range(len(cols)):
            if self_index is not None and m == self_index[n]:
                continue
            logit = sum(a * b for a, b in zip(rows[n].tolist(), cols[m].tolist(), strict=True)) / temperature
            sibling = bool(row_labels[n] == col_labels[m])
            positives += [logit] if sibling else []
            candidates += [] if sibling and drop_group else [logit]
        if own is not None:
            logit = sum(a * b for a, b in zip(rows[n].tolist(), own[n].tolist(), strict=True)) / temperature
            positives.append(logit)
            candidates += [] if drop_group else [logit]
        lse = math.log(sum(math.exp(x) for x in candidates)) if candidates else -math.inf
        answer.append((lse, sum(positives) / max(len(positives), 1), len(positives)))
    return answer


CASES = {
    "nt_xent": dict(n=6, m=None, self_index=[0, 1, 2, 3, 4, 5], own=False),
    "cross": dict(n=4, m=7, self_index=None, own=False),
    "some_selves": dict(n=4, m=5, self_index=[-1, 0, 4, -1], own=False),
    "queue": dict(n=3, m=5, self_index=None, own=True),
    "one_label_row_alone": dict(n=1, m=None, self_index=[0], own=False),
    "all": dict(n=5, m=None, self_index=[0, -1, 2, -1, 4], own=True),
}


@pytest.mark.parametrize("drop_group", [False, True])
def test_without_labels_no_column_is_a_positive(drop_group):
    rows, cols, own, selves = draw(3, 4), draw(5, 4, seed=1), draw(3, 4, seed=2), torch.tensor([-1, 2, 0])
    labels = torch.zeros(3), torch.ones(5)
    expected = ops.info_nce_parts(rows, cols, *labels, 0.5, selves, own, drop_group=drop_group)
    found = ops.info_nce_parts(rows, cols, None, None, 0.5, selves, own, drop_group=drop_group)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("drop_group", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_info_nce(case, drop_group):
    n, m, temperature = case["n"], case["m"], 0.5
    rows, row_labels = draw(n, 3), torch.arange(n) // 2
    cols, col_labels = (None, None) if m is None else (draw(m, 3, seed=1), torch.arange(m) % 3)
    self_index = None if case["self_index"] is None else torch.tensor(case["self_index"])
    own = draw(n, 3, seed=2) if case["own"] else None
    expected = nce_by_hand(
        rows,
        rows if cols is None else cols,
        row_labels,
        row_labels if col_labels is None else col_labels,
        temperature,
        self_index,
        own,
        drop_group,
    )
    lse, positive = ops.info_nce_parts(
        rows, cols, row_labels, col_labels, temperature, self_index, own, drop_group=drop_group
    )
    assert lse.tolist() == pytest.approx([e[0] for e in expected], rel=1e-12)
    assert positive.tolist() == pytest.approx([e[1] for e in expected], rel=1e-12)
    if not drop_group:
        loss = ops.info_nce(rows, cols, row_labels, col_labels, temperature, self_index=self_index, own=own)
        assert loss.tolist() == pytest.approx([e[0] - e[1] if e[2] else 0.0 for e in expected], rel=1e-12)

    tensors = [t for t in (rows, cols, own) if t is not None]

    def both(*leaves):
        leaves = list(leaves)
        r, c = leaves.pop(0), None if cols is None else leaves.pop(0)
        parts = ops.info_nce_parts(
            r, c, row_labels, col_labels, temperature, self_index, *leaves, drop_group=drop_group
        )
        return parts[0].masked_fill(parts[0].isinf(), 0.0), parts[1]

    assert_differentiable(both, *tensors)


def test_a_row_without_positives_gives_nothing_and_without_columns_no_nan():
    rows = draw(2, 3).requires_grad_()
    alone = torch.tensor([0, 1])
    loss = ops.info_nce(rows, None, alone, None, 0.1, self_index=torch.tensor([0, 1]))
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0] and torch.equal(rows.grad, torch.zeros_like(rows))
    rows.grad = None
    same = torch.tensor([0, 0])
    lse, _ = ops.info_nce_parts(rows, None, same, None, 0.1, self_index=torch.tensor([0, 1]), drop_group=True)
    lse.exp().sum().backward()
    assert lse.tolist() == [-math.inf, -math.inf] and torch.equal(rows.grad, torch.zeros_like(rows))


def test_info_nce_parts_give_a_denominator_for_each_pair():
    """-log of s+ against the negatives alone is softplus(lse - s+): what leaving siblings out is for."""
    rows, labels = draw(6, 4), torch.arange(6) // 2
    self_index = torch.arange(6)
    lse, positive = ops.info_nce_parts(rows, None, labels, None, 0.3, self_index, drop_group=True)
    torch.testing.assert_close(F.softplus(lse - positive), ops.info_nce(rows, None, labels, None, 0.3, self_index))


def test_info_nce_is_not_rounded_by_autocast():
    rows, labels = F.normalize(draw(8, 16).float(), dim=1), torch.arange(8) // 2
    exact = ops.info_nce(rows.double(), None, labels, None, 0.04, torch.arange(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = ops.info_nce(rows, None, labels, None, 0.04, torch.arange(8))
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer.double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, k: ops.token_gather(x, k + 5), r"keep in \[0, 6\), got numbers from \d to \d+"),
        (lambda x, k: ops.token_gather(x, k - 6), r"keep in \[0, 6\), got numbers from -\d"),
        (lambda x, k: ops.token_gather(x, k.double()), "expected keep to be integers"),
        (lambda x, k: ops.token_gather(x, k[:1]), r"integers \[2, K\]"),
        (lambda x, k: ops.token_gather(x[0], k), r"expected x \[B, L, D\]"),
        (lambda x, k: ops.token_scatter(x, k, x[0, 0], 6), r"expected latents \[B, P\+K, D\]"),
        (lambda x, k: ops.token_scatter(x[:, :3], k, x[0, 0], 2), r"keep in \[0, 2\)"),
        (lambda x, k: ops.token_scatter(x[:, :3], k, x[0, 0], 6, x[0, :5]), r"expected pos \[6, 4\]"),
        (lambda x, k: ops.token_scatter(x[:, :3], k, x[0, 0, :2], 6), r"expected mask_token \[4\]"),
        (lambda x, k: ops.patchify(draw(1, 3, 4, 5), 2), "multiples of the patch side 2"),
        (lambda x, k: ops.masked_patch_mse(x, draw(2, 3, 4, 6), x[..., 0] > 0), r"p\*p\*3"),
        (lambda x, k: ops.masked_patch_mse(x, draw(2, 1, 4, 4), x[..., 0] > 0), r"pred \[G, 4, 4\]"),
        (lambda x, k: ops.masked_patch_mse(x, draw(2, 1, 4, 6), x[..., 0]), "expected mask bool"),
        (lambda x, k: ops.info_nce(x[0], x[1], k[0], None, 0.1), "cols and col_labels together"),
        (lambda x, k: ops.info_nce(x[0], x[1], None, None, 0.1), "or cols and own without any labels"),
        (lambda x, k: ops.info_nce(x[0], None, k[0], None, 0.1), r"expected row_labels \[6\]"),
        (lambda x, k: ops.info_nce(x[0], None, torch.arange(6), None, 0.0), "temperature above 0"),
        (
            lambda x, k: ops.info_nce(x[0], None, torch.arange(6), None, 1.0, torch.arange(6) + 1),
            r"self_index in \[-1, 6\)",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call(draw(2, 6, 4), draw_keep(2, 6, 3))


def test_patch_embed_gather_mistakes_are_named():
    images, keep, weight, bias, pos = draw(1, 3, 4, 4), draw_keep(1, 4, 2), draw(5, 3, 2, 2), draw(5), draw(4, 5)
    with pytest.raises(UserError, match=r"weight \[D, 3, p, p\]"):
        ops.patch_embed_gather(images, keep, weight[:, :2], bias, pos)
    with pytest.raises(UserError, match=r"pos \[4, 5\]"):
        ops.patch_embed_gather(images, keep, weight, bias, pos[1:])
    with pytest.raises(UserError, match=r"keep in \[0, 4\)"):
        ops.patch_embed_gather(images, keep + 4, weight, bias, pos)


def test_of_a_token_scattered_twice_the_later_place_counts():
    latents, keep = draw(1, 3, 2).requires_grad_(), torch.tensor([[1, 3, 1]])
    full = ops.token_scatter(latents, keep, torch.zeros(2).double(), 4)
    assert torch.equal(full[0, 1], latents[0, 2]) and torch.equal(full[0, 3], latents[0, 1])
    (gradient,) = torch.autograd.grad(full.sum(), latents)
    assert gradient[0].tolist() == [[0, 0], [1, 1], [1, 1]]


def mixture_by_hand(t, c, tau, log_prior):
    """(lse, mean, entropy, expected log prior) of every row and the mean posterior, in Python numbers."""
    rows, marginal = [], [0.0] * len(c)
    for x in t.tolist():
        logits = [sum(a * b for a, b in zip(x, prototype, strict=True)) / tau for prototype in c.tolist()]
        total = sum(math.exp(logit) for logit in logits)
        p = [math.exp(logit) / total for logit in logits]
        mean = [sum(q * prototype[i] for q, prototype in zip(p, c.tolist(), strict=True)) for i in range(len(x))]
        entropy = -sum(q * math.log(q) for q in p)
        rows.append((math.log(total), mean, entropy, sum(q * u for q, u in zip(p, log_prior.tolist(), strict=True))))
        marginal = [m + q / len(t) for m, q in zip(marginal, p, strict=True)]
    return rows, marginal


def test_gmm_ops():
    t, c, log_prior = draw(5, 3), draw(4, 3, seed=1), draw(4, seed=2).log_softmax(dim=0)
    rows, marginal = mixture_by_hand(t, c, 0.7, log_prior)
    assert ops.gmm_lse(t, c, 0.7).tolist() == pytest.approx([r[0] for r in rows], rel=1e-12)
    answer = ops.gmm_posterior(t, c, 0.7, log_prior)
    torch.testing.assert_close(answer[0], torch.tensor([r[1] for r in rows], dtype=torch.float64))
    assert answer[1].tolist() == pytest.approx([r[2] for r in rows], rel=1e-12)
    assert answer[2].tolist() == pytest.approx([r[3] for r in rows], rel=1e-12)
    assert answer[3].tolist() == pytest.approx(marginal, rel=1e-12)
    assert ops.gmm_posterior(t, c, 0.7)[2].tolist() == [0.0] * 5
    assert ops.gmm_posterior(t, c, 0.7, marginal=False)[3].numel() == 0
    assert_differentiable(lambda t, c: ops.gmm_posterior(t, c, 0.7, log_prior), t, c)
    assert_differentiable(lambda t, c: ops.gmm_lse(t, c, 0.7), t, c)


def test_gmm_assign_is_the_cross_entropy_of_the_assignments():
    student, teacher, c = draw(5, 3), draw(5, 3, seed=1), draw(4, 3, seed=2)
    p_t, log_p_s = (teacher @ c.T / 0.3).softmax(dim=1), (student @ c.T / 0.6).log_softmax(dim=1)
    cross_entropy, entropy = ops.gmm_assign(student, teacher, c, 0.6, 0.3)
    torch.testing.assert_close(cross_entropy, -(p_t * log_p_s).sum(dim=1))
    torch.testing.assert_close(entropy, -(p_t * p_t.log()).sum(dim=1))
    assert_differentiable(lambda s, t, c: ops.gmm_assign(s, t, c, 0.6, 0.3), student, teacher, c)


def test_gmm_crops_is_lse_and_posterior():
    student, teacher, c, log_prior = draw(6, 3), draw(5, 3, seed=1), draw(4, 3, seed=2), draw(4, seed=3)
    expected = ops.gmm_lse(student, c, 0.6), *ops.gmm_posterior(teacher, c, 0.3, log_prior)
    for a, b in zip(ops.gmm_crops(student, teacher, c, 0.6, 0.3, log_prior), expected, strict=True):
        assert torch.equal(a, b)
    assert_differentiable(lambda s, t, c: ops.gmm_crops(s, t, c, 0.6, 0.3, log_prior), student, teacher, c)


def test_a_detached_posterior_moves_the_prototypes_as_values_alone():
    """dL/dc = p^T dL/dmean, and the rows get nothing from the mean; the other answers keep their gradients."""
    t, c = draw(5, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_()
    mean, entropy, _, _ = ops.gmm_posterior(t, c, 0.7, detach_p=True)
    weight = draw(5, 3, seed=2)
    values, rows = torch.autograd.grad((mean * weight).sum(), (c, t), retain_graph=True, allow_unused=True)
    assert rows is None or not rows.any()
    torch.testing.assert_close(values, (t @ c.T / 0.7).softmax(dim=1).T @ weight)
    plain = ops.gmm_posterior(t, c, 0.7)[1]
    for kept, whole in zip(*(torch.autograd.grad(h.sum(), (t, c)) for h in (entropy, plain)), strict=True):
        torch.testing.assert_close(kept, whole)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, c: ops.gmm_lse(x[0], c, 0.1), r"gmm_lse: expected rows \[N, d\]"),
        (lambda x, c: ops.gmm_lse(x, c[:, :2], 0.1), r"expected prototypes \[K, 3\]"),
        (lambda x, c: ops.gmm_lse(x, c[:0], 0.1), "K of 1 or more"),
        (lambda x, c: ops.gmm_posterior(x, c, 0.0), "temperature above 0, got 0.0"),
        (lambda x, c: ops.gmm_posterior(x, c, 0.1, c[0]), r"expected log_prior \[4\]"),
        (lambda x, c: ops.gmm_crops(x, x[0], c, 0.1, 0.1), r"gmm_crops: expected rows \[N, d\]"),
        (lambda x, c: ops.gmm_crops(x, x, c, 0.1, 0.0), "gmm_crops: expected a temperature above 0, got 0.0"),
        (lambda x, c: ops.gmm_crops(x, x, c, 0.1, 0.1, c[0]), r"gmm_crops: expected log_prior \[4\]"),
        (lambda x, c: ops.gmm_assign(x, x[:1], c, 0.1, 0.1), "student and teacher of one shape"),
    ],
)
def test_mistakes_in_the_mixture_ops(call, message):
    with pytest.raises(UserError, match=message):
        call(draw(5, 3), draw(4, 3, seed=1))
