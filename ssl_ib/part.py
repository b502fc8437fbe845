"""The three parts a run is composed of: Task makes batches, Model makes representations, Criterion scores them.

All are `torch.nn.Module`s, so their state lives in one state_dict. State is created in `__init__` and changed outside
the gradient only in the hooks below. A part keeps each number of its constructor as an attribute of the same name and
reads it when it is used: that is what lets any number be a schedule.

Hooks and parameter groups are asked of every part in the tree, so a part that holds another (MRCL's criterion holds a
contrastive one) forwards nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from .errors import UserError
from .types import Batch, Loss, Progress, Sample


@dataclass(frozen=True)
class RunInfo:
    """What a part may want to know of the run it is built for (constructor argument `info`).

    view_shapes: one a view, without the batch dimension, such as [C, H, W].
    batch_size:  images a forward pass of a process: a step is `accumulate` of them in each process.
    num_global:  how many of the views, the first ones, are global crops: those a teacher sees; None for all.
    cap:         the largest number of rows a bank of past features may have (a dry run makes it small), or None.
    images:      how many training images there are; a call, because it may have to read the source.
    classes:     names of the training images' classes; a call, because it may have to read the source.
    factors:     what is known of how the training images came about (`Sample.factors`), of all of them; a call, because
                 it may have to read the source.
    mean, deviation: of each channel, with which views are normalised, for pixels in [0, 1]; calls, because they may
                 have to read the source.
    grid:        patches (rows, columns) the model cuts a view of a given shape into, or None; known once the model is.
    width:       size of the last dimension of an output of the model, by name; known once the model is.
    masks:       how many masks an image gets on a grid, and how many patches each keeps, or None without a masker.
    """

    view_shapes: tuple[tuple[int, ...], ...]
    batch_size: int
    world_size: int = 1
    num_global: int | None = None
    cap: int | None = None
    images: Callable[[], int] = lambda: 0
    classes: Callable[[], Sequence[str]] = lambda: ()
    factors: Callable[[], Mapping[str, Tensor]] = lambda: {}
    mean: Callable[[], Sequence[float]] = lambda: (0.0,)
    deviation: Callable[[], Sequence[float]] = lambda: (1.0,)
    grid: Callable[[tuple[int, ...]], tuple[int, int] | None] = lambda shape: None
    width: Callable[[str], int] = lambda name: 1
    masks: Callable[[tuple[int, int]], tuple[int, int] | None] = lambda grid: None

    @property
    def global_views(self) -> int:
        """How many views are global crops."""
        return len(self.view_shapes) if self.num_global is None else self.num_global

    def capped(self, rows: int) -> int:
        """`rows`, or the cap where that is smaller."""
        return rows if self.cap is None else min(rows, self.cap)


@dataclass(frozen=True)
class Context:
    """What a hook may use of the run; never the trainer.

    collect(name, n, draw=None): the model's output `name` (its first entry) for n plain training images, stacked:
        [n, ...]; always the same images, spread over the classes, or with a number `draw` that many random ones. All
        processes ask at once: they share the work, and each gets all of it.
    reset_optimizer_state(param): forgets the optimiser's moments of a parameter whose value was replaced.
    """

    progress: Progress
    collect: Callable[..., Tensor]
    reset_optimizer_state: Callable[[nn.Parameter], None]


@dataclass
class ParamGroup:
    """Parameters that learn alike.

    name:         shown in logs.
    params:       (name, parameter) pairs.
    lr_scale:     factor on the run's learning rate.
    lr:           a learning rate of its own, in place of the run's (it follows the same schedule shape).
    weight_decay: in place of the run's; biases and other 1-D parameters never decay.
    """

    name: str
    params: list[tuple[str, nn.Parameter]]
    lr_scale: float = 1.0
    lr: float | None = None
    weight_decay: float | None = None


class Part(nn.Module, ABC):
    """Hooks and parameter groups shared by task, model and criterion. Every hook may be left as it is."""

    def param_groups(self) -> Iterable[ParamGroup]:
        """What the optimiser trains of this part, those inside it left to themselves; by default one group of all."""
        inner = {id(p) for part in parts(self) if part is not self for p in part.parameters()}
        params = [(n, p) for n, p in self.named_parameters() if p.requires_grad and id(p) not in inner]
        return [ParamGroup(type(self).__name__.lower(), params)] if params else []

    def shards(self) -> Iterable[nn.Module]:
        """With `parallel=fsdp`: the modules of this part, those of parts inside it left to themselves, whose weights
        come together only while they run.

        Each has to be run by calling it, and its weights must be read nowhere else. All other weights are together from
        the beginning of a step's forward to the end of its backward. By default: what `blocks` finds.
        """
        return blocks(self)

    def on_epoch_start(self, ctx: Context) -> None:
        """Before the first step of an epoch; not called again when a run resumes within the epoch."""

    def on_epoch_end(self, ctx: Context) -> None:
        """After the last step of an epoch."""

    def after_forward(
        self, outputs: dict[str, list[Tensor]], batch: Batch, terms: dict[str, Tensor], ctx: Context
    ) -> None:
        """After each micro-batch, with everything detached: queues, banks, centres, running statistics."""

    def before_step(self, ctx: Context) -> None:
        """Gradients are final and unclipped: freeze a layer by dropping its gradient."""

    def after_step(self, ctx: Context) -> None:
        """Once an optimiser step: move an EMA teacher."""

    def draw(self, folder: Path) -> None:
        """At the end of a run, in the main process: figures that only this part can draw."""


def parts(*roots: nn.Module) -> list[Part]:
    """Every part in the trees, each once, outer before inner."""
    found = {id(m): m for root in roots for m in root.modules() if isinstance(m, Part)}
    return list(found.values())


def blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks and heads of a network, but for those of parts inside it.

    Blocks are modules of one class that follow one another in a Sequential or a ModuleList, such as timm's; where there
    are others inside them, these. Heads are Sequentials of torch's own layers outside of blocks.
    """
    found, heads = _repeated(module), []
    inside = {id(each) for block in found for each in block.modules()}
    for head in _inner(module):
        torchs = [type(each).__module__.startswith("torch.nn.") for each in head.children()]
        if isinstance(head, nn.Sequential) and id(head) not in inside and all(torchs):
            heads.append(head)
            inside |= {id(each) for each in head.modules()}
    return [each for each in found + heads if any(True for _ in each.parameters())]


