"""The built-in criterions, one a file; `pair.py` has what those of two views share."""

from . import barlow_twins, byol, info_nce, mae, mi_mae, moco_v3, mrcl, simmim  # noqa: F401
