"""The folder of a sweep: whether these runs may use it, what is remembered there, and a lock."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..config.config import differences
from ..config.outside import YamlDumper, parse_yaml
from ..config.recipe import read_recipe
from ..errors import UserError
from ..record.files import replace
from ..record.folder import changes, is_empty
from ..record.lock import Lock
from .points import Run

RECORD, LOCK = "sweep.yaml", "sweep.lock"


def base_of(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What all points start from: the recipe's name, and the overrides that are not varied."""
    pairs = (text.partition("=") for text in overrides)
    return {"recipe": name, "overrides": {key: parse_yaml(value) for key, _, value in pairs}}


def examine(out: Path, base: dict[str, Any], runs: Sequence[Run]) -> None:
    """Whether a sweep of this base and these runs may use the folder, which stays as it is.

    Raises UserError where it holds something else, a sweep of another base, or a run of another configuration.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file; a sweep needs a folder")
    record = out / RECORD
    if not record.is_file():
        if any(path.name != LOCK for path in out.iterdir()):
            raise UserError(f"{out} holds files but no sweep (no {RECORD}): choose --out")
        return
    former = read_recipe(record)
    changed = differences({key: former.get(key) for key in base}, base)
    if changed:
        lines = "".join(f"\n  - {line}" for line in changed)
        raise UserError(f"{out} holds a sweep of another base; choose another --out, or vary the key:{lines}")
    problems = [line for run in runs for line in _differences(out / run.folder, run)]
    if problems:
        lines = "".join(f"\n  - {line}" for line in problems)
        raise UserError(f"runs in {out} were configured otherwise; choose another --out, or remove them:{lines}")


def _differences(folder: Path, run: Run) -> list[str]:
    """How the run that lies in a folder differs from what it would be now, where that moves a loss."""
    saved = folder / "config.yaml"
    if not saved.is_file():
        filled = folder.exists() and (not folder.is_dir() or not is_empty(folder))
        return [f"{run.folder} holds files but no run (no config.yaml)"] if filled else []
    return [f"{run.folder}: {line}" for line in changes(saved, run.config)]


def remember(out: Path, base: dict[str, Any], command: str) -> None:
    """Writes `sweep.yaml`: the base, and the latest command, to continue with."""
    text = yaml.dump({**base, "command": command}, Dumper=YamlDumper, sort_keys=False, width=1000)
    replace(out / RECORD, text)


def lock(out: Path) -> Lock:
    """Makes the folder and holds it for one sweep.

    The runs inherit the lock's descriptor: one that outlives a killed sweep keeps the folder, so that no other writes
    there too.
    """
    return Lock(out, LOCK, "another sweep, or a run that it left behind,")
