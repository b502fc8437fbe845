"""The encoder a run leaves behind: an ordinary timm model, that three lines rebuild without this package.

A folder holds `backbone.safetensors` (the state_dict) and `backbone.json`:
    {"model": timm's name, "arguments": {...}, "mean": [...], "std": [...], "ssl_ib": version}
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

from . import __version__
from .errors import UserError

_WEIGHTS, _DESCRIPTION = "backbone.safetensors", "backbone.json"


def save_backbone(
    module: nn.Module,
    name: str,
    arguments: dict[str, Any],
    normalisation: tuple[Sequence[float], Sequence[float]],
    folder: Path | str,
) -> Path:
    """Writes the backbone and its description to `folder`, and returns the path of the weights.

    module:        the timm model; timm.create_model(name, **arguments) has the same state_dict keys and shapes.
    arguments:     plain data, fit for JSON.
    normalisation: (mean, std) of the channels, for pixels in [0, 1]: what its inputs were normalised with.

    A reader never meets a half-written file. Raises UserError where the arguments do not fit JSON.
    """
    mean, std = normalisation
    description = {
        "model": name,
        "arguments": arguments,
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "ssl_ib": __version__,
    }
    try:
        text = json.dumps(description, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"backbone {name!r}: expected arguments fit for JSON, got {arguments!r} ({error})") from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors wants every tensor dense and alone in its storage: tied weights become equal copies.
    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in module.state_dict().items()
    }
    _replace(folder / _WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    _replace(folder / _DESCRIPTION, text.encode())
    return folder / _WEIGHTS


def snippet(folder: Path | str) -> str:
    """Three lines of Python that rebuild the backbone in `folder` with timm alone, as `model`."""
    description, weights = (str(Path(folder) / name) for name in (_DESCRIPTION, _WEIGHTS))
    return (
        "import json, timm\n"
        f"saved = json.load(open({description!r}))\n"
        f'model = timm.create_model(saved["model"], checkpoint_path={weights!r}, **saved["arguments"]).eval()\n'
    )


def load_backbone(folder: Path | str) -> nn.Module:
    """The backbone saved in `folder`, in evaluation mode, on the CPU. Raises UserError where there is none."""
    folder = Path(folder)
    missing = [name for name in (_DESCRIPTION, _WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: expected a saved backbone, found no {' and no '.join(missing)}")
    saved = json.loads((folder / _DESCRIPTION).read_text())
    return timm.create_model(saved["model"], checkpoint_path=str(folder / _WEIGHTS), **saved["arguments"]).eval()


def _replace(path: Path, content: bytes) -> None:
    """Writes a file at once: whoever reads it sees the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
