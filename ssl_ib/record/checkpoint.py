"""Checkpoints that a kill, a full disk or a torn file cannot cost: written beside the old one, then renamed over it.

`last.pt` is the newest, `previous.pt` the one before; both load with `torch.load(..., weights_only=True)`. A sharded
run has folders in their place (shards.py), `last` and `previous`. A run may go from one kind to the other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .. import distributed
from ..errors import UserError
from . import shards


def save(state: dict[str, Any], folder: Path, keep_as: str | None = None) -> Path:
    """Writes `last.pt` atomically, keeping the former one as `previous.pt`, and this one also as `keep_as`.

    Raises UserError where the disk refuses; what was there before is then untouched.
    """
    last, fresh = folder / "last.pt", folder / "last.pt.tmp"
    try:
        # Not what it lies in: a run's folder that was deleted stays so.
        folder.mkdir(exist_ok=True)
        with fresh.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if last.exists():
            _alias(last, folder / "previous.pt")
        os.replace(fresh, last)
        if (folder / "last").is_dir():
            # The run was sharded until now.
            shutil.rmtree(folder / "previous", ignore_errors=True)
            os.replace(folder / "last", folder / "previous")
            (folder / "previous.pt").unlink(missing_ok=True)
        if keep_as is not None:
            _alias(last, folder / keep_as)
    except (OSError, RuntimeError) as error:
        # torch may wrap an error of the file in a RuntimeError of its zip writer.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        there = f"{last} is intact" if last.exists() else "no checkpoint was saved before"
        raise UserError(
            f"could not save the checkpoint in {folder}: {cause}; {there}. Free some space, then continue with --resume"
        ) from error
    finally:
        with suppress(OSError):
            fresh.unlink()
    return last


def _alias(file: Path, name: Path) -> None:
    """Gives `file` a second name, replacing what had it; by a link where the file system has them."""
    fresh = name.with_suffix(".tmp")
    fresh.unlink(missing_ok=True)
    try:
        try:
            os.link(file, fresh)
        except OSError:
            shutil.copyfile(file, fresh)
        os.replace(fresh, name)
    finally:
        # Still there where renaming failed, or where both are names of one file and it did nothing.
        fresh.unlink(missing_ok=True)


def not_numbers(state: dict[str, Any], but: Collection[str] = ()) -> list[str]:
    """Names of a checkpoint's tensors, of the parts and of the optimiser, that have a NaN in them; `but` is not read.

    Infinite numbers are let pass, as a buffer may begin with one, and so is a lone number that is NaN: a statistic that
    is not known yet.
    """
    tensors = {name: value for name, value in state["parts"].items() if name not in but}
    for number, kept in state["optimizer"].get("state", {}).items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in kept.items()}
    floating = {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor) and v.ndim and v.is_floating_point()}
    return [name for name, tensor in floating.items() if extremes(distributed.local(tensor)).isnan().any()]


def extremes(x: torch.Tensor) -> torch.Tensor:
    """The least and the largest number, [2], both NaN where one is: read once, which `isnan` and `isfinite` do not."""
    return torch.stack(torch.aminmax(x)) if x.numel() else x.new_zeros(2)


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, files and folders, the newest first, then those that were kept of epochs."""
    # Of a kill between two renamings, `last.tmp` is whole.
    whole = ["last.tmp"] if shards.is_checkpoint(folder / "last.tmp") else []
    found = []
    for name in ("last", *whole, "previous"):
        both = [path for path in (folder / f"{name}.pt", folder / name) if path.exists()]
        found += sorted(both, key=lambda path: path.stat().st_mtime, reverse=True)
    return [*found, *reversed(kept(folder))]


def kept(folder: Path) -> list[Path]:
    """The checkpoints of epochs, in their order."""
    return sorted(path for path in folder.glob("epoch_*") if path.suffix != ".tmp")


def last(folder: Path) -> Path | None:
    """The newest checkpoint, or None without any."""
    return next(iter(saved(folder)), None)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content on the CPU. A sharded one's tensors are left where they are: `shards.whole` reads them.

    Raises anything where it is damaged.
    """
    if path.is_dir():
        return shards.read(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def load(folder: Path, problem: Callable[[Any], str | None] = lambda state: None) -> tuple[dict[str, Any], list[str]]:
    """The newest checkpoint that can be used, and a warning for each one that could not.

    problem: what is wrong with one that was read; None where nothing is.

    Raises UserError where there is none, or none can be read.
    """
    warnings: list[str] = []
    for file in saved(folder):
        try:
            state = read(file)
        except Exception as error:  # Unpickling a torn file can raise anything.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.append(f"{file} cannot be read ({reason}); falling back to the one before")
            continue
        reason = problem(state)
        if reason is None:
            return state, warnings
        warnings.append(f"{file} cannot be used ({reason}); falling back to the one before")
    if warnings:
        what = "used" if any("cannot be used" in warning for warning in warnings) else "read"
        raise UserError(f"no checkpoint can be {what}:\n  " + "\n  ".join(warnings))
    raise UserError(f"nothing to resume: there is no checkpoint in {folder}")
