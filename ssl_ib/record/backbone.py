"""The encoder a run leaves behind: an ordinary timm model, that three lines rebuild without this package.

A folder holds `backbone.safetensors` (the state_dict) and `backbone.json`:
    {"model": timm's name, "arguments": {...}, "mean": [...], "std": [...], "preprocessing": {...}, "ssl_ib": version}
and "stem": "cifar" where the stem of a ResNet was exchanged (see `create`), which takes two lines more. A checkpoint
has the same under `backbones`, by name, with the "prefix" of the encoder's names among its `parts`. A model with
several encoders leaves such a pair of files of each, under names of their own.

The preprocessing is that of the evaluated view (`Views.center`): the image is shrunk until its longer side has at most
`max_side` pixels (null: as it is), its shorter side is resized to size / crop_ratio by `interpolation`, and size x size
pixels are cut from the centre. It is null where views have a centre of their own.

"channels" is there where the encoder reads some channels of that view alone: the first, and the one after the last.
Mean and std are of all channels of the view.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import safetensors.torch
import timm
import torch
from annotated_types import Interval
from huggingface_hub import constants, try_to_load_from_cache
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from .. import __version__, distributed
from ..config.hints import Count, CropRatio, PositiveInt
from ..config.outside import read_json
from ..device import Bounded
from ..errors import UserError
from ..ops.pixels.resample import Interpolation
from ..run import Run
from .files import replace
from .weights import read_file

#: The name of the encoder of a model that has one.
MAIN = "backbone"

#: The largest of timm's arguments that are sizes, by what their names contain; none of them may be 0.
LARGEST = {"depth": 1024, "layers": 1024, "heads": 1024, "patch_size": 1024, "dim": 65536, "img_size": 16384}
LARGEST |= {"in_chans": 1024, "width": 1024}
#: How timm names the weights of a model that it has downloaded.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
#: How the arguments begin that say where first weights came from. They are no part of what rebuilds a backbone: that
#: file may be gone, and `checkpoint_path` is where `snippet` has its own.
ORIGINS = ("pretrained", "checkpoint_path")

#: What `create` does for a stem of small images, as a reader without this package would.
_CIFAR_STEM = (
    "model.conv1 = torch.nn.Conv2d(model.conv1.in_channels, model.conv1.out_channels, 3, padding=1, bias=False)\n"
    "model.maxpool = torch.nn.Identity()\n"
)


class _Preprocessing(BaseModel):
    model_config = ConfigDict(strict=True)

    size: Annotated[int, Interval(ge=1, le=LARGEST["img_size"])]
    crop_ratio: CropRatio
    interpolation: Interpolation
    max_side: PositiveInt | None


class _Description(BaseModel):
    """What a description is checked against; its other keys may be anything."""

    model_config = ConfigDict(strict=True)

    model: str
    arguments: dict[str, Any]
    mean: list[float]
    std: list[float]
    preprocessing: _Preprocessing | None = None
    channels: tuple[Count, Count] | None = None
    stem: str = "cifar"
    prefix: str = ""


def create(name: str, arguments: dict[str, Any]) -> nn.Module:
    """timm.create_model, which takes one argument more: `stem: cifar` for a ResNet on images of about 32 pixels.

    That is a 3 x 3 convolution of stride 1 without pooling, where timm's stem divides the resolution by 4 (Chen et al.,
    SimCLR, appendix B.9). Raises ValueError where there is no such model, or it has no such stem, and what timm raises.
    """
    if not timm.is_model(name):
        # Not a name such as hf-hub:..., for which timm would ask the network.
        raise ValueError(f"timm has no model {name!r}")
    arguments = dict(arguments)
    stem = arguments.pop("stem", None)
    model = timm.create_model(name, **arguments)
    if stem is None:
        return model
    first = getattr(model, "conv1", None)
    if stem != "cifar" or not isinstance(first, nn.Conv2d) or not hasattr(model, "maxpool"):
        raise ValueError(f"stem={stem!r}: expected 'cifar', on a ResNet with a convolution and pooling as its stem")
    model.conv1 = conv = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return model


def check_reachable(name: str) -> None:
    """Raises UserError where timm would have to download the weights of a model, and there is no way to their host.

    Where a proxy is set, it is the proxy that has to be there. Trying takes a second or two; the download itself would
    try again and again for minutes.
    """
    weights = timm.get_pretrained_cfg(name)
    repository = getattr(weights, "hf_hub_id", None)
    if not repository or getattr(weights, "file", None):
        return
    if any(isinstance(try_to_load_from_cache(repository, file), str) for file in WEIGHT_FILES):
        return
    host = urlsplit(constants.ENDPOINT)
    proxies = {} if proxy_bypass(host.hostname or "") else getproxies()
    proxy = proxies.get(host.scheme) or proxies.get("all")
    way = host if proxy is None else urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    shown = way.hostname if proxy is None else f"the proxy {way.hostname}"
    try:
        socket.create_connection((way.hostname, way.port or (443 if way.scheme == "https" else 80)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"the weights of timm's {name!r} are not on this machine, and {shown} cannot be reached to download them: "
            f"{error}"
        ) from None


def check_sizes(arguments: dict[str, Any], what: str) -> None:
    """Raises UserError for sizes that no backbone has: timm would fail in the first step, or build for hours.

    what: what the arguments are called, for the message.
    """
    for key, value in arguments.items():
        most = next((most for kind, most in LARGEST.items() if kind in key), None)
        for size in value if isinstance(value, list | tuple) else [value]:
            if most and isinstance(size, int) and not isinstance(size, bool) and not 1 <= size <= most:
                raise UserError(f"{what}.{key}: expected sizes from 1 to {most:,}, got {value}")


def without_origins(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `timm.create_model` but for those that say where first weights come from."""
    return {key: value for key, value in arguments.items() if not key.startswith(ORIGINS)}


