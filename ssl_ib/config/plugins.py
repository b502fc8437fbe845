"""Loads users' own parts: a module's name, a package folder, a Python file, or an installed entry point."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UserError
from .outside import short, user_path

_logger = logging.getLogger(__name__)

GROUP = "ssl_ib.plugins"
#: How long the import of one plugin may take.
SECONDS = 300.0


def remembered(config: Mapping[str, Any]) -> list[str]:
    """The plugins that a recipe, or a run's configuration, asks for. Raises UserError where they are no names."""
    names = config.get("plugins") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"plugins: expected a list of modules and paths, got {short(str(names))}")
    return names


def load_plugins(
    names: list[str], asking: str = "", given: Collection[str] = (), say: Callable[[str], None] = _logger.warning
) -> list[str]:
    """Imports the named plugins and those installed under the entry-point group, which registers their parts.

    asking: the recipe or run that names them, in words, where it is not the user; then those that are not among the
    user's own, `given`, are told to `say` before any is imported: no code of somebody else's runs unsaid.

    Returns the names to remember: paths are made absolute. Raises UserError where one is missing or fails.
    """
    for name in names if asking else ():
        if name not in given:
            say(f"{asking} asks for the plugin {short(name)}, which is imported now")
    for entry in entry_points(group=GROUP):
        _guarded(entry.load, f"entry point {entry.name}")
    return [_load(name) for name in names]


def _load(name: str) -> str:
    path = user_path(name, "plugin")
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
    if not root.isidentifier() or (root not in sys.modules and importlib.util.find_spec(root) is None):
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


class _TooLong(BaseException):
    """Raised in a plugin that is still imported after `SECONDS`; no Exception, so that the plugin cannot swallow it."""


@contextmanager
def _in_time() -> Iterator[None]:
    """Bounds the seconds that its body may take, in the main thread of a process with such signals."""

    def over(signum: int, frame: object) -> None:
        raise _TooLong(f"its import has not ended after {SECONDS:g} seconds")

    # Where somebody else has set an alarm, it stays.
    free = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not free or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _guarded(load: Callable[[], object], name: str) -> None:
    """Imports, and says in one line what a plugin did instead: raise, end the process, or not come back."""
    try:
        with _in_time():
            load()
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if isinstance(error, SyntaxError):
            message, file, line = error.msg, error.filename, error.lineno
        else:
            message, (file, line, *_) = error, traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, SystemExit):
            raise UserError(
                f"plugin {name!r} ends the process when it is imported: sys.exit({error}) ({file}:{line})"
            ) from error
        if isinstance(error, _TooLong):
            # The last line of all is the alarm's own.
            file, line, *_ = traceback.extract_tb(error.__traceback__)[-2]
            raise UserError(f"plugin {name!r}: {error} ({file}:{line})") from error
        raise UserError(f"plugin {name!r} failed: {type(error).__name__}: {message} ({file}:{line})") from error
