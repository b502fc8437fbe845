"""A part that hangs in one process of a run; a plugin, as a user would write one."""

import os
import signal
import time
from typing import Literal

from ssl_ib import Criterion, register_criterion
from ssl_ib.config.hints import Count


@register_criterion("hanging")
class Hanging(Criterion):
    """Another criterion, which in one process never answers at step `at`, or stops the process."""

    def __init__(self, inner: Criterion, rank: Count = 1, at: Count = 5, how: Literal["spin", "stop"] = "spin"):
        super().__init__()
        self.inner, self.rank, self.at, self.how = inner, rank, at, how
        self.requires = inner.requires

    def forward(self, outputs, batch, progress):
        if self.training and progress.step == self.at and os.environ.get("RANK") == str(self.rank):
            time.sleep(2.0)  # Longer than a beat.
            while self.how == "spin":
                pass
            os.kill(os.getpid(), signal.SIGSTOP)
        return self.inner(outputs, batch, progress)
