"""The built-in criterions, one a file; `pair.py` has what those of two views share."""

from .bank_nce import BankNCE as BankNCE
from .barlow_twins import BarlowTwins as BarlowTwins
from .byol import BYOL as BYOL
from .dino import DINO as DINO
from .info_nce import InfoNCE as InfoNCE
from .mae import MAE as MAE
from .mi_mae import MIMAE as MIMAE
from .moco_v3 import MoCoV3 as MoCoV3
from .mrcl import MRCL as MRCL
from .queue_nce import QueueNCE as QueueNCE
from .simmim import SimMIM as SimMIM
from .supervised import Supervised as Supervised
from .svib import SVIB as SVIB
from .swav import SwAV as SwAV
from .view_game import ViewGame as ViewGame
