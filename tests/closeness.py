"""The tolerance of every kernel test: as close to the float64 truth as the reference in that dtype, plus an epsilon."""

import torch
from torch import Tensor

#: What a kernel may be off beyond the reference's own error, relative to the largest number of the truth: some
#: roundings of the dtype (its unit roundoff is 6e-8, 4e-3 and 5e-4), since the order of a sum is free.
EPSILON = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def error(answer: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; equal infinities are no difference, and a NaN is an infinite one."""
    answer, truth = answer.double(), truth.double()
    difference = torch.where(answer == truth, 0.0, (answer - truth).abs())
    return difference.nan_to_num(nan=torch.inf).max().item() if difference.numel() else 0.0


def assert_close(
    name: str,
    answer: Tensor,
    reference: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    logits: float = 0.0,
    scale: float = 1.0,
) -> None:
    """`answer` (the kernel's) against `truth` (float64), with `reference` computed by plain torch in `dtype`.

    logits: the largest that a softmax was taken of. Off by 16 roundoffs of the sums' dtype, as another order of a
    product's sum may leave it, it moves a logsumexp by as much and a probability by as much of itself.
    scale: the natural size of the answer where cancellation may leave less (1/temperature for a logit's gradient).
    """
    assert answer.shape == truth.shape, f"{name}: {list(answer.shape)}, expected {list(truth.shape)}"
    finite = truth[truth.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    roundoff = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    slack = EPSILON[dtype] * largest + 16 * roundoff * logits * max(largest, scale)
    allowed = error(reference, truth) + slack
    assert error(answer, truth) <= allowed, f"{name}: off by {error(answer, truth):.3g}, allowed {allowed:.3g}"
