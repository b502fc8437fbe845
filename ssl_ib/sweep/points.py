"""The grid of a sweep: what varies, and the runs that come of it, every one of them checked before any is started."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..config.outside import NotYaml, YamlDumper, parse_yaml, short
from ..errors import ConfigError, UserError

if TYPE_CHECKING:
    from ..config.config import Config

#: The name of the axis of `--case`.
CASE = "case"
_KEY = re.compile(r"[A-Za-z_][\w.-]*")
#: The longest folder name of a value, and of a point, before it is cut short.
_VALUE_LENGTH, _POINT_LENGTH = 60, 200


@dataclass(frozen=True)
class Choice:
    """A value on an axis: as tables show it, as data, and the overrides (and recipe) that make it."""

    label: str
    value: Any
    overrides: tuple[str, ...]
    recipe: str | None = None


@dataclass(frozen=True)
class Axis:
    """What varies: a dotted key (or several, joined by +, that share their value), or the cases."""

    name: str
    choices: tuple[Choice, ...]

    @property
    def keys(self) -> list[str]:
        return self.name.split("+")


@dataclass(frozen=True, eq=False)
class Point:
    """One choice of each axis, in the axes' order; all its runs share the object."""

    choices: tuple[Choice, ...]
    name: str

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(choice.label for choice in self.choices)


@dataclass(frozen=True, eq=False)
class Run:
    """A point with a seed: what `ssl-ib-train` is given, and the configuration that this resolves to."""

    point: Point
    seed: int
    recipe: str
    overrides: tuple[str, ...]
    config: Config

    @property
    def folder(self) -> Path:
        """Where it goes, inside the sweep's folder."""
        return Path(self.point.name) / f"seed_{self.seed}"


def split(text: str, separators: str) -> list[str]:
    """Cuts a text at separators outside brackets, braces and quotes. Raises ValueError where one of these is odd."""
    parts, start, opened, quote = [], 0, [], ""
    for i, c in enumerate(text):
        if quote:
            if c == quote and not (c == '"' and text[i - 1] == "\\"):
                quote = ""
        elif c in "'\"" and not (i and text[i - 1].isalnum()):  # An apostrophe inside a word is none.
            quote = c
        elif c in "[{":
            opened.append(c)
        elif c in "]}":
            if not opened or opened.pop() + c not in ("[]", "{}"):
                raise ValueError(f"{c!r} closes nothing")
        elif c in separators and not opened:
            parts.append(text[start:i])
            start = i + 1
    if quote or opened:
        raise ValueError(f"{quote or opened[-1]!r} is not closed")
    return [part.strip() for part in [*parts, text[start:]]]


def parse_vary(text: str, problems: list[str]) -> Axis:
    """The axis of `KEY=V1,V2,...` or `KEY+KEY=...`; each value is YAML. What is wrong is added to `problems`."""
    key, equals, values = text.partition("=")
    keys = key.split("+")
    if not equals or not all(map(_KEY.fullmatch, keys)):
        problems.append(f"--vary: expected KEY=V1,V2,..., such as optim.lr=1e-3,2e-3, got {text!r}")
        return Axis(key, ())
    if "seed" in keys:
        problems.append("--vary seed: seeds are repetitions, not an axis: give them as --seeds 0,1,2")
    try:
        texts = split(values, ",")
    except ValueError as error:
        problems.append(f"--vary {key}: {error} in {values!r}")
        return Axis(key, ())
    choices: dict[str, Choice] = {}
    for value in texts:
        if not value:
            problems.append(f'--vary {key}: an empty value in {values!r}; write null or "" where that is meant')
            continue
        try:
            data = parse_yaml(value)
        except NotYaml as error:
            problems.append(f"--vary {key}: expected YAML values, got {short(value)}: {error.problem}")
            continue
        label = shown(data)
        if label in choices:
            problems.append(f"--vary {key}: the value {label} is given twice in {values!r}")
        choices[label] = Choice(label, data, tuple(f"{k}={value}" for k in keys))
    return Axis(key, tuple(choices.values()))


