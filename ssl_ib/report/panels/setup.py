"""All that is needed to repeat a run: its configuration, command and environment."""

from __future__ import annotations

import json
import shlex

import yaml

from ...config.recipe import YamlDumper
from ..blocks import Facts, Group, Panel, Text
from ..page import Page
from ..reading import RunData

#: Runs of a page whose files are shown.
MOST = 12


def build(page: Page) -> Panel | None:
    blocks = []
    for run in page.runs[:MOST]:
        inside = [Facts(_facts(run))] if run.environment else []
        if run.config:
            inside.append(Text("config.yaml", yaml.dump(run.config, Dumper=YamlDumper, sort_keys=False)))
        if run.environment:
            inside.append(Text("environment.json", json.dumps(run.environment, indent=2)))
        if inside:
            blocks += inside if len(page.runs) == 1 else [Group(run.name, inside, folded=True)]
    text = "The command, the versions and the whole configuration, with which the run can be repeated."
    if len(page.runs) > MOST:
        text += f" Those of the first {MOST} runs are shown; the others lie in their folders."
    return Panel("How to repeat it", text, blocks) if blocks else None


def _facts(run: RunData) -> list[tuple[str, str]]:
    found = run.environment
    git = found.get("git") or {}
    commit = git.get("commit", "")
    command = found.get("command") or []
    facts = [
        ("Command", shlex.join(["ssl-ib-train", *map(str, command[1:])]) if command else ""),
        ("Started", found.get("started")),
        ("Device", f"{found.get('device')}, threads: {found.get('threads')}"),
        ("Platform", f"{found.get('platform')}, Python {found.get('python')}"),
        ("ssl_ib", found.get("ssl_ib")),
        ("Commit", f"{commit}{', with uncommitted changes' if git.get('uncommitted_changes') else ''}"),
    ]
    return [(name, str(value)) for name, value in facts if value]
