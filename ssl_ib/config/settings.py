"""The settings of a command that is no run: one section, checked like a run's configuration.

A section may have a `source`, which is a part; a class method `fill(given)` may say defaults that depend on what is
given.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import ValidationError

from ..errors import ConfigError
from .config import Section, describe_field, parse_overrides
from .recipe import merge, named
from .registry import check_part, part_keys, problems_of

T = TypeVar("T", bound=Section)


def settings(section: type[T], overrides: Iterable[str], base: dict[str, Any] | None = None) -> T:
    """A section with the overrides `KEY=VALUE` laid over `base` and the section's defaults.

    base: plain data, such as the source of a run. `eval.source` is another name of `source`.
    Raises ConfigError with every problem.
    """
    problems: list[str] = []
    data = dict(base or {})
    given: dict[str, Any] = {}
    overrides = [text.removeprefix("eval.") if text.startswith("eval.source") else text for text in overrides]
    for key, value in parse_overrides(overrides, problems):
        first, *rest = key.split(".")
        if not rest or first not in section.model_fields:
            given[key] = value
        elif first == "source" and len(rest) == 1:
            below = named(given.get(first, data.get(first)))
            given[first] = {**(below if isinstance(below, dict) else {}), rest[0]: value}
        else:
            problems.append(f"{key}: {first} has no keys")
    if "source" in section.model_fields:
        source = merge(data.get("source"), given.get("source"), "source") if "source" in given else data.get("source")
        keys = [*section.model_fields, *part_keys("source", source, "source")]
        if source is not None:
            data["source"] = check_part("source", source, "source", problems, keys)
        given.pop("source", None)
    fill = getattr(section, "fill", None)
    data = {**data, **(fill(given) if fill else {}), **given}
    try:
        found = section.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        problems += problems_of(error, "", lambda place: section.model_fields)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return found


def described(section: type[Section]) -> str:
    """The keys of a section with their types and defaults, a line each, and what it and its bases say of them."""
    lines = [f"  {name}: {describe_field(section, name)}" for name in section.model_fields]
    bases = [base for base in section.__mro__ if issubclass(base, Section) and base is not Section]
    return "\n\n".join(["\n".join(lines), *(inspect.cleandoc(base.__doc__) for base in bases if base.__doc__)]) + "\n"
