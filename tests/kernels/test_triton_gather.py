"""The gather family's Triton kernels against plain torch in float64: values, gradients, ragged shapes, bits.

Everything that a kernel reads lies between NaNs, and so does everything that it allocates: a number read from outside
shows in the result, and one written outside shows in the margins.

Shapes: B images, L tokens or patches, K kept, P prefix tokens, D width, G reconstructions.
"""

import out_of_range
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from optional_tensors import ARGUMENTS, absences, check, extremes
from parameters import spread
from ssl_ib_kernels import patch_embed_gather as embedding
from ssl_ib_kernels import token_scatter as scattering
from ssl_ib_kernels.masked_patch_mse import masked_patch_mse, masked_patch_mse_backward
from ssl_ib_kernels.patch_embed_gather import patch_embed_gather, patch_embed_gather_backward
from ssl_ib_kernels.token_gather import token_gather, token_gather_backward
from ssl_ib_kernels.token_scatter import token_scatter, token_scatter_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

#: Numbers in front of a tensor and behind it; a multiple of 16, so that a tensor stays aligned.
MARGIN = 4096

FAR = 2**40

KERNELS = {
    function.__name__: function
    for function in (
        *(token_gather, token_gather_backward, token_scatter, token_scatter_backward),
        *(patch_embed_gather, patch_embed_gather_backward, masked_patch_mse, masked_patch_mse_backward),
    )
}


@pytest.fixture(autouse=True)
def margins(monkeypatch):
    """Puts what the kernels allocate between NaNs, fills it with NaN, and checks afterwards that the NaNs are there."""
    allocate, buffers = torch.Tensor.new_empty, []

    def new_empty(self, *size, **options):
        size = torch.Size(size[0] if size and not isinstance(size[0], int) else size)
        if size.numel() == 0:
            return allocate(self, size, **options)
        buffer = allocate(self, size.numel() + 2 * MARGIN, **options).fill_(torch.nan)
        buffers.append(buffer)
        return buffer[MARGIN : MARGIN + size.numel()].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    for buffer in buffers:
        assert buffer[:MARGIN].isnan().all() and buffer[-MARGIN:].isnan().all(), "written outside of a tensor"


@pytest.fixture
def draw(device):
    """draw(*shape, dtype=, seed=): normal numbers between NaNs."""

    def draw(*shape, dtype=torch.float32, seed=0):
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return between_nans(numbers.to(dtype), device)

    return draw


def between_nans(x, device):
    buffer = torch.full((x.numel() + 2 * MARGIN,), torch.nan, dtype=x.dtype, device=device)
    inner = buffer[MARGIN : MARGIN + x.numel()].view(x.shape)
    return inner.copy_(x)


@pytest.fixture
def draw_keep(device):
    """draw_keep(B, L, K, repeats=): unsorted, and where asked for, with tokens named several times."""

    def draw_keep(batch, num_tokens, kept, repeats=False, seed=7):
        generator = torch.Generator().manual_seed(seed)
        if repeats:
            return torch.randint(num_tokens, (batch, kept), generator=generator).to(device)
        return torch.rand(batch, num_tokens, generator=generator).argsort(dim=1)[:, :kept].to(device)

    return draw_keep


def at(keep):
    """The index of what keep [B, K] names in [B, L, ...]."""
    return torch.arange(len(keep), device=keep.device)[:, None], keep


# Widths below, at and above a block, one of two blocks; more kept tokens than are compared at a time.
SHAPES = [(2, 5, 5, 24), (3, 7, 4, 1), (2, 9, 3, 128), (1, 6, 4, 1030), (2, 80, 70, 24), (5, 33, 8, 300)]


@pytest.mark.parametrize(("shape", "dtype"), spread(SHAPES, DTYPES))
def test_token_gather_copies(draw, draw_keep, shape, dtype):
    batch, num_tokens, kept, width = shape
    x, keep = draw(batch, num_tokens, width, dtype=dtype), draw_keep(batch, num_tokens, kept, repeats=True)
    assert torch.equal(token_gather(x, keep), x[at(keep)])
    if (shape, dtype) == (SHAPES[0], DTYPES[0]):
        assert torch.equal(token_gather(x, keep.int()), x[at(keep)])


