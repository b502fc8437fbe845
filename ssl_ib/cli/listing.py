"""What `--list` and `--describe` print: names, and what is behind one. Names need no part to be imported."""

from __future__ import annotations

import yaml

from ..config.outside import YamlDumper, user_path
from ..config.recipe import base_of, find_recipe, leading_comment, read_recipe, recipe_names
from ..config.registry import REGISTRIES, describe
from ..errors import UserError, nearest


def listing(kind: str) -> str:
    """Names of one kind (singular or plural), or of all. Recipes have a line each that says what they are."""
    plurals = {f"{kind.removesuffix('s')}s": registry.listed for kind, registry in REGISTRIES.items()}
    plurals["recipes"] = recipe_names
    if kind == "all":
        return "".join(f"{plural:<11} {', '.join(names())}\n" for plural, names in plurals.items())
    plural = f"{kind.removesuffix('s')}s"
    if plural not in plurals:
        raise UserError(f"--list: unknown kind {kind!r}{nearest(kind, plurals)}")
    names = plurals[plural]()
    if plural != "recipes":
        return "".join(f"{name}\n" for name in names)
    width = max(map(len, names))
    sentences = {name: leading_comment(find_recipe(name)).partition(". ")[0].removesuffix(".") for name in names}
    return "".join(f"{name:<{width}}  {sentence}\n" for name, sentence in sentences.items())


def description(text: str) -> str:
    """What is known of a part (`KIND:NAME`), of a recipe (`recipe:NAME`), or of a key that is no part (`optim`)."""
    kind, colon, name = text.partition(":")
    if colon and kind in REGISTRIES:
        return describe(kind, name)
    if colon and kind == "recipe":
        return _recipe(name)
    if not colon and kind in REGISTRIES:
        raise UserError(f"--describe: which {kind}? {', '.join(f'{kind}:{n}' for n in REGISTRIES[kind].listed())}")
    from ..config.config import describe_key, section_keys

    keys = [key for key in section_keys() if key not in REGISTRIES]
    if text == "config" or text in keys:
        return describe_key(text)
    named = [f"{k}:{text}" for k, registry in REGISTRIES.items() if text in registry.listed()]
    named += [f"recipe:{text}"] if text in recipe_names() else []
    top = ["config", *(key for key in keys if "." not in key)]
    meant = f"; did you mean {' or '.join(map(repr, named))}?" if named else nearest(text, top, keys)
    raise UserError(f"--describe: expected KIND:NAME, recipe:NAME, config or a key such as optim, got {text!r}{meant}")


def _recipe(name: str) -> str:
    """What a recipe says of itself, its bases, what it needs, and all that it and they set."""
    path = find_recipe(name)
    data = read_recipe(path)
    bases, base = [], base_of(path)
    while base is not None:
        bases, base = [*bases, base.stem], base_of(base)
    source = data.get("source")
    images = source.get("path") if isinstance(source, dict) else None
    here = images is None or user_path(images, "source.path").exists()
    needs = [] if images is None else [f"images at {images}{'' if here else ', which is not here: give source.path'}"]
    plugins = data.get("plugins") or []
    needs += [f"plugin {plugin}" for plugin in ([plugins] if isinstance(plugins, str) else plugins)]
    lines = [f"recipe {path.stem}   ({path})", leading_comment(path)]
    lines += [f"  base:  {' < '.join(bases) or 'none'}", f"  needs: {', '.join(needs) or 'nothing'}"]
    text = yaml.dump(data, Dumper=YamlDumper, sort_keys=False, default_flow_style=None, width=100)
    return "\n".join([*filter(None, lines), "", text])
