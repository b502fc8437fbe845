"""The kernels' facade: one function a kernel, its torch reference beside it, and the choice of what runs.

Needs torch alone. Legend of the shape letters at the head of each module.
"""

from . import flop_formulas as flop_formulas
from .backend import BACKENDS, record, use_backend, wanted, why_not
from .contrastive import info_nce, info_nce_parts
from .mixture import gmm_assign, gmm_crops, gmm_lse, gmm_posterior
from .patches import masked_patch_mse, patch_embed_gather, patchify
from .tokens import token_gather, token_scatter
from .views import augment

__all__ = [
    "BACKENDS",
    "augment",
    "gmm_assign",
    "gmm_crops",
    "gmm_lse",
    "gmm_posterior",
    "info_nce",
    "info_nce_parts",
    "masked_patch_mse",
    "patch_embed_gather",
    "patchify",
    "record",
    "token_gather",
    "token_scatter",
    "use_backend",
    "wanted",
    "why_not",
]
