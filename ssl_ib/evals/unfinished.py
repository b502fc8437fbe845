"""Where a training stands at the end of an epoch, in the folder of the results: one that was stopped goes on there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .protocol import Job
from .results import fingerprint_of, identity_of


def place(job: Job, variant: dict[str, Any]) -> Path | None:
    """The file of the training that the result `variant` comes from; None in a dry run, which keeps nothing."""
    if job.out is None:
        return None
    return job.out / "evals" / f"{job.protocol}_{fingerprint_of(identity_of(job.line(variant)))}.pt"


def save(path: Path | None, state: dict[str, Any]) -> None:
    """Writes tensors and plain data at once; None: nowhere."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".tmp")
        torch.save(state, fresh)
        os.replace(fresh, path)


def load(path: Path | None) -> dict[str, Any] | None:
    """What was saved, on the CPU; None where nothing was."""
    if path is None or not path.is_file():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)


def forget(path: Path | None) -> None:
    """Removes what was saved of a training that is finished."""
    if path is not None:
        path.unlink(missing_ok=True)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