def _inner(module: nn.Module) -> Iterator[nn.Module]:
    """The modules inside, outer before inner, but for parts and what is in them."""
    for child in module.children():
        if not isinstance(child, Part):
            yield child
            yield from _inner(child)


def _repeated(module: nn.Module) -> list[nn.Module]:
    found = []
    for child in module.children():
        if isinstance(child, Part):
            continue
        inner = _repeated(child)
        kinds = {type(each) for each in child.children()}
        alike = len(kinds) == 1 and not any(k.__module__.startswith("torch.nn.") or issubclass(k, Part) for k in kinds)
        if not inner and alike and isinstance(child, nn.Sequential | nn.ModuleList):
            inner = list(child)
        found += inner
    return found


class Task(Part):
    """Owns data: turns a raw sample into views and masks."""

    registry_kind: ClassVar[str] = "task"
    #: How many samples one image counts for in the linear-scaling rule.
    samples_per_image: int = 1

    @abstractmethod
    def prepare(self, sample: Sample, progress: Progress) -> Batch:
        """Draws the views and masks; afterwards the forward is deterministic in the batch."""


class Export(NamedTuple):
    """An encoder that a run leaves behind.

    module:   the timm module. model, arguments: timm's name and arguments that rebuild it.
    channels: the first and the one after the last channel of the plain view that it reads; where that has no more
              channels than the encoder, it reads all of them.
    """

    module: nn.Module
    model: str
    arguments: dict[str, Any]
    channels: tuple[int, int] | None = None


class Nats(NamedTuple):
    """What a number in nats says of an information: an attribute `nats` of a criterion has one for each that it tells.

    kind:    whether it is expected to lie below the information or above it, or neither is known.
    of:      which information that is, in words that follow "on" or "of", such as "what the two views share".
    ceiling: the largest value that the number can have, or the name of the term that says it; None for none.
    """

    kind: Literal["lower bound", "upper bound", "estimate"]
    of: str
    ceiling: float | str | None = None


