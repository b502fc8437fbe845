"""Every line of the documents that begins with one of our commands is a command that works."""

import re
import shlex
from pathlib import Path

import pytest
from harness import without_files

from ssl_ib.cli import data, doctor, embed, export, info, report, sweep, train
from ssl_ib.cli import eval as evaluation
from ssl_ib.config.config import configure
from ssl_ib.config.settings import settings
from ssl_ib.evals.protocol import settings_of
from ssl_ib.run import build_run
from ssl_ib.sweep import points

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


#: Commands whose arguments are checked, and nothing else of them.
PARSED = {
    "ssl-ib-data": data.parser,
    "ssl-ib-doctor": doctor.parser,
    "ssl-ib-embed": embed.parser,
    "ssl-ib-export": export.parser,
    "ssl-ib-info": info.parser,
    "ssl-ib-report": report.parser,
}


def commands() -> list[tuple[str, list[str]]]:
    """(page and line, words) of each command in a code block, with shell variables in their places."""
    found = []
    for page in PAGES:
        variables: dict[str, str] = {}
        fenced = inside = False
        kept = ""
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
            if line.startswith("```"):
                inside = not fenced and line == "```"  # A block with a language is no terminal's.
                fenced, kept = not fenced, ""
                continue
            if not inside:
                cells = re.findall(r"`(ssl-ib-eval [^`]+)`", line) if line.startswith("|") else []
                found += [(f"{page.name}:{number}", shlex.split(cell)) for cell in cells]
                continue
            kept += line
            if not re.match(r"\w+=|ssl-ib-", kept):  # A diagram, a table, another command.
                kept = ""
                continue
            if kept.endswith("\\"):
                kept = kept[:-1]
                continue
            kept = re.sub(r"\$(\w+)", lambda m, known=variables: known[m[1]], kept)
            words, kept = shlex.split(kept, comments=True), ""
            while words and (assigned := re.fullmatch(r"(\w+)=(.*)", words[0])):
                variables[assigned[1]] = assigned[2]
                words.pop(0)
            if words and words[0] in ("ssl-ib-train", "ssl-ib-sweep", "ssl-ib-eval", *PARSED):
                found.append((f"{page.name}:{number}", words))
    return found


COMMANDS = commands()
named = pytest.mark.parametrize("words", [pytest.param(words, id=place) for place, words in COMMANDS])


def on_digits(text: str) -> str:
    """Overrides without those of an image set that may be absent."""
    return " ".join(word for word in text.split(" ") if not word.startswith("source."))


def alone(words: list[str], overrides: list[str], recipe: str) -> list[str]:
    """A command's overrides, changed so that it needs no file."""
    elsewhere = ("source", "eval.source", *(("views.run", "views.space") if recipe.startswith("learned_split") else ()))
    kept = [text for text in overrides if not text.startswith(elsewhere)]
    # Where patches are cut at a distance, the digits have to be large.
    return [*kept, *without_files(recipe, 192 if "patches" in " ".join(words) else None)]


def resolved(words: list[str]) -> list:
    """The configurations that a command trains, on digits. Raises UserError where there is a mistake in it."""
    if words[0] in PARSED:
        PARSED[words[0]]().parse_args(words[1:])
        return []
    if words[0] == "ssl-ib-eval":
        options = evaluation.parser().parse_intermixed_args(words[1:])
        if options.encoder is not None:  # Neither --list nor --describe.
            settings(settings_of(options.protocol), options.overrides).check()
        return []
    if words[0] == "ssl-ib-train":
        options = train.parser().parse_intermixed_args(words[1:])
        if options.list or options.describe or options.plugin:
            return []
        # The folder that a run of a recipe leaves is a recipe too.
        options.recipe = options.recipe.removeprefix("runs/")
        options.overrides = alone(words, options.overrides, options.recipe)
        return [train.configuration(options)]
    options = sweep.parser().parse_intermixed_args(words[1:])
    overrides = alone(words, options.overrides, options.recipe)
    problems: list[str] = []
    axes = points.parse_axes(options.vary, [on_digits(case) for case in options.case], overrides, problems)
    seeds = points.parse_seeds(options.seeds, problems) if options.seeds else None
    assert not problems
    return [run.config for run in points.grid(options.recipe, overrides, axes, seeds, configure)]


def test_no_command_is_left_out():
    """All that a line of a page begins with, but for the README's first, which pip precedes."""
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    ours = "train|sweep|eval|embed|export|info|report|data|doctor"
    begun = [line for line in lines if re.match(rf"\s*(\w+=\S+ )*ssl-ib-({ours}) ", line)]
    begun += [cell for line in lines if line.startswith("| ") for cell in re.findall("`ssl-ib-eval ", line)]
    assert len(begun) == len(COMMANDS) and not any(line.strip() == "\\" for line in lines)


def test_there_are_commands_on_every_page_of_a_method():
    assert {place.split(":")[0] for place, _ in COMMANDS} >= {
        "README.md",
        "mrcl.md",
        "mi_mae.md",
        "svib.md",
        "sweeps.md",
    }


@named
def test_a_documented_command_resolves(words):
    resolved(words)


@named
def test_what_a_documented_command_trains_can_be_built(words):
    small = [config for config in resolved(words) if not config.recipe.endswith(("imagenet", "imagenet_400ep"))]
    # The first and the last point of a grid, with its first seed.
    for config in {id(config): config for config in small[:1] + small[-1:]}.values():
        build_run(config, dry=True)


@pytest.mark.slow
@named
def test_every_point_of_a_documented_command_can_be_built(words):
    for config in resolved(words):
        build_run(config, dry=True)


def anchors(page: Path) -> set[str]:
    """What can be linked to in a page: its headings, as they are spelled in addresses."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(found), f"{page.name} links to {target}: no such heading"


def test_every_page_can_be_found():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = {Path(target.partition("#")[0]).name for target in re.findall(r"\]\(([^)\s]+)\)", index)}
    assert {page.name for page in PAGES} - {"index.md"} <= linked
