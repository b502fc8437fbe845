"""Recipes as files: where they lie, their YAML, and how one is laid over its `base`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, nearest
from .registry import is_schedule

#: The sections of a recipe that name a registered part, in the order in which they are shown.
PARTS = ("task", "model", "criterion", "masker", "source", "views")


def named(value: Any) -> Any:
    """A part that is given by its name alone, as a mapping."""
    return {"name": value} if isinstance(value, str) else value


class YamlLoader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number (YAML 1.1 wants 1.0e-3) and a repeated key is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        repeated = {str(key) for key in keys if keys.count(key) > 1}
        if repeated:
            raise yaml.constructor.ConstructorError(
                None, None, f"repeated key {', '.join(sorted(repeated))}", node.start_mark
            )
        return super().construct_mapping(node, deep)


class YamlDumper(yaml.SafeDumper):
    """Writes what `YamlLoader` reads: a text such as 1e-3 gets quotes."""


for _side in (YamlLoader, YamlDumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def recipes_folder() -> Path:
    """Where the shipped recipes lie: in the installed package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in recipes_folder().glob("[!_]*.yaml"))


def find_recipe(name: str) -> Path:
    """A shipped recipe's file by name, or a path. Raises UserError with the nearest names."""
    shipped = recipes_folder() / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    if Path(name).is_file():
        return Path(name)
    if Path(name).suffix in (".yaml", ".yml") or "/" in name:
        raise UserError(f"there is no recipe file {name!r}")
    raise UserError(f"unknown recipe {name!r}{nearest(name, recipe_names())}")


def read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe merged over its `base`. Raises UserError where the file is not a YAML mapping.

    above: the recipes whose base this is. A recipe may have the name of its base, which is then the shipped one.
    """
    above = (*above, path.resolve())
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = getattr(error, "problem_mark", None)
        where = f" (line {place.line + 1})" if place else ""
        raise UserError(f"{path} is not YAML{where}: {getattr(error, 'problem', error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(data).__name__}")
    base = data.pop("base", None)
    if base is None:
        return data
    below = path.parent / f"{base}.yaml"
    below = below if below.is_file() and below.resolve() != above[-1] else find_recipe(str(base))
    if below.resolve() in above:
        raise UserError(f"{path}: base {base!r} leads back to {below}: a recipe cannot be its own base")
    return merge(read_recipe(below, above), data)


def merge(base: Any, over: Any, section: str | None = None) -> Any:
    """`over` laid over `base`, both of them of `section` (default: whole recipes).

    Mappings merge key by key; a part that names another one replaces the old part whole.
    """
    if section in PARTS:
        base = named(base) if isinstance(over, dict) else base
        over = named(over) if isinstance(base, dict) and "name" in base else over
    if not isinstance(base, dict) or not isinstance(over, dict) or is_schedule(over):
        return over
    if section in PARTS and over.get("name", base.get("name")) != base.get("name"):
        return over
    return base | {key: merge(base.get(key), value, section or key) for key, value in over.items()}
