"""Where a run's tensors live."""

from __future__ import annotations

import os

import torch

from .errors import UserError


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises UserError for a device that torch does not have."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    there = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        raise UserError(f"device: {name!r} was asked for, but torch sees {there or 'no'} CUDA devices")
    return device
