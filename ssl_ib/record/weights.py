"""Files of weights, read without running code that they may hold: safetensors, or torch's files with `weights_only`."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..errors import UserError
from . import shards

#: Under which of its keys a file has its weights, if it has more than these.
WRAPPERS = ("model", "state_dict")


class _Settings:
    """Takes the place of yacs's configuration, a kind of dictionary that SimMIM's files carry."""

    def __new__(cls) -> OrderedDict:
        return OrderedDict()


#: What published files hold besides weights, all of it plain data: the arguments they were trained with.
_PLAIN = [argparse.Namespace, (_Settings, "yacs.config.CfgNode")]


def read_file(path: Path | str) -> Any:
    """What is in a file of weights, on the CPU: of a `.safetensors` file its tensors by name, else what torch saved.

    Of a sharded run's checkpoint, which is a folder, what one of one file would hold.

    Raises UserError where there is no such file, where it cannot be read, or where it holds more than tensors and plain
    data, which could run code when it is loaded.
    """
    path = Path(path)
    if not path.is_file() and not shards.is_checkpoint(path):
        raise UserError(f"there is no file {str(path)!r}")
    try:
        if path.is_dir():
            return shards.whole(shards.read(path))
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Reading a foreign file can raise anything, and without a word.
        text = str(error)
        if "Unsupported global" in text or "Unsupported class" in text:
            name = text.partition("GLOBAL ")[2].split(" ")[0] or "an object"
            raise UserError(
                f"{str(path)!r} cannot be read: it holds {name}, and loading more than tensors and plain data could "
                "run code of the file's. Where you trust it, save its state dict alone: "
                "torch.save(torch.load(FILE, weights_only=False)['model'], NEW)"
            ) from None
        # torch's advice on its own arguments comes before what was wrong, or after the first sentence.
        text = text.rpartition("WeightsUnpickler error: ")[2].strip()
        reason = (text.splitlines() or [""])[0].split(". ")[0] or type(error).__name__
        if (
            isinstance(error, (LookupError, EOFError)) or "Unsupported operand" in text
        ):  # Of a text, say, whose letters torch takes for commands.
            reason = "it is no file of weights"
        raise UserError(f"{str(path)!r} cannot be read: {reason}") from None


def state_dict_of(content: Any, path: Path | str) -> dict[str, Tensor]:
    """The state dict in what `read_file` found: all of it, or what is under one of `WRAPPERS`.

    Raises UserError where there is none.
    """
    if isinstance(content, dict):
        content = next((content[key] for key in WRAPPERS if key in content), content)
    if not (
        isinstance(content, dict)
        and content
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    ):
        raise UserError(f"{str(path)!r}: expected a state dict, or one under 'model' or 'state_dict'")
    return dict(content)
