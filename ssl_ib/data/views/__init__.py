"""How views are drawn from images. Importing this package registers the named recipes."""

from . import recipes as recipes
from .augment import Augment as Augment
from .augment import Parameters as Parameters
from .augment import Views as Views
