"""Builds the parts of a run from its configuration, and checks that they fit together before any image is read."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import contract, distributed, ops
from .config.config import Config
from .config.recipe import PARTS
from .config.registry import Built, build_part
from .config.schedule import Schedule
from .device import Bounded, choose_device, require_memory
from .errors import ConfigError, EndedElsewhere, UserError
from .part import Criterion, Model, RunInfo, Task, parts

_logger = logging.getLogger(__name__)

#: What a dry run is cut down to, so that every recipe passes it on a small machine.
DRY_BATCH, DRY_BANK_BATCHES, DRY_IMAGES = 8, 4, 64
#: What the evaluation before the first step may be called (`Run.first_evaluation`).
FIRST = ("untrained", "initial")


@dataclass
class Run:
    """A run's parts.

    evaluated: the source whose images are evaluated: `source`, or that of `eval.source`.
    schedules: the numbers that change: (owner, attribute, schedule).
    dry:       whether it is cut down to a few small steps, for a check that all fits.
    start:     what fitted of the weights that `init` names, in a line; empty without `init`.
    """

    config: Config
    device: torch.device
    batch_size: int
    source: Any
    views: Any
    task: Task
    model: Model
    criterion: Criterion
    evaluated: Any
    schedules: list[tuple[Any, str, Schedule]] = field(default_factory=list)
    dry: bool = False
    start: str = ""

    @property
    def first_evaluation(self) -> str:
        """What the evaluation before the first step is called: `initial` where the encoder starts from given weights
        (`init`, or pretrained ones of the model's own), else `untrained`."""
        pretrained = any(getattr(module, "pretrained", False) is True for module in self.model.modules())
        return "initial" if pretrained or self.config.init is not None else "untrained"

    @property
    def samples_per_step(self) -> int:
        """The batch of the linear-scaling rule: over all ranks, an image counted as often as the task says."""
        return self.batch_size * distributed.world_size() * self.task.samples_per_image


def build_run(config: Config, dry: bool = False, resumed: bool = False) -> Run:
    """Builds every part. Raises ConfigError with all that does not fit.

    dry: as in `Run`; resumed: whether the parts' state is loaded from a checkpoint afterwards.
    """
    problems: list[str] = []
    built: dict[str, Any] = {}
    schedules: list[tuple[Any, str, Schedule]] = []

    def attempt(kind: str, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except EndedElsewhere:
            raise  # Nothing of this process's is wrong.
        except UserError as error:
            text = str(error)
            # Two parts may ask the masker the same, and both be refused: that is one problem.
            if not any(problem.endswith(text) for problem in problems):
                problems.append(text if text.startswith((f"{kind}.", f"{kind} ")) else f"{kind}: {text}")
            return None

    def make(kind: str, **supplied: Any) -> Built:
        try:
            with Bounded():
                answer = build_part(kind, getattr(config, kind), **supplied)
        except (ArithmeticError, MemoryError, RuntimeError) as error:
            # What sizes such as 0 heads or 2^62 features lead to; a part whose own code is wrong keeps its traceback.
            extreme = _extreme(getattr(config, kind))
            if not extreme:
                raise
            raise UserError(
                f"{kind}: {getattr(config, kind)['name']!r} cannot be built with these sizes ({', '.join(extreme)}): "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from None
        contract.check_part(kind, getattr(config, kind)["name"], answer.part)
        return answer

    def build(kind: str, **supplied: Any) -> Any:
        answer = attempt(kind, lambda: make(kind, **supplied))
        if answer is None:
            return None
        schedules.extend(answer.schedules)
        built[kind] = answer.part
        return answer.part

    device = None
    try:
        device = choose_device(config.device)
    except UserError as error:
        problems.append(str(error))
    try:
        ops.use_backend(config.ops.backend)
        reason = ops.why_not(ops.wanted(), device.type) if device and ops.wanted() != "auto" else None
        if reason is not None:
            problems.append(f"ops.backend: {ops.wanted()!r} cannot run here: {reason}")
    except UserError as error:
        problems.append(f"ops.backend: {error}")
    if config.compile == "graphs":
        if device and device.type != "cuda":
            problems.append("compile: graphs are a GPU's, and the device is cpu: use compile=true or compile=false")
        if config.parallel in ("fsdp", "hybrid"):
            problems.append(
                f"compile: graphs read weights where they are, and parallel={config.parallel} moves them: use "
                "compile=true or parallel=ddp"
            )
    if "wandb" in config.logger and not _installed("wandb"):
        problems.append("logger: wandb is not installed: pip install 'ssl-ib[wandb]', or leave it out of logger")
    first, last = config.optim.warmup_epochs, config.epochs
    if not all(first <= milestone < last for milestone in config.optim.milestones):
        problems.append(
            f"optim.milestones: expected epochs from the warm-up's end, {first:g}, to before the run's, {last}, got "
            f"{', '.join(f'{milestone:g}' for milestone in config.optim.milestones)}"
        )
    world, batch_size = distributed.world_size(), config.batch_size
    pieces = world * config.accumulate
    if batch_size % pieces:
        problems.append(
            f"batch_size: {batch_size} images a step cannot be cut into {pieces} equal batches "
            f"(processes: {world}, accumulate: {config.accumulate})"
        )
    if dry:
        batch_size = min(batch_size, pieces * max(DRY_BATCH // pieces, 1))
    torch.manual_seed(config.seed)
    source = build("source")
    views = build("views", source=source, resumed=resumed)
    evaluated = source
    if config.eval.source is not None:
        found = attempt("eval.source", lambda: build_part("source", config.eval.source, "eval.source"))
        evaluated = None if found is None else found.part
    masked = config.masker["name"] != "none"
    masker = build("masker") if masked else None
    model = criterion = None
    if views is not None:
        info = {
            "view_shapes": tuple(tuple(shape) for shape in views.shapes),
            "batch_size": batch_size // pieces,
            "world_size": world,
            "num_global": getattr(views, "num_global", None),
            "cap": DRY_BANK_BATCHES * batch_size if dry else None,
            "images": (lambda: len(source.train())) if source is not None else (lambda: 0),
            "classes": (lambda: source.train().classes) if source is not None else tuple,
            "factors": (lambda: source.train().factors) if source is not None else dict,
            "mean": lambda: _statistics(views, source)[0],
            "deviation": lambda: _statistics(views, source)[1],
            "masks": partial(_masks, masker),
        }
        pixels = sum(math.prod(shape) for shape in info["view_shapes"])
        what = f"{info['batch_size']:,} images with {len(info['view_shapes'])} views each"
        if (
            attempt("batch_size", lambda: require_memory(4.0 * pixels * info["batch_size"], what, device) or True)
            is None
        ):
            raise ConfigError(problems)
        model = build("model", info=RunInfo(**info))
        if model is not None:
            info |= {"grid": model.grid, "width": partial(_width, model, config.model["name"])}
        criterion = build("criterion", info=RunInfo(**info))
        if model is not None and not (masked and masker is None):
            build("task", views=views, masker=masker, source=source, info=RunInfo(**info))
            for grid in {model.grid(shape) for shape in info["view_shapes"]} - {None}:
                attempt("masker", partial(_masks, masker, grid))
    if model is not None and criterion is not None:
        problems += _fit(config, len(views.shapes), model, criterion)
    if problems:
        raise ConfigError(problems)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    # A gradient and, of most optimisers, two moments each.
    require_memory(3.0 * trained, "model: the gradients and the optimiser's state", device)
    for part in (model, criterion, built["task"]):
        part.to(device)
    if device.type == "cpu" and config.precision == "bf16" and plain_attention(model):
        _logger.info("attention: plain products, because torch's fused kernel is slow on a CPU in bfloat16")
    parts_of_run = {kind: built[kind] for kind in PARTS if kind != "masker"}
    return Run(config, device, batch_size // world, **parts_of_run, evaluated=evaluated, schedules=schedules, dry=dry)


def _extreme(spec: dict[str, Any], prefix: str = "") -> list[str]:
    """The arguments of a part that are 0, negative, or larger than any size is, as `key=value`."""
    found = []
    for key, value in spec.items():
        if isinstance(value, dict):
            found += _extreme(value, f"{prefix}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool) and not 0 < value < 10_000:
            found.append(f"{prefix}{key}={value}")
    return found


def _installed(package: str) -> bool:
    # Not by looking for a module: the folder in which wandb keeps its runs would be taken for one.
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def plain_attention(model: torch.nn.Module) -> bool:
    """Has timm's attention multiply, softmax and multiply, in place of torch's fused kernel; whether there was any.

    On a CPU in bfloat16 that kernel's backward takes longer than the products it saves (docs/mi_mae.md has figures).
    """
    fused = [module for module in model.modules() if getattr(module, "fused_attn", None) is True]
    for module in fused:
        module.fused_attn = False
    return bool(fused)


def _statistics(views: Any, source: Any) -> tuple[Sequence[float], Sequence[float]]:
    """What views are normalised with; 0 and 1 without a source, which is a problem of its own."""
    if source is None:
        return (0.0,), (1.0,)
    views.measure(source)
    return views.statistics


def _masks(masker: Any, grid: tuple[int, int]) -> tuple[int, int] | None:
    """Masks an image and patches that each keeps, found out by drawing some; None without a masker."""
    if masker is None:
        return None
    return tuple(contract.checked_masks(masker, torch.zeros(1, dtype=torch.int64), grid).keep.shape[1:])


def _width(model: Model, name: str, output: str) -> int:
    """Size of the last dimension of a model's output. Raises UserError where the model does not tell."""
    if output in model.provides and output not in model.widths:
        raise UserError(f"model {name!r} does not say how wide its output {output!r} is (`widths` of ssl_ib.Model)")
    return model.widths.get(output, 1)


def _fit(config: Config, num_views: int, model: Model, criterion: Criterion) -> list[str]:
    """Whether model and views give what the criterion reads; where they do, tells the model so."""
    problems = []
    missing = criterion.requires - model.provides
    if missing:
        problems.append(
            f"criterion {config.criterion['name']!r} requires {', '.join(sorted(criterion.requires))}, "
            f"but model {config.model['name']!r} provides {', '.join(sorted(model.provides))}: "
            f"missing {', '.join(sorted(missing))}"
        )
    if config.eval.ledger and not criterion.held_out:
        problems.append(
            "eval.ledger=true reads the gradients of the held-out loss, and criterion "
            f"{config.criterion['name']!r} has none: use eval.ledger=false"
        )
    encoders = model.trained_encoders() if config.eval.ledger else []
    if config.eval.ledger and not any(p.requires_grad for encoder in encoders for p in encoder.parameters()):
        problems.append(
            f"eval.ledger=true reads gradients of the encoder, and model {config.model['name']!r} names none that is "
            "trained (`trained_encoders` of ssl_ib.Model): use eval.ledger=false"
        )
    if criterion.num_views not in (None, num_views):
        problems.append(
            f"criterion {config.criterion['name']!r} compares {criterion.num_views} views, "
            f"but views {config.views['name']!r} draws {num_views}"
        )
    for name, numbers in criterion.reads.items():
        if any(not 0 <= number < num_views for number in numbers):
            problems.append(
                f"criterion {config.criterion['name']!r} reads {name!r} of the views {', '.join(map(str, numbers))} "
                f"(counted from 0), but views {config.views['name']!r} draws {num_views}"
            )
    if not problems:
        for part in parts(model):
            if isinstance(part, Model):
                part.wanted_views = criterion.reads
        try:
            model.select(criterion.requires)
        except UserError as error:
            problems.append(f"model: {error}")
    return problems


def parameter_counts(run: Run) -> dict[str, int]:
    """Trained and all parameters of model and criterion."""
    everything = [p for part in (run.model, run.criterion) for p in part.parameters()]
    owned = {id(p): p for part in parts(run.model, run.criterion) for g in part.param_groups() for _, p in g.params}
    return {"trained": sum(p.numel() for p in owned.values()), "all": sum(p.numel() for p in everything)}
