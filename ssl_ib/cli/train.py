"""`ssl-ib-train`: resolve a recipe, build the run, train it, and leave its folder. `--help` shows the usage.

Exit codes: 0 done, 2 a mistake of the user's (one message on stderr), 128 + n stopped by signal n after saving, which
`--resume` and `--auto-resume` continue.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import UserError
from .exits import end_at_interrupts, exit_code, heed_interrupts

if TYPE_CHECKING:
    from ..config.config import Config

SWAPS = ("task", "model", "criterion", "masker")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="ssl-ib-train",
        description="Pretrain an encoder without labels: RECIPE is a shipped name or a path; KEY=VALUE overrides it.",
        epilog="examples: ssl-ib-train mrcl_digits | ssl-ib-train simclr_cifar10 source.path=cifar10.tar.xz "
        "optim.lr=1e-3 --masker block | ssl-ib-train --list recipes | ssl-ib-train --describe masker:random",
    )
    p.add_argument("recipe", nargs="?", metavar="RECIPE", help="a shipped recipe's name, a path, or a run's folder")
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted, as in optim.lr=1e-3 masker.ratio=0.5")
    for kind in SWAPS:
        p.add_argument(f"--{kind}", metavar="NAME", help=f"use another registered {kind}")
    p.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE_OR_PATH", help="import your own parts first"
    )
    p.add_argument(
        "--init",
        metavar="WEIGHTS",
        help="start the encoder from these: a run's folder, a file, or timm:NAME (timm's weights, downloaded)",
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/RECIPE)")
    group = p.add_mutually_exclusive_group()
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in the folder from its last checkpoint; RECIPE may be that folder, and all is said",
    )
    group.add_argument(
        "--auto-resume",
        action="store_true",
        help="continue the run in the folder, or start one where there is none: for jobs that are started again",
    )
    group.add_argument("--overwrite", action="store_true", help="remove what an earlier run left in the folder")
    p.add_argument(
        "--accept-changed-images",
        action="store_true",
        help="with --resume: go on though the training images have other names, sizes or labels than before",
    )
    p.add_argument(
        "--profile",
        nargs="?",
        type=int,
        const=10,
        metavar="STEPS",
        help="watch so many steps (default 10) and write where their time goes to DIR/profile: a table and a trace",
    )
    p.add_argument("--dry-run", action="store_true", help="build all, run two small steps and one evaluation, no files")
    p.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    p.add_argument("--device", metavar="D", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--list", nargs="?", const="all", metavar="KIND", help="names: tasks, models, ..., recipes")
    p.add_argument(
        "--describe",
        metavar="KIND:NAME",
        help="a part's arguments, defaults and documentation; also recipe:NAME, and keys such as optim (config: all)",
    )
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    # Deterministic matrix products on CUDA need this before the first of them (cuBLAS, "Results reproducibility").
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if arguments is None:
        end_at_interrupts("ssl-ib-train")
    # What torch's profiler has to say of GPUs that are not there; it reads this when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    options = parser().parse_intermixed_args(arguments)
    return exit_code("ssl-ib-train", lambda: _main(options))


def _main(options: argparse.Namespace) -> int:
    from ..config.plugins import load_plugins

    if options.list or options.describe:
        load_plugins(options.plugin)
        from .listing import description, listing

        print(listing(options.list) if options.list else description(options.describe), end="")
        return 0
    if options.recipe is None:
        raise UserError("which recipe? give a name or a path; `ssl-ib-train --list recipes` shows the names")
    if "=" in options.recipe and not Path(options.recipe).exists():
        raise UserError(f"expected RECIPE first, got {options.recipe!r}")
    if options.accept_changed_images and not (options.resume or options.auto_resume):
        raise UserError("--accept-changed-images is for --resume, which compares the images with those of before")
    if options.profile is not None and (options.profile < 1 or options.dry_run):
        asked = "a number of steps above 0" if options.profile < 1 else "a real run, not --dry-run"
        raise UserError(f"--profile takes {asked}")
    config = configuration(options)
    if options.print_config:
        print(config.yaml(), end="")
        return 0
    return _train(config, options)


def configuration(options: argparse.Namespace) -> Config:
    from ..config.config import configure

    swaps = [f"{kind}={getattr(options, kind)}" for kind in SWAPS if getattr(options, kind)]
    device = [f"device={options.device}"] if options.device else []
    # Quoted, because a path may look like another YAML value.
    init = [f"init={json.dumps(options.init)}"] if options.init else []
    # Every process that torchrun starts finds the same; one says it.
    say = partial(print, file=sys.stderr) if os.environ.get("RANK", "0") == "0" else lambda line: None
    return configure(options.recipe, [*swaps, *device, *init, *options.overrides], options.plugin, say)


def _train(config: Config, options: argparse.Namespace) -> int:
    from .. import distributed
    from ..api import pretrain
    from ..record.signals import Stopped
    from ..record.terminal import say

    heed_interrupts()
    # What was chosen for the user (where images are held, say) is said once.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ssl_ib").setLevel(logging.INFO)
    try:
        out = None if options.dry_run else options.out or _folder(config, options)
        trainer, lines = pretrain(
            config,
            out,
            resume=options.resume,
            overwrite=options.overwrite,
            accept_changed_images=options.accept_changed_images,
            auto_resume=options.auto_resume,
            dry=options.dry_run,
            profile=options.profile,
            started=lambda trainer: print(_heading(trainer, out), flush=True),
        )
        if options.dry_run:
            lines = [f"dry run of {config.recipe} passed: {trainer.step} steps, one evaluation, nothing written"]
        if distributed.is_main():
            say("\n".join(lines))
        return 0
    except Stopped as stop:
        if distributed.is_main():
            where = f"; saved {stop.saved}, continue with ssl-ib-train {out} --resume" if stop.saved else ""
            print(f"ssl-ib-train: stopped by {stop} at step {stop.step}{where}", file=sys.stderr)
        return 128 + stop.signum
    finally:
        distributed.shutdown()


def _folder(config: Config, options: argparse.Namespace) -> Path:
    """Where a run goes without --out: what continues or replaces a run means the folder that was given as RECIPE."""
    from ..config.recipe import find_recipe

    named_by_folder = find_recipe(options.recipe) == Path(options.recipe) / "config.yaml"
    if named_by_folder and (options.resume or options.auto_resume or options.overwrite):
        return Path(options.recipe)
    return Path("runs") / config.recipe


def _heading(trainer, out: Path | None) -> str:
    """The run in a few lines, before it starts."""
    import torch

    from .. import ops
    from ..config.recipe import PARTS
    from ..data.sources.layout import label_lines
    from ..run import DRY_BANK_BATCHES, DRY_BATCH, DRY_IMAGES, parameter_counts

    run, config = trainer.run, trainer.config
    counts = parameter_counts(run)
    # A plugin's source may say nothing.
    held_out, notes = run.source.val(), getattr(run.source, "notes", ())
    steps, device, indent = trainer.total_steps, run.device, "\n" + 13 * " "
    lines = [f"{config.recipe} -> {out or 'a dry run, which writes nothing'}"]
    lines += [f"  {kind:<10} {_shown(kind, getattr(config, kind))}" for kind in PARTS]
    lines += [f"  init       {run.start}"] if run.start else []
    held = f"{len(held_out):,} held out" if held_out is not None else "none held out"
    place = "in memory" if trainer.images.in_memory else "streamed"
    lr = config.optim.lr if isinstance(config.optim.lr, dict) else format(config.optim.lr * trainer.scale, ".4g")
    scaled = f" ({config.optim.lr} x {trainer.scale:g})" if trainer.scale != 1 else ""
    compiled = {False: "", True: ", compiled", "graphs": ", compiled, in CUDA graphs"}[config.compile]
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    lines += [
        f"  data       {len(trainer.images):,} training images ({place}), {held}",
        f"  labels     {indent.join(label_lines(trainer.images, notes))}",
        f"  parameters {counts['all']:,}, of which {counts['trained']:,} are trained",
        f"  batch      {_batch(run)} a step, {config.epochs} epochs, {steps:,} steps",
        f"  optimiser  {config.optim.name}, learning rate {lr}{scaled}",
        f"  device     {device}{threads}, {config.precision}{compiled}, seed {config.seed}",
        f"  ops        {ops.wanted()}",
    ]
    lines += _terms(trainer.example, run.criterion.nats)
    if trainer.step:
        lines.append(f"  resumed    at step {trainer.step:,}")
    if out is None:
        lines.append(
            f"  dry run    batch at most {DRY_BATCH}, banks at most {DRY_BANK_BATCHES * run.batch_size} rows, "
            f"evaluation on at most {DRY_IMAGES} images"
        )
    return "\n".join(lines)


def _terms(loss, nats) -> list[str]:
    """The terms of a loss with their weights, what is only watched, and what the numbers in nats are worth."""
    trained = ", ".join(f"{name} x {float(weight):g}" for name, weight in loss.weights.items())
    watched = ", ".join(name for name in loss.terms if name not in loss.weights)
    lines = [f"  terms      {trained or 'the loss alone'}"]
    lines += [f"  watched    {line}" if not n else f"{13 * ' '}{line}" for n, line in enumerate(wrap(watched, 106))]
    for name, told in nats.items():
        ceiling = told.ceiling if told.ceiling is None or isinstance(told.ceiling, str) else f"{told.ceiling:.2f}"
        most = "" if ceiling is None else f", at most {ceiling}"
        lines.append(f"  in nats    {name}: {told.kind} {'of' if told.kind == 'estimate' else 'on'} {told.of}{most}")
    return lines


def _batch(run) -> str:
    """The images of a step, and what they count for in the learning rate where that is more."""
    images = run.samples_per_step // run.task.samples_per_image
    return f"{images} images ({run.samples_per_step} masks)" if run.task.samples_per_image > 1 else str(images)


def _shown(kind: str, spec: dict) -> str:
    """A part with those arguments that are not the defaults."""
    from ..config.registry import REGISTRIES, part_kind

    schema = REGISTRIES[kind].schema(spec["name"])
    given = []
    for key, value in spec.items():
        if key == "name":
            continue
        nested = part_kind(schema[key].annotation)
        default = schema[key].default
        default = list(default) if isinstance(default, tuple) else default
        if nested and value is not None:
            given.append(f"{key}: {_shown(nested, value)}")
        elif value != default:
            given.append(f"{key}={value}")
    return f"{spec['name']}({', '.join(given)})" if given else spec["name"]


if __name__ == "__main__":
    sys.exit(main())
