"""`ssl-ib-sweep`: train a grid of runs, here or as jobs of a cluster, and compare them. `--help` shows the usage.

Exit codes: 0 done or out of budget, 1 some run failed, 2 a mistake of the user's (one message on stderr), 128 + n
stopped by signal n after the runs have saved.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import ConfigError, UserError, nearest
from .exits import end_at_interrupts, exit_code, heed_interrupts

if TYPE_CHECKING:
    from ..config.config import Config
    from ..sweep.launch import Launch
    from ..sweep.points import Axis, Run
    from ..sweep.report import Report


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="ssl-ib-sweep",
        description="Train every point of a grid: RECIPE is a shipped name or a path; KEY=VALUE overrides it for all. "
        "Called again, it continues what was stopped, and does what is new.",
        epilog="examples: ssl-ib-sweep mrcl_digits --vary masker.ratio=0.1,0.2,0.4 --seeds 0,1,2 | ssl-ib-sweep "
        'mrcl_digits epochs=20 --case "SimCLR: simclr_digits" --case "MRCL:" --budget-minutes 30',
    )
    p.add_argument("recipe", nargs="?", metavar="RECIPE", help="a shipped recipe's name, or a path")
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run, as in optim.lr=1e-3 epochs=20")
    p.add_argument(
        "--vary", action="append", default=[], metavar="KEY=V1,V2,...", help="an axis of the grid; values are YAML"
    )
    p.add_argument(
        "--case",
        action="append",
        default=[],
        metavar='"NAME: [RECIPE] KEY=VALUE ..."',
        help="overrides that vary together, perhaps of another recipe; all cases are one axis",
    )
    p.add_argument("--seeds", metavar="S1,S2,...", help="repeat the whole grid with each (default: the recipe's own)")
    p.add_argument(
        "--budget-minutes", type=float, metavar="M", help="start no run that would not end in time; stop at the end"
    )
    p.add_argument("--jobs", type=int, metavar="J", help="so many runs at once, which share the cores (default: 1)")
    p.add_argument(
        "--launch",
        metavar="HOW",
        help="submit a job for each run: slurm; to try that, local (processes here) or debug (one after the other)",
    )
    p.add_argument(
        "--slurm",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help="what the jobs are given: partition=gpu time=240 (minutes) gpus_per_node=1 cpus_per_task=8 mem=32GB ...",
    )
    p.add_argument(
        "--metric", nargs="+", action="extend", metavar="NAME", help="what table and plot show, such as knn/top1 loss"
    )
    p.add_argument(
        "--choose-by",
        metavar="NAME",
        help="name the run to keep by a number that needs no labels, such as health/rankme, and how far to trust that",
    )
    p.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE_OR_PATH", help="import your own parts first"
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="the sweep's folder (default: sweeps/RECIPE)")
    p.add_argument("--dry-run", action="store_true", help="check all, print the commands, run and write nothing")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    if arguments is None:
        end_at_interrupts("ssl-ib-sweep")
        arguments = sys.argv[1:]
    options = parser().parse_intermixed_args(arguments)
    command = shlex.join(["ssl-ib-sweep", *arguments])
    return exit_code("ssl-ib-sweep", lambda: _main(options, command), "interrupted; runs were ended without saving")


def _main(options: argparse.Namespace, command: str) -> int:
    from ..config.config import configure
    from ..config.recipe import find_recipe, read_recipe
    from ..sweep import folder, launch, points

    _check(options)
    problems: list[str] = []
    launched = launch.parse(options.launch, options.slurm, problems)
    axes = points.parse_axes(options.vary, options.case, options.overrides, problems)
    seeds = None if options.seeds is None else points.parse_seeds(options.seeds, problems)
    if options.seeds is not None and any(text.startswith("seed=") for text in options.overrides):
        problems.append("seed: is given as an override and by --seeds")
    # An axis that could not be read is left out, so that what is wrong elsewhere is said too.
    readable = [axis for axis in axes if axis.choices]
    try:
        runs = points.grid(
            options.recipe,
            options.overrides,
            readable,
            seeds or None,
            # Many points may have the same to say; it is said once.
            partial(configure, plugins=options.plugin, say=cache(partial(print, file=sys.stderr))),
        )
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    path = find_recipe(options.recipe)
    name = str(read_recipe(path).get("recipe", path.stem))
    out = options.out or Path("sweeps") / name
    base = folder.base_of(name, options.overrides)
    folder.examine(out, base, runs)
    _check_builds(runs, launched)
    if launched is not None and launched.ignored:
        named = ", ".join(launched.ignored)
        print(f"ssl-ib-sweep: --launch {options.launch} does without {named}, which Slurm alone knows", file=sys.stderr)
    if options.dry_run:
        _print_commands(runs, out, options.plugin, launched)
        return 0
    if launched is not None:
        launched.check()
    heed_interrupts()
    with folder.lock(out) as lock:
        folder.remember(out, base, command)
        return _run(options, axes, runs, out, lock.descriptor, command, launched)


def _check(options: argparse.Namespace) -> None:
    from ..config.recipe import recipe_names

    if options.recipe is None:
        raise UserError("which recipe? give a name or a path; `ssl-ib-train --list recipes` shows the names")
    if "=" in options.recipe:
        raise UserError(f"expected RECIPE first, got {options.recipe!r}")
    _check_launch(options)
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs: expected a number above 0, got {options.jobs}")
    if options.budget_minutes is not None and not options.budget_minutes >= 0:
        raise UserError(f"--budget-minutes: expected a number of at least 0, got {options.budget_minutes}")
    for metric in options.metric or ():
        if "=" in metric or metric in recipe_names():
            raise UserError(f"--metric: {metric!r} is no metric; recipe and overrides stand before --metric")
    if options.choose_by is not None:
        from ..sweep.choice import check_name

        check_name(options.choose_by)


def _check_launch(options: argparse.Namespace) -> None:
    """Raises UserError where --launch does not go together with what else is asked."""
    from ..sweep.launch import LAUNCHERS

    if options.launch is None:
        return
    if options.launch not in LAUNCHERS:
        raise UserError(f"--launch: unknown {options.launch!r}{nearest(options.launch, LAUNCHERS)}")
    if options.jobs is not None:
        raise UserError("--jobs is for runs in processes here; with --launch, --slurm array_parallelism=J bounds them")
    if options.budget_minutes is not None:
        raise UserError("--budget-minutes is for runs in processes here; with --launch, --slurm time=M bounds a job")


def _check_builds(runs: list[Run], launched: Launch | None) -> None:
    """Builds every point once, as a dry run does. Raises ConfigError with all that does not fit."""
    from ..run import build_run
    from ..sweep.points import told_once

    found: dict[str, list[str]] = {}
    points = {run.point.name: run for run in reversed(runs)}
    for name, run in reversed(points.items()):
        if problem := _wrong_processes(run.config, launched):
            found.setdefault(problem, []).append(name)
            continue
        config = run.config
        if launched is not None and launched.launcher == "slurm":
            # Where jobs are submitted there may be no GPU.
            ops = config.ops.model_copy(update={"backend": "auto"})
            config = config.model_copy(update={"device": "cpu", "ops": ops})
        try:
            build_run(config, dry=True)
        except UserError as error:
            for problem in getattr(error, "problems", [str(error)]):
                found.setdefault(problem, []).append(name)
    if found:
        raise ConfigError(told_once(found, len(points)))


def _wrong_processes(config: Config, launched: Launch | None) -> str:
    """Why a run cannot have the processes that it would get; "" where it can."""
    if launched is None:
        if config.parallel != "none":
            return (
                "parallel: a sweep gives each run one process; use parallel=none, or --launch slurm with gpus_per_node"
            )
        return ""
    count = launched.processes
    if config.parallel != "none" and count == 1:
        return f"parallel={config.parallel} is for several processes: give --slurm gpus_per_node=N, or parallel=none"
    if config.parallel == "none" and count > 1:
        return f"parallel=none is one process, for gpus_per_node={count}: use parallel=ddp, or gpus_per_node=1"
    if config.batch_size % (count * config.accumulate):
        return (
            f"batch_size: {config.batch_size} images a step cannot be cut into {count * config.accumulate} equal "
            f"batches (gpus_per_node: {count}, accumulate: {config.accumulate})"
        )
    return ""


def _print_commands(runs: list[Run], out: Path, plugins: list[str], launched: Launch | None) -> None:
    from ..sweep import runner

    how = "" if launched is None else f", each a job of --launch {launched.launcher}"
    how += f" with {launched.processes} processes" if launched is not None and launched.processes > 1 else ""
    print(f"{_counted(runs)} in {out}{how}")
    for run in runs:
        status = runner.status_of(run, out, {})
        print(f"{_title(run)} ({status})\n  " + shlex.join(["ssl-ib-train", *runner.arguments(run, out, plugins)]))


def _run(
    options: argparse.Namespace,
    axes: list[Axis],
    runs: list[Run],
    out: Path,
    lock: int,
    command: str,
    launched: Launch | None,
) -> int:
    from ..sweep import launch, plot, runner
    from ..sweep.report import DEFAULT_METRICS

    todo = [run for run in runs if not runner.is_done(run, out)]
    print(f"{_counted(runs)} in {out}; {len(runs) - len(todo)} done before", flush=True)

    def ended(run: Run, outcome: runner.Outcome, outcomes: dict[Run, runner.Outcome]) -> None:
        report = _write(out, axes, runs, outcomes, options.metric or DEFAULT_METRICS)
        said = report.line(run) if outcome.status == runner.DONE else outcome.status
        said += f" ({outcome.message})" if outcome.message else ""
        said += f"; see {runner.log_of(run, out)}" if outcome.status == runner.FAILED else ""
        print(f"[{sum(s == runner.DONE for s in report.statuses.values())}/{len(runs)}] {_title(run)}: {said}")
        sys.stdout.flush()

    if launched is not None:
        outcomes, signum = launch.run_all(launched, todo, out, options.plugin, f"ssl-ib-{out.name}", ended)
    else:
        budget = None if options.budget_minutes is None else 60 * options.budget_minutes
        outcomes, signum = runner.run_all(todo, out, options.plugin, options.jobs or 1, budget, lock, ended)
    report = _write(out, axes, runs, outcomes, options.metric or DEFAULT_METRICS)
    print("\n" + report.table(), end="")
    missing = [metric for metric in options.metric or () if report.numbers and metric not in report.known()]
    for metric in missing:
        print(f"ssl-ib-sweep: no run has the metric {metric!r}{nearest(metric, report.known())}", file=sys.stderr)
    unseen = plot.draw(report, out / "plot.png")
    files = f"{out}/table.md, results.csv" + ("" if unseen else ", plot.png")
    done = sum(status == runner.DONE for status in report.statuses.values())
    print(f"{done} of {len(runs)} runs are done | {files}" + (f" | {unseen}" if unseen else ""))
    if options.choose_by is not None:
        _print_choice(out, options.choose_by)
    failed = [run for run, outcome in outcomes.items() if outcome.status == runner.FAILED]
    if done < len(runs):
        print(f"continue with the same command: {command}")
    return 128 + signum if signum else 1 if failed else 0


def _print_choice(out: Path, name: str) -> None:
    """The run to keep by a number, or why there is none; the runs are done, so neither changes the exit code."""
    from ..sweep import choice, finished

    try:
        print(choice.choose(finished.read(out), name))
    except UserError as error:
        print(f"ssl-ib-sweep: {error}", file=sys.stderr)


def _write(out: Path, axes: list[Axis], runs: list[Run], outcomes: dict, metrics) -> Report:
    """Writes `results.csv` and `table.md` as things stand."""
    from ..record.files import replace
    from ..sweep import runner
    from ..sweep.report import Report

    report = Report.read(out, axes, runs, {run: runner.status_of(run, out, outcomes) for run in runs}, metrics)
    replace(out / "results.csv", report.csv())
    replace(out / "table.md", report.table())
    return report


def _counted(runs: list[Run]) -> str:
    points = len({run.point for run in runs})
    return f"{len(runs)} run{'s' * (len(runs) != 1)} ({points} point{'s' * (points != 1)})"


def _title(run: Run) -> str:
    return f"{run.point.name} seed {run.seed}"


if __name__ == "__main__":
    sys.exit(main())
