"""Recipes and overrides that nobody would write: built up to the first step, or refused."""

import random
import re
from functools import cache

import yaml
from fuzz.cases import CHANGES, WRONG, empty_folder, fuzzed, holds, mutate, mutations, nudge, parent, places
from harness import TINY, without_files
from hypothesis import strategies as st

from ssl_ib.cli.train import SWAPS, main
from ssl_ib.config.config import configure
from ssl_ib.config.outside import YamlDumper
from ssl_ib.config.recipe import PARTS, find_recipe, read_recipe, recipe_names
from ssl_ib.config.registry import REGISTRIES

#: Recipes that take no longer to build than digits do.
SMALL = [name for name in recipe_names() if name.endswith(("digits", "cifar10")) or name.startswith(("moving", "view"))]
NAMES = sorted({name for kind in PARTS for name in REGISTRIES[kind].names()})
values = st.sampled_from(WRONG) | st.sampled_from(NAMES) | st.integers() | st.floats() | st.text(max_size=20)
#: What YAML is made of.
TOKENS = (
    ["base: mrcl_digits\n", "base: ", "mrcl_digits", "epochs", "optim", "lr", "model", "name", "plugins", "recipe"]
    + [
        ": ",
        ":",
        "\n",
        "\n  ",
        "  ",
        "\t",
        "- ",
        "? ",
        ", ",
        "{",
        "}",
        "[",
        "]",
        "#",
        "|\n",
        ">-\n",
        "'",
        '"',
        "\\",
        "%",
        "@",
    ]
    + ["&a ", "*a", "<<: ", "!!int ", "!!float ", "!!binary ", "!!set ", "!!python/none ", "!a ", "---\n", "...\n"]
    + [
        "%YAML 1.1\n",
        "0x1f",
        "0b2",
        "1_0",
        "0o9",
        "190:20:30",
        "1e999",
        ".nan",
        "-.inf",
        "~",
        "null",
        "=",
        "2001-99-99",
    ]
    + ["\\u00", "\\ud800", "\\x", "\0", "\ufeff", "\x85", "\u2028", "é", "\U0001f600", "9" * 70, "a" * 300]
)


@cache
def merged(name: str) -> str:
    """A shipped recipe over its base, made fit for digits, as YAML."""
    config = configure(name, without_files(name))
    keys = read_recipe(find_recipe(name))
    return yaml.dump({key: config.plain()[key] for key in keys} | {"source": config.plain()["source"]})


@cache
def known() -> dict[str, list]:
    """The values that keys have in recipes, and those among which the parts' hints let choose."""
    found = {}
    for name in SMALL:
        tree = yaml.safe_load(merged(name))
        for path in places(tree):
            found.setdefault(path[-1], []).append(parent(tree, path)[path[-1]])
    for registry in REGISTRIES.values():
        for name in registry.names():
            for key, parameter in registry.schema(name).items():
                hint = str(parameter.annotation)
                found.setdefault(key, []).extend(re.findall(r"'([^']*)'", hint) if "Literal" in hint else ())
    for kind in PARTS:
        found[kind] += REGISTRIES[kind].names()
    # One value as often as another.
    return {key: list({repr(value): value for value in values}.values()) for key, values in found.items()}


def dumped(tree: object) -> str:
    try:
        return yaml.dump(tree, Dumper=YamlDumper, allow_unicode=True)
    except yaml.YAMLError:
        return repr(tree)


@fuzzed(80, name=st.sampled_from(SMALL), changes=mutations(values))
def test_a_recipe(name, changes):
    with empty_folder() as folder:
        (folder / "mine.yaml").write_text(
            dumped(mutate(yaml.safe_load(merged(name)), changes, known())), errors="replace"
        )
        holds("recipes", main, "mine.yaml", "--dry-run", folder=folder)


@fuzzed(20, parts=st.lists(st.sampled_from(TOKENS) | st.text(max_size=8) | values.map(dumped), max_size=12))
def test_any_text_as_a_recipe(parts):
    with empty_folder() as folder:
        (folder / "mine.yaml").write_bytes("".join(parts).encode("utf-8", "surrogatepass"))
        holds("recipes", main, "mine.yaml", "--print-config", folder=folder)


@cache
def settings_of_tiny() -> dict[str, object]:
    """Dotted keys and their values; not the plugins, which would be a way to the modules of this machine."""
    tree = configure(TINY).plain()
    return {".".join(map(str, path)): parent(tree, path)[path[-1]] for path in places(tree) if path[0] != "plugins"}


def override(key: str, number: int, value: object, known_value: int) -> str:
    """A key that there is with a value that it has elsewhere, one of the same type, or one that is wrong."""
    found = known().get(key.rpartition(".")[2], [])
    if known_value and found:
        value = found[number % len(found)]
    elif number % 3:
        value = nudge(settings_of_tiny()[key], number // 3)
    text = yaml.dump(value, Dumper=YamlDumper, default_flow_style=True, width=10**6)
    return f"{key}={text.removesuffix('...' + chr(10)).strip()}"


key = st.deferred(lambda: st.sampled_from(list(settings_of_tiny())))
overrides = st.builds(override, key, st.integers(0, 2**20), values, st.integers(0, 1))
anything = st.builds("{}={}".format, key | st.text(max_size=12), values.map(dumped) | st.text(max_size=12))
swaps = st.tuples(
    st.sampled_from([*(f"--{kind}" for kind in SWAPS), "--init", "--device"]),
    st.sampled_from(NAMES) | st.text(max_size=9),
)


@fuzzed(
    45,
    given=st.lists(overrides | overrides | overrides | anything, min_size=1, max_size=3),
    swap=st.just(()) | st.just(()) | swaps,
)
def test_overrides(given, swap):
    # What the shell cannot hand over, no command is given.
    words = [word.replace("\0", "").encode("utf-8", "replace").decode() for word in (*given, *swap)]
    with empty_folder() as folder:
        holds("overrides", main, TINY, *words, "--dry-run", folder=folder)


def test_changes_reach_no_other_case_and_make_no_circle():
    how, before = random.Random(0), repr(WRONG)
    for _ in range(2000):
        changes = [
            (how.choice(CHANGES), how.randrange(99), how.randrange(99), how.choice(WRONG))
            for _ in range(how.randrange(6))
        ]
        made = repr(mutate({"a": {"b": [1, {"c": 2}]}, "d": [3]}, changes))
        assert "{...}" not in made and "[...]" not in made
    assert repr(WRONG) == before
