"""Names for the parts a run is composed of, and the schema each name's constructor implies.

    @register_criterion("info_nce")
    class InfoNCE(Criterion):
        def __init__(self, temperature: Positive = 0.1): ...

A recipe's `criterion: {name: info_nce, temperature: 0.2}` is checked against the constructor's type hints. An argument
whose hint is itself a registered kind (`contrastive: Criterion`) takes a nested part. Arguments a registry `supplies`
come from the run, not from the recipe. Any number may be a schedule (see schedule.py).

Importing this module is cheap: the built-in parts are imported when a registry is first read.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import ConfigError, UserError, nearest
from .hints import show
from .schedule import Schedule

T = TypeVar("T")


def place(thing: Any) -> str:
    """Where a class or function is defined: `file:line`."""
    try:
        return f"{inspect.getsourcefile(thing)}:{inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError):
        return f"{thing.__module__}.{thing.__qualname__}"


def _defined_again(taken: Any, maker: Any) -> bool:
    """Whether a part takes its own place: a notebook's cell that is run again defines it anew."""
    return taken.__module__ == maker.__module__ == "__main__" and taken.__qualname__ == maker.__qualname__


class Registry(Generic[T]):
    """Names of one kind of part.

    kind:     singular, as recipes spell it ("criterion").
    package:  imported when the registry is first read; its `__init__` imports every built-in part.
    supplied: constructor arguments that the run gives and a recipe cannot.
    """

    def __init__(self, kind: str, package: str, supplied: tuple[str, ...] = ()):
        self.kind, self.package, self.supplied = kind, package, supplied
        self._entries: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Decorator that gives a class (or a function that builds one) a name. A taken name raises UserError."""

        def decorate(maker: Callable[..., T]) -> Callable[..., T]:
            taken = self._entries.get(name)
            if taken is not None and _defined_again(taken, maker):
                _checker.cache_clear()
            elif taken is not None:
                raise UserError(f"{self.kind} {name!r} is registered twice: at {place(taken)} and at {place(maker)}")
            self._entries[name] = maker
            return maker

        return decorate

    def _load(self) -> None:
        importlib.import_module(self.package)

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._entries)

    def listed(self) -> list[str]:
        """The same without the time that importing takes: built-in names are read from the decorators in the source."""
        folder = Path(importlib.util.find_spec(self.package).origin).parent  # type: ignore[union-attr, arg-type]
        decorator = re.compile(rf'^@register_{self.kind}\("(\w+)"\)', re.MULTILINE)
        built_in = (decorator.findall(file.read_text(encoding="utf-8")) for file in folder.glob("*.py"))
        return sorted({*self._entries, *chain.from_iterable(built_in)})

    def __contains__(self, name: str) -> bool:
        self._load()
        return name in self._entries

    def __getitem__(self, name: str) -> Callable[..., T]:
        self._load()
        try:
            return self._entries[name]
        except KeyError:
            raise UserError(f"unknown {self.kind} {name!r}{nearest(name, self._entries)}") from None

    def schema(self, name: str) -> dict[str, inspect.Parameter]:
        """The arguments a recipe may give the part `name`, with evaluated type hints, in the constructor's order.

        Raises UserError where a hint names what the part's module does not have when it runs.
        """
        target = self._signed(name)
        try:
            hints = typing.get_type_hints(target, include_extras=True)
        except Exception as error:  # A hint in quotes is an expression, which may raise anything.
            raise UserError(
                f"the type hints of {self.kind} {name!r} ({place(target)}) cannot be read: {error}"
            ) from None
        parameters = {}
        for key, parameter in inspect.signature(target).parameters.items():
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if variadic or key == "self" or key in self.supplied:
                continue
            parameters[key] = parameter.replace(annotation=hints.get(key, Any))
        return parameters

    def takes(self, name: str) -> set[str]:
        """Which of the supplied arguments the part's constructor asks for."""
        return {key for key in inspect.signature(self._signed(name)).parameters if key in self.supplied}

    def _signed(self, name: str) -> Callable:
        """The function whose signature is the part's."""
        maker = self[name]
        return maker.__init__ if inspect.isclass(maker) else maker


TASKS: Registry = Registry("task", "ssl_ib.tasks", supplied=("views", "masker", "info", "source"))
MODELS: Registry = Registry("model", "ssl_ib.models", supplied=("info",))
CRITERIONS: Registry = Registry("criterion", "ssl_ib.criterions", supplied=("info",))
MASKERS: Registry = Registry("masker", "ssl_ib.maskers")
SOURCES: Registry = Registry("source", "ssl_ib.data.sources")
VIEWS: Registry = Registry("views", "ssl_ib.data.views", supplied=("source", "resumed"))

#: By kind, in the order in which a run builds them.
REGISTRIES: dict[str, Registry] = {r.kind: r for r in (SOURCES, VIEWS, MASKERS, TASKS, MODELS, CRITERIONS)}

