"""Training for an evaluation: it repeats by the seed, and goes on after a kill where its last finished epoch ended.

What an epoch, a step or an image draws is a function of the seed and of its number alone.
"""

from __future__ import annotations

import random as python_random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import random
from ..errors import UserError
from . import unfinished
from .progress import track
from .protocol import Job

#: Keeps what a step draws apart from the order of the images.
_STEPS = -2
#: Where epochs are short, the state is written at the end of one in so many seconds.
SAVE_EVERY = 30.0


class Order:
    """The batches of an epoch, as pairs of the epoch and the row of an image; `epoch` is set before each of them.

    count: images; batch: of a step; steps: of an epoch.
    """

    def __init__(self, count: int, batch: int, steps: int, seed: int):
        self.count, self.batch, self.steps, self.seed, self.epoch = count, batch, steps, seed, 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = random.shuffled(self.seed, self.epoch, self.count).tolist()
        for start in range(0, self.steps * self.batch, self.batch):
            yield [(self.epoch, row) for row in order[start : start + self.batch]]


def train(
    job: Job,
    model: nn.Module,
    loader: DataLoader,
    loss_of: Callable[[Any], Tensor],
    optimiser: torch.optim.Optimizer,
    rate: Callable[[int], float],
    steps: int,
    seed: int,
    saved: Path | None,
    what: str,
    clip: float | None = None,
) -> None:
    """Trains a model for a number of steps, in place; in a dry run for one.

    loader:  its batch sampler is an `Order`.
    loss_of: the loss of what the loader gives.
    rate:    of a step; that of a group of the optimiser is this times its `lr_scale`.
    saved:   where the state is kept at the ends of epochs, and from where training goes on; None: nowhere.
    what:    names the training. clip: of the gradient's norm.

    Raises UserError where the loss is not finite.
    """
    order = loader.batch_sampler
    state, first = unfinished.load(saved), 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["epoch"]
    steps, written = 1 if job.dry else steps, time.perf_counter()

    def batches() -> Iterator[tuple[int, Any]]:
        step = first * len(order)
        for epoch in range(first, -(-steps // len(order))):
            order.epoch = epoch
            for batch in loader:
                yield step, batch
                step += 1
                if step == steps:
                    return

    with generators():
        for step, batch in track(batches(), steps, f"{what}, steps", first * len(order)):
            seed_step(seed, step)
            for group in optimiser.param_groups:
                group["lr"] = rate(step) * group.get("lr_scale", 1.0)
            model.train()
            optimiser.zero_grad(set_to_none=True)
            loss = loss_of(batch)
            if not bool(loss.isfinite()):
                raise UserError(f"the loss of the {what} is no longer finite at step {step}: lower lr")
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimiser.step()
            done, left = divmod(step + 1, len(order))
            if not left and step + 1 < steps and time.perf_counter() - written >= SAVE_EVERY:
                unfinished.save(
                    saved, {"epoch": done, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
                )
                written = time.perf_counter()
    model.eval()


def seed_step(seed: int, step: int) -> None:
    """What a step draws of the global generators is its own."""
    seed_all(int(random.fold(random.fold(torch.tensor(seed), _STEPS), step)) % 2**32)


def seed_all(seed: int) -> None:
    """Of Python, numpy and torch: timm draws from all three generators."""
    python_random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def generators() -> Iterator[None]:
    """Puts the generators back as they were."""
    before = python_random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        try:
            yield
        finally:
            python_random.setstate(before[0])
            np.random.set_state(before[1])
