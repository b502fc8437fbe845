"""Parts that put a run to the test; a plugin, as a user would write one. `EVENTS`, `SIGNALS` and `TROUBLE` are the
test's hands inside the run: no part of its configuration, so that a resumed run may do without them.
"""

import os
import signal
import time
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ssl_ib import Criterion, Loss, Model, RunInfo, distributed, register_criterion, register_model
from ssl_ib.config.hints import Count, PositiveInt

#: What the criterion `recorded` was asked, in order: (hook, step, epoch), and its `amount` then.
EVENTS: list[tuple[str, int, int, float]] = []
#: Signals that `recorded` sends its own process, by the number of steps that are done then.
SIGNALS: dict[int, signal.Signals] = {}
#: Seconds by which every step of these two is slowed down, so that a test can meet it half way.
PAUSE = float(os.environ.get("SSL_IB_TEST_PAUSE", 0))


@register_criterion("plain_mean")
class PlainMean(Criterion):
    """Distance of two projections: a plain mean over images, whatever the batch they come in."""

    requires = frozenset({"projection"})

    def forward(self, outputs, batch, progress):
        first, second = outputs["projection"]
        return Loss.weighted(distance=((first - second - 1).square().mean(), 1.0))


@register_criterion("queued")
class Queued(Criterion):
    """Attracts the views and repels a queue of past projections; draws noise of its own in forward and in a hook."""

    requires = frozenset({"projection"})

    def __init__(self, size: PositiveInt = 192, dim: PositiveInt = 16):
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.randn(size, dim)))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs, batch, progress):
        first, second = (F.normalize(F.dropout(z, 0.1, self.training)) for z in outputs["projection"])
        logits = torch.cat([(first * second).sum(1, keepdim=True), first @ self.queue.T], dim=1) * 5 * self.scale
        return Loss.weighted(queue=(-logits.log_softmax(1)[:, 0].mean(), 1.0))

    def after_forward(self, outputs, batch, terms, ctx):
        rows = F.normalize(outputs["projection"][1])
        places = (self.written + torch.arange(len(rows))) % len(self.queue)
        self.queue[places] = rows
        self.written += len(rows)

    def on_epoch_start(self, ctx):
        self.queue += 0.01 * torch.randn_like(self.queue)

    def on_epoch_end(self, ctx):
        self.queue.copy_(self.queue[torch.randperm(len(self.queue))])

    def after_step(self, ctx):
        time.sleep(PAUSE)


@register_criterion("recorded")
class Recorded(Criterion):
    """Another criterion, with a watched number `amount` and a record of every hook."""

    def __init__(self, inner: Criterion, amount: float = 1.0):
        super().__init__()
        self.inner, self.amount = inner, amount
        self.requires = inner.requires

    def forward(self, outputs, batch, progress):
        loss = self.inner(outputs, batch, progress)
        if self.training:
            self._note("forward", progress)
        return Loss(loss.total, loss.terms | {"amount": torch.tensor(self.amount)}, loss.weights)

    def _note(self, what, progress):
        EVENTS.append((what, progress.step, progress.epoch, self.amount))

    def on_epoch_start(self, ctx):
        self._note("on_epoch_start", ctx.progress)

    def on_epoch_end(self, ctx):
        self._note("on_epoch_end", ctx.progress)

    def after_forward(self, outputs, batch, terms, ctx):
        assert not any(t.requires_grad for t in (*outputs["projection"], *terms.values()))
        self._note("after_forward", ctx.progress)

    def before_step(self, ctx):
        self._note("before_step", ctx.progress)

    def after_step(self, ctx):
        self._note("after_step", ctx.progress)
        time.sleep(PAUSE)
        if ctx.progress.step in SIGNALS:
            os.kill(os.getpid(), SIGNALS.pop(ctx.progress.step))


@register_criterion("broken")
class Broken(Criterion):
    """Another criterion, that breaks at step `at`: its loss, its gradient alone, or a running statistic as well.

    rank: the only process in which it does. Default: all.
    """

    def __init__(
        self,
        inner: Criterion,
        at: Count = 3,
        what: Literal["loss", "gradient", "statistic"] = "loss",
        rank: Count | None = None,
    ):
        super().__init__()
        self.inner, self.at, self.what, self.rank = inner, at, what, rank
        self.requires = inner.requires
        self.norm = nn.BatchNorm1d(16, affine=False)

    def forward(self, outputs, batch, progress):
        loss = self.inner(outputs, batch, progress)
        broken = progress.step == self.at and self.rank in (None, distributed.rank())
        z = outputs["projection"][0]
        spread = self.norm(z * float("nan") if broken and self.what == "statistic" else z).square().mean()
        if broken and self.what == "gradient":
            # Finite, but with an infinite slope.
            loss.terms["root"] = (0 * z.sum()).abs().sqrt()
        elif broken and self.what == "loss":
            loss.terms["root"] = torch.tensor(float("nan"))
        else:
            loss.terms["root"] = 0 * spread
        return Loss(loss.total + loss.terms["root"], loss.terms, loss.weights)


@register_model("split_linear")
class SplitLinear(Model):
    """A layer on the mean pixel rows of each view; the plain view has the channels of all."""

    provides = frozenset({"projection"})

    def __init__(self, info: RunInfo):
        super().__init__()
        self.channels = [shape[0] for shape in info.view_shapes]
        self.layers = nn.ModuleList(nn.Linear(c * width, 8) for c, _, width in info.view_shapes)

    def forward(self, batch):
        return {"projection": [self._project(number, view) for number, view in enumerate(batch.views)]}

    def _project(self, number, view):
        return self.layers[number](view.mean(dim=2).flatten(1))

    def encode(self, images):
        views = images.split(self.channels, dim=1)
        return torch.cat([self._project(number, view) for number, view in enumerate(views)], dim=1)
