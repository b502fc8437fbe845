"""Self-supervised vision pretraining seen through the information bottleneck.

The names below are what a plugin needs. Importing them starts nothing: no CUDA, no network, no search for plugins, and
the built-in parts are imported when a registry is first read.
"""

from .config.registry import (
    register_criterion,
    register_masker,
    register_model,
    register_source,
    register_task,
    register_views,
)
from .errors import ConfigError, UserError
from .part import Context, Criterion, Model, ParamGroup, Part, RunInfo, Task
from .types import Batch, Loss, Masks, Progress, Sample

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "ConfigError",
    "Context",
    "Criterion",
    "Loss",
    "Masks",
    "Model",
    "ParamGroup",
    "Part",
    "Progress",
    "RunInfo",
    "Sample",
    "Task",
    "UserError",
    "register_criterion",
    "register_masker",
    "register_model",
    "register_source",
    "register_task",
    "register_views",
]
