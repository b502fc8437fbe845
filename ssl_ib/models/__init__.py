"""The built-in models, one a file."""

from . import mae, mrcl, siamese, simmim  # noqa: F401