def parse_case(text: str, problems: list[str]) -> Choice | None:
    """The case of `NAME: [RECIPE] KEY=VALUE ...`. What is wrong is added to `problems`."""
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not colon or not name or "=" in name:
        problems.append(f'--case: expected "NAME: [RECIPE] KEY=VALUE ...", got {text!r}')
        return None
    try:
        words = [word for word in split(rest, " \t\n") if word]
    except ValueError as error:
        problems.append(f"--case {name}: {error} in {rest.strip()!r}")
        return None
    recipe = words.pop(0) if words and "=" not in words[0] else None
    keys = [word.partition("=")[0] for word in words]
    problems += [f"--case {name}: expected KEY=VALUE, got {word!r}" for word in words if "=" not in word]
    problems += [f"--case {name}: {key} is given twice" for key in sorted({k for k in keys if keys.count(k) > 1})]
    if "seed" in keys:
        problems.append(f"--case {name}: seeds are repetitions, not a part of a case: give them as --seeds 0,1,2")
    return Choice(name, name, tuple(words), recipe)


def parse_seeds(text: str, problems: list[str]) -> list[int]:
    """The seeds of `0,1,2`. What is wrong is added to `problems`."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() for word in words):
        problems.append(f"--seeds: expected whole numbers of at least 0, such as 0,1,2, got {text!r}")
        return []
    seeds = [int(word) for word in words]
    problems += [f"--seeds: {seed} is given twice" for seed in sorted({s for s in seeds if seeds.count(s) > 1})]
    return seeds


def parse_axes(vary: Sequence[str], cases: Sequence[str], overrides: Sequence[str], problems: list[str]) -> list[Axis]:
    """The axes, that of the cases first. Adds what is wrong to `problems`, among it a key that is set in two places."""
    found = [case for text in cases if (case := parse_case(text, problems)) is not None]
    names = [case.label for case in found]
    problems += [f"--case {name}: the name is given twice" for name in sorted({n for n in names if names.count(n) > 1})]
    axes = [parse_vary(text, problems) for text in vary]
    keys = [key for axis in axes for key in axis.keys]
    problems += [f"--vary {key}: is given twice" for key in sorted({k for k in keys if keys.count(k) > 1})]
    for key in dict.fromkeys(keys):
        if key in (text.partition("=")[0] for text in overrides):
            problems.append(f"{key}: is both varied and given one value")
        for case in found:
            if key in (text.partition("=")[0] for text in case.overrides):
                problems.append(f"{key}: is both varied and set by the case {case.label}")
    elsewhere = [text.partition("=")[0] for text in (*overrides, *(text for case in found for text in case.overrides))]
    for axis in axes:
        for key in axis.keys if any(isinstance(choice.value, dict) for choice in axis.choices) else ():
            # A dotted key is laid over a whole part, whatever their order: the values would not be what they say.
            problems += [
                f"{inner}: is part of {key}, which is varied as a whole"
                for inner in dict.fromkeys([*elsewhere, *keys])
                if inner.startswith(f"{key}.")
            ]
    return [*([Axis(CASE, tuple(found))] if cases else []), *axes]


def grid(
    recipe: str,
    overrides: Sequence[str],
    axes: Sequence[Axis],
    seeds: Sequence[int] | None,
    configure: Callable[[str, list[str]], Config],
) -> list[Run]:
    """All runs in the order in which they start: the whole grid with the first seed, then with the next one.

    seeds: None for the seed that each point's own configuration has; configure: resolves a recipe and overrides.
    Raises ConfigError with every problem of every point, each of them once, or where two points are the same.
    """
    runs: list[Run] = []
    found: dict[str, list[str]] = {}
    tried: list[tuple[Point, Sequence[str]]] = []
    names = [axis.name for axis in axes]
    products = product(*(axis.choices for axis in axes))
    points = [Point(choices, folder_name(names, [choice.label for choice in choices])) for choices in products]
    for seed in [None] if seeds is None else seeds:
        for point in points:
            start = next((c.recipe for c in point.choices if c.recipe), recipe)
            given = [*overrides, *(text for c in point.choices for text in c.overrides)]
            given += [] if seed is None else [f"seed={seed}"]
            try:
                config = configure(start, given)
            except UserError as error:
                for problem in getattr(error, "problems", [str(error)]):
                    found.setdefault(problem, []).append(point.name)
                if isinstance(error, ConfigError):
                    tried.append((point, error.problems))
                continue
            tried.append((point, ()))
            runs.append(Run(point, config.seed, start, tuple(given), config))
    clearer = _unknown_to_some_cases(overrides, axes, tried)
    problems = told_once({problem: names for problem, names in found.items() if problem not in clearer}, len(points))
    problems += dict.fromkeys(clearer.values())
    seen: dict[str, str] = {}
    for run in runs:
        former = seen.setdefault(json.dumps(run.config.plain()), run.point.name)
        if former != run.point.name:
            problems.append(f"{former} and {run.point.name} are the same configuration")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return runs


def _unknown_to_some_cases(
    overrides: Sequence[str], axes: Sequence[Axis], tried: Sequence[tuple[Point, Sequence[str]]]
) -> dict[str, str]:
    """What to say in place of some problems: that a key is unknown which all cases are given, and only some have.

    tried: the points, each with the problems of its configuration.
    """
    if not axes or axes[0].name != CASE:
        return {}
    clearer = {}
    given = {text.partition("=")[0]: text for text in overrides} | {key: "" for axis in axes[1:] for key in axis.keys}
    for key, text in given.items():
        steps = key.split(".")
        unknown = tuple(f"{'.'.join(steps[:n])}: unknown key" for n in range(1, len(steps) + 1))
        lacking, having = {}, {}
        for point, problems in tried:
            said = next((problem for problem in problems if problem.startswith(unknown)), None)
            (having if said is None else lacking).setdefault(point.choices[0].label, (point.choices[0], said))
        if not having or not lacking:
            continue
        who = (
            f"the case{'s' * (len(lacking) > 1)} {', '.join(lacking)} ha{'ve' if len(lacking) > 1 else 's'} no such key"
        )
        case, _ = next(iter(having.values()))
        words = " ".join(filter(None, [case.recipe, *case.overrides, text or f"{key}=..."]))
        example = f'--case "{case.label}: {words}"'
        line = (
            f"{text} is given to every case, but {who}: write it in the cases that have it, as in {example}"
            if text
            else f"--vary {key}: {who}: write each value as a case, as in {example}"
        )
        clearer |= {said: line for _, said in lacking.values()}
    return clearer


def told_once(found: dict[str, list[str]], num_points: int) -> list[str]:
    """Problems with the names of the points that have them, which are left out where these are all."""
    problems = []
    for problem, names in found.items():
        names = list(dict.fromkeys(names))
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        problems.append(problem if len(names) == num_points else f"{problem} (at {names[0]}{more})")
    return problems


def shown(value: Any) -> str:
    """A value as tables and folders show it; equal values look the same (1e-3 and 0.001, 1 and 1.0)."""
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    text = yaml.dump(value, Dumper=YamlDumper, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.strip().removesuffix("...").strip()


def safe(text: str, length: int = _VALUE_LENGTH) -> str:
    """A text as part of a folder's name: letters, digits, `.`, `_`, `-`; what that loses is told apart by a hash.

    No `=`, so that no path looks like an override.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:length]
    if plain == text:
        return plain
    return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def folder_name(axes: Sequence[str], labels: Sequence[str]) -> str:
    """The folder of a point, such as `optim.lr_0.001,masker.ratio_0.5`, from the names of axes and values."""
    name = ",".join(f"{axis}_{safe(label)}" for axis, label in zip(axes, labels, strict=True)) or "base"
    if len(name) <= _POINT_LENGTH:
        return name
    return f"{name[:_POINT_LENGTH]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
