"""The gather family's CUDA kernels, emulated, against the reference in float64.

Shapes: B images, L tokens, K kept, P prefix tokens, D width.
"""

import ctypes
import faulthandler
import itertools
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


def run_everything(csrc, dtype=BF16, width=40, place=lambda tensor: tensor):
    """Every output of every kernel, with its inputs where `place` puts them."""
    entries = torch.cat([draw_keep(5, 12, 6), draw_keep(5, 12, 2)], dim=1)
    entries[0, 0], entries[-1, -1] = 0, 11
    keep, mask_token = place(entries), place(draw(width))
    tokens, latents, full = (place(draw(5, n, width, dtype=dtype, seed=n)) for n in (12, 9, 13))
    yield csrc.token_gather(tokens, keep)
    yield csrc.token_gather_backward(place(draw(5, 8, width, dtype=dtype)), keep, 12)
    yield csrc.token_scatter(latents, keep, mask_token, 12, place(draw(13, width)), 1)
    yield from csrc.token_scatter_backward(full, keep, 1, True, True, True)


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


@pytest.mark.parametrize(("dtype", "width"), [(BF16, 40), (F16, 24), (F32, 33)])
@pytest.mark.parametrize("at_end", [True, False])
def test_inputs_are_not_read_beyond_their_ends(csrc, at_end, dtype, width):
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            count = sum(1 for _ in run_everything(csrc, dtype, width, lambda tensor: fenced(tensor, at_end)))
            os._exit(0 if count == 6 else 1)
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


def test_what_a_kernel_cannot_read_is_refused(csrc):
    x, keep = draw(1, 4, 8), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16, got Double"):
        csrc.token_gather(x.double(), keep)
    with pytest.raises(RuntimeError, match="keep as int32 or int64, got Short"):
        csrc.token_gather(x, keep.short())
    with pytest.raises(RuntimeError, match="tensors on one cpu device, got meta"):
        csrc.token_gather(x, keep.to("meta"))
