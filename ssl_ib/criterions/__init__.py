"""The built-in criterions, one a file; `pair.py` has what those of two views share."""

from . import (  # noqa: F401
    bank_nce,
    barlow_twins,
    byol,
    dino,
    info_nce,
    mae,
    mi_mae,
    moco_v3,
    mrcl,
    queue_nce,
    simmim,
    supervised,
    svib,
    swav,
)
