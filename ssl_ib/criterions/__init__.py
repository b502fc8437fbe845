"""The built-in criterions, one a file; `pair.py` has what those of two views share."""

from . import barlow_twins, byol, dino, info_nce, mae, mi_mae, moco_v3, mrcl, simmim, svib, swav  # noqa: F401
