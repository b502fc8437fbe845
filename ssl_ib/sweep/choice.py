"""Choosing a run without labels: the numbers that need none, whether more or less of each is better, and what of a
sweep's runs each would keep.

Which way is better is known before any accuracy is: it is what the number stands for. A rho is signed by it, so that +1
means that the number ranks the runs as the labels do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import UserError, nearest
from ..info.ranking import Group, Rho, spearman, why_not
from .finished import KNN, LINEAR, Finished, known
from .report import digits

HIGHER, LOWER = "higher", "lower"
#: The label-free numbers of a run, as patterns of their names; the first that fits says which way is better.
BETTER = {
    "health/rankme": HIGHER,
    "health/lidar": HIGHER,
    "health/std": HIGHER,
    "health/alignment": LOWER,  # a mean squared distance of positive pairs
    "health/uniformity": LOWER,  # a log of a mean potential
    "held_out/loss": LOWER,
    "held_out/mi_nats*": HIGHER,
    "held_out/nce_nats*": HIGHER,
    "held_out/club_nats": LOWER,  # an upper bound on what the latents hold of the pixels, which MI-MAE lowers
    "held_out/positive_similarity": HIGHER,
    "held_out/agreement": HIGHER,
    "held_out/top_agreement": HIGHER,
    "held_out/marginal_entropy": HIGHER,
    "held_out/log_likelihood": HIGHER,
    "held_out/assignment_entropy": LOWER,
    "held_out/dead_prototypes": LOWER,
    "held_out/variance_floor": LOWER,
    "held_out/negative_bounds": LOWER,
    "held_out/kl_to_prior": LOWER,
    "held_out/kl_to_uniform": LOWER,
    "held_out/info_nce*": LOWER,
    "held_out/cross_entropy": LOWER,
    "held_out/reconstruction*": LOWER,
    "held_out/prediction_error": LOWER,
    "held_out/invariance": LOWER,
    "held_out/redundancy": LOWER,
    "held_out/dino": LOWER,
    "held_out/swav": LOWER,
    "held_out/max": LOWER,
    "held_out/min": LOWER,
    "held_out/approximation": LOWER,
}
#: What is no reading of the representation: limits, and what the settings alone decide.
NO_READING = ("held_out/*_ceiling", "held_out/gate", "held_out/gate_step", "held_out/mask_*")
#: Held-out numbers that a criterion has of labels: such a run's held-out numbers are not label-free.
OF_LABELS = ("held_out/*accuracy*", "held_out/ce_*")


def better(name: str) -> str | None:
    """Whether "higher" or "lower" is better; None where nobody has said so. Accuracies count as higher."""
    if name in (KNN, LINEAR) or name.startswith("probe/"):
        return HIGHER
    return next((way for pattern, way in BETTER.items() if fnmatchcase(name, pattern)), None)


def uses_labels(run: Finished) -> bool:
    """Whether the run's criterion was given labels."""
    if run.config is not None and run.config.get("criterion", {}).get("name") == "supervised":
        return True
    return any(fnmatchcase(name, pattern) for name in run.numbers for pattern in OF_LABELS)


def label_free(runs: Sequence[Finished]) -> list[str]:
    """The names of the runs' numbers that need no labels: their health and held-out numbers."""
    names = dict.fromkeys(name for run in runs for name in run.numbers)
    wanted = [name for name in names if name.startswith(("health/", "held_out/"))]
    left_out = (*NO_READING, *OF_LABELS)
    return [name for name in wanted if not any(fnmatchcase(name, pattern) for pattern in left_out)]


def group(runs: Sequence[Finished], name: str) -> Group:
    """A number of runs against their kNN accuracy, signed so that more is better where it is known; other runs are
    left out."""
    runs = known(runs, name, KNN)
    sign = -1 if better(name) == LOWER else 1
    x, y = ([run.numbers[key] for run in runs] for key in (name, KNN))
    return Group([sign * value for value in x], y, [run.identity for run in runs])


@dataclass(frozen=True)
class Choice:
    """The run that a number would keep; rho against kNN over these runs, or why there is none."""

    name: str
    run: Finished
    rho: Rho | None
    no_rho: str
    methods: int

    @property
    def doubts(self) -> list[str]:
        """Why the choice is not to be trusted; empty where nothing speaks against it."""
        found = self.rho.doubts if self.rho is not None else [self.no_rho]
        if self.name.startswith("held_out/") and self.methods > 1:
            found.append(f"the runs are of {self.methods} methods, whose held-out numbers may be on different scales")
        return found

    def __str__(self) -> str:
        chosen = self.run.numbers
        said = f"{self.name} {digits(chosen[self.name])}"
        accuracy = f", {KNN} {digits(chosen[KNN])}" if KNN in chosen and self.name != KNN else ""
        lines = [f"keep {self.run.title}: the {better(self.name)} the better, {said}{accuracy}; it is {self.run.place}"]
        if self.name == KNN:
            lines.append("chosen with labels, by the accuracy that other numbers are held against")
            return "\n".join(lines)
        if self.rho is not None:
            over = f"{self.rho.n} runs of {self.rho.points} points"
            lines.append(f"rho of {self.name} with {KNN}: {self.rho} over {over}")
        if self.name == LINEAR or self.name.startswith("probe/"):
            lines.append("chosen with labels")
        if self.doubts:
            lines.append(f"do not trust this choice: {'; '.join(self.doubts)}")
        return "\n".join(lines)


def check_name(name: str) -> None:
    """Raises UserError where it is not known which way of a number is better: then it chooses nothing."""
    if better(name) is None:
        names = [KNN, LINEAR, *(pattern for pattern in BETTER if "*" not in pattern)]
        names += ["held_out/mi_nats", "held_out/nce_nats", "held_out/info_nce", "held_out/reconstruction"]
        likely = next((known for known in names if known.endswith(f"/{name}")), name)
        raise UserError(f"--choose-by: whether more or less of {name!r} is better is not known{nearest(likely, names)}")


def choose(runs: Sequence[Finished], name: str) -> Choice:
    """The run with the best value of a number; of equal ones the first. Raises UserError where no run has it."""
    have = known(runs, name)
    if not have:
        names = {key for run in runs for key in run.numbers if better(key)}
        raise UserError(f"--choose-by: no finished run has {name!r}{nearest(name, names)}")
    if name.startswith("held_out/"):
        have = [run for run in have if not uses_labels(run)]
        if not have:
            raise UserError(f"--choose-by: {name!r} needs labels in all of these runs, because their criterion does")
    sign = -1 if better(name) == LOWER else 1
    best = max(have, key=lambda run: sign * run.numbers[name])
    measured = group(have, name)
    reason = why_not(measured) or ""
    if not known(have, KNN):
        reason = f"no run has {KNN}, so its worth was never measured"
    rho = None if reason else spearman(measured)
    return Choice(name, best, rho, reason, len({run.method for run in have}))
