"""The built-in maskers (which patches of an image stay visible), one a file; `masker.py` has what they share."""

from . import block, grid, independent, none, orthogonal, random  # noqa: F401
