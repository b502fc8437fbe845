"""What the ops cost in operations: what torch's counter finds in the reference, where the products are torch's own."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ssl_ib import ops
from ssl_ib.flops import FlopCount

N, M, D = 6, 10, 8
PRODUCT = 2 * N * M * D


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def keep(batch: int, patches: int, kept: int) -> torch.Tensor:
    return torch.arange(batch * kept).view(batch, kept) % patches


#: An op on leaves, and what it costs by hand: forward, backward.
CASES = {
    "info_nce of rows with themselves": (
        lambda x: ops.info_nce(x, None, torch.arange(N) // 2, None, 0.1, self_index=torch.arange(N)),
        [(N, D)],
        (2 * N * N * D, 4 * N * N * D),
    ),
    "info_nce of rows with others": (
        lambda x, y: ops.info_nce(x, y, torch.arange(N), torch.arange(M), 0.1),
        [(N, D), (M, D)],
        (PRODUCT, 2 * PRODUCT),
    ),
    "info_nce with a queue": (
        lambda x: ops.info_nce(x, torch.ones(M, D), None, None, 0.1, own=torch.ones(N, D)),
        [(N, D)],
        (PRODUCT, PRODUCT),
    ),
    "gmm_lse": (lambda x, c: ops.gmm_lse(x, c, 0.1), [(N, D), (M, D)], (PRODUCT, 2 * PRODUCT)),
    "gmm_posterior": (
        lambda t, c: ops.gmm_posterior(t, c, 0.1, log_prior=torch.zeros(M))[:3],
        [(N, D), (M, D)],
        # The expected log prior is a matrix with a vector, which torch does not count.
        (2 * PRODUCT, 4 * PRODUCT),
    ),
    "gmm_posterior of teachers": (
        lambda c: ops.gmm_posterior(torch.ones(N, D), c, 0.1)[:2],
        [(M, D)],
        (2 * PRODUCT, 3 * PRODUCT),
    ),
    "gmm_posterior with a constant mean": (
        lambda t, c: ops.gmm_posterior(t, c, 0.1, detach_p=True)[:2],
        [(N, D), (M, D)],
        (2 * PRODUCT, 3 * PRODUCT),
    ),
    "gmm_crops": (
        lambda s, c: ops.gmm_crops(s, torch.ones(N, D), c, 0.1, 0.04)[:4],
        [(N, D), (M, D)],
        (3 * PRODUCT, 5 * PRODUCT),
    ),
    "patch_embed_gather": (
        lambda weight, bias, pos: ops.patch_embed_gather(torch.ones(2, 3, 8, 8), keep(2, 4, 3), weight, bias, pos),
        [(5, 3, 4, 4), (5,), (4, 5)],
        (2 * 2 * 3 * 5 * 48, 2 * 2 * 3 * 5 * 48),
    ),
    "masked_patch_mse": (
        lambda pred: ops.masked_patch_mse(pred, torch.ones(2, 3, 8, 8), torch.ones(2, 4, dtype=torch.bool), True),
        [(2, 4, 48)],
        (0, 0),
    ),
}


def counted(name: str, backend: str) -> tuple[float, float]:
    """What torch's counter finds in the forward and in the backward."""
    call, shapes, _ = CASES[name]
    leaves = [leaf(*shape) for shape in shapes]
    with ops.use_backend(backend):
        with FlopCounterMode(display=False) as forward:
            answers = call(*leaves)
            answers = answers if isinstance(answers, tuple) else (answers,)
            total = sum(answer.sum() for answer in answers if answer.requires_grad)
        with FlopCounterMode(display=False) as backward:
            total.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("name", CASES)
def test_every_backend_costs_what_the_reference_does(name):
    by_hand = CASES[name][2]
    assert counted(name, "chunked") == by_hand
    assert counted(name, "reference") == by_hand


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_counted_from_its_forward_alone(name):
    call, shapes, (forward, backward) = CASES[name]
    leaves = [leaf(*shape) for shape in shapes]
    with ops.use_backend("chunked"):
        with FlopCount() as count:
            call(*leaves)
        assert count.total == forward + backward
        with FlopCount() as count, torch.no_grad():
            call(*leaves)
        assert count.total == forward