@pytest.mark.parametrize("layout", ["slice", "images_last", "width_first", "expanded"])
def test_token_gather_of_any_layout(draw, draw_keep, layout):
    x = {
        "slice": lambda: draw(3, 8, 20)[:, 1:, 2:18],
        "images_last": lambda: draw(7, 3, 16).transpose(0, 1),
        "width_first": lambda: draw(3, 16, 7).mT,
        "expanded": lambda: draw(1, 1, 16).expand(3, 7, 16),
    }[layout]()
    keep = draw_keep(3, 7, 8)[:, :4]
    answer = token_gather(x, keep)
    assert torch.equal(answer, x[at(keep)]) and answer.is_contiguous()
    grad = x[:, :4]
    assert torch.equal(token_gather_backward(grad, keep, 7), token_gather_backward(grad.contiguous(), keep, 7))


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), spread(SHAPES, DTYPES))
def test_token_gather_backward_sums_in_order_of_k(draw, draw_keep, shape, repeats, dtype):
    batch, num_tokens, kept, width = shape
    grad, keep = draw(batch, kept, width, dtype=dtype), draw_keep(batch, num_tokens, kept, repeats)
    expected = torch.zeros(batch, num_tokens, width, device=grad.device)
    for b in range(batch):
        for k in range(kept):
            expected[b, keep[b, k]] += grad[b, k].float()
    assert torch.equal(token_gather_backward(grad, keep, num_tokens), expected.to(dtype))


def test_a_token_named_by_all_is_summed_over_all(draw, device):
    grad, keep = draw(2, 130, 24), torch.full((2, 130), 3, device=device)
    answer = token_gather_backward(grad, keep, 5)
    assert_close("sum", answer[:, 3], grad.sum(1), grad.double().sum(1), torch.float32)
    assert answer[:, [0, 1, 2, 4]].count_nonzero() == 0


#: B, L, K, P, D
SCATTERS = [
    (5, 9, 4, 2, 24),
    (1, 6, 3, 0, 16),
    (2, 6, 6, 1, 130),
    (3, 5, 0, 1, 8),
    (9, 80, 70, 1, 24),
    (2, 4, 2, 0, 1030),
]


@pytest.mark.parametrize(("case", "dtype"), spread([(s, p) for s in SCATTERS for p in (False, True)], DTYPES))
def test_token_scatter_rounds_the_sum_once(draw, draw_keep, case, dtype):
    (batch, num_tokens, kept, num_prefix, width), with_pos = case
    latents = draw(batch, num_prefix + kept, width, dtype=dtype)
    keep, mask_token = draw_keep(batch, num_tokens, kept, repeats=True), draw(width, seed=1)
    pos = draw(num_prefix + num_tokens, width, seed=2) if with_pos else None
    expected = mask_token.repeat(batch, num_prefix + num_tokens, 1)
    expected[:, :num_prefix] = latents[:, :num_prefix].float()
    for b in range(batch):
        for k in range(kept):  # so the last one has the token
            expected[b, num_prefix + keep[b, k]] = latents[b, num_prefix + k].float()
    expected = (expected if pos is None else expected + pos).to(dtype)
    assert torch.equal(token_scatter(latents, keep, mask_token, num_tokens, pos, num_prefix), expected)


def test_token_scatter_of_any_layout_and_dtype(draw, draw_keep):
    latents, keep = draw(3, 6, 20, dtype=torch.float16)[:, 1:, :16], draw_keep(3, 7, 8)[:, :4].int()
    mask_token, pos = draw(32, dtype=torch.bfloat16, seed=1)[::2], draw(16, 8, dtype=torch.float16, seed=2).mT
    answer = token_scatter(latents, keep, mask_token, 7, pos, 1)
    again = token_scatter(latents.contiguous(), keep.long(), mask_token.float(), 7, pos.float().contiguous(), 1)
    assert torch.equal(answer, again) and answer.is_contiguous()
    grad = draw(8, 3, 20)[..., :16].transpose(0, 1)
    for part, expected in zip(
        token_scatter_backward(grad, keep, 1, True, True, True),
        token_scatter_backward(grad.contiguous(), keep.long(), 1, True, True, True),
        strict=True,
    ):
        assert torch.equal(part, expected)


