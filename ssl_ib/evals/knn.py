"""Weighted nearest neighbours: how well the frozen features sort the classes by themselves, with nothing trained.

Shapes: n training rows, m test rows, c test rows of a chunk, D feature dimensions, k neighbours, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import num_classes


@torch.no_grad()
def knn_top1(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 512,
) -> float:
    """Top-1 accuracy in [0, 1] of a kNN classifier weighted by similarity (Wu et al., CVPR 2018; DINO's protocol).

    A class scores the sum of exp(cosine / temperature) over those of the k nearest training rows that belong to it.
    Of equally near rows the first count, and of equal scores the smaller class, so the answer repeats exactly.

    train [n, D], test [m, D]: features of any scale, normalised here; train_labels [n], test_labels [m]: int64.
    k: at least 1; no more than n are used. chunk: test rows compared at a time, which bounds the memory to chunk x n.

    Returns nan where a feature is not finite. Raises UserError where a label is unknown.
    """
    classes = num_classes(train_labels, test_labels)
    if not (train.isfinite().all() and test.isfinite().all()):
        return float("nan")
    train = F.normalize(train.float(), dim=1)
    correct = 0
    for rows, labels in zip(test.split(chunk), test_labels.split(chunk), strict=True):
        # In float32 also where the caller encodes in less: bfloat16 would tie neighbours that are not.
        with torch.autocast(train.device.type, enabled=False):
            similarity = F.normalize(rows.float(), dim=1) @ train.T
        neighbours = _nearest(similarity, min(k, len(train)))
        # The softmax is the exponential over a factor common to the row, and does not overflow.
        weights = (similarity.gather(1, neighbours) / temperature).softmax(dim=1)
        # Not scatter_add, whose order of summation on a GPU is left to chance.
        scores = (weights[:, :, None] * F.one_hot(train_labels[neighbours], classes)).sum(dim=1)
        correct += int((scores.argmax(dim=1) == labels).sum())
    return correct / len(test)


def _nearest(similarity: Tensor, k: int) -> Tensor:
    """The k most similar columns of each row, in ascending order: similarity [c, n] -> int64 [c, k].

    Among columns tied for the last place the first win; `topk` alone would leave that to the backend.
    """
    last = similarity.topk(k, dim=1).values[:, -1:]
    above, tied = similarity > last, similarity == last
    room = k - above.sum(dim=1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= room))
    return chosen.nonzero()[:, 1].view(-1, k)
