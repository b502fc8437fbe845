"""`about.json`: what a run is made of, for those who read its folder later: images, classes, parameters, terms."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from ..run import Run, parameter_counts
from ..types import Loss
from .files import replace

ABOUT = "about.json"


def write_about(out: Path, run: Run, example: Loss, peak: int | None = None) -> None:
    """Writes `about.json`.

    example: a loss of the run, which tells its terms and their weights (null: the term is only watched).
    peak:    of a run that has ended, the most memory that it used, in bytes.
    """
    sets = {"train": run.source.train(), "held_out": run.source.val()}
    sets = {name: images for name, images in sets.items() if images is not None}
    classes = sets["train"].classes
    about = {
        "images": {name: len(images) for name, images in sets.items()},
        "classes": classes,
        "class_counts": {
            name: images.labels[images.labels >= 0].bincount(minlength=len(classes)).tolist()
            for name, images in sets.items()
        },
        # A plugin's source may say nothing.
        "notes": list(getattr(run.source, "notes", ())),
        "parameters": parameter_counts(run),
        "terms": {name: float(example.weights[name]) if name in example.weights else None for name in example.terms},
        "nats": {name: told._asdict() for name, told in run.criterion.nats.items()},
        "start": run.start,
        "memory_of": "GPU" if run.device.type == "cuda" else "process",
        "peak_memory": peak,
    }
    plain = json.loads(json.dumps(about), parse_constant=str)
    replace(out / ABOUT, json.dumps(plain, indent=2, allow_nan=False) + "\n")


def peak_memory(device: torch.device) -> int:
    """The most memory in use so far, in bytes: of a GPU as torch counts it, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
