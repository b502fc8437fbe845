"""What comes from outside, and how much of it is taken: the paths and files that a user names, YAML and JSON text.

Everything here raises UserError, in one line that says what the bound is. Nothing here waits for a pipe or a device.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError

#: Bytes of a path, and of a name in it, that file systems take.
LONGEST_PATH, LONGEST_NAME = 4095, 255
#: YAML: bytes of a text, values in it after aliases have been followed, and levels of nesting.
MOST_YAML, MOST_VALUES, DEEPEST = 1 << 18, 50_000, 64
#: Characters of a number, and the size of an integer: more is a mistake, and slow to read.
LONGEST_NUMBER, LARGEST_INTEGER = 64, 2**63
#: Bytes of a file of JSON.
MOST_JSON = 1 << 24

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def user_path(text: str | Path, what: str) -> Path:
    """The path that a user's text names, `~` expanded; what: the key that has it, for messages.

    Raises UserError where no file could have this name. Whether there is one is for the caller to see.
    """
    name = str(text)
    try:
        path = Path(name).expanduser()
        size = len(os.fsencode(path))
        longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    except RuntimeError:
        raise UserError(f"{what}: there is no user whose home {short(name.partition('/')[0])} could be") from None
    except UnicodeEncodeError:
        raise UserError(f"{what}: {short(name)} cannot be the name of a file") from None
    if "\0" in name:
        raise UserError(f"{what}: {short(name)} cannot be a path: it has a NUL character")
    if size > LONGEST_PATH or longest > LONGEST_NAME:
        raise UserError(
            f"{what}: {short(name)} is too long for a path: {size} bytes, {longest} of them in one name; at most "
            f"{LONGEST_PATH} and {LONGEST_NAME}"
        )
    return path


def short(text: str) -> str:
    """A text of any length for a message: in quotes, its middle left out."""
    return repr(text if len(text) <= 80 else f"{text[:50]}...{text[-20:]}")


def kind_of(path: Path) -> str:
    """What there is at a path, in words: a file, a folder, a pipe, a socket, a device, or nothing."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return "nothing"
    return next((name for test, name in _KINDS if test(mode)), "a file")


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a regular file. Raises OSError for a pipe, a socket or a device, and where there are over `most`."""
    # Opening a pipe waits for a writer, unless it is asked not to.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(None, f"{kind_of(path)}, not a file")
        if found.st_size > most:
            raise OSError(None, f"{found.st_size:,} bytes, at most {most:,} are read")
        return file.read()


class YamlLoader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number (YAML 1.1 wants 1.0e-3), a date is a text and a repeated key is an error.

    It knows the values that a configuration is made of, and no others; how many and how deep is bounded.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self._values = self._depth = self._deepest = 0
        #: Of each value that is complete: how many values it is, itself included, and the levels below it.
        self._extent: dict[yaml.Node, tuple[int, int]] = {}

    def compose_node(self, parent, index):
        mark = self.peek_event().start_mark
        alias = self.check_event(yaml.AliasEvent)
        before, outer = self._values, self._deepest
        self._depth += 1
        self._deepest = self._depth
        # Before it goes deeper: reading a value is recursive.
        self._bound(mark)
        node = super().compose_node(parent, index)
        if alias and node not in self._extent:
            raise yaml.composer.ComposerError(None, None, "a value that contains itself", mark)
        values, below = self._extent[node] if alias else (1, 0)
        self._values += values
        self._deepest = max(self._deepest, self._depth + below)
        self._bound(mark)
        self._extent[node] = self._values - before, self._deepest - self._depth
        self._deepest = max(outer, self._deepest)
        self._depth -= 1
        return node

    def _bound(self, mark) -> None:
        if self._deepest > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"nested in more than {DEEPEST} levels", mark)
        if self._values > MOST_VALUES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MOST_VALUES:,} values, those that aliases repeat included", mark
            )

    def construct_object(self, node, deep=False):
        try:
            value = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception:  # The constructors of numbers raise whatever Python's do.
            tag = node.tag.rpartition(":")[2]
            raise self._wrong(f"{short(str(node.value))} cannot be read as {tag}", node) from None
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise self._wrong("a text with a NUL or half a surrogate pair, which no name or path can have", node)
        return value

    def construct_number(self, node):
        if isinstance(node, yaml.ScalarNode) and len(node.value) > LONGEST_NUMBER:
            raise self._wrong(f"a number of {len(node.value):,} characters, at most {LONGEST_NUMBER} are read", node)
        number = (self.construct_yaml_int if node.tag.endswith("int") else self.construct_yaml_float)(node)
        if isinstance(number, int) and abs(number) >= LARGEST_INTEGER:
            raise self._wrong(f"the integer {number}, which has more than 64 bits", node)
        return number

    def construct_mapping(self, node, deep=False):
        keys: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | None):
                raise self._wrong(f"a key has to be a text or a number, got {short(str(key))}", key_node)
            if key in keys:
                raise self._wrong(f"repeated key {key}", node)
            keys.add(key)
        return super().construct_mapping(node, deep)

    @staticmethod
    def _wrong(problem: str, node: yaml.Node) -> yaml.YAMLError:
        return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class YamlDumper(yaml.SafeDumper):
    """Writes what `YamlLoader` reads: a text such as 1e-3 gets quotes."""


for _side in (YamlLoader, YamlDumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )

_TAG = "tag:yaml.org,2002:"
YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != f"{_TAG}timestamp"]
    for first, found in YamlLoader.yaml_implicit_resolvers.items()
}
YamlLoader.yaml_constructors = {
    tag: made
    for tag, made in YamlLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix(_TAG) in ("null", "bool", "str", "seq", "map")
}
for _tag in ("int", "float"):
    YamlLoader.add_constructor(_TAG + _tag, YamlLoader.construct_number)


class NotYaml(UserError):
    """Text that is no YAML, or more of it than is read: `line`, from 1 where it is known, and what is wrong."""

    def __init__(self, problem: str, line: int | None = None):
        self.problem, self.line = problem, line
        super().__init__(f"not YAML{f' (line {line})' if line else ''}: {problem}")


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, which is plain data. Raises NotYaml."""
    if len(text) > MOST_YAML:
        raise NotYaml(f"{len(text):,} characters, at most {MOST_YAML:,} are read")
    try:
        return yaml.load(text, YamlLoader)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise NotYaml(" ".join(str(problem).split()), place.line + 1 if place else None) from None
    except (ValueError, OverflowError) as error:
        # An escape such as \UFFFFFFFF, which the scanner takes for a character.
        raise NotYaml(str(error)) from None


def read_yaml(path: Path) -> Any:
    """The value of a YAML file. Raises NotYaml, and UserError where it is no file that can be read."""
    try:
        text = read_bytes(path, MOST_YAML).decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotYaml(str(error)) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return parse_yaml(text)


def json_object(text: str | bytes) -> dict[str, Any]:
    """The object that a JSON text, or a line of one, is. Raises ValueError, in a line, where it is none."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, got {type(found).__name__}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON that a program wrote. Raises UserError, which names the file, where it is none."""
    try:
        return json_object(read_bytes(path, MOST_JSON))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{path} is damaged: {reason}") from None
