"""Type hints for constructor arguments, with their ranges: they are the schema a recipe is checked against."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

PositiveInt = Annotated[int, Ge(1)]
Count = Annotated[int, Ge(0)]
#: Of layers or blocks: each is built, so that a slip of some zeros would build for hours.
Layers = Annotated[int, Interval(ge=1, le=1024)]
LayerCount = Annotated[int, Interval(ge=0, le=1024)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Probability = Annotated[float, Interval(ge=0, le=1)]
#: A share of something of which a part must remain, such as a mask ratio.
Ratio = Annotated[float, Interval(ge=0, lt=1)]
#: Of the centre crop, of the resized image's shorter side.
CropRatio = Annotated[float, Interval(ge=0.01, le=1)]


def show(hint: Any) -> str:
    """A hint as a reader would write it: `float in [0, 1)`, `int >= 1`, `'cls' | 'mean'`, `(float, float)`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        # A text stands for what types and bounds cannot say.
        if texts := [bound for bound in inner[1:] if isinstance(bound, str)]:
            return texts[0]
        return " ".join([show(inner[0]), *filter(None, map(_range, inner[1:]))])
    if origin is Literal:
        return " | ".join(map(repr, inner))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(show, inner))
    if origin is tuple:
        return f"({', '.join('...' if part is Ellipsis else show(part) for part in inner)})"
    if hint is type(None):
        return "none"
    return hint.__name__ if isinstance(hint, type) and not inner else str(hint).replace("typing.", "")


def _range(bound: Any) -> str:
    """A bound of annotated-types in the usual notation."""
    if isinstance(bound, Interval):
        low = (
            "(-inf" if bound.ge is None and bound.gt is None else f"[{bound.ge}" if bound.gt is None else f"({bound.gt}"
        )
        high = (
            "inf)" if bound.le is None and bound.lt is None else f"{bound.le}]" if bound.lt is None else f"{bound.lt})"
        )
        return f"in {low}, {high}"
    return f">= {bound.ge}" if isinstance(bound, Ge) else f"> {bound.gt}" if isinstance(bound, Gt) else ""
