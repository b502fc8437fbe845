"""Numbers that change over a run: `{from: 0.5, to: 0.01, shape: exponential}` in place of any number of a recipe.

Shapes, with t in [0, 1] the share of the schedule's span that is done:
    constant     a                              linear       a + (b - a) t
    cosine       b + (a - b) (1 + cos(pi t))/2  exponential  a (b / a)^t
`epochs` is the span (default: the whole run) and `delay` the epochs before it begins; outside the span the nearer end
holds. The values are taken per optimiser step, and rounded where the number is an integer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import nearest

SHAPES = ("linear", "cosine", "exponential", "constant")


@dataclass(frozen=True)
class Schedule:
    """A number as a function of the run's progress."""

    start: float
    end: float
    shape: str = "linear"
    epochs: float | None = None
    delay: float = 0.0
    whole: bool = False

    @classmethod
    def parse(cls, value: dict[str, Any], path: str, problems: list[str]) -> Schedule | None:
        """Reads a recipe's schedule; appends what is wrong to `problems` and then returns None."""
        before = len(problems)
        known = {"from", "to", "shape", "epochs", "delay"}
        problems += [f"{path}.{key}: unknown key{nearest(str(key), known)}" for key in value if key not in known]
        for key in ("from", "to", "epochs", "delay"):
            number = value.get(key)
            if number is None and (key == "epochs" or key not in value):
                continue
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                problems.append(f"{path}.{key}: expected a number, got {number!r}")
            elif key == "epochs" and number <= 0:
                problems.append(f"{path}.{key}: expected a number of epochs above 0, got {number!r}")
            elif key == "delay" and number < 0:
                problems.append(f"{path}.{key}: expected a number of epochs of at least 0, got {number!r}")
        shape = value.get("shape", "linear")
        if shape not in SHAPES:
            problems.append(f"{path}.shape: unknown shape {shape!r}{nearest(str(shape), SHAPES)}")
        if len(problems) > before:
            return None
        if shape == "exponential" and value["from"] * value["to"] <= 0:
            problems.append(f"{path}: an exponential schedule needs two numbers of one sign, neither of them 0")
            return None
        return cls(value["from"], value["to"], shape, value.get("epochs"), value.get("delay", 0.0))

    def spec(self) -> dict[str, Any]:
        """The schedule as a recipe spells it."""
        spec = {"from": self.start, "to": self.end, "shape": self.shape}
        return spec | ({"epochs": self.epochs} if self.epochs else {}) | ({"delay": self.delay} if self.delay else {})

    @property
    def largest(self) -> float:
        """The end of larger magnitude. A part is built with it, so that what it sets up allows for every value."""
        return max(self.start, self.end, key=abs)

    def at(self, epoch: float, total_epochs: float) -> float:
        """The value when `epoch` epochs (a fraction counts) of `total_epochs` are done."""
        span = self.epochs or max(total_epochs - self.delay, 1e-12)
        value = self._value(min(max((epoch - self.delay) / span, 0.0), 1.0))
        return round(value) if self.whole else value

    def _value(self, t: float) -> float:
        if self.shape == "linear":
            return self.start + (self.end - self.start) * t
        if self.shape == "cosine":
            return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * t))
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** t
        return self.start
