"""The kernels in plain torch, a piece at a time: no tensor larger than a piece beyond inputs and outputs.

Every backend offers these functions: plain tensors in, new tensors out, no gradients, arguments already checked.
"""

from .gather import (
    masked_patch_mse,
    masked_patch_mse_backward,
    patch_embed_gather,
    patch_embed_gather_backward,
    token_gather,
    token_gather_backward,
    token_scatter,
    token_scatter_backward,
)
from .softmax import lse, lse_backward, lse_backward_symmetric, posterior, posterior_backward

__all__ = [
    "lse",
    "lse_backward",
    "lse_backward_symmetric",
    "masked_patch_mse",
    "masked_patch_mse_backward",
    "patch_embed_gather",
    "patch_embed_gather_backward",
    "posterior",
    "posterior_backward",
    "token_gather",
    "token_gather_backward",
    "token_scatter",
    "token_scatter_backward",
]
