"""Weighted nearest neighbours: how well the frozen features sort the classes by themselves, with nothing trained.

Shapes: n training rows, m test rows, c test rows of a chunk, D feature dimensions, k neighbours, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import distributed
from .features import num_classes

#: Columns of a block, which are `n // _BLOCK` apart.
_BLOCK = 16


@torch.no_grad()
def knn_top1(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 256,
) -> float:
    """Top-1 accuracy in [0, 1] of a kNN classifier weighted by similarity (Wu et al., CVPR 2018; DINO's protocol).

    A class scores the sum of exp(cosine / temperature) over those of the k nearest training rows that belong to it.
    Of equally near rows the first count, and of equal scores the smaller class, so the answer repeats exactly.

    train [n, D], test [m, D]: features of any scale, normalised here; train_labels [n], test_labels [m]: int64.
    k: at least 1; no more than n are used. chunk: test rows compared at a time, which bounds the memory to chunk x n.

    The processes of a group share the chunks, and all get the answer. All of them have to call it.

    Returns nan where a feature is not finite. Raises UserError where a label is unknown.
    """
    classes = num_classes(train_labels, test_labels)
    if not (train.isfinite().all() and test.isfinite().all()):
        return float("nan")
    named = knn_classes(train, train_labels, test, [k], classes, temperature, chunk)[0]
    return (named == test_labels.cpu()).double().mean().item()


@torch.no_grad()
def knn_classes(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    ks: Sequence[int],
    classes: int,
    temperature: float | None = 0.07,
    chunk: int = 256,
) -> Tensor:
    """The classes that `knn_top1` names, for several numbers of neighbours in one pass: int64 [len(ks), m], on the CPU.

    temperature: None gives every neighbour the same weight. Features have to be finite.
    """
    ks = [min(k, len(train)) for k in ks]
    nearest = _nearest_to(train, max(ks), min(chunk, len(test)))

    def named(part: Tensor) -> tuple[Tensor]:
        similarity, rows = nearest(part)
        votes = _votes(similarity, train_labels.to(rows.device)[rows], classes, temperature)
        found = {k: scores.argmax(dim=1) for k, scores in votes if k in ks}
        return (torch.stack([found[k] for k in ks], dim=1).cpu(),)

    return distributed.shared_rows(named, test.split(chunk))[0].T


@torch.no_grad()
def knn_scores(
    train: Tensor, train_labels: Tensor, test: Tensor, k: int, classes: int, temperature: float = 0.07, chunk: int = 256
) -> Tensor:
    """The scores of the classes of which `knn_classes` names the highest: float32 [m, classes], on the CPU."""
    nearest = _nearest_to(train, min(k, len(train)), min(chunk, len(test)))

    def scored(part: Tensor) -> tuple[Tensor]:
        similarity, rows = nearest(part)
        *_, (_, scores) = _votes(similarity, train_labels.to(rows.device)[rows], classes, temperature)
        return (scores.cpu(),)

    return distributed.shared_rows(scored, test.split(chunk))[0]


def _votes(similarity: Tensor, labels: Tensor, classes: int, temperature: float | None) -> Iterator[tuple[int, Tensor]]:
    """The scores [c, classes] after 1, 2, ... neighbours, in one tensor: similarity, labels [c, k], the nearest first.

    Neighbour by neighbour, so that the order of summation is always the same, on a GPU too.
    """
    weights = torch.ones_like(similarity)
    if temperature is not None:
        # A factor common to the row does not matter, and this one keeps the exponential from overflowing.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
    scores, here = similarity.new_zeros(len(labels), classes), torch.arange(len(labels), device=labels.device)
    for j in range(labels.shape[1]):
        scores[here, labels[:, j]] += weights[:, j]
        yield j + 1, scores


@torch.no_grad()
def neighbours(train: Tensor, test: Tensor, k: int, chunk: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """The k nearest rows of `train` to each row of `test` by cosine, exactly, `chunk` test rows at a time.

    Yields the cosines, float32 [c, k], descending, and the rows' numbers, int64 [c, k]; of equally near rows the first
    come first. train [n, D], test [m, D]: features of any scale; k at most n.
    """
    yield from map(_nearest_to(train, k, min(chunk, len(test))), test.split(chunk))


def _nearest_to(train: Tensor, k: int, chunk: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What finds `neighbours` for at most `chunk` test rows at a time."""
    # In float32 also where the caller encodes in less: bfloat16 would tie neighbours that are not.
    full_precision = torch.autocast(train.device.type, enabled=False)
    with full_precision:
        columns = F.normalize(train.float(), dim=1).T
    # One piece of memory for all chunks: to be given a new one for each takes longer than half of the product.
    memory = columns.new_empty(chunk, len(train))

    def nearest(rows: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision:
            return _nearest(torch.mm(F.normalize(rows.float(), dim=1), columns, out=memory[: len(rows)]), k)

    return nearest


def _nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest numbers of each row, descending, and their columns; of equal ones the first columns come first.

    `topk` alone would leave ties to the backend. One number more than asked for shows where there is one at the end.
    """
    n = similarity.shape[1]
    values, columns = _largest(similarity, min(k + 1, n))
    if n > k:
        tied = (values[:, k] == values[:, k - 1]).nonzero()[:, 0]
        columns = columns[:, :k].contiguous()
        if len(tied):
            columns[tied] = _first_of_tied(similarity[tied], values[tied, -1:], k)
    # Ascending columns first: the sort by value, which is stable, leaves those of equal values so.
    columns = columns.sort(dim=1).values
    values, order = similarity.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _largest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`similarity.topk(k)`, several times as fast where k is small: as k blocks of columns, those with the largest
    maxima, hold the k largest numbers, only these are searched."""
    n = similarity.shape[1]
    blocks = n // _BLOCK
    if blocks < 4 * k:
        return similarity.topk(k, dim=1)
    whole = similarity[:, : _BLOCK * blocks].unflatten(1, (_BLOCK, blocks))
    chosen = whole.amax(dim=1).topk(k, dim=1).indices
    columns = chosen[:, None] + blocks * torch.arange(_BLOCK, device=similarity.device)[:, None]
    rest = torch.arange(_BLOCK * blocks, n, device=similarity.device).expand(len(similarity), -1)
    columns = torch.cat([columns.flatten(1), rest], dim=1)
    values, places = similarity.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, places)


def _first_of_tied(similarity: Tensor, last: Tensor, k: int) -> Tensor:
    """The columns of the k largest numbers of each row, ascending; `last` [c, 1] is the smallest of them.

    Among the columns tied with it the first are taken: similarity [c, n] -> int64 [c, k].
    """
    above, tied = similarity > last, similarity == last
    room = k - above.sum(dim=1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= room))
    return chosen.nonzero()[:, 1].view(-1, k)
