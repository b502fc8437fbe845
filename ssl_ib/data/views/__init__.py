"""How views are drawn from images. Importing this package registers the named recipes."""

from . import infomin as infomin
from . import learned_split as learned_split
from . import moving_mnist as moving_mnist
from . import recipes as recipes
from . import splits as splits
from .augment import Augment as Augment
from .augment import Crops as Crops
from .augment import Parameters as Parameters
from .base import Views as Views
from .rand_augment import RandAugment as RandAugment
