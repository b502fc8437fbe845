"""The kernels of views as a torch operator with fake tensors. It has no gradient: what views are drawn from has none.

Shapes: B images, C channels, H x W pixels of the source, S pixels of a side of the view, N operations of RandAugment.
"""

from __future__ import annotations

from torch.library import custom_op

from .backend import function


@custom_op(
    "ssl_ib::augment",
    mutates_args=(),
    schema="(Tensor images, Tensor boxes, Tensor flip, Tensor factors, Tensor order, Tensor grey, Tensor sigma, "
    "Tensor solarise, Tensor? op, Tensor? value, Tensor? mean, Tensor? std, SymInt size, bool bicubic, "
    "str[] operations, int radius, str[] level_ops, ScalarType dtype, str backend) -> Tensor",
)
def augment(images, *numbers):
    """images uint8 or float32 [B, C, H, W] -> [B, C, S, S]; the others as ssl_ib_kernels.augment has them."""
    *numbers, dtype, backend = numbers
    return function("augment", "augment", backend, images, dtype)(images, *numbers, dtype)


@augment.register_fake
def _(images, *numbers):
    size, dtype = numbers[11], numbers[16]
    return images.new_empty(*images.shape[:2], size, size, dtype=dtype)
