"""What comes from outside and is wrong: recipes, overrides, paths and plugins. Each case is one message, exit code 2.

None of them may end in a traceback, hang, train, or write anything.
"""

import os
import re
import sys

import pytest

from ssl_ib.cli.train import main
from ssl_ib.config import outside, plugins
from ssl_ib.config.hints import CropRatio
from ssl_ib.config.recipe import MOST_BASES
from ssl_ib.config.registry import MASKERS, VIEWS

BASE = "base: mrcl_digits\n"
#: Nine levels of nine aliases each: 300 bytes that stand for 387,420,489 values.
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
LONG, NOBODY = "a" * 5000, "~nosuchuser/there"


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs the command and returns its one message."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        before = sorted(os.listdir(tmp_path))
        assert main(list(arguments)) == 2
        message = capsys.readouterr().err
        assert message.startswith("ssl-ib-train: ") and len(message) < 1500
        assert sorted(os.listdir(tmp_path)) == before
        return message

    return run


RECIPES = {
    "a date is a text": ("optim: {lr: 2026-13-45}", "optim.lr: expected a number of at least 0"),
    "int tag": ("epochs: !!int a", "(line 2): 'a' cannot be read as int"),
    "float tag": ("epochs: !!float a", "'a' cannot be read as float"),
    "set tag": ("epochs: !!set {a, b}", "could not determine a constructor"),
    "python tag": ("epochs: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "half a surrogate": ('device: "\\uD800"', "half a surrogate pair"),
    "half a surrogate as key": ('"\\uD800": 3', "half a surrogate pair"),
    "no such character": ('device: "\\U00FFFFFF"', "not YAML"),
    "NUL": ('device: "a\\0"', "a text with a NUL"),
    "5,000 digits": ("epochs: " + "9" * 5000, "a number of 5,000 characters"),
    "more than 64 bits": ("epochs: " + "9" * 30, "more than 64 bits"),
    "sexagesimal": ("epochs: 1" + ":59" * 3000, "a number of 9,001 characters"),
    "hexadecimal": ("epochs: 0x" + "f" * 9000, "a number of 9,002 characters"),
    "bomb": (BOMB + "optim: {args: *a8}", f"more than {outside.MOST_VALUES:,} values"),
    "bomb of mappings": (
        "a0: &a0 {a: 1}\n"
        + "".join(f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n" for i in range(1, 9)),
        "more than",
    ),
    "depth": ("optim: {args: " + "[" * 3000 + "]" * 3000 + "}", "nested in more than"),
    "depth of aliases": (
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100)),
        "nested in more than",
    ),
    "a circle": ("optim: &o {args: *o}", "a value that contains itself"),
    "a list as key": ("? [a]\n: 3", "a key has to be a text or a number"),
    "too long": ("#" * (outside.MOST_YAML + 1), "cannot be read"),
    "plugins: 3": ("plugins: 3", "plugins: expected a list of modules and paths, got '3'"),
    "plugins: [3]": ("plugins: [3]", "plugins: expected a list of modules and paths"),
    "recipe leads out": ("recipe: ../../x", "recipe: expected a name for the run's folder"),
    "recipe is empty": ("recipe: ''", "recipe: expected a name for the run's folder"),
}


@pytest.mark.parametrize("text, says", RECIPES.values(), ids=RECIPES)
def test_a_recipe(refused, tmp_path, text, says):
    (tmp_path / "mine.yaml").write_text(BASE + text + "\n")
    assert says in refused("mine.yaml")


OVERRIDES = {
    "date": ("optim.lr=2026-13-45", "optim.lr: expected a number of at least 0"),
    "tag": ("epochs=!!int a", "'a' cannot be read as int"),
    "digits": ("epochs=" + "9" * 5000, "a number of 5,000 characters"),
    "depth": ("optim.args=" + "[" * 400 + "]" * 400, "nested in more than"),
    "steps": ("optim.args" + ".a" * 3000 + "=3", "a key of more than"),
    "surrogate": ('device="\\uD800"', "half a surrogate pair"),
    "source.path long": (f"source={{name: folder, path: {LONG}}}", "source.path: 'aaaa"),
    "source.path nobody": (f"source={{name: folder, path: {NOBODY}}}", "source.path: there is no user"),
    "archive long": (f"source={{name: archive, path: {LONG}.tar}}", "source.path: 'aaaa"),
    "archive nobody": (f"source={{name: archive, path: {NOBODY}.tar}}", "source.path: there is no user"),
    "labels long": (f"source={{name: folder, path: images, labels: {LONG}.csv}}", "source.labels: 'aaaa"),
    "labels nobody": (
        f"source={{name: folder, path: images, labels: {NOBODY}.csv}}",
        "source.labels: there is no user",
    ),
    "films": ("source={name: moving_mnist, sequences: 10}", "the source has films [10, 3, 64, 64]"),
    "a crop of no pixel": ("views.crop_ratio=1e-300", "views.crop_ratio: expected greater than or equal to 0.01"),
    "many workers": ("workers=1000000", "workers: expected less than or equal to 1024"),
}