register_task = TASKS.register
register_model = MODELS.register
register_criterion = CRITERIONS.register
register_masker = MASKERS.register
register_source = SOURCES.register
register_views = VIEWS.register


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the hint alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def part_kind(hint: Any) -> str | None:
    """The registry kind a type hint stands for: `Criterion` or `Criterion | None` -> "criterion"; else None."""
    kinds = {getattr(option, "registry_kind", None) for option in _options(hint) if option is not type(None)}
    return kinds.pop() if len(kinds) == 1 else None


@cache
def _checker(kind: str, name: str) -> Any:
    """A pydantic model of the part's plain arguments (nested parts are checked on their own)."""
    import pydantic

    fields: dict[str, Any] = {}
    for key, parameter in REGISTRIES[kind].schema(name).items():
        hint = Any if part_kind(parameter.annotation) else parameter.annotation
        fields[key] = (hint, ... if parameter.default is parameter.empty else parameter.default)
    config = pydantic.ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=()
    )
    try:
        return pydantic.create_model(f"{kind}:{name}", __config__=config, **fields)
    except Exception as error:
        raise _unusable(kind, name, error) from None


def _unusable(kind: str, name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    where = place(REGISTRIES[kind][name])
    return UserError(f"the type hints of {kind} {name!r} ({where}) cannot be used to check its arguments: {reason}")


def _validate(kind: str, name: str, plain: dict[str, Any]) -> Any:
    # JSON mode, because strict JSON lets a list be a tuple and nothing else be what it is not.
    checker = _checker(kind, name)
    try:
        return checker.model_validate_json(json.dumps(plain, default=str))
    except TypeError as error:
        raise _unusable(kind, name, error) from None


def problems_of(
    error: Any,
    prefix: str,
    known: Callable[[tuple], Iterable[str]],
    hints: Mapping[str, Any] | None = None,
    elsewhere: Iterable[str] = (),
) -> list[str]:
    """A pydantic ValidationError as lines `path: what is wrong, got ...`.

    known:     the keys there are at a place (the keys that lead to it), to suggest one for an unknown key.
    hints:     type hints of first-level keys, for those that take one of several types.
    elsewhere: the dotted keys of the whole configuration, to suggest one that was meant.
    """
    lines = []
    for item in error.errors():
        path = ".".join(str(p) for p in (*filter(None, [prefix]), *item["loc"]))
        hint = (hints or {}).get(item["loc"][0])
        if typing.get_origin(hint) in (typing.Union, types.UnionType) and len(item["loc"]) == 2:
            # pydantic complains once for each of the types, under names of its own.
            key = f"{prefix}.{item['loc'][0]}"
            lines.append(f"{key}: expected {show(hint)}, got {item['input']!r}")
        elif item["type"] == "extra_forbidden":
            *place, key = item["loc"]
            lines.append(f"{path}: unknown key{nearest(str(key), known(tuple(place)), elsewhere)}")
        elif item["type"] == "missing":
            lines.append(f"{path}: required, but not given")
        else:
            message = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            lines.append(f"{path}: expected {message}, got {item['input']!r}")
    return lines


def is_schedule(value: Any) -> bool:
    """Whether a recipe's value has the form of a schedule rather than of a number."""
    return isinstance(value, dict) and {"from", "to"} <= set(value)


def part_keys(kind: str, spec: Any, path: str) -> list[str]:
    """The dotted keys of a part, as `check_part` takes it, and of the parts and mappings in it, the shallow ones first.

    What is no part has none.
    """
    spec = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(spec, dict) or str(spec.get("name")) not in REGISTRIES[kind]:
        return []
    keys, below = [], []
    for key, parameter in REGISTRIES[kind].schema(spec["name"]).items():
        keys.append(f"{path}.{key}")
        value, nested = spec.get(key), part_kind(parameter.annotation)
        if nested:
            below += part_keys(nested, value, keys[-1])
        elif isinstance(value, dict) and not is_schedule(value):
            below += [f"{keys[-1]}.{inner}" for inner in value]
    return keys + below


def check_part(kind: str, spec: Any, path: str, problems: list[str], elsewhere: Iterable[str] = ()) -> dict[str, Any]:
    """Completes a part's spec (`"name"` or `{name: ..., key: value}`) with its defaults.

    elsewhere: the dotted keys of the whole configuration, to suggest one for an unknown key. Appends what is wrong to
    `problems`, each line beginning with the dotted path. Returns plain data, fit for YAML.
    """
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        problems.append(f"{path}: expected a name or {{name: ..., key: value}}, got {spec!r}")
        return {}
    name, registry = spec["name"], REGISTRIES[kind]
    try:
        schema = registry.schema(name)
    except UserError as error:
        problems.append(f"{path}: {error}")
        return dict(spec)
    given = {key: value for key, value in spec.items() if key != "name"}
    plain: dict[str, Any] = {}
    done: dict[str, Any] = {}
    schedules: dict[str, Schedule | None] = {}
    for key, value in given.items():
        hint = schema[key].annotation if key in schema else None
        nested = part_kind(hint)
        if nested and not (value is None and type(None) in _options(hint)):
            done[key] = check_part(nested, value, f"{path}.{key}", problems, elsewhere)
            plain[key] = None
        elif is_schedule(value):
            if typing.get_origin(hint) is typing.Literal:
                problems.append(f"{path}.{key}: expected {show(hint)}, got a schedule")
                schedules[key] = None
                continue
            schedule = schedules[key] = Schedule.parse(value, f"{path}.{key}", problems)
            done[key] = value if schedule is None else schedule.spec()
        else:
            plain[key] = value
    import pydantic

    found: list[str] = []
    # Both ends of a schedule must be allowed: every shape stays between them.
    for end in ("start", "end"):
        numbers = {key: getattr(schedule, end, 0) for key, schedule in schedules.items()}
        try:
            checked = _validate(kind, name, plain | numbers)
        except pydantic.ValidationError as error:
            hints = {key: parameter.annotation for key, parameter in schema.items()}
            found += problems_of(error, path, lambda place: () if place else schema, hints, elsewhere)
        except UserError as error:
            found.append(f"{path}: {error}")
    # What is wrong within a schedule has been said.
    wrong = tuple(f"{path}.{key}: expected" for key, schedule in schedules.items() if schedule is None)
    problems.extend(line for line in dict.fromkeys(found) if not line.startswith(wrong))
    return {"name": name, **(given if found else json.loads(checked.model_dump_json()) | done)}


@dataclass
class Built(Generic[T]):
    """A part, and the numbers in it that follow a schedule: (owner, attribute, schedule)."""

    part: T
    schedules: list[tuple[Any, str, Schedule]] = field(default_factory=list)


def build_part(kind: str, spec: dict[str, Any], path: str | None = None, **supplied: Any) -> Built:
    """Builds a part from what `check_part` returned; supplied arguments go to the constructors that ask for them.

    path: where the recipe has it, for messages (default: the kind). Raises UserError for a schedule on a number that
    the part does not keep, and what the constructors raise, with the arguments that it names (`pool=mean`) as recipes
    and command lines spell them (`model.pool=mean`).
    """
    registry, name, path = REGISTRIES[kind], spec["name"], path or kind
    schema = registry.schema(name)
    schedules: list[tuple[Any, str, Schedule]] = []
    numbers: dict[str, Schedule] = {}
    inner, plain = {}, {}
    for key, value in spec.items():
        if key == "name":
            continue
        nested = part_kind(schema[key].annotation)
        plain[key] = value
        if nested and value is not None:
            built = build_part(nested, value, f"{path}.{key}", **supplied)
            inner[key], plain[key] = built.part, None
            schedules += built.schedules
        elif is_schedule(value):
            # `check_part` has found nothing wrong with it.
            numbers[key] = schedule = typing.cast(Schedule, Schedule.parse(value, key, []))
            plain[key] = schedule.largest
    checked = _validate(kind, name, plain)
    arguments = {key: inner.get(key, getattr(checked, key)) for key in schema}
    arguments |= {key: supplied[key] for key in registry.takes(name) if key in supplied}
    maker = registry[name]
    if inspect.isabstract(maker):
        lacking = ", ".join(sorted(getattr(maker, "__abstractmethods__", ())))
        raise UserError(f"{kind} {name!r} ({place(maker)}) does not say what these methods do: {lacking}")
    try:
        part = maker(**arguments)
    except ConfigError:
        raise
    except SystemExit as error:
        raise UserError(
            f"{kind} {name!r} ({place(maker)}) ends the process when it is built: sys.exit({error})"
        ) from error
    except UserError as error:
        own = rf"(?<![\w.])(?=(?:{'|'.join(schema) or '$'})(?:\.\w|=))"
        raise UserError(re.sub(own, f"{path}.", str(error))) from error
    for key, schedule in numbers.items():
        kept = getattr(part, key, None)
        if not isinstance(kept, int | float) or kept != arguments[key]:
            raise UserError(f"{path}.{key}: {name!r} cannot follow a schedule here: it keeps no such number to change")
        whole = isinstance(arguments[key], int) and schema[key].annotation is not Any
        schedules.append((part, key, replace(schedule, whole=whole)))
    return Built(part, schedules)


def describe(kind: str, name: str) -> str:
    """The part's arguments with hints and defaults, then its docstring: what `--describe kind:name` prints."""
    registry = REGISTRIES[kind]
    lines = [f"{kind} {name}   ({place(registry[name])})"]
    for key, parameter in registry.schema(name).items():
        hint = part_kind(parameter.annotation) or show(parameter.annotation)
        default = "required" if parameter.default is parameter.empty else f"default {parameter.default!r}"
        lines.append(f"  {key}: {hint}, {default}")
    doc = inspect.getdoc(registry[name]) or ""
    return "\n".join([*lines, "", doc]).rstrip() + "\n"