@pytest.mark.parametrize(("programs", "repeats"), [(1, True), (7, False), (1024, True)])
@pytest.mark.parametrize(("shape", "dtype"), spread([(5, 9, 4, 2, 24), (3, 80, 70, 0, 24), (4, 5, 0, 1, 1030)], DTYPES))
def test_token_scatter_backward(monkeypatch, draw, draw_keep, shape, programs, repeats, dtype):
    batch, num_tokens, kept, num_prefix, width = shape
    monkeypatch.setattr(scattering, "PROGRAMS", programs)
    grad = draw(batch, num_prefix + num_tokens, width, dtype=dtype)
    keep = draw_keep(batch, num_tokens, kept, repeats)

    expected_latents = torch.zeros(batch, num_prefix + kept, width, dtype=dtype, device=grad.device)
    expected_latents[:, :num_prefix] = grad[:, :num_prefix]
    hidden = torch.ones(batch, num_tokens, dtype=torch.bool, device=grad.device)
    for b in range(batch):
        for k in range(kept):
            hidden[b, keep[b, k]] = False
            if keep[b, k] not in keep[b, k + 1 :]:
                expected_latents[b, num_prefix + k] = grad[b, num_prefix + keep[b, k]]

    latents, mask_token, pos = token_scatter_backward(grad, keep, num_prefix, True, True, True)
    assert torch.equal(latents, expected_latents)
    assert mask_token.dtype == pos.dtype == torch.float32
    blanks = grad[:, num_prefix:][hidden]
    assert_close("mask_token", mask_token, blanks.float().sum(0), blanks.double().sum(0), torch.float32)
    assert_close("pos", pos, grad.float().sum(0), grad.double().sum(0), torch.float32)

    # What is wanted decides which kernel is compiled; one dtype of a shape shows it.
    if width == 24 and dtype != torch.float32:
        return
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        parts = token_scatter_backward(grad, keep, num_prefix, *wanted)
        for part, want, whole in zip(parts, wanted, (latents, mask_token, pos), strict=True):
            assert torch.equal(part, whole) if want else part.numel() == 0
            assert part.dtype == whole.dtype


def embedded(images, keep, weight, bias, pos, prefix):
    """The definition: a strided convolution, positions, a gather, and the prefix in front."""
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).mT + pos
    tokens = tokens[at(keep)]
    return tokens if prefix is None else torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1)


#: B, C, grid of patches, p, K, D, P
EMBEDDINGS = [
    (2, 3, (2, 3), 4, 4, 20, 1),
    (3, 1, (3, 2), 2, 6, 64, 0),
    (2, 3, (2, 1), 14, 1, 12, 2),
    (1, 2, (4, 4), 3, 9, 300, 1),
    (5, 3, (6, 6), 1, 30, 8, 1),
    (2, 1, (2, 2), 16, 3, 33, 0),
]


PAIRS = [(torch.float32, d) for d in DTYPES] + [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]


@pytest.mark.parametrize(("case", "dtypes"), spread(EMBEDDINGS, PAIRS))
def test_patch_embed_gather(draw, draw_keep, case, dtypes):
    image_dtype, dtype = dtypes
    batch, channels, (rows, columns), side, kept, width, num_prefix = case
    images = draw(batch, channels, rows * side, columns * side, dtype=image_dtype)
    keep, weight = draw_keep(batch, rows * columns, kept), draw(width, channels, side, side, dtype=dtype, seed=1)
    bias, pos = draw(width, seed=2), draw(rows * columns, width, seed=3)
    prefix = draw(num_prefix, width, seed=4) if num_prefix else None
    answer = patch_embed_gather(images, keep, weight, bias, pos, prefix)
    assert answer.dtype == dtype and answer.is_contiguous()
    arguments = (weight, bias, pos, prefix)
    truth = embedded(images.to(dtype).double(), keep, *(x if x is None else x.double() for x in arguments))
    reference = embedded(images.to(dtype), keep, *(x if x is None else x.to(dtype) for x in arguments))
    assert_close("tokens", answer, reference, truth, dtype)
    if prefix is not None:
        assert torch.equal(answer[:, :num_prefix], prefix.to(dtype).expand(batch, -1, -1))
    if (case, dtypes) == (EMBEDDINGS[0], PAIRS[0]):
        assert torch.equal(answer, patch_embed_gather(images, keep.int(), weight, bias, pos, prefix))


@pytest.mark.parametrize(("with_bias", "dtype"), spread([True, False], DTYPES))
def test_patch_embed_gather_rounds_the_sum_once(device, draw_keep, with_bias, dtype):
    """With whole numbers for pixels and weights every order of summing is exact, so the answer is known to the bit."""

    def whole(*shape, low, high, by=1, seed):
        numbers = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)) / by
        return between_nans(numbers, device)

    images, weight = whole(2, 3, 12, 8, low=-3, high=4, seed=0), whole(20, 3, 4, 4, low=-3, high=4, seed=1).to(dtype)
    bias, pos = whole(20, low=-99, high=99, by=128, seed=2), whole(6, 20, low=-99, high=99, by=128, seed=3)
    bias = bias if with_bias else None
    keep = draw_keep(2, 6, 5, repeats=True)
    exact = embedded(images, keep, weight.float(), bias, pos, None)
    assert torch.equal(patch_embed_gather(images, keep, weight, bias, pos, None), exact.to(dtype))


