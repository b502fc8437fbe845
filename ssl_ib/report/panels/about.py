"""What was trained on what, how far it came, and the numbers that matter most."""

from __future__ import annotations

from typing import Any

from ..blocks import Bar, Bars, Facts, Note, Panel, Part, Table, Tiles, number, percent
from ..page import Page
from ..reading import RunData

#: Classes that are shown with a bar each.
MOST_CLASSES = 20


def build(page: Page) -> Panel | None:
    notes = [Note(f"{run.name}: {problem}") for run in page.runs for problem in run.problems]
    if page.sweep is not None:
        return Panel("What could not be read", "", notes) if notes else None
    if len(page.runs) > 1:
        head = ["run", "method", "images", "kNN top-1", "linear top-1", "minutes", "status"]
        rows = [_row(run) for run in page.runs]
        known = [n for n in range(len(head)) if any(row[n] for row in rows)]
        table = Table([head[n] for n in known], [[row[n] for n in known] for row in rows])
        text = "The runs of this page, with the accuracy of each one's trained encoder on its own held-out images."
        return Panel("The runs", text, [*notes, table])
    if not page.runs:
        return None
    run = page.runs[0]
    text = f"What was trained on what, and what came of it. {run.status}"
    classes = _classes(run)
    blocks = [*notes, Tiles(_tiles(run)), Facts(_facts(run), span=2 if classes else 3), *classes]
    return Panel("The run", text, [block for block in blocks if getattr(block, "rows", True)])


def method(run: RunData) -> str:
    """Model and criterion by name, with those inside them."""
    parts = (run.config.get(key) for key in ("model", "criterion"))
    return " + ".join(named(part) for part in parts if part is not None)


def named(part: Any) -> str:
    """A part's name, and in brackets those of the parts inside it."""
    if not isinstance(part, dict):
        return str(part)
    inner = [named(value) for value in part.values() if isinstance(value, dict) and "name" in value]
    return f"{part.get('name')} ({', '.join(inner)})" if inner else str(part.get("name"))


def _row(run: RunData) -> list[str]:
    scores = [run.number("trained", key) for key in ("knn/top1", "linear/top1")]
    seconds = run.results.get("seconds")
    return [
        run.name,
        method(run),
        number(run.about["images"]["train"]) if run.about.get("images") else "",
        *("" if score is None else percent(score) for score in scores),
        "" if seconds is None else number(seconds / 60),
        run.status if not run.results else "finished",
    ]


def _tiles(run: RunData) -> list[tuple[str, str, str]]:
    tiles = []
    knn = run.number("trained", "knn/top1")
    if knn is not None:
        others = [
            (name.replace("_", " "), run.number(name, "knn/top1")) for name in (run.first, "raw_pixels", "chance")
        ]
        than = ", ".join(f"{name} {percent(value)}" for name, value in others if value is not None)
        tiles.append(("kNN top-1, held out", percent(knn), than))
    if (linear := run.number("trained", "linear/top1")) is not None:
        tiles.append(("Linear probe top-1, held out", percent(linear), "a linear layer on the frozen features"))
    for name, key, why in (
        ("Held-out loss", "held_out/loss", "lower is better, for one method on the same images"),
        ("RankMe", "health/rankme", "dimensions in use; 1 is a collapse"),
    ):
        before, after = run.number(run.first, key), run.number("trained", key)
        if after is not None:
            tiles.append((name, number(after), why if before is None else f"{run.first} {number(before)}; {why}"))
    return tiles


def _facts(run: RunData) -> list[tuple[str, str]]:
    config, about = run.config, run.about
    facts = [("Recipe", config.get("recipe"))]
    facts += [(key.capitalize(), named(config.get(key))) for key in ("task", "model", "criterion", "masker", "views")]
    facts.append(("Backbone", _backbone(config.get("model"))))
    facts.append(("Source", _source(config.get("source"))))
    if images := about.get("images"):
        held = f", {images['held_out']:,} held out" if images.get("held_out") else ", none held out"
        facts.append(("Images", f"{images['train']:,} trained on{held}"))
    facts += [("Labels", note) for note in about.get("notes", ())]
    chance, scored = run.number("chance", "knn/top1"), run.number("chance", "images")
    if chance is not None:
        of = "" if scored is None else f", on {number(scored)} images that are scored"
        facts.append(("Chance", f"{percent(chance)}: always naming the most frequent class{of}"))
    if parameters := about.get("parameters"):
        facts.append(("Parameters", f"{parameters['all']:,}, of which {parameters['trained']:,} are trained"))
    if "epochs" in config:
        steps = f" ({run.last_step:,} steps logged)" if run.last_step else ""
        facts.append(("Length", f"{config['epochs']} epochs of batches of {config.get('batch_size')}{steps}"))
    facts += [("Starts from", about.get("start")), ("Seed", config.get("seed")), ("Precision", config.get("precision"))]
    return [(name, str(value)) for name, value in facts if value not in (None, "", "None", "none")]


def _backbone(model: Any) -> str | None:
    if not isinstance(model, dict):
        return None
    if "backbone" in model:
        arguments = model.get("backbone_args") or {}
        given = ", ".join(f"{key} {value}" for key, value in arguments.items())
        return f"{model['backbone']} ({given})" if given else str(model["backbone"])
    return next((found for value in model.values() if (found := _backbone(value))), None)


def _source(source: Any) -> str | None:
    if not isinstance(source, dict):
        return None
    return ", ".join(filter(None, [str(source.get("name")), str(source.get("path") or "")]))


def _classes(run: RunData) -> list[Any]:
    classes, counts = run.about.get("classes") or [], run.about.get("class_counts") or {}
    if not classes or not any(counts.get("train", ())):
        return []
    names = [name for name in ("train", "held_out") if name in counts]
    title = f"Images of each of the {len(classes)} classes"
    words = {"train": "trained on", "held_out": "held out"}
    if len(classes) > MOST_CLASSES:
        rows = [[label, *(f"{counts[name][k]:,}" for name in names)] for k, label in enumerate(classes)]
        return [Table(["class", *(words[name] for name in names)], rows, title=title, folded=True)]
    most = max(counts["train"])
    held = counts.get("held_out")
    rows = [
        Bar(str(label), [Part(count / most, f"{count:,}" + (f" + {held[k]:,}" if held else ""))])
        for k, (label, count) in enumerate(zip(classes, counts["train"], strict=True))
    ]
    return [Bars(title, rows, text="Trained on, as a bar, and held out, behind the plus." if held else "Trained on.")]
