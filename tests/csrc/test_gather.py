"""The gather family's CUDA kernels, emulated, against the reference in float64.

Shapes: B images, C channels, p patch side, L tokens or patches, K kept, P prefix tokens, D width, G reconstructions.
"""

import ctypes
import faulthandler
import itertools
import math
import mmap
import os
import traceback

import pytest
import torch
from closeness import assert_close
from torch.utils import deterministic

from ssl_ib import ops

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

pytestmark = pytest.mark.usefixtures("thread_order", "_filled")
every_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])


@pytest.fixture(autouse=True)
def _reference():
    with ops.use_backend("reference"):
        yield


@pytest.fixture
def _filled():
    """New memory holds NaN, so that an output nobody wrote shows."""
    assert deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape, dtype=F32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_keep(batch, num_tokens, kept, dtype=torch.int64):
    """Unsorted, without repeats in a row."""
    return draw(batch, num_tokens, seed=99).argsort(dim=1)[:, :kept].to(dtype)


def off_by_one(x):
    """The same numbers at an address that is a multiple of their size alone."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def gradients(function, *tensors, upstream):
    """function(*tensors) and its gradients to all of them."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    answer = function(*leaves)
    return answer.detach(), torch.autograd.grad(answer, leaves, upstream.to(answer.dtype), allow_unused=True)


