"""What features hold of labels, bounded by how well the labels are read off them: I(Z; Y) = H(Y) - H(Y|Z), in nats.

Whoever reads labels off features that it was not fitted to leaves open at least H(Y|Z), so each reader gives a lower
bound on the information, and the best reader the closest one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def entropy(labels: Tensor) -> float:
    """H(Y) of int64 labels [n] by their frequencies, in nats: no information about them is larger."""
    shares = labels.unique(return_counts=True)[1].double() / len(labels)
    return float(torch.special.entr(shares).sum())


def fano(accuracy: float, labels: Tensor, classes: int) -> tuple[float, float]:
    """A lower bound on I(Z; Y) from the accuracy of any reader, and its standard error, in nats.

    It is H(Y) - h(e) - e log(classes - 1), where e = 1 - accuracy is the reader's error on labels int64 [n] that it was
    not fitted to, and h the binary entropy (Fano's inequality; Cover and Thomas, "Elements of Information Theory",
    2006, theorem 2.10.1). Below 0 it says nothing. classes: at least 2.
    """
    right, wrong = accuracy, 1 - accuracy
    spread = float(torch.special.entr(torch.tensor([right, wrong], dtype=torch.float64)).sum())
    others = math.log(max(classes - 1, 1))
    # The bound's slope in the accuracy, times the error of that. At 0 and 1 the latter is 0.
    slope = math.log(right / wrong) + others if 0 < right < 1 else 0.0
    return entropy(labels) - spread - wrong * others, abs(slope) * math.sqrt(right * wrong / len(labels))


def cross_entropy_bound(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """A lower bound on I(Z; Y) from a reader's probabilities, and its standard error, in nats.

    It is H(Y) less the reader's cross-entropy: logits [n, C], labels int64 [n], of samples that it was not fitted to. A
    reader that is surer than it is right makes the bound low. Below 0 it says nothing.
    """
    losses = F.cross_entropy(logits.double(), labels, reduction="none")
    return entropy(labels) - losses.mean().item(), losses.std().item() / math.sqrt(len(losses))
