"""The built-in criterions, one a file; `pair.py` has what those of two views share."""

from .bank_nce import BankNCE
from .barlow_twins import BarlowTwins
from .byol import BYOL
from .dino import DINO
from .info_nce import InfoNCE
from .mae import MAE
from .mi_mae import MIMAE
from .moco_v3 import MoCoV3
from .mrcl import MRCL
from .queue_nce import QueueNCE
from .simmim import SimMIM
from .svib import SVIB
from .swav import SwAV

__all__ = [
    "BYOL",
    "DINO",
    "MAE",
    "MIMAE",
    "MRCL",
    "SVIB",
    "BankNCE",
    "BarlowTwins",
    "InfoNCE",
    "MoCoV3",
    "QueueNCE",
    "SimMIM",
    "SwAV",
]
