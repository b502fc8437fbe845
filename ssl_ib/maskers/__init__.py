"""The built-in maskers (which patches of an image stay visible), one a file; `masker.py` has what they share."""

from . import block, grid, none, random  # noqa: F401
