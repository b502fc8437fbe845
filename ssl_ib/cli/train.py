"""`ssl-ib-train`: resolve a recipe, build the run, train it, and leave its folder. `--help` shows the usage.

Exit codes: 0 done, 2 a mistake of the user's (one message on stderr), 128 + n stopped by signal n after saving.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UserError, nearest
from .exits import exit_code

if TYPE_CHECKING:
    from ..config.config import Config

SWAPS = ("task", "model", "criterion", "masker")
#: What a run writes; `--overwrite` removes these and nothing else.
WRITTEN = (
    "config.yaml environment.json metrics.jsonl tensorboard figures checkpoints backbone.safetensors backbone.json "
    "results.json bad_images.txt bad_batch.txt"
).split()
#: Keys that may change when a run resumes: they move no loss.
MOVABLE = ("device", "workers", "log_every", "checkpoint")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="ssl-ib-train",
        description="Pretrain an encoder without labels: RECIPE is a shipped name or a path; KEY=VALUE overrides it.",
        epilog="examples: ssl-ib-train mrcl_digits | ssl-ib-train simclr_cifar10 source.path=cifar10.tar.xz "
        "optim.lr=1e-3 --masker block | ssl-ib-train --list recipes | ssl-ib-train --describe masker:random",
    )
    p.add_argument("recipe", nargs="?", metavar="RECIPE", help="a shipped recipe's name, or a path")
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted, as in optim.lr=1e-3 masker.ratio=0.5")
    for kind in SWAPS:
        p.add_argument(f"--{kind}", metavar="NAME", help=f"use another registered {kind}")
    p.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE_OR_PATH", help="import your own parts first"
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/RECIPE)")
    group = p.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="continue the run in the folder from its last checkpoint")
    group.add_argument("--overwrite", action="store_true", help="remove what an earlier run left in the folder")
    p.add_argument("--dry-run", action="store_true", help="build all, run two small steps and one evaluation, no files")
    p.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    p.add_argument("--device", metavar="D", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--list", nargs="?", const="all", metavar="KIND", help="names: tasks, models, ..., recipes")
    p.add_argument("--describe", metavar="KIND:NAME", help="a part's arguments, defaults and documentation")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    # Deterministic matrix products on CUDA need this before the first of them (cuBLAS, "Results reproducibility").
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options = parser().parse_intermixed_args(arguments)
    return exit_code("ssl-ib-train", lambda: _main(options))


def _main(options: argparse.Namespace) -> int:
    from ..config.plugins import load_plugins

    if options.list or options.describe:
        load_plugins(options.plugin)
        print(_listing(options.list) if options.list else _description(options.describe), end="")
        return 0
    if options.recipe is None:
        raise UserError("which recipe? give a name or a path; `ssl-ib-train --list recipes` shows the names")
    if "=" in options.recipe:
        raise UserError(f"expected RECIPE first, got {options.recipe!r}")
    config = configuration(options)
    if options.print_config:
        print(config.yaml(), end="")
        return 0
    return _train(config, options)


def configuration(options: argparse.Namespace) -> Config:
    from ..config.config import resolve
    from ..config.plugins import load_plugins
    from ..config.recipe import find_recipe, read_recipe

    remembered = read_recipe(find_recipe(options.recipe)).get("plugins") or []
    remembered = [remembered] if isinstance(remembered, str) else remembered
    plugins = load_plugins(list(dict.fromkeys([*remembered, *options.plugin])))
    swaps = [f"{kind}={getattr(options, kind)}" for kind in SWAPS if getattr(options, kind)]
    device = [f"device={options.device}"] if options.device else []
    return resolve(options.recipe, [*swaps, *device, *options.overrides], plugins)


def _train(config: Config, options: argparse.Namespace) -> int:
    import torch

    from .. import distributed
    from ..device import choose_device
    from ..record import artifacts
    from ..record.signals import Stopped
    from ..run import build_run
    from ..trainer import Trainer

    # What was chosen for the user (where images are held, say) is said once.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ssl_ib").setLevel(logging.INFO)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and config.parallel == "none":
        raise UserError("several processes were started; say how they share the work: parallel=ddp")
    device = choose_device(config.device)
    if device.type == "cuda" and config.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    distributed.initialise(device)
    if not distributed.is_main():
        # Every process finds the same; one says it.
        logging.getLogger("ssl_ib").setLevel(logging.ERROR)
    try:
        out = None if options.dry_run else options.out or Path("runs") / config.recipe
        state = _examine(out, config, options) if out else None
        trainer = Trainer(build_run(config, dry=options.dry_run), out)
        # Every process has found its arguments right and looked at the folder before one of them changes it.
        distributed.barrier()
        if out and state is None and distributed.is_main():
            _claim(out, config)
        if state is not None:
            trainer.restore(state)
        with closing(trainer.log):
            if distributed.is_main():
                print(_heading(trainer, out), flush=True)
                if out:
                    artifacts.write_environment(out, device)
                    artifacts.record_bad_images(trainer)
            try:
                trainer.fit()
            except Stopped as stop:
                if distributed.is_main():
                    where = f"; saved {stop.saved}, continue with --resume" if stop.saved else ""
                    print(f"ssl-ib-train: stopped by {stop} at step {trainer.step}{where}", file=sys.stderr)
                return 128 + stop.signum
            if distributed.is_main():
                if out:
                    artifacts.record_bad_images(trainer)
                    print("\n".join(artifacts.finish(trainer)))
                else:
                    print(f"dry run of {config.recipe} passed: {trainer.step} steps, one evaluation, nothing written")
        return 0
    finally:
        distributed.shutdown()


def _examine(out: Path, config: Config, options: argparse.Namespace) -> dict[str, Any] | None:
    """Whether the run may use its folder, which stays as it is; returns the checkpoint to continue from, or None."""
    from ..record.checkpoint import load

    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; a run needs a folder")
    saved = out / "config.yaml"
    if options.resume:
        if not saved.is_file():
            raise UserError(f"nothing to resume: {out} holds no run (no config.yaml)")
        changed = changes(saved, config)
        if changed:
            raise ConfigError([f"--resume cannot change {line}" for line in changed])
        if not any((out / "checkpoints").glob("*.pt")):
            print(f"ssl-ib-train: {out} has no checkpoint yet: starting from the beginning", file=sys.stderr)
            return None
        state, warnings = load(out / "checkpoints")
        for warning in warnings:
            print(f"ssl-ib-train: {warning}", file=sys.stderr)
        return state
    if not out.exists() or not any(out.iterdir()):
        return None
    if not options.overwrite:
        raise UserError(f"{out} is not empty: continue it with --resume, replace it with --overwrite, or choose --out")
    if not saved.is_file():
        raise UserError(f"{out} holds files but no run (no config.yaml), so --overwrite leaves it alone: choose --out")
    return None


def changes(saved: Path, config: Config) -> list[str]:
    """In what a run's saved configuration differs from `config`, but for keys that move no loss: `key: old -> new`."""
    from ..config.config import differences
    from ..config.recipe import read_recipe

    movable = tuple(f"{key}{end}" for key in MOVABLE for end in (":", "."))
    return [line for line in differences(read_recipe(saved), config.plain()) if not line.startswith(movable)]


