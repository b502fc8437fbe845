"""What `ssl-ib-eval` has found of the run: each protocol's results, and the pictures it drew."""

from __future__ import annotations

from typing import Any

from ...sweep.finished import flat
from ..blocks import Panel, Picture, Pictures, Table, number
from ..names import title, words
from ..page import Page
from ..reading import RunData

#: What the pictures of evaluations show, by the end of their name.
_SHOWN = {
    "confusion": "How the images of each class are named, in per cent of them; the diagonal is right.",
    "neighbours": "Held-out images and the training images that are nearest to them.",
    "map": "The features in two dimensions (t-SNE); near points are alike, and distances between groups mean little.",
}


def build(page: Page) -> Panel | None:
    protocols = list(dict.fromkeys(line["protocol"] for run in page.runs for line in run.evals))
    if not protocols:
        return None
    blocks = []
    for protocol in protocols:
        lines = [(run, line) for run in page.runs for line in run.evals if line["protocol"] == protocol]
        blocks.append(_table(page, protocol, lines))
        names = dict.fromkeys(path.stem for run in page.runs for path in page.figures(run))
        for name in names:
            if name.startswith(f"{protocol}_") and page.is_evaluation(name):
                shown = [
                    Picture(path, f"{run.name}: {name}")
                    for run in page.runs
                    for path in page.figures(run)
                    if path.stem == name
                ]
                said = next((text for end, text in _SHOWN.items() if end in name), "")
                blocks.append(Pictures(shown, title(words(name)), said))
    text = (
        "What the encoder is worth by each protocol of ssl-ib-eval. The spread says how far a value moves by chance; "
        "chance is what guessing gets. Only settings that differ between a protocol's results are shown."
    )
    return Panel("Evaluations", text, blocks)


def _table(page: Page, protocol: str, lines: list[tuple[RunData, dict[str, Any]]]) -> Table:
    settings = [flat(line["settings"]) if isinstance(line.get("settings"), dict) else {} for _, line in lines]
    keys = dict.fromkeys(key for one in settings for key in one)
    varied = [key for key in keys if len({repr(one.get(key)) for one in settings}) > 1]
    head = [*(["run"] if len(page.runs) > 1 else []), "step", *varied, "metric", "value", "spread", "chance"]
    rows = []
    for (run, line), one in zip(lines, settings, strict=True):
        spread = f"± {number(line['spread'])} ({line.get('spread_of')})" if _is_number(line.get("spread")) else ""
        cells = [*([run.name] if len(page.runs) > 1 else []), str(line.get("step", ""))]
        cells += ["" if one.get(key) is None else str(one[key]) for key in varied]
        value, chance = (number(v) if _is_number(v) else str(v or "") for v in (line.get("value"), line.get("chance")))
        rows.append([*cells, str(line.get("metric", "")), value, spread, chance])
    return Table(head, rows, title=title(words(protocol)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