def describe(
    name: str,
    arguments: dict[str, Any],
    normalisation: tuple[Sequence[float], Sequence[float]],
    preprocessing: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What `backbone.json` says of a backbone.

    name, arguments: timm.create_model(name, **arguments) has its state_dict's keys and shapes; the arguments are plain
                     data, fit for JSON, with `stem` as for `create`. Those that say where first weights came from
                     are left out.
    normalisation:   (mean, std) of the channels, for pixels in [0, 1]: what its inputs were normalised with.
    preprocessing:   as at the head of this file.

    Raises UserError where the arguments do not fit JSON.
    """
    mean, std = normalisation
    description = {
        "model": name,
        "arguments": {key: value for key, value in without_origins(arguments).items() if key != "stem"},
        **({"stem": arguments["stem"]} if "stem" in arguments else {}),
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "preprocessing": preprocessing,
        "ssl_ib": __version__,
    }
    try:
        return json.loads(json.dumps(description))
    except (TypeError, ValueError) as error:
        raise UserError(f"backbone {name!r}: expected arguments fit for JSON, got {arguments!r} ({error})") from None


def of_run(run: Run) -> dict[str, dict[str, Any]]:
    """The descriptions of the encoders that a run's model exports, by name."""
    preprocessing = run.views.preprocessing
    if preprocessing is not None:
        preprocessing = {**preprocessing, "max_side": getattr(run.source, "max_side", None)}
    found, statistics = {}, run.views.statistics
    for name, (_, model, arguments, channels) in run.model.exports().items():
        found[name] = describe(model, arguments, statistics, preprocessing)
        if channels is not None and channels[1] - channels[0] < len(statistics[0]):
            found[name]["channels"] = list(channels)
    return found


def in_checkpoint(run: Run) -> dict[str, dict[str, Any]]:
    """`of_run`, each with the `prefix` of the encoder's names among a checkpoint's `parts`; those that are there."""
    exports, found = run.model.exports(), {}
    for name, description in of_run(run).items():
        names = (key for key, module in run.model.named_modules(prefix="model") if module is exports[name][0])
        prefix = next(names, None)
        if prefix is not None:
            found[name] = {**description, "prefix": f"{prefix}."}
    return found


def save_backbone(module: nn.Module, description: dict[str, Any], folder: Path | str, name: str = MAIN) -> Path:
    """Writes a backbone and what `describe` said of it to `folder`, and returns the path of the weights.

    name: of the files, without their endings. A reader never meets a half-written file.

    Of several processes the main one writes; where the module is sharded, all call it at once.
    """
    description_file, weights = files(folder, name)
    tensors = state_of(module, everywhere=False)
    if distributed.is_main():
        Path(folder).mkdir(parents=True, exist_ok=True)
        fresh = weights.with_name(f"{weights.name}.tmp")
        try:
            # save_file makes files that nobody else may read.
            fresh.touch()
            mode = fresh.stat().st_mode
            safetensors.torch.save_file(tensors, fresh, metadata={"format": "pt"})
            fresh.chmod(mode)
            os.replace(fresh, weights)
        except safetensors.SafetensorError as error:
            # Its own error has the number of the system's in its text alone.
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(weights)) from None
        finally:
            fresh.unlink(missing_ok=True)
        replace(description_file, json.dumps(description, indent=2) + "\n")
    return weights


def state_of(module: nn.Module, everywhere: bool = True) -> dict[str, Tensor]:
    """A copy of a module's state_dict, on the CPU: every tensor dense and alone in its storage, as safetensors wants
    them. Tied weights become equal copies.

    everywhere: in every process, or in the main one alone.

    Where the module is sharded, all processes ask at once, and one tensor after the other comes together.
    """
    found = {}
    for name, value in module.state_dict().items():
        whole = value.full_tensor() if distributed.is_sharded(value) else value
        if everywhere or distributed.is_main():
            found[name] = whole.detach().cpu().clone(memory_format=torch.contiguous_format)
    return found