def _claim(out: Path, config: Config) -> None:
    """Makes the run's folder, and removes what an earlier run left there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the folder {out}: {error.strerror}") from None
    for path in map(out.joinpath, WRITTEN):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    # The first file: it is what tells a run's folder from any other.
    (out / "config.yaml").write_text(config.yaml(), encoding="utf-8")


def _heading(trainer, out: Path | None) -> str:
    """The run in a few lines, before it starts."""
    import torch

    from .. import ops
    from ..config.recipe import PARTS
    from ..run import DRY_BANK_BATCHES, DRY_BATCH, DRY_IMAGES, parameter_counts

    run, config = trainer.run, trainer.config
    counts = parameter_counts(run)
    held_out = run.source.val()
    steps, device = trainer.total_steps, run.device
    lines = [f"{config.recipe} -> {out or 'a dry run, which writes nothing'}"]
    lines += [f"  {kind:<10} {_shown(kind, getattr(config, kind))}" for kind in PARTS]
    held = f"{len(held_out):,} held out" if held_out is not None else "none held out"
    place = "in memory" if trainer.images.in_memory else "streamed"
    lr = config.optim.lr if isinstance(config.optim.lr, dict) else format(config.optim.lr * trainer.scale, ".4g")
    scaled = f" ({config.optim.lr} x {trainer.scale:g})" if trainer.scale != 1 else ""
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    lines += [
        f"  data       {len(trainer.images):,} training images ({place}), {held}",
        f"  parameters {counts['all']:,}, of which {counts['trained']:,} are trained",
        f"  batch      {_batch(run)} a step, {config.epochs} epochs, {steps:,} steps",
        f"  optimiser  {config.optim.name}, learning rate {lr}{scaled}",
        f"  device     {device}{threads}, {config.precision}{', compiled' * config.compile}, seed {config.seed}",
        f"  ops        {ops.wanted()}",
    ]
    if trainer.step:
        lines.append(f"  resumed    at step {trainer.step:,}")
    if out is None:
        lines.append(
            f"  dry run    batch at most {DRY_BATCH}, banks at most {DRY_BANK_BATCHES * run.batch_size} rows, "
            f"evaluation on at most {DRY_IMAGES} images"
        )
    return "\n".join(lines)


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


def _listing(kind: str) -> str:
    """Names of one kind (singular or plural), or of all."""
    from ..config.recipe import recipe_names
    from ..config.registry import REGISTRIES

    names = {f"{kind.removesuffix('s')}s": registry.names for kind, registry in REGISTRIES.items()}
    names["recipes"] = recipe_names
    if kind == "all":
        return "".join(f"{plural:<11} {', '.join(get())}\n" for plural, get in names.items())
    plural = f"{kind.removesuffix('s')}s"
    if plural not in names:
        raise UserError(f"--list: unknown kind {kind!r}{nearest(kind, names)}")
    return "".join(f"{name}\n" for name in names[plural]())


def _description(text: str) -> str:
    from ..config.registry import REGISTRIES, describe

    kind, colon, name = text.partition(":")
    if not colon or kind not in REGISTRIES:
        raise UserError(f"--describe: expected KIND:NAME, got {text!r}{nearest(kind, REGISTRIES)}")
    return describe(kind, name)


if __name__ == "__main__":
    sys.exit(main())
