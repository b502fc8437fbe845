"""The encoder a run leaves behind: an ordinary timm model, that three lines rebuild without this package.

A folder holds `backbone.safetensors` (the state_dict) and `backbone.json`:
    {"model": timm's name, "arguments": {...}, "mean": [...], "std": [...], "ssl_ib": version}
and "stem": "cifar" where the stem of a ResNet was exchanged (see `create`), which takes two lines more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

from .. import __version__
from ..errors import UserError
from .files import replace

_WEIGHTS, _DESCRIPTION = "backbone.safetensors", "backbone.json"


#: What `create` does for a stem of small images, as a reader without this package would.
_CIFAR_STEM = (
    "model.conv1 = torch.nn.Conv2d(model.conv1.in_channels, model.conv1.out_channels, 3, padding=1, bias=False)\n"
    "model.maxpool = torch.nn.Identity()\n"
)


def create(name: str, arguments: dict[str, Any]) -> nn.Module:
    """timm.create_model, which takes one argument more: `stem: cifar` for a ResNet on images of about 32 pixels.

    That is a 3 x 3 convolution of stride 1 without pooling, where timm's stem divides the resolution by 4 (Chen et al.,
    SimCLR, appendix B.9). Raises ValueError where the model has no such stem, and what timm raises.
    """
    arguments = dict(arguments)
    stem = arguments.pop("stem", None)
    model = timm.create_model(name, **arguments)
    if stem is None:
        return model
    if stem != "cifar" or not isinstance(getattr(model, "conv1", None), nn.Conv2d) or not hasattr(model, "maxpool"):
        raise ValueError(f"stem={stem!r}: expected 'cifar', on a ResNet with a convolution and pooling as its stem")
    model.conv1 = nn.Conv2d(model.conv1.in_channels, model.conv1.out_channels, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


def save_backbone(
    module: nn.Module,
    name: str,
    arguments: dict[str, Any],
    normalisation: tuple[Sequence[float], Sequence[float]],
    folder: Path | str,
) -> Path:
    """Writes the backbone and its description to `folder`, and returns the path of the weights.

    module:        the timm model; timm.create_model(name, **arguments) has the same state_dict keys and shapes.
    arguments:     plain data, fit for JSON; `stem` as for `create`.
    normalisation: (mean, std) of the channels, for pixels in [0, 1]: what its inputs were normalised with.

    A reader never meets a half-written file. Raises UserError where the arguments do not fit JSON.
    """
    mean, std = normalisation
    stem = {"stem": arguments["stem"]} if "stem" in arguments else {}
    description = {
        "model": name,
        "arguments": {key: value for key, value in arguments.items() if key != "stem"},
        **stem,
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
    replace(folder / _WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    replace(folder / _DESCRIPTION, text)
    return folder / _WEIGHTS


def snippet(folder: Path | str) -> str:
    """A few lines of Python that rebuild the backbone in `folder` with timm alone, as `model`."""
    description, weights = (str(Path(folder) / name) for name in (_DESCRIPTION, _WEIGHTS))
    if (Path(folder) / _DESCRIPTION).is_file() and "stem" in json.loads((Path(folder) / _DESCRIPTION).read_text()):
        return (
            "import json, timm, torch, safetensors.torch\n"
            f"saved = json.load(open({description!r}))\n"
            'model = timm.create_model(saved["model"], **saved["arguments"]).eval()\n'
            f"{_CIFAR_STEM}model.load_state_dict(safetensors.torch.load_file({weights!r}))\n"
        )
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
    if "stem" not in saved:
        return timm.create_model(saved["model"], checkpoint_path=str(folder / _WEIGHTS), **saved["arguments"]).eval()
    model = create(saved["model"], {**saved["arguments"], "stem": saved["stem"]})
    model.load_state_dict(safetensors.torch.load_file(folder / _WEIGHTS))
    return model.eval()
