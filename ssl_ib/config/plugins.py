"""Loads users' own parts: a module's name, a package folder, a Python file, or an installed entry point."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from ..errors import UserError

GROUP = "ssl_ib.plugins"


def load_plugins(names: list[str]) -> list[str]:
    """Imports the named plugins and those installed under the entry-point group, which registers their parts.

    Returns the names to remember: paths are made absolute. Raises UserError where one is missing or fails.
    """
    for entry in entry_points(group=GROUP):
        _guarded(entry.load, f"entry point {entry.name}")
    return [_load(name) for name in names]


def _load(name: str) -> str:
    path = Path(name).expanduser()
    if path.exists():
        path = path.resolve()
        module_name = f"ssl_ib_plugin_{path.stem}"
        file = path / "__init__.py" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"plugin {name!r}: a folder needs an __init__.py that registers its parts")
        if getattr(sys.modules.get(module_name), "__file__", None) != str(file):
            _guarded(lambda: _import_file(module_name, file), name)
        return str(path)
    root = name.partition(".")[0]
    if not root.isidentifier() or importlib.util.find_spec(root) is None:
        raise UserError(f"plugin {name!r} is neither a path nor an importable module")
    _guarded(lambda: importlib.import_module(name), name)
    return name


def _import_file(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        name, file, submodule_search_locations=[str(file.parent)] if file.name == "__init__.py" else None
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _guarded(load, name: str) -> None:
    try:
        load()
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, SyntaxError):
            message, file, line = error.msg, error.filename, error.lineno
        else:
            message, (file, line, *_) = error, traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(f"plugin {name!r} failed: {type(error).__name__}: {message} ({file}:{line})") from error
