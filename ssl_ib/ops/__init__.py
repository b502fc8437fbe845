"""The kernels' facade: one function a kernel, its torch reference beside it, and the choice of what runs.

Needs torch alone. Legend of the shape letters at the head of each module.
"""

from .backend import chosen, use_backend
from .contrastive import info_nce, info_nce_parts
from .patches import masked_patch_mse, patch_embed_gather, patchify
from .tokens import token_gather, token_scatter

__all__ = [
    "chosen",
    "info_nce",
    "info_nce_parts",
    "masked_patch_mse",
    "patch_embed_gather",
    "patchify",
    "token_gather",
    "token_scatter",
    "use_backend",
]
