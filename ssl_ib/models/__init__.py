"""The built-in models, one a file."""

from . import mrcl, siamese  # noqa: F401
