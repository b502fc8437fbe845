"""A run's folder: whether a run may use it, and what another run left there.

Nothing here changes the folder but `claim`, which comes after every check.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.config import Config, configure, differences
from ..errors import ConfigError, UserError
from ..run import FIRST
from .checkpoint import load, not_numbers
from .checkpoint import saved as saved_in
from .files import replace
from .lock import LOCK, Lock

#: What a run writes beside `config.yaml`; `claim` removes these and the files of further encoders, and nothing else.
#: The checkpoints go first: a run that was killed meanwhile has none, and not one of a run that is half there.
WRITTEN = (
    "checkpoints environment.json metrics.jsonl tensorboard wandb figures "
    "backbone.safetensors backbone.json results.json bad_images.txt bad_batch.txt "
    "evals.jsonl evals export info about.json report.html"
).split()
#: Keys that may change when a run resumes: they move no loss.
MOVABLE = ("device", "workers", "worker_timeout", "process_timeout", "log_every", "logger", "checkpoint", "parallel")

#: Keys by which a checkpoint is known to be this run's. Not those that name files, which may have moved since.
OWN = ("seed", "epochs", "batch_size", "accumulate", "precision", "optim", "task", "model", "criterion", "masker")


def lock(out: Path) -> Lock:
    """Holds a run's folder from the first look at it to the run's end, against any other run."""
    return Lock(out, LOCK, "another run")


def is_empty(out: Path) -> bool:
    """Whether there is nothing of anybody's in a folder, or no folder."""
    return not out.exists() or all(path.name == LOCK for path in out.iterdir())


def has_run(out: Path) -> bool:
    """Whether a run was begun in the folder."""
    return (out / "config.yaml").is_file()


def examine(out: Path, config: Config, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Checks that a run may use the folder `out`; returns the checkpoint to continue from, or None for a new run.

    Raises UserError where it holds something else, or a run that neither `resume` nor `overwrite` was asked for, and
    ConfigError where that run cannot be continued because a key that moves its losses has changed.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; a run needs a folder")
    saved = out / "config.yaml"
    if resume:
        if not has_run(out):
            raise UserError(f"nothing to resume: {out} holds no run (no config.yaml)")
        changed = changes(saved, config)
        if changed:
            raise ConfigError([f"--resume cannot change {line}" for line in changed])
        if not saved_in(out / "checkpoints"):
            print(f"ssl-ib-train: {out} has no checkpoint yet: starting from the beginning", file=sys.stderr)
            return None
        state, warnings = load(out / "checkpoints", lambda state: _problem(state, config))
        for warning in warnings:
            print(f"ssl-ib-train: {warning}", file=sys.stderr)
        return state
    if is_empty(out):
        return None
    if not overwrite:
        raise UserError(f"{out} is not empty: continue it with --resume, replace it with --overwrite, or choose --out")
    if not has_run(out):
        raise UserError(f"{out} holds files but no run (no config.yaml), so --overwrite leaves it alone: choose --out")
    return None


def _problem(state: Any, config: Config) -> str | None:
    """Why a checkpoint is not one that the run can continue from; None where it is."""
    if not _is_checkpoint(state):
        return "it is no checkpoint of a run"
    if not any(name in state["results"] for name in FIRST):
        return "it is no checkpoint of a run: it has no first evaluation"
    then, now = _shared(state.get("config", {}), config.plain())
    other = [line for line in differences(then, now) if line.startswith(OWN)]
    if other:
        return f"it is another run's: {other[0]} here"
    spoiled = not_numbers(state)
    return f"it holds NaN: {spoiled[0]}{f' and {len(spoiled) - 1} more' * (len(spoiled) > 1)}" if spoiled else None


def _is_checkpoint(state: Any) -> bool:
    """Whether something has the form of a checkpoint; an earlier version's may lack some of it."""
    kinds = {"step": int, "images": int, "parts": dict, "optimizer": dict, "results": dict, "seconds": (int, float)}
    if not isinstance(state, dict) or any(not isinstance(state.get(key), kind) for key, kind in kinds.items()):
        return False
    optional = {"config": dict, "fingerprint": dict, "backbones": dict, "rows": int}
    if any(key in state and not isinstance(state[key], kind) for key, kind in optional.items()):
        return False
    inner = [*state["results"].values(), state["optimizer"].get("state")]
    if not all(isinstance(value, dict) for value in inner):
        return False
    if not all(isinstance(value, dict) for value in state["optimizer"]["state"].values()):
        return False
    try:
        # No tensor is compared with a text.
        json.dumps([state.get(key) for key in ("config", "fingerprint", "results")])
    except (TypeError, ValueError):
        return False
    return True


def _shared(a: dict[str, Any], b: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two plain configurations without the keys that one of them lacks, as those of different versions may."""
    pairs = {
        key: _shared(a[key], b[key]) if isinstance(a[key], dict) and isinstance(b[key], dict) else (a[key], b[key])
        for key in a
        if key in b
    }
    return {key: pair[0] for key, pair in pairs.items()}, {key: pair[1] for key, pair in pairs.items()}


def changes(saved: Path, config: Config) -> list[str]:
    """In what a run's saved configuration differs from `config`, but for keys that move no loss: `key: old -> new`.

    A key that the saved one lacks has its default: the run was started before there was such a key, so the default of a
    new key must be what was done without it. Raises UserError where the saved one is no configuration of a run any
    more.
    """
    try:
        former = configure(str(saved))
    except UserError as error:
        raise UserError(f"{saved} cannot be continued: {error}") from None
    movable = tuple(f"{key}{end}" for key in MOVABLE for end in (":", "."))
    return [line for line in differences(former.plain(), config.plain()) if not line.startswith(movable)]


def claim(out: Path, config: Config) -> None:
    """Removes what an earlier run left in the folder, and writes `config.yaml`."""
    # A model with several encoders leaves two files of each.
    encoders = [
        file for weights in out.glob("backbone_*.safetensors") for file in (weights, weights.with_suffix(".json"))
    ]
    for path in [*map(out.joinpath, WRITTEN), *encoders, *out.glob("hung_rank_*.txt")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    # It tells a run's folder from any other, so that it is never missing while there is anything else of a run's.
    replace(out / "config.yaml", config.yaml())


def names_of(folders: Sequence[Path]) -> list[str]:
    """What runs are called: the ends of their folders' paths, as short as tells them apart."""
    paths = [folder.resolve().parts for folder in folders]
    # The folder of a lone seed says nothing of the run.
    while len({path[-1] for path in paths}) == 1 and (len(set(paths)) > 1 or paths[0][-1].startswith("seed_")):
        paths = [path[:-1] for path in paths]
    length = 1
    while len({path[-length:] for path in paths}) < len(set(paths)):
        length += 1
    return ["/".join(path[-length:]).removeprefix("case_") for path in paths]
