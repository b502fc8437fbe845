"""A run that starts from given weights: what `init` names is put into the encoder, and what fitted is said in one line.

Shapes: L patches, P prefix tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor, nn

from .config.outside import user_path
from .errors import UserError
from .pretrained import TIMM, of_timm
from .record import backbone as record
from .record import shards
from .record.weights import read_file, state_dict_of
from .run import Run

#: The smallest share of an encoder's numbers that has to fit: below it the weights are another architecture's.
LEAST = 0.5


def initialise(run: Run) -> str | None:
    """Gives the encoders of a run the weights that `init` names; what fitted and what did not, in one line.

    Heads are dropped. Positions of another grid are resampled. Copies of the encoder, such as a teacher, which begin
    with its weights, begin with these. A model with several encoders takes those of the same names, or one for all.

    Returns None where `init` is not given. Raises UserError where there are no such weights, or where less than half of
    an encoder would have them.
    """
    source, exports = run.config.init, run.model.exports()
    if source is None:
        return None
    if not exports:
        raise UserError(f"init: model {run.config.model['name']!r} exports no encoder that could take {source}")
    try:
        found = _weights(source)
        chosen = {name: _for(name, found, source) for name in exports}
        fits = {name: _put(run.model, exports[name][0], weights, source) for name, weights in chosen.items()}
    except UserError as error:
        raise UserError(f"init: {error}") from None
    return f"{source}: " + "; ".join(fit if len(fits) == 1 else f"{name}: {fit}" for name, fit in fits.items())


@dataclass
class _Weights:
    """A state dict under timm's names, and where it is known the grid (rows, columns) that its positions are for."""

    state: dict[str, Tensor]
    grid: tuple[int, int] | None = None


def _weights(source: str) -> dict[str, _Weights]:
    """The encoders that are meant, by name."""
    if source.startswith(TIMM):
        return {record.MAIN: _of_module(of_timm(source.removeprefix(TIMM), pretrained=True))}
    path = user_path(source, "init")
    if path.is_dir() and not shards.is_checkpoint(path):
        return {name: _described(*record.read(path, name)) for name in record.names(path)}
    if not path.exists():
        raise UserError(
            "expected the folder of a run, a checkpoint of one, a file of weights, or timm:NAME, and there is nothing "
            f"at {source!r}"
        )
    content = read_file(path)
    if isinstance(content, dict) and content.get("backbones"):
        return {name: _described(*found) for name, found in record.from_checkpoint(content).items()}
    return {record.MAIN: _Weights(state_dict_of(content, path))}


def _described(description: dict[str, Any], state: dict[str, Tensor]) -> _Weights:
    return _of_module(record.rebuild(description, state))


def _of_module(module: nn.Module) -> _Weights:
    return _Weights(module.state_dict(), _grid(module))


def _grid(module: nn.Module) -> tuple[int, int] | None:
    """The grid that a module's positions are for; None without any."""
    grid = getattr(getattr(module, "patch_embed", None), "grid_size", None)
    return None if grid is None else tuple(grid)


def _for(name: str, found: dict[str, _Weights], source: str) -> _Weights:
    """The weights for an encoder: those of its name, or the only ones there are."""
    if name in found:
        return found[name]
    if len(found) > 1:
        raise UserError(
            f"{source} holds the encoders {', '.join(sorted(found))}, and the model has {name!r}: write the one that "
            "is meant to a folder, with ssl-ib-export --to safetensors --name, and give that folder"
        )
    return next(iter(found.values()))


@dataclass
class _Fit:
    """What came of a state dict: tensors that fit, by name, and what is to be said of the others."""

    taken: dict[str, Tensor] = field(default_factory=dict)
    resampled: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)


