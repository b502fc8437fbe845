"""What the criterions of a student and a teacher over many crops share.

Shapes: B images, V student views of which the first G are also the teacher's, K prototypes.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from ..errors import UserError
from ..part import RunInfo

#: One prototype would be every image's.
NumPrototypes = Annotated[int, Ge(2)]


def check_views(info: RunInfo) -> None:
    """Raises UserError where the run's views leave no pair of different ones."""
    if len(info.view_shapes) < 2:
        raise UserError("a teacher teaches other views than its own: expected at least 2 views, got 1")


def pairs(num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    """(teacher's view, student's view) of every pair but those of one view with itself.

    Raises UserError where there is none, or the student lacks a view of the teacher's.
    """
    found = [(t, s) for t in range(num_teacher) for s in range(num_student) if s != t]
    if not found or num_student < num_teacher:
        raise UserError(
            f"a teacher teaches other views than its own: expected outputs of 2 views or more, the teacher's first, "
            f"got {num_student} of the student and {num_teacher} of the teacher"
        )
    return found


def same_top(targets: list[Tensor], predictions: list[Tensor], found: list[tuple[int, int]]) -> Tensor:
    """The share of images, over pairs of views, whose target and prediction [B, K] are largest at one prototype."""
    with torch.no_grad():
        tops, guesses = ([x.argmax(dim=1) for x in views] for views in (targets, predictions))
        return torch.stack([(tops[t] == guesses[s]).to(predictions[s].dtype).mean() for t, s in found]).mean()
