"""Whether parts keep to the contracts of part.py: checked once, before a run starts, and said by class and place.

Shapes: B images, V views, N masks an image, K kept patches, L patches.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .config.registry import REGISTRIES, place
from .errors import UserError
from .flops import FlopCount
from .part import Criterion, Model, Part, Task, detached, parts
from .types import Batch, Loss, Masks, Progress, Sample

KINDS = {"task": Task, "model": Model, "criterion": Criterion}


def check_part(kind: str, name: str, part: Any) -> None:
    """Raises UserError where what a registered name builds is no part of its kind, or where a method of it or of a part
    inside it, hooks among them, cannot be called as part.py says."""
    base = KINDS.get(kind)
    if base is None:
        return
    if not isinstance(part, base):
        where = place(REGISTRIES[kind][name])
        raise UserError(f"{kind} {name!r} ({where}) is a {_type(part)}, expected a subclass of ssl_ib.{base.__name__}")
    problems = []
    for inner in parts(part):
        for base in (Part, *KINDS.values()):
            if isinstance(inner, base):
                wanted = {name: method for name, method in vars(base).items() if inspect.isfunction(method)}
                problems += [_misfit(inner, name, method) for name, method in wanted.items()]
    if any(problems):
        raise UserError("; ".join(filter(None, problems)))


def _misfit(part: Part, name: str, wanted: Any) -> str | None:
    expected, found = list(inspect.signature(wanted).parameters)[1:], inspect.signature(getattr(part, name))
    try:
        found.bind(*expected)
    except TypeError:
        return f"{_name(part, name)}: expected {name}({', '.join(expected)}), got {name}{found}"
    return None


def checked_masks(masker: Any, keys: Tensor, grid: tuple[int, int]) -> Masks:
    """What a masker answers. Raises UserError where that is no `Masks` of these images and this grid."""
    where = f"masker {_type(masker)} ({place(masker if inspect.isfunction(masker) else type(masker))})"
    try:
        inspect.signature(masker).bind(keys, grid)
    except TypeError:
        raise UserError(f"{where}: expected a call with (keys, grid), which it does not take") from None
    masks = masker(keys, grid)
    if not isinstance(masks, Masks):
        raise UserError(f"{where} returned a {_type(masks)}, expected ssl_ib.Masks, such as Masks.from_keep(keep, L)")
    keep, mask = masks.keep, masks.mask
    if keep.ndim != 3 or tuple(mask.shape) != (len(keys), keep.shape[1], grid[0] * grid[1]) or len(keep) != len(keys):
        raise UserError(
            f"{where}: expected keep [B, N, K] and mask [B, N, L] with B = {len(keys)} and L = {grid[0] * grid[1]}, "
            f"got {list(keep.shape)} and {list(mask.shape)}"
        )
    return masks


def check_step(
    task: Task,
    model: Model,
    criterion: Criterion,
    sample: Sample,
    plain: Tensor,
    progress: Progress,
    num_global: int | None,
) -> tuple[Loss, float]:
    """Asks for one loss and one representation. Raises UserError where a part, or one inside it, answers what it should
    not. Returns the loss without its graph, and the floating-point operations of model and loss, backward too.

    plain:      a few images as they are evaluated (`Views.center`).
    num_global: how many views a teacher sees, whose outputs may be of these alone; None for all.
    """
    with torch.no_grad():
        features = model.encode(plain)
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(plain):
        raise UserError(
            f"{_name(model, 'encode')}: expected one vector an image, [{len(plain)}, D], got {_shape(features)}"
        )
    batch = task.prepare(sample, progress)
    _check_batch(task, batch, len(sample))
    num_views = len(batch.views)
    lengths = sorted({num_views, num_global or num_views})
    handles = []
    for part in parts(model, criterion):
        if isinstance(part, Model):
            handles.append(part.register_forward_hook(lambda part, _, answer: _check_outputs(part, answer, lengths)))
        elif isinstance(part, Criterion):
            handles.append(part.register_forward_hook(lambda part, _, answer: _check_loss(part, answer)))
    try:
        with FlopCount() as flops:
            loss = criterion(model(batch), batch, progress)
        return Loss(loss.total.detach(), detached(loss.terms), detached(loss.weights)), flops.total
    finally:
        for handle in handles:
            handle.remove()


def _check_batch(task: Task, batch: Any, size: int) -> None:
    where = _name(task, "prepare")
    if not isinstance(batch, Batch):
        raise UserError(f"{where} returned a {_type(batch)}, expected ssl_ib.Batch")
    # A task may add rows of its own choice, such as labelled images.
    rows = len(batch.index) if isinstance(batch.index, Tensor) and batch.index.ndim else 0
    if not _are_tensors(batch.views) or any(not view.ndim or len(view) != rows for view in batch.views):
        raise UserError(f"{where}: expected views to be a list of tensors of {rows} images, got {_shape(batch.views)}")
    if not rows or rows % size:
        raise UserError(f"{where}: expected a batch of {size} images, or a multiple of that, got {rows}")
    masks = batch.masks
    if (
        not isinstance(masks, list | tuple)
        or len(masks) != len(batch.views)
        or not all(m is None or isinstance(m, Masks) for m in masks)
    ):
        raise UserError(
            f"{where}: expected masks to be a list with one ssl_ib.Masks or None a view ({len(batch.views)}), "
            f"got {_shape(masks)}"
        )


def _check_outputs(model: Model, outputs: Any, lengths: list[int]) -> None:
    where = _name(model, "forward")
    if not isinstance(outputs, dict):
        raise UserError(f"{where} returned a {_type(outputs)}, expected a dict of lists, one tensor a view")
    missing = sorted(model.wanted - outputs.keys())
    if missing:
        raise UserError(
            f"{where} left out {', '.join(missing)}, which the criterion reads; it returned {list(outputs)}"
        )
    for name in sorted(model.wanted):
        output = outputs[name]
        expected = [model.counts[name]] if name in model.counts else lengths
        listed = isinstance(output, list | tuple) and len(output) in expected
        if not listed or not _are_tensors([x for view, x in enumerate(output) if model.reads(name, view)]):
            number = " or ".join(map(str, expected))
            raise UserError(
                f"{where}: expected output {name!r} to be a list of {number} tensors, one a view, got {_shape(output)}"
            )


def _check_loss(criterion: Criterion, loss: Any) -> None:
    where = _name(criterion, "forward")
    if not isinstance(loss, Loss):
        raise UserError(
            f"{where} returned a {_type(loss)}, expected ssl_ib.Loss, such as Loss.weighted(name=(value, weight))"
        )
    for name, value in {"total": loss.total, **loss.terms}.items():
        if not isinstance(value, Tensor) or value.ndim:
            raise UserError(
                f"{where}: expected the loss's {name} to be a tensor without dimensions, got {_shape(value)}"
            )
    if unknown := loss.weights.keys() - loss.terms.keys():
        raise UserError(f"{where}: the loss has weights of terms that it lacks: {', '.join(sorted(unknown))}")
    ceilings = {told.ceiling for told in criterion.nats.values() if isinstance(told.ceiling, str)}
    if unknown := (criterion.nats.keys() | ceilings) - loss.terms.keys():
        raise UserError(f"{where}: `nats` is of terms that the loss lacks: {', '.join(sorted(unknown))}")


def _name(part: Part, method: str) -> str:
    """A part's kind and class, one of its methods, and where that is written."""
    kind = next((kind for kind, base in KINDS.items() if isinstance(part, base)), "part")
    return f"{kind} {type(part).__name__}: {method} ({place(getattr(type(part), method))})"


def _are_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(x, Tensor) for x in value)


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"{len(value)} of them: [{', '.join(map(_shape, value))}]" if value else "an empty list"
    return repr(value) if value is None or isinstance(value, int | float | str) else f"a {_type(value)}"


def _type(value: Any) -> str:
    return type(value).__name__
