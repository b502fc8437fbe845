"""`results.json`, the last file that a run writes: what it says is checked where it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.outside import read_json
from ..errors import UserError
from ..run import FIRST
from .log import with_numbers

#: Its evaluations, each metrics by name; a run has one of `FIRST`.
EVALUATIONS = (*FIRST, "raw_pixels", "trained", "chance")


def read_results(folder: Path) -> dict[str, Any]:
    """What `results.json` of a finished run's folder holds: `EVALUATIONS`, `seconds` and `step`.

    Raises UserError where there is none, or a damaged one, which it names.
    """
    path = folder / "results.json"
    found = with_numbers(read_json(path))
    for name in EVALUATIONS:
        part = found.get(name, {})
        if not isinstance(part, dict):
            raise UserError(f"{path} is damaged: {name} is no object")
        for key, value in part.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise UserError(f"{path} is damaged: {key} of {name} is no number")
    if not isinstance(found.get("seconds"), int | float) or not isinstance(found.get("step"), int):
        raise UserError(f"{path} is damaged: it has no seconds or no step")
    return found