def _put(model: nn.Module, module: nn.Module, weights: _Weights, source: str) -> str:
    """Puts weights into an encoder of a model, and into its copies there; what fitted, in words."""
    own = module.state_dict()
    fit = _fit(module, own, weights)
    total = sum(value.numel() for value in own.values())
    reached = sum(value.numel() for value in fit.taken.values())
    missing = [key for key in own if key not in weights.state]
    parts = [f"{len(fit.taken)} of {len(own)} weights fit", *fit.resampled]
    parts += [f"of another shape: {_some(fit.misshapen)}"] if fit.misshapen else []
    parts += [f"not in it: {_some(_tops(missing))}"] if missing else []
    dropped = _tops(key for key in weights.state if key not in own)
    parts += [f"dropped: {_some(dropped)}"] if dropped else []
    if reached < LEAST * total:
        raise UserError(
            f"the weights of {source} are of another architecture than the model's backbone ({', '.join(parts)}). "
            "Published checkpoints in layouts of their own are read by ssl-ib-export --from"
        )
    # A copy is known by the weights it begins with.
    copies = [other for other in model.modules() if other is not module and _same(other, module, own)]
    for one in (module, *copies):
        one.load_state_dict(fit.taken, strict=False)
    return ", ".join(parts)


def _same(other: nn.Module, module: nn.Module, own: dict[str, Tensor]) -> bool:
    if type(other) is not type(module):
        return False
    state = other.state_dict()
    return state.keys() == own.keys() and all(torch.equal(value, own[key]) for key, value in state.items())


def _fit(module: nn.Module, own: dict[str, Tensor], weights: _Weights) -> _Fit:
    fit, grid = _Fit(), _grid(module)
    for key, value in weights.state.items():
        if key not in own:
            continue
        wanted = own[key]
        if key == "pos_embed" and grid is not None and value.ndim == 3 and value.shape[2] == wanted.shape[2]:
            old = weights.grid or _square(value.shape[1], wanted.shape[1] - grid[0] * grid[1])
            if old is not None and (old != grid or value.shape != wanted.shape):
                value = _positions(value, old, wanted, grid)
                fit.resampled.append(f"positions resampled from {_by(old)} to {_by(grid)}")
        elif key.endswith("relative_position_bias_table") and value.shape != wanted.shape:
            owner = module.get_submodule(key.rpartition(".")[0])
            if value.ndim == wanted.ndim == 2 and value.shape[1] == wanted.shape[1]:
                value = resize_rel_pos_bias_table(value, owner.window_size, wanted.shape)
                fit.resampled = fit.resampled or [
                    f"relative positions resampled to windows of {_by(owner.window_size)}"
                ]
        if value.shape == wanted.shape:
            fit.taken[key] = value
        else:
            fit.misshapen.append(f"{key} ({_by(value.shape)}, here {_by(wanted.shape)})")
    return fit


def _square(rows: int, prefix: int) -> tuple[int, int] | None:
    """The grid of a table of positions of which nothing else is known: the square that leaves as many prefix tokens as
    the own table has, or one, or none."""
    for count in (prefix, 1, 0):
        side = round((rows - count) ** 0.5) if rows > count else 0
        if side and side * side == rows - count:
            return side, side
    return None


def _positions(table: Tensor, old: tuple[int, int], own: Tensor, new: tuple[int, int]) -> Tensor:
    """A table of positions [1, P + L, D] for another grid; a prefix token that it lacks keeps its own position."""
    prefix, own_prefix = table.shape[1] - old[0] * old[1], own.shape[1] - new[0] * new[1]
    patches = resample_abs_pos_embed(table[:, prefix:], list(new), list(old), num_prefix_tokens=0)
    in_front = own[:, :own_prefix].clone()
    shared = min(prefix, own_prefix)
    in_front[:, :shared] = table[:, :shared]
    return torch.cat([in_front, patches.to(own.dtype)], dim=1)


def _by(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))


def _tops(keys: Iterable[str]) -> list[str]:
    """Names of weights by what they belong to: `head` for `head.weight`, `blocks.6` for what is in that block."""
    found = []
    for key in keys:
        parts = key.split(".")
        found.append(".".join(parts[:2]) if len(parts) > 2 and parts[1].isdigit() else parts[0])
    return list(dict.fromkeys(found))


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
