"""Recipes as files: where they lie, their YAML, and how one is laid over its `base`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, nearest
from .outside import LONGEST_NAME, NotYaml, YamlDumper, kind_of, read_yaml, short, user_path
from .registry import is_schedule

#: How many recipes may be laid over one another.
MOST_BASES = 32
#: The sections of a recipe that name a registered part, in the order in which they are shown.
PARTS = ("task", "model", "criterion", "masker", "source", "views")
#: Arguments of a part that were chosen for the value of another one: where that changes, they are dropped.
BELONGING = {"backbone": ("backbone_args", "positions")}


def named(value: Any) -> Any:
    """A part that is given by its name alone, as a mapping."""
    return {"name": value} if isinstance(value, str) else value


def recipes_folder() -> Path:
    """Where the shipped recipes lie: in the installed package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in recipes_folder().glob("[!_]*.yaml"))


def find_recipe(name: str) -> Path:
    """A shipped recipe's file by name, a path, or the `config.yaml` in a run's folder. Raises UserError otherwise."""
    path = user_path(name, "recipe")
    shipped = {file.stem: file for file in recipes_folder().glob("*.yaml")}
    if name in shipped:
        return shipped[name]
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "config.yaml").is_file():
            return path / "config.yaml"
        raise UserError(f"expected a recipe or the folder of a run, and {name!r} is a folder without a config.yaml")
    if Path(name).suffix in (".yaml", ".yml") or "/" in name:
        found = kind_of(path)
        if found != "nothing":
            raise UserError(f"expected a recipe, a file of YAML, and {name!r} is {found}")
        raise UserError(f"there is no recipe file {name!r}")
    raise UserError(f"unknown recipe {name!r}{nearest(name, recipe_names())}")


def leading_comment(path: Path) -> str:
    """What a recipe says of itself in its first lines, as one line; empty where it says nothing."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ").rstrip() for line in takewhile(lambda line: line.startswith("#"), lines))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = read_yaml(path)
    except NotYaml as error:
        raise UserError(f"{path} is {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(data).__name__}")
    return data


def base_of(path: Path, data: dict[str, Any] | None = None) -> Path | None:
    """The recipe that a recipe, of what is in `data` where that was read, names as its base; None without one."""
    base = (_read(path) if data is None else data).get("base")
    if base is None:
        return None
    if not isinstance(base, str):
        raise UserError(f"{path}: base: expected the name or path of a recipe, got {short(str(base))}")
    user_path(base, f"{path}: base")
    if len(base) > LONGEST_NAME - len(".yaml"):
        return find_recipe(base)
    below = path.parent / f"{base}.yaml"
    return below if below.is_file() and below.resolve() != path.resolve() else find_recipe(base)


def read_recipe(path: Path, above: tuple[Path, ...] = (), dropped: list[Dropped] | None = None) -> dict[str, Any]:
    """A recipe merged over its `base`. Raises UserError where the file is not a YAML mapping.

    above: the recipes whose base this is. A recipe may have the name of its base, which is then the shipped one.
    dropped: what the recipe drops of its base is added here.
    """
    above = (*above, path.resolve())
    data = _read(path)
    below = base_of(path, data)
    base = data.pop("base", None)
    if below is None:
        return data
    if len(above) > MOST_BASES:
        raise UserError(
            f"{above[0]}: more than {MOST_BASES} recipes, each the base of the one before; the last is {path}"
        )
    if below.resolve() in above:
        raise UserError(f"{path}: base {base!r} leads back to {below}: a recipe cannot be its own base")
    below = read_recipe(below, above, dropped)
    return merge(without_dropped(below, merge(below, data), [] if dropped is None else dropped), data)


def merge(base: Any, over: Any, section: str | None = None) -> Any:
    """`over` laid over `base`, both of them of `section` (default: whole recipes).

    Mappings merge key by key, and an empty one empties; a part that names another one replaces the old part whole.
    """
    if section in PARTS:
        base = named(base) if isinstance(over, dict) else base
        over = named(over) if isinstance(base, dict) and "name" in base else over
    if not isinstance(base, dict) or not isinstance(over, dict) or is_schedule(over) or (section and not over):
        return over
    if section in PARTS and over.get("name", base.get("name")) != base.get("name"):
        return over
    return base | {key: merge(base.get(key), value, section or key) for key, value in over.items()}


@dataclass(frozen=True)
class Dropped:
    """The arguments that the value `old` of `key` had, and that were dropped when it became `new`.

    key: the path of a part's argument, such as (model, backbone).
    """

    key: tuple[str, ...]
    old: Any
    new: Any
    arguments: dict[str, Any]

    def line(self, config: dict[str, Any]) -> str | None:
        """What to tell the user of a resolved configuration; None where nothing of it is different there."""
        *place, owner = self.key
        for step in place:
            config = config.get(step) if isinstance(config, dict) else None
        if not isinstance(config, dict) or config.get(owner) != self.new:
            return None
        lost = {}
        for key, value in self.arguments.items():
            now = config.get(key)
            if isinstance(value, dict):
                value = {k: v for k, v in value.items() if not isinstance(now, dict) or now.get(k) != v}
            if value not in (now, None, {}):
                lost[key] = value
        if not lost:
            return None
        text = yaml.dump(lost, Dumper=YamlDumper, default_flow_style=True, sort_keys=False, width=float("inf")).strip()
        change = f"{'.'.join(self.key)}={self.new}"
        return (
            f"{change}: drops what was for {self.old or 'the default one'} (give again what is to stay): {text[1:-1]}"
        )


def without_dropped(base: dict[str, Any], laid: dict[str, Any], dropped: list[Dropped]) -> dict[str, Any]:
    """A recipe without the arguments that belong to a value (`BELONGING`) which is another one in `laid`.

    laid: what comes of the recipe when something is laid over it. What is laid over the answer in its place keeps the
    arguments that it gives itself. dropped: a line is added for each value that loses arguments.
    """
    parts = {kind: _part_without(base[kind], laid.get(kind), (kind,), dropped) for kind in PARTS if kind in base}
    return base | parts


def _part_without(part: Any, laid: Any, place: tuple[str, ...], dropped: list[Dropped]) -> Any:
    part, laid = named(part), named(laid)
    if not isinstance(part, dict) or not isinstance(laid, dict) or part.get("name") != laid.get("name"):
        return part
    gone: dict[str, Any] = {}
    for owner, owned in BELONGING.items():
        arguments = {key: part[key] for key in owned if key in part}
        if arguments and part.get(owner) != laid.get(owner):
            dropped.append(Dropped((*place, owner), part.get(owner), laid.get(owner), arguments))
            gone |= arguments
    return {
        key: _part_without(value, laid.get(key), (*place, key), dropped) if isinstance(value, dict) else value
        for key, value in part.items()
        if key not in gone
    }
