"""Parameter groups, the optimiser (timm's, by name), the learning rate at each step, and clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn

from . import distributed
from .config.config import OptimConfig
from .config.registry import is_schedule
from .config.schedule import Schedule
from .errors import UserError, nearest
from .part import Part, parts

#: timm's optimisers with a trust ratio that they leave out where weight decay is 0; the published LARS adapts every
#: matrix. (Above 0, timm divides by |g| + wd |p| where the published one has |g + wd p|.)
ADAPTIVE = ("lars", "nlars", "larc", "nlarc")


def linear_scale(config: OptimConfig, samples: int) -> float:
    """The factor of the linear-scaling rule: samples a step / 256, or 1 where it is off (Goyal et al., 2017)."""
    return samples / 256 if config.linear_scaling else 1.0


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and name.rpartition(".")[2] != "bias"


def build_optimizer(config: OptimConfig, roots: Sequence[Part]) -> torch.optim.Optimizer:
    """The optimiser over every part's groups. Raises UserError for a name or arguments that timm does not take.

    Each group is split in two, so that biases and other 1-D parameters never decay. Every torch group carries
    `lr_scale`, `own_lr` (or None) and `own_decay` (or None), which `set_rates` reads, and `clip`, the number of the
    root it belongs to, which `clip_gradients` reads.
    """
    if config.name not in list_optimizers():
        raise UserError(f"optim.name: unknown optimiser {config.name!r}{nearest(config.name, list_optimizers())}")
    adapt = {"always_adapt": True} if config.name in ADAPTIVE else {}
    groups: list[dict[str, Any]] = []
    root_of = {id(part): number for number, root in enumerate(roots) for part in parts(root)}
    for number, group in ((root_of[id(part)], group) for part in parts(*roots) for group in part.param_groups()):
        matrices = [p for n, p in group.params if _decays(n, p)]
        vectors = [p for n, p in group.params if not _decays(n, p)]
        common = {"name": group.name, "clip": number, "lr_scale": group.lr_scale, "own_lr": group.lr}
        if matrices:
            groups.append({**common, **adapt, "params": matrices, "own_decay": group.weight_decay})
        if vectors:
            groups.append({**common, "params": vectors, "own_decay": 0.0})
            groups[-1]["lr_scale"] *= config.bias_lr_scale
    if not groups:
        raise UserError("nothing to train: no part has a parameter that requires a gradient")
    info = get_optimizer_info(config.name)
    arguments = {"betas": config.betas} if info.has_betas and info.num_betas == 2 else {}
    arguments |= {"fused": True} if config.name in ("adam", "adamw") else {}
    try:
        return create_optimizer_v2(
            groups,
            opt=config.name,
            lr=1.0,
            weight_decay=0.0,
            momentum=config.momentum,
            filter_bias_and_bn=False,
            **arguments | config.args,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"optim: {config.name!r} cannot be built: {error}") from None


def learning_rate(config: OptimConfig, lr: float, epoch: float, epochs: float) -> float:
    """The rate after `epoch` epochs (a fraction counts): a linear warm-up, then as `shape` says (OptimConfig)."""
    first = 0.0 if config.cosine_from == "start" else config.warmup_epochs
    if epoch < config.warmup_epochs:
        top = _cosine(config, lr, config.warmup_epochs / epochs) if config.cosine_from == "start" else lr
        return config.start_lr + (top - config.start_lr) * epoch / config.warmup_epochs
    if config.shape == "constant":
        return lr
    if config.shape == "step":
        return lr * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    return _cosine(config, lr, (epoch - first) / max(epochs - first, 1e-12))


def _cosine(config: OptimConfig, lr: float, t: float) -> float:
    """The rate at t, the share of the cosine's span that is done."""
    return config.min_lr + (lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(t, 1.0)))


def set_rates(
    optimizer: torch.optim.Optimizer, config: OptimConfig, scale: float, epoch: float, epochs: float
) -> float:
    """Sets every group's learning rate and weight decay; returns the run's rate. `scale` is linear_scale's."""
    lr, decay = (Schedule.parse(v, "", []) if is_schedule(v) else v for v in (config.lr, config.weight_decay))
    if isinstance(lr, Schedule):
        peak, base = lr.largest * scale, lr.at(epoch, epochs) * scale
    else:
        peak, base = lr * scale, learning_rate(config, lr * scale, epoch, epochs)
    decay = decay.at(epoch, epochs) if isinstance(decay, Schedule) else decay
    shape = base / peak if peak else 0.0
    for group in optimizer.param_groups:
        rate = base if group["own_lr"] is None else group["own_lr"] * shape
        group["lr"] = rate * group["lr_scale"]
        group["weight_decay"] = decay if group["own_decay"] is None else group["own_decay"]
    return base


@torch.no_grad()
def clip_gradients(optimizer: torch.optim.Optimizer, limit: float | None, mode: str) -> torch.Tensor:
    """Bounds the gradient's norm by `limit` (None: not at all) and returns the norm over all parameters before.

    mode "part": the norm over all that a root trains together, so that a model is clipped as one with the parts inside
    it, as published codes do; "param": over each parameter alone (DINO).
    """
    roots: dict[int, list[torch.Tensor]] = {}
    for group in optimizer.param_groups:
        roots.setdefault(group["clip"], []).extend(p.grad for p in group["params"] if p.grad is not None)
    gradients = [gradient for root in roots.values() for gradient in root]
    if not gradients:
        return torch.tensor(0.0)
    norms = distributed.norms(gradients)
    rows = [distributed.local(gradient) for gradient in gradients]
    if limit is not None and mode == "param":
        torch._foreach_mul_(rows, [(limit / (norm + 1e-6)).clamp(max=1.0) for norm in norms])
    elif limit is not None:
        first = 0
        for count in filter(None, map(len, roots.values())):
            norm = torch.linalg.vector_norm(norms[first : first + count])
            torch._foreach_mul_(rows[first : first + count], (limit / (norm + 1e-6)).clamp(max=1.0))
            first += count
    return torch.linalg.vector_norm(norms)
