"""What stands in for the runs of a sweep, where a test is about the sweep."""

import json
import sys
from pathlib import Path

import pytest

from ssl_ib.sweep import runner

CHILD = str(Path(__file__).with_name("child.py"))


def results(score: float, **more) -> str:
    return json.dumps(
        {
            "untrained": {"knn/top1": 0.25},
            "raw_pixels": {"knn/top1": 0.5},
            "trained": {"knn/top1": score, "health/rankme": 12.0, **more},
            "seconds": 30.0,
            "step": 44,
        }
    )


class Started:
    """The runs that were started, in order, and what those of a learning rate are to do (nothing: end at once)."""

    def __init__(self):
        self.runs: list[str] = []
        self.behaviour: dict[float, str] = {}

    def command(self, run, out, plugins):
        self.runs.append(str(run.folder))
        score = run.config.optim.lr * 100 + run.seed / 10
        behaviour = self.behaviour.get(run.config.optim.lr, "")
        return [sys.executable, "-S", CHILD, str(out / run.folder), run.config.yaml(), results(score), behaviour]


@pytest.fixture
def started(monkeypatch) -> Started:
    """A script stands in for the runs."""
    started = Started()
    monkeypatch.setattr(runner, "command", started.command)
    return started
