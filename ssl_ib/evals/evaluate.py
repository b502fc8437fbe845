"""`evaluate`: a protocol on an encoder, from names and settings to recorded results, and their table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import __version__, distributed
from ..config.plugins import load_plugins, remembered
from ..config.settings import settings as read_settings
from ..device import choose_device
from ..errors import UserError
from .protocol import PROTOCOLS, Job, Settings, settings_of
from .results import Results
from .subject import Subject, origin

RESULTS = "evals.jsonl"


def evaluate(
    protocol: str,
    encoder: str | Path,
    *overrides: str,
    out: str | Path | None = None,
    dry: bool = False,
    overwrite: bool = False,
    plugins: Iterable[str] = (),
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Evaluates an encoder and returns the results, those that were finished before among them.

    protocol:  a registered name, such as "knn".
    encoder:   the folder of a run, a checkpoint, or `timm:NAME`.
    overrides: texts `KEY=VALUE`: the protocol's settings.
    out:       the folder of `evals.jsonl` and the pictures (default: the run's).
    dry:       on few images and for few steps, to check that all fits; nothing is written.
    overwrite: compute again what is finished, in place of the former results.
    plugins:   as for `ssl_ib.train`.
    say:       called with a line for the user.

    Raises UserError, and ConfigError with all that is wrong in the settings, before any image is encoded.

    Joins the processes that torchrun started, which share the work; leaving them (`distributed.shutdown`) is for the
    caller. Each returns the results; the main one alone says and writes something.
    """
    where = str(encoder)
    load_plugins(list(plugins))
    of = origin(where)
    section = settings_of(protocol)
    source = _source_of(of.config or {}) if issubclass(section, Settings) else None
    settings = read_settings(section, overrides, {} if source is None else {"source": source})
    settings.check()
    folder, problems = of.folder if out is None else Path(out), []
    labelled = isinstance(settings, Settings)
    if labelled and settings.source is None and of.found:
        problems.append(f"{where} has no images of its own: give source=, such as source=folder source.path=FOLDER")
    if folder is None and of.found and not dry:
        problems.append(f"{where} has no folder of its own: say where the results go, with --out")
    if problems:
        raise UserError("; ".join(problems))
    device = choose_device(settings.device)
    distributed.initialise(device)
    main = distributed.is_main()
    say = say if main else lambda line: None
    size = settings.size if labelled else None
    with distributed.together():
        if distributed.world_size() > 1 and not settings.shareable():
            raise UserError(
                f"{protocol} with these settings is a training, which processes do not share: run it in one process"
            )
        subject = Subject(
            where, of, name=settings.name, size=size, pretrained_weights=settings.pretrained, device=device
        )
        for note in subject.notes:
            say(note)
        train, val = settings.open(dry, say)
        results = Results(folder / RESULTS if main and not dry else None)
    # All have to find the same finished.
    results.lines = distributed.from_main(results.lines)
    job = Job(protocol, settings, subject, train, val, results, folder, None if dry else folder, say, overwrite)
    say(_heading(job))
    with _repeating(device), distributed.together():
        PROTOCOLS[protocol](job, settings)
    for version in sorted({line["ssl_ib"] for line in job.lines} - {__version__}):
        say(f"some results are of ssl_ib {version}, and this is {__version__}: --overwrite computes them again")
    for images in (train.images, val.images) if labelled else ():
        if images.bad:
            instead = "left out" if images.in_memory else "the next ones stand in for them"
            say(f"{len(images.bad)} images could not be read, {instead}: {', '.join(images.bad[:3])}")
    return job.lines


def _source_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """The source that a run of this configuration is evaluated on: that of `eval.source`, else its own."""
    load_plugins(remembered(config), "the run")
    scored = config.get("eval")
    return (scored.get("source") if isinstance(scored, dict) else None) or config.get("source")


@contextmanager
def _repeating(device: torch.device):
    """Deterministic operations, and torch's switch as it was afterwards."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(device.type == "cuda", warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _heading(job: Job) -> str:
    step = "" if job.subject.step is None else f" at step {job.subject.step:,}"
    name = f" ({job.settings.name})" if job.settings.name else ""
    return (
        f"{job.protocol} of {job.subject.where}{name}{step}: {len(job.train):,} training images, {len(job.val):,} held "
        f"out, {job.val.facts}"
    )


def table(lines: list[dict[str, Any]], varied: Iterable[str]) -> str:
    """Results as a table: a row each, with what varies, the value, its spread, and what chance gives."""
    keys = [key for key in varied if key != "metric" and any(key in line["settings"] for line in lines)]
    header = [*keys, "metric", "value", "spread", "chance", "seconds"]
    rows = [header]
    for line in lines:
        spread = "" if line["spread"] is None else f"± {line['spread']:.4f} ({line['spread_of']})"
        chosen = f" -> {line['chosen_lr']:g}" if "chosen_lr" in line else ""
        what = [_short(line["settings"].get(key, "")) + (chosen if key == "lr" else "") for key in keys]
        chance = "" if line["chance"] is None else _number(line["chance"])
        rows.append([*what, line["metric"], _number(line["value"]), spread, chance, f"{line['seconds']:.1f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} values" if len(value) > 4 else ",".join(_short(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
