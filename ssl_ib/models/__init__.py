"""The built-in models, one a file."""

from . import mae, moco, mrcl, siamese, simmim, student_teacher, two_stream  # noqa: F401
