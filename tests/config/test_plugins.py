"""Users' parts are found by module, folder, file and entry point; what fails says where."""

import sys
from importlib.metadata import EntryPoint

import pytest

from ssl_ib import UserError
from ssl_ib.config import registry
from ssl_ib.config.plugins import GROUP, load_plugins
from ssl_ib.config.registry import MASKERS, build_part

PART = """
from ssl_ib import register_masker

@register_masker({name!r})
class Mine:
    def __init__(self, number: int = {number}):
        self.number = number
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Forgets what a test registered and imported."""
    MASKERS.names()
    entries, modules = dict(MASKERS._entries), dict(sys.modules)
    monkeypatch.setattr("ssl_ib.config.plugins.entry_points", lambda group: [])
    yield
    MASKERS._entries.clear()
    MASKERS._entries.update(entries)
    registry._checker.cache_clear()
    for name in [name for name in sys.modules if name.startswith("ssl_ib_plugin_") or "_of_a_test" in name]:
        del sys.modules[name]
    # Those of other tests stay as they were.
    sys.modules.update({name: module for name, module in modules.items() if name not in sys.modules})


def write(path, name="mine", number=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PART.format(name=name, number=number))
    return path


def number(name="mine"):
    return build_part("masker", {"name": name}).part.number


def test_a_file(tmp_path):
    path = write(tmp_path / "parts.py", number=3)
    assert load_plugins([str(path)]) == [str(path)]
    assert number() == 3
    # Once is enough.
    assert load_plugins([str(path)]) == [str(path)]


def test_a_relative_path_is_remembered_in_full(tmp_path, monkeypatch):
    path = write(tmp_path / "parts.py")
    monkeypatch.chdir(tmp_path)
    assert load_plugins(["parts.py"]) == [str(path)] and "mine" in MASKERS
    assert load_plugins(["./parts.py"]) == [str(path)]


def test_a_home_path(tmp_path, monkeypatch):
    path = write(tmp_path / "parts.py")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_plugins(["~/parts.py"]) == [str(path)]


def test_a_package_folder(tmp_path):
    write(tmp_path / "package" / "inner" / "thing.py", number=5)
    (tmp_path / "package" / "inner" / "__init__.py").write_text("from . import thing")
    (tmp_path / "package" / "__init__.py").write_text("from .inner import thing\nfrom . import inner")
    assert load_plugins([str(tmp_path / "package")]) == [str(tmp_path / "package")]
    assert number() == 5


def test_a_module_by_name(tmp_path, monkeypatch):
    write(tmp_path / "plugin_package_of_a_test" / "part.py", number=7)
    (tmp_path / "plugin_package_of_a_test" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_plugins(["plugin_package_of_a_test"]) == ["plugin_package_of_a_test"]
    assert "mine" not in MASKERS
    assert load_plugins(["plugin_package_of_a_test.part"]) == ["plugin_package_of_a_test.part"]
    assert number() == 7


def test_files_of_one_name_in_two_folders(tmp_path):
    first = write(tmp_path / "a" / "parts.py", "one", 1)
    second = write(tmp_path / "b" / "parts.py", "two", 2)
    load_plugins([str(first), str(second)])
    assert (number("one"), number("two")) == (1, 2)


def test_entry_points(tmp_path, monkeypatch):
    write(tmp_path / "installed_plugin_of_a_test.py", number=9)
    monkeypatch.syspath_prepend(tmp_path)
    groups = []

    def entry_points(group):
        groups.append(group)
        return [EntryPoint("theirs", "installed_plugin_of_a_test", group)]

    monkeypatch.setattr("ssl_ib.config.plugins.entry_points", entry_points)
    # Installed ones need no mention, and none is remembered: they are there again.
    assert load_plugins([]) == []
    assert groups == [GROUP] == ["ssl_ib.plugins"] and number() == 9


def test_an_entry_point_that_fails(monkeypatch):
    monkeypatch.setattr(
        "ssl_ib.config.plugins.entry_points", lambda group: [EntryPoint("theirs", "nowhere_at_all", group)]
    )
    with pytest.raises(UserError, match="plugin 'entry point theirs' failed: ModuleNotFoundError: .*nowhere_at_all"):
        load_plugins([])


@pytest.mark.parametrize("name", ["nowhere_at_all", "./nowhere.py", "../nowhere", "nowhere/part.py", ".", "a b", ""])
def test_missing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"neither a path nor an importable module|needs an __init__.py"):
        load_plugins([name])


@pytest.mark.parametrize(
    "text, line, message",
    [
        ("x = 1\n\nimport nowhere_at_all\n", 3, "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def f():\n    return 1 / 0\n\nf()\n", 2, "ZeroDivisionError: division by zero"),
        ("x = 1\ny = (\n", 2, "SyntaxError: '(' was never closed"),
    ],
)
def test_one_that_fails_says_where(tmp_path, text, line, message):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_plugins([str(path)])
    assert str(caught.value) == f"plugin {str(path)!r} failed: {message} ({path}:{line})"
    # Repaired, it loads.
    write(path)
    load_plugins([str(path)])
    assert "mine" in MASKERS


def test_a_mistake_in_a_helper_is_found_there(tmp_path):
    write(tmp_path / "package" / "__init__.py").write_text("from . import helper")
    (tmp_path / "package" / "helper.py").write_text("a = [\n")
    with pytest.raises(UserError, match=r"SyntaxError: .*helper.py:1\)"):
        load_plugins([str(tmp_path / "package")])


def test_a_taken_name_names_both_places(tmp_path):
    path = write(tmp_path / "parts.py", name="random")
    says = r"^masker 'random' is registered twice: at .*random.py:\d+ and at .*parts.py:4"
    with pytest.raises(UserError, match=says):
        load_plugins([str(path)])