class Model(Part):
    """Owns what makes representations: encoder, heads, decoder, teacher.

    provides: names of the outputs `forward` can return, each a list with one entry a view.
    wanted:   the outputs the criterion asked for; `forward` may skip the others.
    wanted_views: of an output, the numbers of the views whose entry the criterion reads; of one that is not named here,
              every view's. `forward` may skip the others, and have None in their place.
    counts:   how many entries those outputs have that do not have one a view, by name (of a model that makes views).
    widths:   size of the last dimension of outputs, for criterions that own layers or vectors of that size.
    backbone: the timm model that the run leaves behind, where there is one (an attribute or a property).
    own_batch_norm: whether batch norm goes by the rows of each process alone where several processes train together;
              otherwise by all rows.
    """

    registry_kind: ClassVar[str] = "model"
    provides: frozenset[str] = frozenset()
    wanted: frozenset[str] = frozenset()
    wanted_views: Mapping[str, Collection[int]] = MappingProxyType({})
    counts: Mapping[str, int] = MappingProxyType({})
    own_batch_norm: bool = False
    widths: Mapping[str, int] = MappingProxyType({})

    def select(self, names: Iterable[str]) -> None:
        """Says which outputs will be used. A model that skips a part of itself freezes that part here."""
        self.wanted = frozenset(names)

    def reads(self, name: str, view: int) -> bool:
        """Whether the criterion reads the entry of the view number `view` of the output `name`."""
        return name in self.wanted and view in self.wanted_views.get(name, (view,))

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, list[Tensor]]:
        """Named outputs, each a list with one entry a view; at least those in `wanted`."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """The representation that is evaluated: plain views (`Views.center`), such as [B, 3, H, W] -> [B, D]."""

    def feature_maps(self, images: Tensor, layers: list[int]) -> list[Tensor]:
        """Spatial features of the given backbone layers: each [B, D, h, w]."""
        raise UserError(f"{type(self).__name__} has no feature maps")

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Patches (rows, columns) a view of shape [C, H, W] is cut into; None where the model has no patches."""
        return None

    def export(self) -> tuple[str, dict[str, Any]] | None:
        """The timm model name and arguments that rebuild `backbone`, or None."""
        return None

    def exports(self) -> dict[str, Export]:
        """The encoders that a run leaves behind, by the names of their files; by default `backbone`, where `export`
        describes it."""
        found = self.export()
        return {} if found is None else {"backbone": Export(cast(nn.Module, self.backbone), *found)}

    def trained_encoders(self) -> list[nn.Module]:
        """The modules whose training makes the encoders that the run leaves behind: those themselves, as a rule."""
        return [export.module for export in self.exports().values()]


class Criterion(Part):
    """Scores the outputs. Owns what exists only for that: queues, prototypes, auxiliary networks.

    requires:    the outputs `forward` reads.
    reads:       of an output, the numbers of the views whose entry is read; of one that is not named here, all of them.
    num_views:   how many views it compares, or None for any number.
    held_out:    whether it has a loss of images that it was not trained on (a bank of the training images has none).
    nats:        what those of its terms and watched numbers that are bounds on an information, or estimates of one, are
        worth, by name.
    pixels_note: what of the patches of `pixels` is predicted and what is not, for the figure's title (an attribute or a
        property).
    """

    registry_kind: ClassVar[str] = "criterion"
    requires: frozenset[str] = frozenset()
    reads: Mapping[str, Collection[int]] = MappingProxyType({})
    num_views: int | None = None
    held_out: bool = True
    nats: Mapping[str, Nats] = MappingProxyType({})
    pixels_note: str = "every patch is predicted, visible ones too"

    @abstractmethod
    def forward(self, outputs: dict[str, list[Tensor]], batch: Batch, progress: Progress) -> Loss:
        """The loss of one batch; reads the outputs it `requires`.

        It is asked for the held-out loss too, by the main process alone and in evaluation mode: its collectives must be
        those of `ssl_ib.distributed`, which then know of no other process.
        """

    def pixels(self, outputs: dict[str, list[Tensor]], batch: Batch) -> list[Tensor] | None:
        """For figures: the reconstructed patches [B*N, L, p*p*C] in the views' units, one a view, or None."""
        return outputs.get("reconstruction")


class Step(nn.Module):
    """Model and criterion as one module, so that a distributed wrapper sees every parameter every step."""

    def __init__(self, model: Model, criterion: Criterion):
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, batch: Batch, progress: Progress) -> tuple[dict[str, list[Tensor]], Loss]:
        outputs = self.model(batch)
        return outputs, self.criterion(outputs, batch, progress)


def detached(outputs: dict[str, Any]) -> dict[str, Any]:
    """The same outputs without their graph, for hooks."""
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, outputs)
