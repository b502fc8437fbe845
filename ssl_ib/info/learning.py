"""Estimators that learn: a critic is trained on one part of the pairs, stopped by a second, and read on a third.

A critic read on the pairs it was trained on says what it has memorised. Both numbers are reported, and the one that
counts is read on pairs that neither training nor stopping has seen.

Shapes: n pairs, dx and dy dimensions.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from . import bounds
from .club import club, club_sampled, log_likelihood
from .critics import Conditional, Joint, Separable
from .reading import Kind, Reading, checked, jackknife, remarks, standardised

#: Pairs below which there is nothing to be learnt: a fifth of them is what is read.
LEAST = 50
#: Pairs that are compared with each other in a reading; with more, it is a mean over blocks.
BLOCK = 2048

NOTHING_LEARNT = "nothing that training found held on the stopping part, so that this is an untrained network's reading"
CRITICS = {"separable": Separable, "joint": Joint}
Critic = Literal["separable", "joint"]


@dataclass(frozen=True)
class Training:
    """How a critic is trained, with AdamW.

    every:    steps from one look at the stopping part to the next.
    patience: looks without improvement after which training ends; the best state is kept, the untrained one included.
    shares:   of the pairs, to train on and to stop by; the others are read.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    every: int = 10
    patience: int = 12
    shares: tuple[float, float] = (0.6, 0.2)


class Learner(ABC):
    """What is trained for an estimator, and how it is read. All x and y are standardised, [n, dx] and [n, dy]."""

    kind: ClassVar[Kind]
    #: What is said with each reading.
    remark: ClassVar[str] = ""
    network: nn.Module

    @abstractmethod
    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """What training makes greater, on a batch."""

    @abstractmethod
    def quality(self, x: Tensor, y: Tensor) -> Tensor:
        """By what training is stopped, the greater the better."""

    @abstractmethod
    def outputs(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """What a reading is computed from."""

    @abstractmethod
    def nats(self, outputs: tuple[Tensor, ...], kept: Tensor) -> Tensor:
        """The reading from the pairs with the numbers `kept`."""

    def ceiling(self, n: int) -> float:
        """The largest reading of n pairs, in nats."""
        return math.inf


class ByScores(Learner):
    """A critic, and a bound of its scores."""

    #: The bound that is read, and what is trained and stopped by where that is another.
    bound: ClassVar[Callable[[Tensor], Tensor]]

    def __init__(self, dx: int, dy: int, critic: Critic):
        self.network = CRITICS[critic](dx, dy)

    def objective(self, x, y):
        return type(self).bound(self.network(x, y))

    def quality(self, x, y):
        return type(self).bound(self.network(x, y))

    def outputs(self, x, y):
        return (self.network(x, y),)

    def nats(self, outputs, kept):
        return type(self).bound(outputs[0][kept][:, kept])


class NCE(ByScores):
    kind = "lower bound"
    bound = staticmethod(bounds.i_nce)

    def ceiling(self, n):
        return math.log(n)


class NWJ(ByScores):
    kind = "lower bound"

    @staticmethod
    def bound(scores: Tensor) -> Tensor:
        # Critics start at 0 and look for log p(x, y) / p(x) p(y); I_NWJ is tight at 1 more.
        return bounds.nwj(scores + 1)


class MINE(ByScores):
    kind = "estimate"
    bound = staticmethod(bounds.mine)

    def __init__(self, dx, dy, critic):
        super().__init__(dx, dy, critic)
        self.trained_by = bounds.Mine()

    def objective(self, x, y):
        return self.trained_by(self.network(x, y))


class SMILE(ByScores):
    kind = "estimate"
    bound = staticmethod(bounds.smile)

    def objective(self, x, y):
        return bounds.jensen_shannon(self.network(x, y))

    # The estimate is no bound: a greater one is not a better one.
    quality = objective


class CLUB(Learner):
    kind = "upper bound"
    remark = "an upper bound only as far as the fitted q(y|x) is right"

    def __init__(self, dx: int, dy: int, critic: Critic):
        self.network = Conditional(dx, dy)

    def objective(self, x, y):
        return log_likelihood(y, *self.network(x)).sum(dim=1).mean()

    quality = objective

    def outputs(self, x, y):
        return (y, *self.network(x))

    def nats(self, outputs, kept):
        z, mean, variance = (part[kept][:, None] for part in outputs)
        return club(z, mean, variance, negatives="batch", gather=False).sum(dim=-1).mean()


class SampledCLUB(CLUB):
    def nats(self, outputs, kept):
        z, mean, variance = (part[kept] for part in outputs)
        other = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0)).to(z.device)
        return club_sampled(z, mean, variance, other).sum(dim=1).mean()


