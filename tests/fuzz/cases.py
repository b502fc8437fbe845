"""What every mutated input is held to, and how inputs are mutated.

A command that reads it ends in time. It does what it was asked to, or refuses in one message with exit code 2; then
nothing in its folder has changed. It raises nothing else, and leaves no half-written file.
"""

import contextlib
import copy
import io
import os
import random
import resource
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import HealthCheck, configuration, given, seed, settings
from hypothesis import strategies as st

from ssl_ib import contract, device, run
from ssl_ib.config import plugins
from ssl_ib.contract import check_step
from ssl_ib.sweep import runner
from ssl_ib.trainer import Trainer

#: Cases of all targets together: so many in CI, always the same ones; `SSL_IB_FUZZ` asks for another number, which are
#: others each time, of the seed `SSL_IB_FUZZ_SEED`.
SHORT = 300
TOTAL = int(os.environ.get("SSL_IB_FUZZ", SHORT))
LONG = "SSL_IB_FUZZ" in os.environ
SEED = int(os.environ.get("SSL_IB_FUZZ_SEED", random.SystemRandom().randrange(2**32)))
#: Cases done so far, by target and exit code.
DONE: Counter[tuple[str, int]] = Counter()
#: Seconds after which a case hangs, and bytes of memory that the machine seems to have; the process can have a few
#: times as many, and what takes them without asking fails.
PATIENCE, MEMORY = 60, 1.5e9
#: Pixels of a view with which the first step is tried: attention over a million patches is work, and no hang.
WIDEST = 512
#: Characters of what a command may say: it quotes, it does not repeat.
LONGEST = 20_000

# Nothing of hypothesis's own is left in the working directory.
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "ssl_ib_hypothesis")


class Reached(BaseException):
    """All was found right, and the work would begin now."""


class Hang(BaseException):
    """A case has not ended in time."""


