"""Type hints for constructor arguments, with their ranges: they are the schema a recipe is checked against."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Interval

PositiveInt = Annotated[int, Ge(1)]
Count = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Probability = Annotated[float, Interval(ge=0, le=1)]
#: A share of something of which a part must remain, such as a mask ratio.
Ratio = Annotated[float, Interval(ge=0, lt=1)]
