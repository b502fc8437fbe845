"""Mistakes a user can make. The command line prints their message and exits with code 2, without a traceback.

Our own bugs are `assert`s and ordinary exceptions: those keep their traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave; the message says what was expected, what came, and the choices."""


class ConfigError(UserError):
    """Everything wrong with a configuration, reported together."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{head} in the configuration:\n" + "\n".join(f"  - {p}" for p in problems))


class EndedElsewhere(UserError):
    """Another process of the group has failed and says why. The command line ends without a word of its own."""


def nearest(name: str, choices: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """A hint for an unknown name: `; did you mean 'x'?` where something is close, then the choices.

    elsewhere: dotted keys, which are suggested where the last step of one is closer than every choice.
    """
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    by_last_step: dict[str, list[str]] = {}
    for key in elsewhere:
        by_last_step.setdefault(key.rpartition(".")[2], []).append(key)
    # Among the choices a weak likeness is a hint; among the many keys elsewhere only a strong one is.
    best = difflib.get_close_matches(name, {*close, *by_last_step}, n=1, cutoff=0.8)
    best = best or [step for step in by_last_step if step.startswith(f"{name}_") and not close]
    if best and best[0] not in close:
        close = by_last_step[best[0]][:3]
    hint = f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    return f"{hint or ';'} choices: {', '.join(choices) or '(none)'}"