@pytest.mark.parametrize("override, says", OVERRIDES.values(), ids=OVERRIDES)
def test_an_override(refused, tmp_path, override, says):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    assert says in refused("mrcl_digits", override, "--dry-run")


@pytest.mark.parametrize("name", [name for name in VIEWS.names() if "crop_ratio" in VIEWS.schema(name)])
def test_views_crop_as_a_backbone_may_say(name):
    """Else a run would leave a backbone.json that nobody can read."""
    assert VIEWS.schema(name)["crop_ratio"].annotation == CropRatio


@pytest.mark.parametrize("init", [LONG, NOBODY])
def test_init(refused, init):
    assert "init: " in refused("mrcl_digits", f"init={init}", "--dry-run")


@pytest.mark.parametrize("name, says", [(LONG, "too long for a path"), ("/a" * 3000, "too long"), (NOBODY, "no user")])
def test_the_name_of_a_recipe(refused, name, says):
    assert says in refused(name)


@pytest.mark.parametrize("base, says", [("[3]", "base: expected the name"), (LONG, "too long"), (NOBODY, "no user")])
def test_a_base(refused, tmp_path, base, says):
    (tmp_path / "mine.yaml").write_text(f"base: {base}\n")
    assert says in refused("mine.yaml")


def test_a_chain_of_bases_has_an_end(refused, tmp_path):
    for i in range(1200):
        (tmp_path / f"link{i}.yaml").write_text(f"base: link{i + 1}\n")
    assert f"more than {MOST_BASES} recipes" in refused("link0.yaml")


def test_a_pipe_is_no_recipe(refused, tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "'pipe.yaml' is a pipe" in refused("pipe.yaml")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "config.yaml")
    assert "a folder without a config.yaml" in refused("pipe")


PLUGINS = {
    "sys.exit": ("import sys; sys.exit(0)", "ends the process when it is imported: sys.exit(0)"),
    "os-like exit": ("raise GeneratorExit", "GeneratorExit"),
    "hint is no expression": (
        "from ssl_ib import register_masker\n@register_masker('{name}')\nclass M:\n"
        "    def __init__(self, a: 'int |' = 3): pass\n",
        "cannot be read: Forward reference must be an expression",
    ),
    "hint raises": (
        "from ssl_ib import register_masker\n@register_masker('{name}')\nclass M:\n"
        "    def __init__(self, a: '1/0' = 3): pass\n",
        "cannot be read: division by zero",
    ),
    "bound of another type": (
        "from typing import Annotated\nfrom annotated_types import Ge\n"
        "from ssl_ib import register_masker\n@register_masker('{name}')\nclass M:\n"
        "    def __init__(self, a: Annotated[str, Ge(3)] = 'x'): pass\n",
        "cannot be used to check its arguments",
    ),
    "sys.exit when built": (
        "import sys\nfrom ssl_ib import register_masker\n@register_masker('{name}')\nclass M:\n"
        "    def __init__(self, a: str = ''): sys.exit(0)\n",
        "ends the process when it is built: sys.exit(0)",
    ),
}


@pytest.fixture
def own_maskers(monkeypatch):
    """What a test registers is forgotten after it."""
    MASKERS.names()  # So that all built-in ones are there.
    monkeypatch.setattr(MASKERS, "_entries", dict(MASKERS._entries))


@pytest.mark.parametrize("case", PLUGINS)
def test_a_plugin(refused, tmp_path, own_maskers, monkeypatch, case):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    code, says = PLUGINS[case]
    name = "bad_input_" + case.replace(" ", "_").replace(".", "_").replace("-", "_")
    (tmp_path / f"{name}.py").write_text(code.replace("{name}", name))
    chosen = [f"masker={name}", "masker.a=r"] if "register" in code else []
    assert says in refused("mrcl_digits", "--plugin", f"{name}.py", *chosen, "--dry-run")


def test_the_import_of_a_plugin_has_an_end(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(plugins, "SECONDS", 0.2)
    (tmp_path / "endless.py").write_text("while True:\n    pass\n")
    said = refused("mrcl_digits", "--plugin", "endless.py")
    assert re.search(r"plugin 'endless.py': its import has not ended after 0.2 seconds \(\S*endless.py:[12]\)", said)


def test_a_part_that_ends_the_process_is_no_finished_run(refused, tmp_path, own_maskers, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "leaves.py").write_text(
        "import sys\nfrom ssl_ib import register_masker\n@register_masker('leaves')\nclass Leaves:\n"
        "    def __call__(self, keys, grid):\n        sys.exit(0)\n"
    )
    said = refused("mrcl_digits", "--plugin", "leaves.py", "masker=leaves", "--dry-run")
    assert "sys.exit(0) in the middle of the work (" in said and "leaves.py:6)" in said
