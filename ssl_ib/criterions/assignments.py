"""What a run shows of its assignments to prototypes, whichever criterion makes them.

Shapes: N rows, K prototypes, T points in time.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from .. import distributed
from ..part import Nats, Part
from ..types import Progress

_logger = logging.getLogger(__name__)
#: What the occupancy figure keeps: that many points in time, and bins of log2(share / equal share) from -8 to 8.
OCCUPANCY_EPOCHS, OCCUPANCY_BINS = 64, 16
#: A prototype is dead where it gets less than this share of an equal one.
DEAD = 0.1
#: Collapse: what an image's assignment tells of the image, as a share of log K, is less; of the prototypes (or of the
#: rows seen, where these are fewer) not as many are in use.
TOLD, FEW = 0.01, 1 / 32


class Assignments(Part):
    """How images are spread over K prototypes: the running mean, the collapse it shows, and its figure.

    A criterion calls `watch` in its forward, `update` after it, and `end_epoch` at the end of an epoch, before it makes
    new prototypes. `usage` [K] is the running mean assignment over all processes; it begins with the uniform one.
    """

    def __init__(self, num: int):
        super().__init__()
        self.num = num
        self.nats = {"kl_to_uniform": Nats("upper bound", "what a view tells of its prototype", math.log(num))}
        self.register_buffer("usage", torch.full((num,), 1 / num))
        self.register_buffer("seen", torch.tensor(0.0))
        self.register_buffer("entropy", torch.tensor(math.nan))
        self.register_buffer("rows", torch.tensor(0.0))
        self.register_buffer("occupancy", torch.full((OCCUPANCY_EPOCHS, OCCUPANCY_BINS), -1.0))
        self._latest: tuple[Tensor, Tensor, int] | None = None

    def watch(self, entropy: Tensor, marginal: Tensor) -> dict[str, Tensor]:
        """The terms to report of a batch, from its entropies [N] in nats and its mean assignment [K]:

        `assignment_entropy` and `kl_to_uniform`, means over images; `marginal_entropy`, that of the mean assignment,
        and `dead_prototypes`, the share that gets less than a tenth of an equal share in it. In training that is the
        running mean up to the step before, over all processes; in evaluation it is the batch's.
        """
        rows, entropy, marginal = len(entropy), entropy.detach().mean(), marginal.detach()
        self._latest = entropy, marginal, rows
        shares = self.shares() if self.training else marginal
        return {
            "assignment_entropy": entropy,
            "kl_to_uniform": math.log(self.num) - entropy,
            "marginal_entropy": torch.special.entr(shares).sum(),
            "dead_prototypes": (shares < DEAD / self.num).to(entropy.dtype).mean(),
        }

    @torch.no_grad()
    def update(self, momentum: float = 0.99) -> None:
        """Moves the running mean by the batch watched last."""
        *means, rows = self._latest
        entropy, marginal = (distributed.all_reduce_mean(x).to(self.usage.dtype) for x in means)
        self.usage.lerp_(marginal, 1 - momentum)
        self.seen.lerp_(torch.ones_like(self.seen), 1 - momentum)
        self.entropy.copy_(entropy)
        self.rows.add_(rows * distributed.world_size())

    def shares(self) -> Tensor:
        """The running mean assignment without the uniform one that it began with: [K]."""
        # Else an epoch of few steps would end before a collapse could show.
        started = (1 - self.seen) / self.num
        return torch.where(self.seen > 0, (self.usage - started) / self.seen, self.usage).clamp(min=0)

    def collapse(self) -> str | None:
        """Which collapse the running statistics show, or None."""
        if not float(self.rows):
            return None
        most, entropy = math.log(self.num), float(self.entropy)
        marginal = float(torch.special.entr(self.shares()).sum())
        # As many equally used ones have that entropy. Two of few prototypes are no collapse.
        used = math.exp(marginal)
        if used < max(FEW * min(self.num, float(self.rows)), 1.5):
            return f"collapse to {'one prototype' if used < 1.5 else 'few prototypes'}: {used:.1f} of {self.num} in use"
        # The mutual information of image and prototype.
        told = marginal - entropy
        if told < TOLD * most:
            kind = "the uniform assignment" if entropy > 0.9 * most else "one assignment for all images"
            told = max(told, 0.0)
            return f"collapse to {kind}: {entropy:.3f} of at most {most:.3f} nats, of which an image decides {told:.3f}"
        return None

    def end_epoch(self, name: str, progress: Progress) -> None:
        """Says, in the name of a criterion, where the assignment has collapsed, and keeps how it was spread."""
        slot = progress.epoch * OCCUPANCY_EPOCHS // max(progress.total_epochs, OCCUPANCY_EPOCHS)
        shares = (self.shares() * self.num).clamp(min=1e-30).log2().clamp(-7.99, 7.99)
        self.occupancy[slot] = shares.float().cpu().histc(OCCUPANCY_BINS, -8, 8).to(shares) / self.num
        collapse = self.collapse()
        if collapse is not None and distributed.is_main():
            _logger.warning("%s: %s", name, collapse)

    def reset(self) -> None:
        """Begins anew with other prototypes."""
        self.usage.fill_(1 / self.num)
        self.seen.zero_()
        self.rows.zero_()

    def draw(self, folder: Path) -> None:
        """How many prototypes had which share of the assignment, over the epochs: occupancy.png."""
        # Here, because a criterion that is not drawn needs no matplotlib.
        from ..record.figures import occupancy

        occupancy(self.occupancy[self.occupancy[:, 0] >= 0], 8.0, folder / "occupancy.png")
