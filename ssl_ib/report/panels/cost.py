"""What the runs cost: time, images, memory."""

from __future__ import annotations

from ..blocks import Facts, Panel, Table, number
from ..curves import charts
from ..page import Page
from ..reading import RunData


def build(page: Page) -> Panel | None:
    found = [(run, _facts(run)) for run in page.runs]
    blocks: list = []
    if len(page.runs) == 1:
        blocks += [Facts(list(found[0][1].items()))] if found[0][1] else []
    else:
        head = list(dict.fromkeys(key for _, facts in found for key in facts))
        if head:
            blocks.append(
                Table(["run", *head], [[run.name, *(facts.get(key, "") for key in head)] for run, facts in found])
            )
    blocks += charts(
        page, "images_per_s", None, "Speed", "images a second", "The whole step, waiting for data included."
    )
    share = "The part of a step that waits for images, from 0 to 1. Near 0 is good; more workers may lower it."
    blocks += charts(page, "data_share", None, "Waiting for data", "share of a step", share)
    text = "What training took. Times are those of the machine at that hour, and include its evaluations."
    return Panel("Cost", text, blocks) if blocks else None


def _facts(run: RunData) -> dict[str, str]:
    facts = {}
    seconds, batch = run.results.get("seconds"), run.config.get("batch_size")
    if isinstance(seconds, (int, float)):
        minutes, left = divmod(round(seconds), 60)
        facts["Time"] = f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {left:02d} s"
    if run.last_step:
        facts["Steps"] = number(run.last_step)
        if isinstance(batch, int):
            facts["Images seen"] = number(run.last_step * batch)
    peak = run.about.get("peak_memory")
    if isinstance(peak, int):
        facts["Peak memory"] = f"{peak / 2**30:.2f} GiB of the {run.about.get('memory_of')}"
    device = run.environment.get("device")
    if device:
        facts["Device"] = str(device)
    return facts