def bits_equal(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ---- token_gather ----

TOKENS = [(2, 7, 4, 8), (3, 40, 13, 5), (1, 33, 33, 136), (2, 1, 1, 3), (2, 70, 3, 600)]  # B, L, K, D


@every_dtype
@pytest.mark.parametrize(("batch", "num_tokens", "kept", "width"), TOKENS)
def test_token_gather(csrc, dtype, batch, num_tokens, kept, width):
    x, keep = draw(batch, num_tokens, width, dtype=dtype), draw_keep(batch, num_tokens, kept)
    expected = ops.token_gather(x, keep)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    for given in (x, off_by_one(x), strided):
        assert bits_equal(csrc.token_gather(given, keep), expected)
    assert bits_equal(csrc.token_gather(x, keep.int()), expected)
    assert bits_equal(csrc.token_gather(x, keep.T.contiguous().T), expected)


@every_dtype
@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize(("batch", "num_tokens", "kept", "width"), TOKENS)
def test_token_gather_backward(csrc, dtype, repeats, batch, num_tokens, kept, width):
    keep = draw_keep(batch, num_tokens, kept, torch.int32)
    if repeats:
        keep = torch.cat([keep, keep[:, : (kept + 1) // 2], keep[:, :1]], dim=1)
    grad, x = draw(batch, keep.shape[1], width, dtype=dtype), draw(batch, num_tokens, width)
    _, (reference,) = gradients(lambda x: ops.token_gather(x, keep), x.to(dtype), upstream=grad)
    _, (truth,) = gradients(lambda x: ops.token_gather(x, keep), x.double(), upstream=grad.double())
    answer = csrc.token_gather_backward(grad, keep, num_tokens)
    assert_close("dx", answer, reference, truth, dtype)
    assert repeats or bits_equal(answer, reference)
    assert bits_equal(csrc.token_gather_backward(off_by_one(grad), keep.long(), num_tokens), answer)


# ---- token_scatter ----


def scatter_by_hand(latents, keep, mask_token, num_tokens, pos, num_prefix):
    """The definition, one token after another: a later entry of keep overrides an earlier one."""
    out = mask_token.to(latents.dtype).expand(len(latents), num_prefix + num_tokens, -1).clone()
    out[:, :num_prefix] = latents[:, :num_prefix]
    for b, k in itertools.product(range(len(keep)), range(keep.shape[1])):
        out[b, num_prefix + keep[b, k]] = latents[b, num_prefix + k]
    return out if pos is None else out + pos.to(out.dtype)


SCATTERS = [  # B, L, K, P, D
    (3, 7, 4, 1, 8),
    (9, 40, 13, 0, 5),
    (1, 33, 33, 2, 136),
    (2, 6, 0, 1, 16),
    (5, 1, 1, 0, 3),
    (2, 0, 0, 2, 8),
    (1, 5, 2, 1, 2400),
]


@every_dtype
@pytest.mark.parametrize("with_pos", [False, True])
@pytest.mark.parametrize(("batch", "num_tokens", "kept", "num_prefix", "width"), SCATTERS)
def test_token_scatter(csrc, dtype, with_pos, batch, num_tokens, kept, num_prefix, width):
    latents = draw(batch, num_prefix + kept, width, dtype=dtype)
    mask_token, pos = draw(width, seed=1), draw(num_prefix + num_tokens, width, seed=2) if with_pos else None
    keep = draw_keep(batch, num_tokens, kept)
    keep[:, kept // 2 :] = keep[:, : kept - kept // 2].flip(1)  # the losers' latents appear nowhere
    others = keep, mask_token, num_tokens, pos, num_prefix
    reference = scatter_by_hand(latents, *others)
    wide = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in others]
    truth = scatter_by_hand(latents.double(), *wide)
    answer = csrc.token_scatter(latents, *others)
    assert answer.dtype == dtype
    assert_close("out", answer, reference, truth, dtype)
    # One rounding of the exact sum: nothing is rounded on the way.
    float_pos = 0 if pos is None else pos
    assert bits_equal(
        answer, (scatter_by_hand(latents.float(), keep, mask_token, num_tokens, None, num_prefix) + float_pos).to(dtype)
    )
    assert bits_equal(
        csrc.token_scatter(off_by_one(latents), keep.int(), mask_token, num_tokens, pos, num_prefix), answer
    )
    half = None if pos is None else pos.bfloat16()
    assert_close(
        "out of half parameters",
        csrc.token_scatter(latents, keep, mask_token.half(), num_tokens, half, num_prefix),
        reference,
        scatter_by_hand(
            latents.double(),
            keep,
            mask_token.half().double(),
            num_tokens,
            None if half is None else half.double(),
            num_prefix,
        ),
        dtype,
    )


@every_dtype
@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize(("batch", "num_tokens", "kept", "num_prefix", "width"), SCATTERS)
def test_token_scatter_backward(csrc, dtype, repeats, batch, num_tokens, kept, num_prefix, width):
    keep, rows = draw_keep(batch, num_tokens, kept), num_prefix + num_tokens
    if repeats:
        keep[:, kept // 2 :] = keep[:, : kept - kept // 2].flip(1)
    grad = draw(batch, rows, width, dtype=dtype)
    inputs = draw(batch, num_prefix + kept, width, seed=1), draw(width, seed=2), draw(rows, width, seed=3)

    def scatter(latents, mask_token, pos):
        return scatter_by_hand(latents, keep, mask_token, num_tokens, pos, num_prefix)

    _, reference = gradients(scatter, inputs[0].to(dtype), *inputs[1:], upstream=grad)
    _, truth = gradients(scatter, *(t.double() for t in inputs), upstream=grad.double())
    answer = csrc.token_scatter_backward(grad, keep, num_prefix, True, True, True)
    assert [t.dtype for t in answer] == [dtype, F32, F32]
    assert bits_equal(answer[0], reference[0])  # copies, and exact zeros
    # The sums are float32's, whatever the stream's dtype.
    exact = gradients(scatter, *inputs, upstream=grad.float())[1]
    assert_close("dmask_token", answer[1], exact[1], truth[1], F32)
    assert_close("dpos", answer[2], exact[2], truth[2], F32)
    for wanted in itertools.product([False, True], repeat=3):
        for part, full, want in zip(
            csrc.token_scatter_backward(off_by_one(grad), keep.int(), num_prefix, *wanted), answer, wanted, strict=True
        ):
            assert bits_equal(part, full) if want else part.numel() == 0


def test_token_scatter_backward_over_many_images(csrc):
    """Slices of the batch, uneven ones among them, and several groups of tokens."""
    grad, keep = draw(37, 11, 8), draw_keep(37, 10, 3)
    _, dmask_token, dpos = csrc.token_scatter_backward(grad, keep, 1, False, True, True)
    hidden = torch.ones(37, 10, dtype=torch.bool).scatter(1, keep, False)
    truth = grad.double()[:, 1:][hidden].sum(0)
    assert_close("dmask_token", dmask_token, grad[:, 1:][hidden].sum(0), truth, F32)
    assert_close("dpos", dpos, grad.sum(0), grad.double().sum(0), F32)


# ---- patch_embed_gather ----

EMBEDDINGS = {  # B, C, patches down and across, p, K, P, D
    "runs of 8": (3, 3, 4, 5, 8, 7, 1, 40),
    "two tiles of rows": (11, 1, 4, 4, 8, 12, 0, 24),
    "the wide tile": (2, 2, 2, 3, 8, 4, 2, 264),
    "two wide tiles": (1, 1, 2, 2, 8, 3, 0, 400),
    "side 16": (2, 3, 2, 3, 16, 5, 1, 64),
    "runs of 2": (2, 3, 3, 2, 14, 4, 0, 20),
    "side 4, odd width": (3, 3, 3, 3, 4, 6, 1, 33),
    "odd side": (2, 3, 2, 4, 3, 5, 1, 150),
    "one pixel": (2, 1, 3, 3, 1, 2, 0, 1),
}
DTYPES = [(F32, F32), (F32, BF16), (BF16, BF16), (F32, F16), (F16, F16), (BF16, F32), (F16, BF16)]
every_embedding = pytest.mark.parametrize("shape", EMBEDDINGS.values(), ids=EMBEDDINGS)
every_pair = pytest.mark.parametrize(
    ("pixels", "dtype"), DTYPES, ids=[f"{str(a)[6:]} to {str(b)[6:]}" for a, b in DTYPES]
)


def draw_embedding(shape, pixels, dtype):
    """images, keep, weight, bias, pos, prefix."""
    batch, channels, down, across, side, kept, num_prefix, width = shape
    return (
        draw(batch, channels, down * side, across * side, dtype=pixels),
        draw_keep(batch, down * across, kept),
        (draw(width, channels, side, side, seed=1) / math.sqrt(channels) / side).to(dtype),
        draw(width, seed=2),
        draw(down * across, width, seed=3),
        draw(num_prefix, width, seed=4) if num_prefix else None,
    )


def embed(images, keep, weight, bias, pos, prefix):
    """The reference on pixels converted to the weight's dtype; bias too, as a convolution demands."""
    bias = None if bias is None else bias.to(weight.dtype)
    return ops.patch_embed_gather(images.to(weight.dtype), keep, weight, bias, pos, prefix)


def doubled(tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


@every_pair
@every_embedding
def test_patch_embed_gather(csrc, shape, pixels, dtype):
    arguments = draw_embedding(shape, pixels, dtype)
    # Pixels are rounded to the weight's dtype, by definition.
    truth = embed(*doubled([arguments[0].to(dtype), *arguments[1:]]))
    answer = csrc.patch_embed_gather(*arguments)
    assert answer.dtype == dtype
    assert_close("tokens", answer, embed(*arguments), truth, dtype)
    images, keep, weight, bias, pos, prefix = arguments
    moved = csrc.patch_embed_gather(off_by_one(images), keep.int(), off_by_one(weight), bias, pos, prefix)
    assert_close("tokens, unaligned", moved, embed(*arguments), truth, dtype)


@every_dtype
def test_patch_embed_gather_without_bias_or_kept_patches(csrc, dtype):
    images, keep, weight, _, pos, prefix = draw_embedding(EMBEDDINGS["runs of 8"], F32, dtype)
    arguments = images, keep, weight, None, pos.bfloat16(), prefix.half()
    truth = embed(*doubled([images.to(dtype), *arguments[1:]]))
    assert_close("tokens", csrc.patch_embed_gather(*arguments), embed(*arguments), truth, dtype)
    alone = csrc.patch_embed_gather(images, keep[:, :0], weight, draw(40), pos, prefix)
    assert bits_equal(alone, prefix.to(dtype).expand(3, 1, 40))


@every_dtype
@pytest.mark.parametrize("side", [3, 8, 14])
def test_patch_embed_gather_rounds_pixels_to_the_weights_dtype(csrc, dtype, side):
    """The difference of two pixels that are one in half precision, and not in float32."""
    images, weight = torch.ones(1, 1, side, side), torch.zeros(1, 1, side, side, dtype=dtype)
    images[..., 0, 0] += 2**-12
    weight[..., 0, 0], weight[..., 0, 1] = 1, -1
    answer = csrc.patch_embed_gather(
        images, torch.zeros(1, 1, dtype=torch.int32), weight, None, torch.zeros(1, 1), None
    )
    assert answer.item() == (2**-12 if dtype == F32 else 0)


@every_pair
@every_embedding
def test_patch_embed_gather_backward(csrc, shape, pixels, dtype):
    images, keep, weight, bias, pos, prefix = draw_embedding(shape, pixels, dtype)
    keep = torch.cat([keep, keep[:, :2], keep[:, :1]], dim=1)
    num_prefix = 0 if prefix is None else len(prefix)
    grad = draw(len(keep), num_prefix + keep.shape[1], len(weight), dtype=dtype, seed=5)

    def tokens(images, weight, pos):
        return embed(images, keep, weight, None, pos, None if prefix is None else prefix.to(weight.dtype))

    _, reference = gradients(tokens, images, weight, pos, upstream=grad)
    _, truth = gradients(tokens, images.to(dtype).double(), weight.double(), pos.double(), upstream=grad.double())
    answer = csrc.patch_embed_gather_backward(grad, images, keep, weight, num_prefix, True, True, True)
    assert [t.dtype for t in answer] == [pixels, F32, F32]
    coarsest = max(pixels, dtype, key=lambda x: torch.finfo(x).eps)
    assert_close("dimages", answer[0], reference[0], truth[0], coarsest)
    assert_close("dweight", answer[1], reference[1], truth[1], dtype)
    assert_close(
        "dpos", answer[2], gradients(tokens, images.float(), weight.float(), pos, upstream=grad)[1][2], truth[2], F32
    )
    for wanted in itertools.product([False, True], repeat=3):
        parts = csrc.patch_embed_gather_backward(grad, off_by_one(images), keep.int(), weight, num_prefix, *wanted)
        for part, full, want in zip(parts, answer, wanted, strict=True):
            assert bits_equal(part, full) if want else part.numel() == 0


def test_patch_embed_gather_backward_in_chunks(csrc):
    """More than 16 MB of pixels, and slices of the batch."""
    images, keep = draw(90, 3, 64, 64), (torch.arange(64) + torch.arange(90)[:, None]) % 15
    weight, grad = draw(8, 3, 16, 16, seed=1), draw(90, 64, 8, seed=2)
    assert keep.numel() * weight[0].numel() * 4 > 16 << 20

    def tokens(images, weight, pos):
        return embed(images, keep, weight, None, pos, None)

    pos = torch.zeros(16, 8)
    _, reference = gradients(tokens, images, weight, pos, upstream=grad)
    _, truth = gradients(tokens, images.double(), weight.double(), pos.double(), upstream=grad.double())
    answer = csrc.patch_embed_gather_backward(grad, images, keep, weight, 0, True, True, True)
    for name, *parts in zip(("dimages", "dweight", "dpos"), answer, reference, truth, strict=True):
        assert_close(name, *parts, F32)


# ---- masked_patch_mse ----

RECONSTRUCTIONS = [  # images, reconstructions of each, C, patches down and across, p
    (2, 1, 3, 2, 3, 4),
    (3, 2, 3, 3, 3, 3),
    (1, 3, 1, 2, 2, 8),
    (2, 2, 3, 1, 2, 16),
    (1, 1, 4, 1, 1, 32),
    (5, 1, 1, 7, 9, 1),
]


def draw_reconstruction(batch, per_image, channels, down, across, side, pixels, dtype):
    """pred, images, mask. Pixels far from zero, as a variance by differences of squares would show; one is flat."""
    images = (draw(batch, channels, down * side, across * side) + 30).to(pixels)
    images[-1, :, :side, :side] = 30
    shape = batch * per_image, down * across
    return draw(*shape, side * side * channels, dtype=dtype, seed=1), images, draw(*shape, seed=2) > 0.3


def mse_sums(pred, images, mask, norm_pix):
    """The reference's means times their counts."""
    means = torch.stack(ops.masked_patch_mse(pred, images, mask, norm_pix))
    return means * torch.stack([mask.sum(), (~mask).sum()])


@every_pair
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("shape", RECONSTRUCTIONS)
def test_masked_patch_mse(csrc, shape, norm_pix, pixels, dtype):
    pred, images, mask = draw_reconstruction(*shape, pixels, dtype)
    # Targets of one pixel have no deviation.
    if norm_pix and pred.shape[2] == 1:
        assert csrc.masked_patch_mse(pred, images, mask, norm_pix).isnan().all()
        return
    wide = mse_sums(pred.double(), images.double(), mask, norm_pix)
    answer = csrc.masked_patch_mse(pred, images, mask, norm_pix)
    assert answer.dtype == F32
    for i in range(2):  # each against its own size: one group may be much the smaller
        assert_close(
            "sums", answer[i : i + 1], mse_sums(pred.float(), images, mask, norm_pix)[i : i + 1], wide[i : i + 1], F32
        )
    moved = csrc.masked_patch_mse(off_by_one(pred), off_by_one(images), mask.T.contiguous().T, norm_pix)
    assert_close("sums, unaligned", moved, answer, wide, F32)

    scale = torch.tensor([0.7, -0.3])
    leaf = pred.double().requires_grad_()
    error = (mse_sums(leaf, images.double(), mask, norm_pix) * scale).sum() * (pred.shape[2] / 2)
    (truth,) = torch.autograd.grad(error, leaf)
    dpred = csrc.masked_patch_mse_backward(scale, pred, images, mask, norm_pix)
    assert dpred.dtype == dtype
    assert_close("dpred", dpred, truth.float().to(dtype), truth, dtype)
    moved = csrc.masked_patch_mse_backward(scale, off_by_one(pred), off_by_one(images), mask, norm_pix)
    assert_close("dpred, unaligned", moved, truth.float().to(dtype), truth, dtype)


def test_masked_patch_mse_of_more_patches_than_warps(csrc):
    """A warp takes several patches, one after another."""
    pred, images, mask = draw_reconstruction(2, 1, 3, 128, 129, 2, F32, F32)
    assert mask.numel() > 8 * 4096
    truth = mse_sums(pred.double(), images.double(), mask, True)
    answer = csrc.masked_patch_mse(pred, images, mask, True)
    assert_close("sums", answer, mse_sums(pred, images, mask, True), truth, F32)
    dpred = csrc.masked_patch_mse_backward(torch.ones(2), pred, images, mask, False)
    truth = pred.double() - ops.patchify(images.double(), 2)
    assert_close("dpred", dpred, pred - ops.patchify(images, 2), truth, F32)


@pytest.mark.parametrize("hidden", [True, False])
def test_masked_patch_mse_of_an_empty_group_is_zero(csrc, hidden):
    pred, images, mask = draw_reconstruction(2, 1, 3, 2, 3, 4, F32, F32)
    answer = csrc.masked_patch_mse(pred, images, torch.full_like(mask, hidden), False)
    assert answer[int(hidden)] == 0 and answer[int(not hidden)] > 0


def test_masked_patch_mse_refuses_a_patch_beyond_shared_memory(csrc):
    images, mask = torch.zeros(1, 1, 240, 240), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="too many pixels"):
        csrc.masked_patch_mse(torch.zeros(1, 1, 240 * 240), images, mask, False)


# ---- All of them ----

HOSTILE = [-1, 4, 5, -(2**31), 2**31 - 1, 2**40, -(2**62)]


def test_indices_out_of_range_touch_nothing(csrc):
    """Row 0 of keep is in order; all of row 1 points outside, where the memory holds NaN."""
    keep = torch.tensor([[3, 0, 2, 1, 0, 0, 2], HOSTILE])
    around = torch.full((4, 4, 8), torch.nan)
    around[1:3] = draw(2, 4, 8)
    x, good = around[1:3], keep[:1]
    answer = csrc.token_gather(x, keep)
    assert bits_equal(answer[:1], ops.token_gather(x[:1], good)) and answer.isfinite().all()
    grad = torch.full((4, 7, 8), torch.nan)
    grad[1:3] = draw(2, 7, 8)
    answer = csrc.token_gather_backward(grad[1:3], keep, 4)
    assert bits_equal(answer[:1], csrc.token_gather_backward(grad[1:2], good, 4)) and not answer[1].any()

    mask_token = draw(8, seed=3)
    answer = csrc.token_scatter(grad[1:3], keep, mask_token, 4, None, 0)
    assert torch.equal(answer[1], mask_token.expand(4, 8))
    dlatents, dmask_token, _ = csrc.token_scatter_backward(x, keep, 0, True, True, False)
    assert not dlatents[1].any() and torch.equal(
        dmask_token, csrc.token_scatter_backward(x[1:], keep[1:], 0, False, True, False)[1]
    )

    images = torch.full((4, 1, 16, 16), torch.nan)
    images[1:3] = draw(2, 1, 16, 16)
    for side, dtype in [(8, F32), (8, BF16), (8, F16)]:
        weight, pos = draw(16, 1, side, side, dtype=dtype), draw(4, 16)
        answer = csrc.patch_embed_gather(images[1:3], keep, weight, None, pos, None)
        assert answer.isfinite().all()
        assert bits_equal(answer[:1], csrc.patch_embed_gather(images[1:2], good, weight, None, pos, None))
        tokens = draw(2, 7, 16, dtype=dtype)
        answer = csrc.patch_embed_gather_backward(tokens, images[1:3], keep, weight, 0, True, True, True)
        expected = csrc.patch_embed_gather_backward(tokens[:1], images[1:2], good, weight, 0, True, True, True)
        assert not answer[0][1].any() and bits_equal(answer[0][:1], expected[0])
        assert torch.equal(answer[2], expected[2]) and torch.allclose(answer[1], expected[1], atol=1e-6)


def run_everything(csrc, dtype=BF16, width=40, side=8, place=lambda tensor: tensor):
    """Every output of every kernel, with its inputs where `place` puts them."""
    entries = torch.cat([draw_keep(5, 12, 6), draw_keep(5, 12, 2)], dim=1)
    entries[0, 0], entries[-1, -1] = 0, 11
    keep, mask = place(entries), place(draw(10, 12) > 0)
    tokens, latents, full = (place(draw(5, n, width, dtype=dtype, seed=n)) for n in (12, 9, 13))
    images, weight = place(draw(5, 3, 3 * side, 4 * side)), place(draw(width, 3, side, side, dtype=dtype))
    bias, pos, prefix = (place(draw(*shape, width)) for shape in ((), (12,), (1,)))
    pred = place(draw(10, 12, 3 * side * side, dtype=dtype))
    yield csrc.token_gather(tokens, keep)
    yield csrc.token_gather_backward(place(draw(5, 8, width, dtype=dtype)), keep, 12)
    yield csrc.token_scatter(latents, keep, bias, 12, place(draw(13, width)), 1)
    yield from csrc.token_scatter_backward(full, keep, 1, True, True, True)
    yield csrc.patch_embed_gather(images, keep, weight, bias, pos, prefix)
    yield from csrc.patch_embed_gather_backward(latents, images, keep, weight, 1, True, True, True)
    yield csrc.masked_patch_mse(pred, images, mask, True)
    yield csrc.masked_patch_mse_backward(place(draw(2)), pred, images, mask, True)


def test_the_same_bits_in_any_order_of_the_threads(csrc):
    expected = list(run_everything(csrc))
    assert all(t.isfinite().all() for t in expected)
    for order in ("forward", "random", "random"):
        csrc.set_thread_order(order)
        for answer, other in zip(run_everything(csrc), expected, strict=True):
            assert bits_equal(answer, other)


def fenced(tensor, at_end):
    """A copy whose last byte, or first, lies beside a page that cannot be touched."""
    size = tensor.numel() * tensor.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, room + 2 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    no_access = 0
    for fence in (address, address + mmap.PAGESIZE + room):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(fence), mmap.PAGESIZE, no_access) == 0
    offset = mmap.PAGESIZE + (room - size if at_end else 0)
    copy = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


@pytest.mark.parametrize(("dtype", "width", "side"), [(BF16, 40, 8), (F16, 24, 14), (F32, 33, 3)])
@pytest.mark.parametrize("at_end", [True, False])
def test_inputs_are_not_read_beyond_their_ends(csrc, at_end, dtype, width, side):
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            count = sum(1 for _ in run_everything(csrc, dtype, width, side, lambda tensor: fenced(tensor, at_end)))
            os._exit(0 if count == 12 else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFSIGNALED(status), f"killed by signal {os.WTERMSIG(status)}"
    assert os.waitstatus_to_exitcode(status) == 0


@every_dtype
def test_nothing_to_do(csrc, dtype):
    none = torch.zeros(0, 3, dtype=torch.int64)
    keep = torch.zeros(2, 0, dtype=torch.int64)
    images, weight, pos = draw(2, 3, 8, 8), draw(5, 3, 4, 4, dtype=dtype), draw(4, 5)
    assert csrc.token_gather(draw(2, 4, 6, dtype=dtype), keep).shape == (2, 0, 6)
    assert csrc.token_gather(draw(0, 4, 6, dtype=dtype), none).shape == (0, 3, 6)
    assert torch.equal(
        csrc.token_gather_backward(draw(2, 0, 6, dtype=dtype), keep, 4), torch.zeros(2, 4, 6, dtype=dtype)
    )
    assert csrc.token_scatter(draw(0, 3, 6, dtype=dtype), none, draw(6), 4, None, 0).shape == (0, 4, 6)
    dlatents, dmask_token, dpos = csrc.token_scatter_backward(draw(0, 5, 6, dtype=dtype), none, 1, True, True, True)
    assert (
        dlatents.shape == (0, 4, 6)
        and torch.equal(dmask_token, torch.zeros(6))
        and torch.equal(dpos, torch.zeros(5, 6))
    )
    assert csrc.patch_embed_gather(images, keep, weight, None, pos, None).shape == (2, 0, 5)
    assert csrc.patch_embed_gather(images[:0], none, weight, None, pos, None).shape == (0, 3, 5)
    dimages, dweight, dpos = csrc.patch_embed_gather_backward(
        draw(2, 0, 5, dtype=dtype), images, keep, weight, 0, True, True, True
    )
    assert torch.equal(dimages, torch.zeros_like(images)) and dweight.shape == weight.shape and not dweight.any()
    assert torch.equal(dpos, torch.zeros(4, 5))
    mask = torch.zeros(0, 4, dtype=torch.bool)
    assert torch.equal(csrc.masked_patch_mse(draw(0, 4, 48, dtype=dtype), images[:0], mask, False), torch.zeros(2))
    assert csrc.masked_patch_mse_backward(draw(2), draw(0, 4, 48, dtype=dtype), images[:0], mask, False).shape == (
        0,
        4,
        48,
    )


def test_what_a_kernel_cannot_read_is_refused(csrc):
    x, keep = draw(1, 4, 8), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16, got Double"):
        csrc.token_gather(x.double(), keep)
    with pytest.raises(RuntimeError, match="keep as int32 or int64, got Short"):
        csrc.token_gather(x, keep.short())
    with pytest.raises(RuntimeError, match="tensors on one cpu device, got meta"):
        csrc.token_gather(x, keep.to("meta"))