LEARNERS: dict[str, type[Learner]] = {
    "i_nce": NCE,
    "nwj": NWJ,
    "mine": MINE,
    "smile": SMILE,
    "club": CLUB,
    "club_sampled": SampledCLUB,
}


def learn(
    name: str, x: Tensor, y: Tensor, seed: int = 0, critic: Critic = "separable", training: Training | None = None
) -> Reading:
    """Trains what the estimator `name` needs on a part of the pairs and reads it on another.

    name:   one of `LEARNERS`. x [n, dx], y [n, dy]: pairs in random order or not, they are shuffled.
    critic: "separable" or "joint", for estimators that score pairs; CLUB fits a conditional Gaussian.

    All depends on the seed; torch's global generator stays as it is. Raises UserError for fewer than 50 pairs, values
    that are not finite, and a side that never varies.
    """
    training = training or Training()
    x, y = (side.float() for side in checked(x, y, LEAST))
    generator = torch.Generator().manual_seed(seed)
    train, stop, read = _parts(len(x), training.shares, generator)
    # By the training part alone: what is read must not have been seen.
    x, y = (_drawn_in(standardised(side, side[train])) for side in (x, y))
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        learner = LEARNERS[name](x.shape[1], y.shape[1], critic)
        learner.network.to(x.device)
        learnt = _train(learner, x[train], y[train], x[stop], y[stop], training, generator)
    block = min(len(read), BLOCK)
    nats, spread, n = _read(learner, x[read], y[read], block)
    trained, _, _ = _read(learner, x[train], y[train], block, spread=False)
    ceiling = learner.ceiling(block)
    said = remarks(nats, ceiling, block, learner.remark, "" if learnt else NOTHING_LEARNT)
    return Reading(name, learner.kind, nats, trained, ceiling, n, spread, remark=said)


def _drawn_in(side: Tensor) -> Tensor:
    """Values beyond three deviations, drawn in logarithmically: a single outlier must not set a score.

    No two values become one, so that the mutual information stays what it is.
    """
    beyond = (side.abs() - 3).clamp(min=0)
    return side.clamp(-3, 3) + side.sign() * beyond.log1p()


def _parts(n: int, shares: tuple[float, float], generator: torch.Generator) -> list[Tensor]:
    sizes = [round(share * n) for share in shares]
    return list(torch.randperm(n, generator=generator).split([*sizes, n - sum(sizes)]))


def _train(learner: Learner, x, y, x_stop, y_stop, training: Training, generator: torch.Generator) -> bool:
    """Trains the learner's network and leaves it in the state that did best on the stopping part.

    Returns whether that is any other than the one it began in.
    """
    network = learner.network
    optimiser = torch.optim.AdamW(network.parameters(), training.learning_rate, weight_decay=training.weight_decay)
    batch = min(network.batch, len(x))
    best, state, since = _quality(learner, x_stop, y_stop), copy.deepcopy(network.state_dict()), 0
    learnt, order = False, iter(())
    for step in range(1, training.steps + 1):
        index = next(order, None)
        if index is None:
            whole = len(x) // batch * batch
            order = iter(torch.randperm(len(x), generator=generator)[:whole].split(batch))
            index = next(order)
        network.train()
        loss = -learner.objective(x[index], y[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % training.every:
            continue
        quality, since = _quality(learner, x_stop, y_stop), since + 1
        if quality > best:
            best, state, since, learnt = quality, copy.deepcopy(network.state_dict()), 0, True
        if since >= training.patience:
            break
    network.load_state_dict(state)
    network.eval()
    return learnt


@torch.no_grad()
def _quality(learner: Learner, x: Tensor, y: Tensor) -> float:
    """On the stopping part, in blocks of as many pairs as the network compares with each other at a time."""
    network = learner.network.eval()
    size = min(network.block, len(x))
    values = [learner.quality(x[b : b + size], y[b : b + size]) for b in range(0, len(x) - size + 1, size)]
    return sum(value.item() for value in values) / len(values)


@torch.no_grad()
def _read(learner: Learner, x: Tensor, y: Tensor, block: int, spread: bool = True) -> tuple[float, float, int]:
    """The mean over whole blocks of so many pairs, its standard error, and how many pairs these are."""
    count = len(x) // block
    outputs = [learner.outputs(x[b * block : (b + 1) * block], y[b * block : (b + 1) * block]) for b in range(count)]

    def read(kept: Tensor) -> float:
        return sum(learner.nats(each, kept.to(x.device)).item() for each in outputs) / count

    return read(torch.arange(block)), jackknife(read, block) if spread else math.nan, count * block