@pytest.mark.parametrize("layout", ["channels_last", "slice", "expanded"])
def test_patch_embed_gather_of_any_layout(draw, draw_keep, layout):
    images = {
        "channels_last": lambda: draw(2, 8, 12, 3).permute(0, 3, 1, 2),
        "slice": lambda: draw(4, 4, 11, 15)[::2, 1:, 2:10, 3:],
        "expanded": lambda: draw(1, 1, 8, 12).expand(2, 3, 8, 12),
    }[layout]()
    keep, weight, pos = draw_keep(2, 6, 8)[:, :4], draw(3, 20, 4, 4, seed=1).transpose(0, 1), draw(20, 6, seed=2).mT
    bias, prefix = draw(40, seed=3)[::2], draw(20, 2, seed=4).mT
    plain = [x.contiguous() for x in (images, keep, weight, bias, pos, prefix)]
    expected = patch_embed_gather(*plain)
    assert torch.equal(patch_embed_gather(images, keep, weight, bias, pos, prefix), expected)
    grad = draw(2, 6, 20, seed=5).transpose(1, 2).contiguous().transpose(1, 2)
    parts = patch_embed_gather_backward(grad, images, keep, weight, 2, True, True, True)
    wholes = patch_embed_gather_backward(grad.contiguous(), *plain[:3], 2, True, True, True)
    for part, whole in zip(parts, wholes, strict=True):
        assert_close("gradient", part, whole, whole.double(), torch.float32)


@pytest.mark.parametrize("small", [False, True], ids=["one_piece", "in_pieces"])
@pytest.mark.parametrize(("case", "dtype"), spread(EMBEDDINGS, DTYPES))
def test_patch_embed_gather_backward(monkeypatch, draw, draw_keep, case, dtype, small):
    if small:  # several images, steps and parts for one piece of the work; and patches that are kept twice
        monkeypatch.setattr(embedding, "PROGRAMS", 2)
        monkeypatch.setattr(embedding, "PRODUCT_PROGRAMS", 2)
        monkeypatch.setattr(embedding, "WORKSPACE", 2000)
        blocks = {kind: (32, 64, 32, 4, 2) for kind in ("hopper", "ampere", "float32")}
        monkeypatch.setattr(embedding, "TILES", {"weight": blocks})
    batch, channels, (rows, columns), side, kept, width, num_prefix = case
    images = draw(batch, channels, rows * side, columns * side)
    keep, weight = (
        draw_keep(batch, rows * columns, kept, repeats=small),
        draw(width, channels, side, side, dtype=dtype, seed=1),
    )
    grad = draw(batch, num_prefix + kept, width, dtype=dtype, seed=2)
    parts = patch_embed_gather_backward(grad, images, keep, weight, num_prefix, True, True, True)
    assert [part.dtype for part in parts] == [torch.float32] * 3

    def gradients(compute):
        """By autograd, from the operands rounded as the kernel rounds them."""
        leaves = [
            images.to(dtype).to(compute),
            weight.to(compute),
            grad.new_zeros(rows * columns, width, dtype=compute),
        ]
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        tokens = embedded(leaves[0], keep, leaves[1], None, leaves[2], None)
        return torch.autograd.grad(tokens, leaves, grad[:, num_prefix:].to(compute))

    names, truths, references = ("images", "weight", "pos"), gradients(torch.float64), gradients(dtype)
    in_float32 = gradients(torch.float32)
    # The product that becomes the images' gradient is rounded to the operands' dtype, the other two sums are not.
    assert_close("images", parts[0], references[0], truths[0], dtype)
    for name, part, reference, truth in zip(names[1:], parts[1:], in_float32[1:], truths[1:], strict=True):
        assert_close(name, part, reference, truth, torch.float32)

    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        some = patch_embed_gather_backward(grad, images, keep, weight, num_prefix, *wanted)
        for part, want, whole in zip(some, wanted, parts, strict=True):
            assert torch.equal(part, whole) if want else part.numel() == 0


