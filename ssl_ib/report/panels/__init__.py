"""The panels of a page: a module each with `build(page) -> Panel | None`, listed in the order in which they are shown.

None says that the runs have nothing for the panel. A new panel is a new module and its name in `PANELS`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

#: The modules of this package, in the order of the page.
PANELS: tuple[str, ...] = (
    "sweep",
    "about",
    "differences",
    "knn",
    "loss",
    "watched",
    "optimisation",
    "health",
    "information",
    "plane",
    "factors",
    "ledger",
    "prototypes",
    "pictures",
    "evaluations",
    "cost",
    "setup",
)


def modules() -> list[tuple[str, ModuleType]]:
    """Each panel's name and module, in order."""
    return [(name, import_module(f"{__name__}.{name}")) for name in PANELS]