def files(folder: Path | str, name: str = MAIN) -> tuple[Path, Path]:
    """The files of a backbone in `folder`: its description and its weights."""
    return Path(folder) / f"{name}.json", Path(folder) / f"{name}.safetensors"


def snippet(folder: Path | str, name: str = MAIN) -> str:
    """A few lines of Python that rebuild a backbone in `folder` with timm alone, as `model`."""
    description, weights = map(str, files(folder, name))
    if Path(description).is_file() and "stem" in json.loads(Path(description).read_text()):
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


def pooling(vit: nn.Module) -> dict[str, Any]:
    """The arguments that rebuild how a vision transformer of timm's without a classifier is pooled."""
    # timm places the last norm by the pooling it starts with: it has to stay where it is.
    norms_features = not isinstance(vit.fc_norm, nn.Identity)
    return {"num_classes": 0, "global_pool": vit.global_pool, "fc_norm": norms_features}


def rebuild(description: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """The backbone of a description and a state_dict, in evaluation mode, on the CPU.

    torch's generator is left as it was. Raises UserError where the weights are not those of what is described.
    """
    stem = {"stem": description["stem"]} if "stem" in description else {}
    # Those of earlier versions may name the file that the run began with.
    arguments = {**without_origins(description["arguments"]), **stem}
    check_sizes(arguments, "arguments")
    try:
        # What is described may be anything: timm's builders raise whatever Python does.
        with torch.random.fork_rng(devices=[]), Bounded():
            model = create(description["model"], arguments)
        model.load_state_dict(state)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"expected the weights of timm's {description['model']!r} with {arguments}: {reason}") from None
    return model.eval()


def names(folder: Path | str) -> list[str]:
    """The names of the backbones saved in `folder`, sorted. Raises UserError where there is none."""
    folder = Path(folder)
    found = sorted(file.stem for file in folder.glob("*.json") if file.with_suffix(".safetensors").is_file())
    if not found and (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder} holds a run without backbone.json: it is not finished, or its model exports no encoder. "
            f"Of an unfinished run, load a checkpoint, such as {folder / 'checkpoints' / 'last.pt'}"
        )
    if not found:
        raise _nothing(folder, MAIN)
    return found


def from_checkpoint(saved: dict[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """The descriptions and state_dicts of the encoders in a run's checkpoint, by name; empty where it has none."""
    # Earlier versions knew of one encoder alone.
    found = saved.get("backbones") or ({MAIN: saved["backbone"]} if saved.get("backbone") else {})
    if not isinstance(found, dict):
        raise UserError("the checkpoint describes no encoder: its backbones are no mapping")
    encoders = {}
    for name, description in found.items():
        prefix = _checked(description, f"the checkpoint's encoder {name}").get("prefix", "")
        parts = saved["parts"].items() if isinstance(saved.get("parts"), dict) else ()
        encoders[name] = (description, {k.removeprefix(prefix): v for k, v in parts if str(k).startswith(prefix)})
    return encoders


def read(folder: Path | str, name: str = MAIN) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the state_dict saved in `folder` under a name.

    Raises UserError where there is none, or where the files cannot be read.
    """
    file, weights = files(folder, name)
    if not (file.is_file() and weights.is_file()):
        raise _nothing(folder, name)
    return _checked(read_json(file), str(file)), read_file(weights)


def _checked(description: Any, where: str) -> dict[str, Any]:
    """What describes an encoder. Raises UserError where it does not: it may be anybody's."""
    if not (isinstance(description, dict) and {"model", "arguments", "mean", "std"} <= description.keys()):
        raise UserError(f"{where} describes no encoder: expected model, arguments, mean and std")
    try:
        _Description.model_validate_json(json.dumps(description))
    except (ValidationError, TypeError) as error:
        found = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        place = ".".join(map(str, found["loc"]))
        raise UserError(f"{where} describes no encoder: {place + ': ' if place else ''}{found['msg']}") from None
    if len(description["mean"]) != len(description["std"]) or 0 in description["std"]:
        raise UserError(f"{where} describes no encoder: expected a mean and a std above 0 for each channel")
    return description


def _nothing(folder: Path | str, name: str) -> UserError:
    missing = [file.name for file in files(folder, name) if not file.is_file()]
    return UserError(f"{folder}: expected a saved backbone, found no {' and no '.join(missing)}")


def load_backbone(folder: Path | str) -> nn.Module:
    """The timm model saved in `folder`, such as that of a finished run, in evaluation mode, on the CPU.

    `ssl_ib.load` gives it with its preprocessing. Raises UserError where there is none.
    """
    return rebuild(*read(folder))