def targets(images, side, norm_pix):
    """[B, L, p*p*C] in float64."""
    patches = images.double().unfold(2, side, side).unfold(3, side, side)  # B, C, rows, columns, p, p
    patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    if not norm_pix:
        return patches
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


#: B, C, grid of patches, p, masks of an image
RECONSTRUCTIONS = [
    (2, 3, (2, 3), 4, 1),
    (3, 1, (7, 5), 2, 3),
    (1, 3, (1, 2), 14, 2),
    (2, 2, (2, 2), 3, 4),
    (1, 3, (2, 1), 40, 1),
]


#: With pixels normalised, and as they are.
TARGETS = [(case, i % 2 == 0) for i, case in enumerate(RECONSTRUCTIONS)] + [(RECONSTRUCTIONS[0], False)]
OTHER_TARGETS = [(case, i % 2 == 1) for i, case in enumerate(RECONSTRUCTIONS) if i > 0]


@pytest.mark.parametrize(("case", "dtype"), spread(TARGETS, DTYPES, OTHER_TARGETS))
@pytest.mark.parametrize("hidden", [0.0, 0.6, 1.0])
def test_masked_patch_mse(draw, case, hidden, dtype):
    (batch, channels, grid, side, num_masks), norm_pix = case
    (rows, columns), pixels = grid, side * side * channels
    images = draw(batch, channels, rows * side, columns * side)
    pred = draw(batch * num_masks, rows * columns, pixels, dtype=dtype, seed=1)
    noise = torch.rand(pred.shape[:2], generator=torch.Generator().manual_seed(2))
    mask = (noise < hidden).to(pred.device)

    target = targets(images, side, norm_pix).repeat_interleave(num_masks, dim=0)
    difference = pred.double() - target
    error = difference.square().mean(-1)
    truth = torch.stack([error[mask].sum(), error[~mask].sum()])
    rounded = (pred.float() - target.float()).square().mean(-1)
    reference = torch.stack([rounded[mask].sum(), rounded[~mask].sum()])
    sums = masked_patch_mse(pred, images, mask, norm_pix)
    assert sums.dtype == torch.float32
    assert_close("sums", sums, reference, truth, torch.float32)
    assert torch.equal(sums == 0, truth == 0)  # the sum over no patch

    scale = draw(2, seed=3)
    dpred = masked_patch_mse_backward(scale, pred, images, mask, norm_pix)
    assert dpred.dtype == dtype
    by_row = torch.where(mask, scale[0], scale[1])[..., None]
    plain = (by_row * (pred.float() - target.float())).to(dtype)
    assert_close("pred", dpred, plain, by_row.double() * difference, dtype)


def test_masked_patch_mse_of_any_layout(draw):
    images, pred = draw(2, 8, 12, 3).permute(0, 3, 1, 2), draw(4, 7, 50, seed=1)[:, 1:, 1:49]
    mask = (draw(6, 4, seed=2) > 0).mT
    sums = masked_patch_mse(pred, images, mask, True)
    assert torch.equal(sums, masked_patch_mse(pred.contiguous(), images.contiguous(), mask.contiguous(), True))
    dpred = masked_patch_mse_backward(sums, pred, images, mask, True)
    again = masked_patch_mse_backward(sums, pred.contiguous(), images.contiguous(), mask.contiguous(), True)
    assert torch.equal(dpred, again) and dpred.is_contiguous()


