"""How the tests run the whole program: in this process where that is enough, else as a user starts it."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch

from ssl_ib.cli.train import main
from ssl_ib.config.config import resolve
from ssl_ib.config.plugins import load_plugins
from ssl_ib.record import backbone
from ssl_ib.run import build_run
from ssl_ib.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
#: A recipe of 2 epochs of 11 steps, in a second or two.
TINY = str(ROOT / "tests" / "recipes" / "tiny.yaml")
PARTS = str(ROOT / "tests" / "recipes" / "parts.py")
STEPS = 11
#: What draws the figures of a run.
FIGURES = [f"figures.{name}" for name in ("loss_curves", "knn_curve", "reconstructions", "attention")]
FIGURES += ["information.draw", "ledger.draw"]


def parts():
    """The plugin of test parts, as a run loads it."""
    load_plugins([PARTS])
    return sys.modules["ssl_ib_plugin_parts"]


def train(out: Path, *arguments: str, draw: bool = False, recipe: str = TINY) -> int:
    """Runs the command line in this process; returns its exit code. Without `draw`, no figures: half of its time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in () if draw else FIGURES:
            patch.setattr(f"ssl_ib.record.{name}", lambda *given, **more: None)
        return main([recipe, "--plugin", PARTS, "--out", str(out), *arguments])


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def command(out: Path, *arguments: str) -> list[str]:
    """The command line a user would type."""
    return [sys.executable, "-m", "ssl_ib.cli.train", TINY, "--plugin", PARTS, "--out", str(out), *arguments]


def start(out: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    """Runs the command line in a process of its own."""
    return subprocess.Popen(
        command(out, *arguments),
        cwd=out.parent,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(out: Path, process: subprocess.Popen, step: int) -> None:
    """Waits until a run in another process has recorded the step."""
    metrics = out / "metrics.jsonl"
    for _ in range(30000):  # A busy machine takes its time.
        assert process.poll() is None, process.communicate()
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.01)
    raise AssertionError("the run does not move")


def without_files(recipe: str, size: int | None = None) -> list[str]:
    """The overrides with which a shipped recipe needs no file: neither images nor what another run has left.

    size: side of the digits that take the images' place, in pixels, where the recipe does not say.
    """
    if recipe.startswith("moving_mnist"):
        return []  # Its views need their own source, which makes images of what scikit-learn has.
    size = size or (64 if recipe == "views_patches" else 16)
    alone = ["views.run=null", "views.space=ydbdr"] if recipe == "learned_split_cifar10" else []
    return [f"source={{name: digits, size: {size}}}", *alone]


def trainer(*overrides: str, out: Path | None = None) -> Trainer:
    """The trainer of the tiny recipe, before its first step."""
    plugins = load_plugins([PARTS])
    return Trainer(build_run(resolve(TINY, overrides, plugins)), out)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float]]:
    """(step, loss) of every training step, in the order of the record."""
    return [(row["step"], row["loss"]) for row in rows(out) if "loss" in row]


def checkpoint(out: Path, name: str = "last.pt") -> dict:
    return torch.load(out / "checkpoints" / name, weights_only=True)


def assert_same_run(a: Path, b: Path) -> None:
    """Both runs have the same losses at every step, each of them once, and the same final state, bit for bit."""
    assert [step for step, _ in losses(a)] == list(range(1, len(losses(a)) + 1))
    assert losses(a) == losses(b)
    first, second = checkpoint(a), checkpoint(b)
    assert first["step"] == second["step"] and first["results"] == second["results"]
    assert_same_state(first, second)
    assert evaluations(a) == evaluations(b)


def evaluations(out: Path) -> list[dict]:
    return [row for row in rows(out) if "health/rankme" in row]


def assert_same_state(first: dict, second: dict) -> None:
    assert first["parts"].keys() == second["parts"].keys()
    for key, value in first["parts"].items():
        assert torch.equal(value, second["parts"][key]), key
    for number, state in first["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, second["optimizer"]["state"][number][key]), (number, key)


@cache
def finished(*overrides: str) -> Path:
    """The folder of a run that nothing disturbed; one a set of overrides for all workers, for reading only."""
    out = Path(os.environ["SSL_IB_FINISHED_RUNS"]) / hashlib.sha256(repr(overrides).encode()).hexdigest()[:16]
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "results.json").is_file():
            assert train(out, *overrides) == 0
    return out


def save_encoder(folder: Path, name: str, **arguments) -> str:
    """A new timm model saved as a finished run leaves its encoder, for images of 32 pixels; returns the folder."""
    torch.manual_seed(0)
    arguments = {"num_classes": 0, **arguments}
    how = {"size": 32, "crop_ratio": 1.0, "interpolation": "bilinear", "max_side": None}
    statistics = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    description = backbone.describe(name, arguments, statistics, how)
    backbone.save_backbone(backbone.create(name, arguments), description, folder)
    return str(folder)
