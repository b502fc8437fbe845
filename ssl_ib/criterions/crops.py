"""What the criterions of a student and a teacher over many crops share.

Shapes: B images, V student views of which the first G are also the teacher's, d embedding.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge
from torch import Tensor

from ..errors import UserError

#: One prototype would be every image's.
NumPrototypes = Annotated[int, Ge(2)]


def student_and_teacher(outputs: dict[str, list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """The student's V outputs and the teacher's G. Raises UserError where no pair of different views is left."""
    student, teacher = outputs["student"], outputs["teacher"]
    if len(student) < 2:
        raise UserError("a teacher teaches other views than its own: expected at least 2 views, got 1")
    return student, teacher


def pairs(num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    """(teacher's view, student's view) of every pair but those of one view with itself."""
    return [(t, s) for t in range(num_teacher) for s in range(num_student) if s != t]