@pytest.mark.parametrize("far", [-1, 6, 2**30, FAR, -FAR])
def test_an_index_out_of_range_reads_and_writes_nothing_outside(draw, draw_keep, far):
    """Its own row may hold anything; the others hold what they should, and a read so far away would end the process."""
    keep = draw_keep(2, 6, 3)
    strange = keep.clone()
    strange[0, 1] = far
    strange = strange.int() if abs(far) <= 2**30 else strange
    x, others = draw(2, 6, 24), torch.ones(2, 3, dtype=torch.bool, device=keep.device)
    others[0, 1] = False
    assert torch.equal(token_gather(x, strange)[others], x[at(keep)][others])
    grad = draw(2, 3, 24, seed=1)
    assert torch.equal(token_gather_backward(grad, strange, 6)[1], token_gather_backward(grad, keep, 6)[1])

    latents, mask_token = draw(2, 5, 24, seed=2), draw(24, seed=3)
    answer, expected = (token_scatter(latents, k, mask_token, 6, None, 2) for k in (strange, keep))
    assert torch.equal(answer[1], expected[1]) and torch.equal(answer[0, :2], latents[0, :2])
    parts, wholes = (token_scatter_backward(answer, k, 2, True, True, True) for k in (strange, keep))
    assert torch.equal(parts[0][:, 2:][others], wholes[0][:, 2:][others])

    images, weight, pos = draw(2, 3, 8, 12), draw(20, 3, 4, 4, seed=4), draw(6, 20, seed=5)
    answer, expected = (patch_embed_gather(images, k, weight, None, pos, None) for k in (strange, keep))
    assert torch.equal(answer[others], expected[others])
    parts = patch_embed_gather_backward(answer, images, strange, weight, 0, True, True, True)
    assert torch.equal(
        parts[0][1], patch_embed_gather_backward(answer, images, keep, weight, 0, True, False, False)[0][1]
    )
    assert all(part.isfinite().all() for part in parts[1:])


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize("num_prefix", [0, 1])
def test_nothing_to_do(draw, device, batch, kept, num_prefix):
    if batch and kept:
        batch, kept = 0, 0
    keep = torch.zeros(batch, kept, dtype=torch.int64, device=device)
    assert token_gather(draw(batch, 6, 24), keep).shape == (batch, kept, 24)
    assert torch.equal(token_gather_backward(draw(batch, kept, 24), keep, 6), torch.zeros(batch, 6, 24, device=device))

    total = num_prefix + kept
    parts = token_scatter_backward(draw(batch, num_prefix + 6, 24), keep, num_prefix, True, True, True)
    assert [list(part.shape) for part in parts] == [[batch, total, 24], [24], [num_prefix + 6, 24]]
    assert all(part.isfinite().all() for part in parts)

    images, weight, pos = draw(batch, 1, 4, 6), draw(4, 1, 2, 2), draw(6, 4)
    prefix = draw(num_prefix, 4, seed=1, dtype=torch.bfloat16) if num_prefix else None
    tokens = patch_embed_gather(images, keep, weight, None, pos, prefix)
    assert torch.equal(tokens, torch.zeros(batch, total, 4, device=device) + (0 if prefix is None else prefix.float()))
    gradients = patch_embed_gather_backward(tokens, images, keep, weight, num_prefix, True, True, True)
    for gradient, x in zip(gradients, (images, weight, pos), strict=True):
        assert gradient.shape == x.shape and gradient.count_nonzero() == 0

    mask = torch.zeros(0, 6, dtype=torch.bool, device=device)
    assert masked_patch_mse(draw(0, 6, 4), images, mask, False).tolist() == [0, 0]
    assert masked_patch_mse_backward(draw(2), draw(0, 6, 4), images, mask, False).shape == (0, 6, 4)


def test_repeats_to_the_bit(draw, draw_keep):
    images, keep, weight = draw(8, 3, 8, 12), draw_keep(8, 6, 5, repeats=True), draw(20, 3, 4, 4, seed=1)
    grad, full, embedding = draw(8, 5, 24, seed=2), draw(8, 6, 24, seed=3), draw(8, 5, 20, seed=6)
    pred, mask, pos = draw(8, 6, 48, seed=4), draw(8, 6, seed=5) > 0, draw(6, 20, seed=7)
    for run in (
        lambda: token_gather_backward(grad, keep, 6),
        lambda: torch.cat([x.flatten() for x in token_scatter_backward(full, keep, 0, True, True, True)]),
        lambda: patch_embed_gather(images, keep, weight, None, pos, None),
        lambda: torch.cat(
            [x.flatten() for x in patch_embed_gather_backward(embedding, images, keep, weight, 0, True, True, True)]
        ),
        lambda: masked_patch_mse(pred, images, mask, True),
    ):
        first = run()
        assert first.isfinite().all() and torch.equal(first, run())


every_kernel = pytest.mark.parametrize("name", [name for name in ARGUMENTS if name in KERNELS])


@every_kernel
def test_absent_tensors_are_neutral_ones(device, name):
    for absent in extremes(KERNELS[name]):
        check(KERNELS[name], name, absent, device, torch.float32)


@every_kernel
def test_an_absent_tensor_is_a_neutral_one(device, name, not_compiled):
    for absent in absences(KERNELS[name])[1:-1]:
        check(KERNELS[name], name, absent, device, torch.float32)


@pytest.mark.parametrize("name", out_of_range.GATHERS)
def test_an_index_out_of_range_names_nothing(device, name):
    out_of_range.check_gather(KERNELS[name], name, device)
