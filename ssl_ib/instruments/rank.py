"""How well each number that needs no labels ranks the runs of sweeps against their kNN accuracy.

Prints Spearman's rho with a bootstrap interval over points, signed so that +1 ranks the runs as the labels do. Which
way of a number is better is fixed before any accuracy is looked at. Runs are compared where their accuracies are of the
same images: within a results.csv, and over sweep folders whose data, trained and evaluated, are the same.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..info.ranking import Rho
    from ..sweep.finished import Finished

HELP = "how each label-free number ranks a sweep's runs against kNN"
#: The scopes of a rho besides a method's name: all runs of a group, and all groups, each within itself.
ALL = "all"
CEILING = "held_out/mi_ceiling"


def arguments(parser: argparse.ArgumentParser) -> None:
    folders = "folders of ssl-ib-sweep, or results.csv"
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP|CSV", help=folders)
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write rank.csv and rank.png there")


def run(options: argparse.Namespace) -> int:
    from ..record.files import replace

    found = examine(options.sweeps)
    print(report(found), end="")
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: cannot make the folder {options.out}: {error.strerror}") from None
        replace(options.out / "rank.csv", table(found))
        draw(found, options.out / "rank.png")
        print(f"{options.out}/rank.csv, rank.png")
    return 0


@dataclass(frozen=True)
class Score:
    """Rho of a number in a group of runs (ALL: within each, averaged), of one method (ALL: of all); or why not."""

    group: str
    method: str
    name: str
    rho: Rho | None
    reason: str = ""


@dataclass(frozen=True)
class Ranking:
    """groups: runs that may be compared, by the name of the group; remarks: what was left out."""

    groups: dict[str, list[Finished]]
    scores: Sequence[Score]
    remarks: Sequence[str]

    def of(self, group: str, method: str) -> list[Score]:
        return [score for score in self.scores if (score.group, score.method) == (group, method)]


def examine(sweeps: Sequence[Path]) -> Ranking:
    """Scores every label-free number. Raises UserError where there is nothing to rank against, or too few runs."""
    from ..info.ranking import LEAST, spearman, why_not
    from ..sweep.choice import group, label_free, uses_labels
    from ..sweep.finished import KNN, known, read

    every = [run for path in dict.fromkeys(sweeps) for run in read(path)]
    once = _once(every)
    remarks = [f"runs that are there twice, and count once: {len(every) - len(once)}"] if len(once) < len(every) else []
    every, runs = once, known(once, KNN)
    if not runs:
        raise UserError(f"no run of {', '.join(map(str, sweeps))} has {KNN}: there is nothing to rank against")
    if len(runs) < len(every):
        remarks.append(f"finished runs without {KNN}, which are left out: {len(every) - len(runs)} of {len(every)}")
    free = [run for run in runs if not uses_labels(run)]
    if len(free) < len(runs):
        remarks.append(f"runs whose criterion uses labels, which are left out: {len(runs) - len(free)} of {len(runs)}")
    if len(free) < LEAST:
        raise UserError("; ".join([f"expected at least {LEAST} finished runs to rank, got {len(free)}", *remarks]))
    groups: dict[str, list[Finished]] = {}
    data: dict[str, str] = {}
    for run in free:
        name = data.setdefault(_data(run), str(run.sweep))
        groups.setdefault(name, []).append(run)
    for place, inside in groups.items():
        ceilings = [run.numbers[CEILING] for run in known(inside, CEILING)]
        if ceilings and max(ceilings) > min(ceilings) + 1e-6:
            said = f"{min(ceilings):.2f} to {max(ceilings):.2f} nats"
            remarks.append(f"{place}: the candidates of I_NCE differ between runs (ceilings of {said})")
    names = label_free(free)
    scores, pools = [], {}
    for place, inside in groups.items():
        methods = list(dict.fromkeys(run.method for run in inside))
        for method in [ALL, *(methods if len(methods) > 1 else ())]:
            of_method = [run for run in inside if method in (ALL, run.method)]
            for name in names:
                numbers = group(of_method, name)
                if not numbers.x:
                    continue
                reason = why_not(numbers)
                scores.append(Score(place, method, name, None if reason else spearman(numbers), reason or ""))
                if not reason and len(set(numbers.points)) >= LEAST:
                    pools.setdefault((method if len(methods) > 1 else methods[0], name), []).append(numbers)
                    if len(methods) == 1:
                        pools.setdefault((ALL, name), []).append(numbers)
    if len(groups) > 1:
        # A method of one group alone has its score there.
        wanted = {key: pool for key, pool in pools.items() if key[0] == ALL or len(pool) > 1}
        scores += [Score(ALL, method, name, spearman(*pool)) for (method, name), pool in wanted.items()]
    if not any(score.rho for score in scores):
        reasons = "; ".join(dict.fromkeys(f"{score.name}: {score.reason}" for score in scores))
        raise UserError(f"no number could be scored: {reasons}")
    return Ranking(groups, scores, remarks)


def _once(runs: Sequence[Finished]) -> list[Finished]:
    """Without runs that are there twice, in two sweeps or in a sweep and a copy of its table; the first one stays.

    Tables alone are never compared with each other, so that each keeps its own.
    """
    found: dict[tuple, Finished] = {}
    for run in sorted(runs, key=lambda run: run.config is None):
        own = ("health/", "held_out/", "knn/")
        measured = [item for item in sorted(run.numbers.items()) if item[0].startswith(own)]
        # A few numbers may be equal by chance.
        key = (run.seed, *map(repr, measured)) if len(measured) > 2 else (id(run),)
        if run.config is None and key not in found:
            key = (*key, run.sweep)
        found.setdefault(key, run)
    return list(found.values())


def _data(run: Finished) -> str:
    """What losses and accuracies are measured on: two runs with the same may be compared."""
    if run.config is None:
        return str(run.sweep)
    evaluation = run.config.get("eval", {})
    parts = [evaluation.get(key) for key in ("source", "train_images", "val_images", "knn_k")]
    return json.dumps([run.config.get("source"), *parts], default=str)


def report(ranking: Ranking) -> str:
    """Tables, one a group and one over all: each number, which way is better, n, rho and its interval."""
    from ..info.ranking import ENOUGH

    lines = []
    for place, runs in ranking.groups.items():
        sweeps = list(dict.fromkeys(str(run.sweep) for run in runs))
        methods = list(dict.fromkeys(run.method for run in runs))
        points = len({run.identity for run in runs})
        counts = f"{len(runs)} runs, {points} points, {len(methods)} method{'s' * (len(methods) != 1)}"
        lines.append(f"{', '.join(sweeps)}: {counts}")
        lines += _section(ranking.of(place, ALL))
        lines += _by_method(ranking, place, methods)
        lines.append("")
    if len(ranking.groups) > 1:
        lines.append(f"Over all {len(ranking.groups)} groups, runs compared within their own group alone")
        lines += _section(ranking.of(ALL, ALL))
        lines += _by_method(ranking, ALL, [score.method for score in ranking.scores if score.group == ALL])
        lines.append("")
    lines += [
        "rho: Spearman's, +1 = the number ranks the runs as kNN does, -1 = the other way round. The interval (95 %) "
        f"draws points again with all their seeds; with fewer than {ENOUGH} points it is too narrow (marked *).",
        "?: which way is better is not known, and rho counts higher as better. Held-out numbers of different "
        "criterions may be on different scales.",
    ]
    return "\n".join([*lines, *ranking.remarks]) + "\n"


def _section(scores: Sequence[Score]) -> list[str]:
    """The numbers that were scored, best first, then those that were not."""
    from ..info.ranking import ENOUGH
    from ..sweep.choice import better

    scored = sorted((score for score in scores if score.rho), key=lambda score: -score.rho.value)
    rows = [["  number", "better", "n", "points", "rho"]] if scored else []
    for score in scored:
        few = "*" if score.rho.points < ENOUGH and not math.isnan(score.rho.low) else ""
        rows.append(
            [f"  {score.name}", better(score.name) or "?", str(score.rho.n), str(score.rho.points), f"{score.rho}{few}"]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    reasons: dict[str, list[str]] = {}
    for score in scores:
        if score.reason:
            reasons.setdefault(score.reason, []).append(score.name)
    return lines + [f"  not scored ({reason}): {', '.join(names)}" for reason, names in reasons.items()]


def _by_method(ranking: Ranking, place: str, methods: Sequence[str]) -> list[str]:
    """A table a method with a score; the other methods in a line."""
    lines, unscored = [], []
    for method in dict.fromkeys(method for method in methods if method != ALL):
        scores = ranking.of(place, method)
        if any(score.rho for score in scores):
            lines += [f" {method}", *_section(scores)]
        elif scores:
            unscored.append(method)
    more = f" and {len(unscored) - 3} more" if len(unscored) > 3 else ""
    return lines + ([f" too few runs of one method, or no spread: {'; '.join(unscored[:3])}{more}"] if unscored else [])


def table(ranking: Ranking) -> str:
    """A row a group, method and number, as CSV; rho and its interval are empty where it was not scored."""
    from ..sweep.choice import better

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow("group method number better n points rho low high not_scored doubts".split())
    for score in ranking.scores:
        rho = score.rho
        numbers = [rho.n, rho.points, rho.value, rho.low, rho.high] if rho else [""] * 5
        numbers = ["" if isinstance(x, float) and math.isnan(x) else x for x in numbers]
        texts = [score.reason, "; ".join(rho.doubts) if rho else ""]
        writer.writerow([score.group, score.method, score.name, better(score.name) or "", *numbers, *texts])
    return text.getvalue()


def draw(ranking: Ranking, path: Path) -> None:
    """A row a number: rho over all groups with its interval, and faint each group's own."""
    from ..record.figures import BLUE, FAINT, MUTED, chart, tidy

    of_groups = [score for score in ranking.scores if score.method == ALL and score.rho]
    last = ALL if len(ranking.groups) > 1 else next(iter(ranking.groups))
    overall = {score.name: score.rho for score in of_groups if score.group == last}
    names = sorted(overall, key=lambda name: overall[name].value)
    figure = chart(7, 1.2 + 0.28 * len(names))
    panel = figure.add_subplot()
    for row, name in enumerate(names):
        for score in of_groups:
            if score.name == name and score.group != ALL:
                panel.plot(score.rho.value, row, color=MUTED, marker="o", markersize=4, alpha=0.4, markeredgewidth=0)
        rho = overall[name]
        if not math.isnan(rho.low):
            panel.plot([rho.low, rho.high], [row, row], color=BLUE, linewidth=1.4)
        panel.plot(rho.value, row, color=BLUE, marker="o", markersize=6)
    panel.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    tidy(panel, "How label-free numbers rank runs", "Spearman's rho with kNN; +1 picks as the labels would", small=True)
    panel.set_xlim(-1.05, 1.05)
    panel.set_xticks([-1, -0.5, 0, 0.5, 1])
    panel.set_yticks(range(len(names)), [f"{name} (n = {overall[name].n})" for name in names])
    panel.grid(axis="x", color=FAINT, linewidth=0.6)
    figure.savefig(path)
