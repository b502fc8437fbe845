"""The built-in models, one a file."""

from . import (  # noqa: F401
    frame_sequence,
    mae,
    moco,
    mrcl,
    siamese,
    simmim,
    student_teacher,
    two_stream,
    view_generator,
)
