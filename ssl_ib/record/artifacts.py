"""What a run leaves when it ends: figures, the backbone, and one line that says what came of it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__, distributed
from ..data.sources.base import stratified
from ..part import parts
from ..run import FIRST, Run
from ..types import Progress, Sample
from . import figures, information, ledger
from .attention import class_attention, has_class_attention
from .backbone import of_run, save_backbone, snippet
from .files import replace

#: Gives a context in which a run's parts are in evaluation mode.
Evaluating = Callable[[], AbstractContextManager[None]]

#: Images shown as original, masked and reconstructed.
SHOWN = 8


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and command of a run, for `environment.json`."""
    packages = {}
    for name in ("torch", "torchvision", "timm", "triton", "numpy", "scikit-learn", "lightly", "wandb"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "ssl_ib": __version__,
        "packages": packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "git": _checkout(),
        "command": sys.argv,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _checkout() -> dict[str, Any] | None:
    """The commit of the working directory, and whether tracked files differ from it; None where it is no checkout."""
    found = []
    for command in ("rev-parse HEAD", "status --porcelain --untracked-files=no"):
        # Without locks, because the runs of a sweep may all look at once.
        words = ["git", "--no-optional-locks", *command.split()]
        try:
            found.append(subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip())
        except (OSError, subprocess.CalledProcessError):
            return None
    return {"commit": found[0], "uncommitted_changes": bool(found[1])}


def write_environment(out: Path, device: torch.device) -> None:
    """Writes `environment.json`."""
    replace(out / "environment.json", json.dumps(environment(device), indent=2) + "\n")


def record_bad_images(out: Path, bad: set[str]) -> None:
    """Adds images that could not be read to `bad_images.txt`, and says so where there are new ones."""
    path = out / "bad_images.txt"
    # Names as they are on the disk, whatever the locale.
    how = {"encoding": "utf-8", "errors": "surrogateescape"}
    known = set(path.read_text(**how).splitlines()) if path.is_file() else set()
    bad = known | bad
    if bad != known:
        replace(path, "".join(f"{name}\n" for name in sorted(bad)).encode(**how))
        print(f"{len(bad)} images could not be read and are left out: {path}", flush=True)


def draw(out: Path, run: Run, rows: list[dict[str, Any]], results: dict[str, Any], evaluating: Evaluating) -> None:
    """Draws the figures.

    rows:       those of `metrics.jsonl`.
    results:    what `results.json` says.
    evaluating: gives a context in which the run's parts are in evaluation mode.
    """
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    figures.loss_curves(rows, folder / "loss_curves.png")
    references = {name: results.get(name, {}).get("knn/top1") for name in ("raw_pixels", *FIRST, "chance")}
    if any("knn/top1" in row for row in rows):
        figures.knn_curve(rows, folder / "knn_curve.png", **references, images=results.get("chance", {}).get("images"))
    information.draw(rows, run.criterion.nats, folder / "information.png")
    ledger.draw(rows, folder / "ledger.png")
    draw_views(run, evaluating, folder / "reconstructions.png")
    draw_attention(run, evaluating, folder / "attention.png")
    for part in parts(run.task, run.model, run.criterion):
        part.draw(folder)


def finish(out: Path, run: Run, results: dict[str, Any]) -> list[str]:
    """Saves the encoders and the results, and returns the closing lines; the last one is the comparison.

    results: what `results.json` says, which is written last.

    Of several processes the main one writes; all call it at once.
    """
    lines, exports = [], run.model.exports()
    for name, description in of_run(run).items():
        save_backbone(exports[name][0], description, out, name)
        which = "the encoder" if len(exports) == 1 else f"the encoder {name}"
        lines.append(f"{which}, with timm alone:\n" + snippet(out, name).rstrip())
    if distributed.is_main():
        write_results(out, results)
    return [*lines, *information.summary(results["trained"], run.criterion.nats), *summary(out, results)]


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Writes `results.json`, the last of a run's files, so that its presence says that the run is done.

    results: the evaluations by name (`untrained` or `initial`, `raw_pixels`, `trained`), `chance` (the accuracy of
    always naming the most frequent class, and `images`, the number of those scored), `seconds` and `step`. Numbers that
    are not finite become the strings that metrics.jsonl has.
    """
    plain = json.loads(json.dumps(results), parse_constant=str)
    replace(out / "results.json", json.dumps(plain, indent=2, allow_nan=False) + "\n")


def shown(labels: Tensor, count: int = SHOWN) -> Tensor:
    """The numbers of the images that the figures show, always the same: labels int64 [n] -> int64 [at most count].

    They are spread over the classes, and over the images of a class; without labels (-1) over the set.
    """
    if (labels >= 0).any():
        classes = labels[labels >= 0].unique()
        classes = classes[stratified(torch.zeros_like(classes), count)]
    else:
        classes = torch.tensor([-1])
    found = []
    for place, label in enumerate(classes):
        members = (labels == label).nonzero().flatten()
        share = count // len(classes) + (place < count % len(classes))
        found.append(members[stratified(labels[members], share)])
    return torch.cat(found)


def _sample(run: Run) -> tuple[Sample, list[str]]:
    """The images that the figures show, and the names of their classes, where those are known."""
    images = run.source.val()
    images = run.source.train() if images is None or not len(images) else images
    sample = images.gather(shown(images.labels))
    labels = sample.label.tolist()
    return sample.to(run.device), [images.classes[label] for label in labels] if min(labels) >= 0 else []


@torch.no_grad()
def draw_views(run: Run, evaluating: Evaluating, path: Path) -> None:
    """Figure of some images: each view, the view under each mask, and its reconstruction where the model has one."""
    sample, names = _sample(run)
    with evaluating():
        batch = run.task.prepare(sample, Progress(0, -1, 1, 1, run.config.seed))
        views = [run.views.show(view, number) for number, view in enumerate(batch.views)]
        if any(view is None for view in views):
            return
        pixels = run.criterion.pixels(run.model(batch), batch)
    grids = [run.model.grid(tuple(view.shape[1:])) for view in batch.views]
    images = None
    if pixels is not None:
        images = [
            run.views.show(figures.unpatchify(patches.float(), grid, batch.views[number].shape[1]), number)
            .cpu()
            .unflatten(0, (len(sample), -1))
            for number, (patches, grid) in enumerate(zip(pixels, grids, strict=True))
        ]
    figures.reconstructions(
        [view.cpu() for view in views],
        [None if masks is None else masks.mask.cpu() for masks in batch.masks],
        images,
        patch=batch.views[0].shape[-1] // grids[0][1] if grids[0] else 1,
        path=path,
        num=SHOWN,
        names=names,
        note=run.criterion.pixels_note,
    )


@torch.no_grad()
def draw_attention(run: Run, evaluating: Evaluating, path: Path) -> None:
    """Figure of where the class token of the evaluated encoder looks; none where there is no class token."""
    # A plugin's model may have none.
    backbone = getattr(run.model, "backbone", None)
    if not has_class_attention(backbone):
        return
    sample, names = _sample(run)
    images = run.views.center(sample)
    shown = run.views.show(images, None)
    if shown is None:
        return
    with evaluating():
        maps = class_attention(backbone, images)
    figures.attention(shown.cpu(), maps.cpu(), path, SHOWN, names)


def summary(out: Path, results: dict[str, Any]) -> list[str]:
    """How trained compares with chance, untrained or initial features and raw pixels, on the same split; time; folder.

    Without labels: how the held-out loss and the rank of the features changed.
    """
    minutes, seconds = divmod(round(results["seconds"]), 60)
    ending = f"{minutes} min {seconds:02d} s | {out}"
    first = next((name for name in FIRST if name in results), "untrained")
    names = ("chance", first, "raw_pixels", "trained")
    scores = {name: results.get(name, {}).get("knn/top1") for name in names}
    if scores["trained"] is None:
        changes = [
            _change("held-out loss", ("first", "last"), (first, "trained"), results, "held_out/loss", ".4f"),
            _change("RankMe", (first, "trained"), (first, "trained"), results, "health/rankme", ".2f"),
        ]
        return [" | ".join(["no accuracy without labels of two classes", *filter(None, changes), ending])]
    lines = []
    if scores["raw_pixels"] is not None and scores["trained"] < scores["raw_pixels"]:
        lines.append("the trained encoder is BELOW raw pixels: kNN on the images themselves does better")
    shown = ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in scores.items() if v is not None)
    probe = results["trained"].get("linear/top1")
    linear = "" if probe is None else f" | linear trained {probe:.4f}"
    for key in (key for key in results["trained"] if key.startswith("probe/")):
        known = {name: results.get(name, {}).get(key) for name in ("chance", first, "trained")}
        values = ", ".join(f"{'constant' if k == 'chance' else k} {v:.4f}" for k, v in known.items() if v is not None)
        lines.append(f"{key}: {values}")
    return [*lines, f"kNN top-1: {shown}{linear} | {ending}"]


def _change(
    title: str, words: tuple[str, str], names: tuple[str, str], results: dict[str, Any], key: str, digits: str
) -> str:
    """A number of the first evaluation and of the last one, in words; "" where there is none."""
    before, after = (results[name].get(key) for name in names)
    return "" if None in (before, after) else f"{title}: {words[0]} {before:{digits}}, {words[1]} {after:{digits}}"
