"""The built-in models, one a file."""

from . import mae, mrcl, siamese, simmim, student_teacher  # noqa: F401
