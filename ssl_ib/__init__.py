"""Self-supervised vision pretraining seen through the information bottleneck.

`train` trains a recipe, `load` loads an encoder and `load_backbone` the bare timm model of one (docs/python.md); the
other names are what a plugin needs (docs/plugins.md). Importing this package starts nothing: no CUDA, no network, no
search for plugins. Each name is loaded when it is first used, and the built-in parts when a registry is first read.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import TrainedRun, train
    from .config.registry import (
        register_criterion,
        register_masker,
        register_model,
        register_source,
        register_task,
        register_views,
    )
    from .data.sources.base import ImageSet, InMemory, Source, Streamed
    from .data.views.augment import Augment, Crops
    from .data.views.base import Views
    from .errors import ConfigError, UserError
    from .part import Context, Criterion, Export, Model, Nats, ParamGroup, Part, RunInfo, Task
    from .pretrained import Backbone, load
    from .record.backbone import load_backbone
    from .types import Batch, Loss, Masks, Progress, Sample

__version__ = "0.1.0"

__all__ = [
    "Augment",
    "Backbone",
    "Batch",
    "ConfigError",
    "Context",
    "Criterion",
    "Crops",
    "Export",
    "ImageSet",
    "InMemory",
    "Loss",
    "Masks",
    "Model",
    "Nats",
    "ParamGroup",
    "Part",
    "Progress",
    "RunInfo",
    "Sample",
    "Source",
    "Streamed",
    "Task",
    "TrainedRun",
    "UserError",
    "Views",
    "load",
    "load_backbone",
    "register_criterion",
    "register_masker",
    "register_model",
    "register_source",
    "register_task",
    "register_views",
    "train",
]

#: Where the names are defined, in the order in which a name is looked for: the modules without torch come first.
_HOMES = (
    "errors",
    "config.registry",
    "types",
    "part",
    "data.sources.base",
    "data.views.base",
    "data.views.augment",
    "pretrained",
    "record.backbone",
    "api",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = import_module(f".{home}", __name__)
            if name in vars(module):
                globals()[name] = vars(module)[name]
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