def fuzzed(share: int, **drawn: st.SearchStrategy) -> Callable:
    """Has a test run with drawn arguments, `share` times out of the 300 in CI."""

    def decorate(test: Callable) -> Callable:
        profile = settings(
            max_examples=-(-share * TOTAL // SHORT),
            derandomize=not LONG,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        found = profile(given(**drawn)(test))
        return seed(SEED)(found) if LONG else found

    return decorate


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Ends what takes too long, and refuses memory far beyond what there seems to be."""

    def over(signum: int, frame: object) -> None:
        raise Hang(f"not done after {PATIENCE} seconds of the processor, or {15 * PATIENCE} in all")

    signals = (signal.SIGPROF, signal.SIGALRM)
    former, limits = [signal.signal(signum, over) for signum in signals], resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(4 * MEMORY), limits[1]))
    # Of the processor's time, which a busy machine does not use up; what waits for ever uses none.
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    signal.setitimer(signal.ITIMER_REAL, 15 * PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for signum, handler in zip(signals, former, strict=True):
            signal.signal(signum, handler)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in folder.rglob("*")
    }


def holds(target: str, main: Callable[[list[str]], int], *arguments: str, folder: Path) -> int:
    """Runs a command in this process and in `folder`, and asserts what it is held to; returns its exit code."""
    before = contents(folder)
    said = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors=how) for how in ("strict", "backslashreplace")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        patch.setenv("XDG_CACHE_HOME", str(Path(tempfile.gettempdir()) / "ssl_ib_fuzz_cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(Trainer, "fit", _reached)
        patch.setattr(contract, "check_step", _tried)
        patch.setattr(runner, "run_all", lambda *given: ({}, 0))
        patch.setattr(run, "DRY_BATCH", 2)
        patch.setattr(plugins, "entry_points", lambda group: ())  # Looking for them takes longer than many a case.
        patch.setattr(device, "free_memory", lambda device=None: MEMORY)
        with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[1]), _bounded():
            try:
                code = main(list(arguments))
            except Reached:
                code = 0
            except SystemExit as usage:  # argparse's own message.
                code = usage.code
    DONE[target, code] += 1
    text = "".join(stream.buffer.getvalue().decode() for stream in said if not stream.flush())
    assert code in (0, 2), (code, text)
    after = contents(folder)
    if code == 2:
        assert text.count("ssl-ib-") >= 1 and len(text) < LONGEST, text[:LONGEST]
        assert after == before, sorted({*after} ^ {*before}) or [name for name in after if after[name] != before[name]]
    assert not [name for name in after if name.endswith(".tmp")]
    return code


def _reached(trainer: Trainer) -> None:
    raise Reached


def _tried(task, model, criterion, sample, plain, *more):
    if plain.shape[-1] > WIDEST:
        raise Reached
    return check_step(task, model, criterion, sample, plain, *more)


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """A folder for one case, in a folder of its own: a path may lead out of it by a step."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "work"
        folder.mkdir()
        yield folder


#: Numbers at which formats and sizes have their bounds.
EDGES = [
    0,
    1,
    2,
    3,
    7,
    -1,
    -2,
    127,
    128,
    255,
    256,
    1000,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    -(2**63),
]
#: Values that are wrong in most places.
WRONG = [
    *(0, 1, -1, 2, 3, 5, 64, 1000, 10**6, 2**31, 2**62, 2**63 - 1, -(2**63)),
    *(0.0, 0.5, -0.5, 1.0, 1.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")),
    *(
        "",
        " ",
        "a",
        "none",
        "auto",
        "a.b",
        "é\n",
        "~",
        ".",
        "..",
        "/dev/null",
        "../../x",
        "x" * 300,
        "1e-3",
        "0",
        "nan",
    ),
    *(True, False, None, [], {}, [0], [0, 0], [1, 2, 3], [-1.5, 1e9], [[]], ["a", "b"], {"name": "x"}, {"a": 1}),
    *({"from": 0, "to": 1}, {"from": 1, "to": 0, "shape": "cosine"}, {"from": "a", "to": []}, {"from": 0, "to": 1e300}),
]


def places(tree: object, path: tuple = ()) -> list[tuple]:
    """The path of every value in nested mappings and lists, but of the whole."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in pairs for found in [(*path, key), *places(value, (*path, key))]]


def parent(tree, path: tuple):
    """What holds the value at a path."""
    for key in path[:-1]:
        tree = tree[key]
    return tree


def nudge(value: object, number: int) -> object:
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int():
            return [0, 1, 2, 3, 4, 6, 7, 16, 17, 60, 100, value + 1, value - 1, 2 * value, value // 2, -value][
                number % 16
            ]
        case float():
            return [0.0, 1.0, 0.5, 1e-9, 0.999999, 2.0, 10.0, 1e4, 10 * value, value / 10, -value, 1e38][number % 12]
        case str():
            return value[: number % (len(value) + 1)]
        case list():
            return [nudge(item, number) for item in value] if number % 3 else [*value, *value[:1]]
        case _:
            return value


#: What is done to a value in a tree: mostly what leaves the rest of it to be looked at.
CHANGES = ("known",) * 6 + ("nudge",) * 6 + ("put", "put", "delete", "rename", "move", "wrap", "schedule", "swap")


@st.composite
def mutations(draw, values: st.SearchStrategy, most: int = 3) -> list[tuple]:
    """What `mutate` does to a tree: up to `most` changes."""
    one = st.tuples(st.sampled_from(CHANGES), st.integers(0, 2**32), st.integers(0, 2**32), values)
    return draw(st.lists(one, min_size=1, max_size=most))


def mutate(tree: dict, changes: list[tuple], known: Mapping[str, list] = MappingProxyType({})) -> object:
    """Changes nested mappings and lists in place, and returns them; known: values that a key may have elsewhere."""
    for what, first, second, value in changes:
        # A tree of its own values: further changes reach no other case, and none comes to contain itself.
        value, there = copy.deepcopy(value), places(tree)
        if not there:
            return tree
        path = there[first % len(there)]
        holder, key, other = parent(tree, path), path[-1], there[second % len(there)]
        if what == "delete":
            del holder[key]
        elif what == "known":
            found = known.get(key, [])
            holder[key] = copy.deepcopy(found[second % len(found)]) if found else nudge(holder[key], second)
        elif what == "nudge":
            holder[key] = nudge(holder[key], second)
        elif what == "rename" and isinstance(holder, dict):
            holder[value if isinstance(value, str | int | float | None) else f"{key}s"] = holder.pop(key)
        elif what == "move":
            holder[key] = copy.deepcopy(parent(tree, other)[other[-1]])
        elif what == "wrap":
            holder[key] = [holder[key]] if second % 2 else {str(key): holder[key]}
        elif what == "schedule":
            holder[key] = {"from": holder[key], "to": value}
        elif what == "swap":
            held = parent(tree, other)
            if other[: len(path)] != path and path[: len(other)] != other:
                holder[key], held[other[-1]] = held[other[-1]], holder[key]
        else:
            holder[key] = value
    return tree


def damage(data: bytes, how: random.Random, other: bytes = b"") -> bytes:
    """Bytes with up to six changes at any places; other: what pieces are taken from besides."""
    changed = bytearray(data)
    for _ in range(how.choice((1, 1, 1, 2, 3, 6))):
        # Where formats have their headers as often as anywhere.
        size = len(changed)
        place = how.randrange(min(size, 64) + 1) if how.random() < 0.3 else how.randrange(size + 1)
        place = max(size - how.randrange(64), 0) if how.random() < 0.2 else place
        length = how.choice((1, 2, 4, 8, 30, 512, size))
        piece = (other or data)[(start := how.randrange(len(other or data) + 1)) : start + length]
        match how.randrange(8):
            case 0:
                changed[place : place + 1] = bytes([how.randrange(256)])
            case 1:
                changed[place : place + 1] = bytes([(changed[place] if place < size else 0) ^ 1 << how.randrange(8)])
            case 2:
                width = how.choice((1, 2, 4, 8))
                number = how.choice(EDGES) % 256**width
                changed[place : place + width] = number.to_bytes(width, how.choice(("little", "big")))
            case 3:
                del changed[place : place + length]
            case 4:
                del changed[place:]
            case 5:
                changed[place:place] = piece
            case 6:
                changed[place : place + len(piece)] = piece
            case 7:
                changed[place : place + length] = how.choice((b"\0", b"\xff", b"9", b"[")) * min(length, size - place)
    return bytes(changed)


#: How bytes are damaged: a generator that hypothesis seeds.
hows = st.randoms(use_true_random=True)
