"""The README keeps its word: its commands are those CI runs, its plugin trains, its names exist."""

import re
from pathlib import Path

import pytest

from ssl_ib.cli.train import main
from ssl_ib.config.recipe import recipe_names

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, number: int = 0) -> str:
    """The README's `number`-th code block of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[number]


def test_ci_runs_the_two_commands_as_they_stand_here():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = block("").strip().splitlines()
    assert len(commands) == 2
    assert re.findall(r'^run "(.*)"$', ci, re.MULTILINE) == commands


def test_the_plugin_is_under_30_lines_and_trains(tmp_path, monkeypatch, capsys):
    code = block("python")
    assert len(code.splitlines()) < 30
    (tmp_path / "my_parts.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    command = next(line for line in README.splitlines() if "--plugin my_parts.py" in line)
    # Some epochs of the README's command, on the same images.
    assert main([*command.split()[1:], "epochs=2", "eval.linear.enabled=false"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    scores = {name: float(score) for name, score in re.findall(r"(untrained|raw pixels|trained) ([\d.]+)", last)}
    assert set(scores) == {"untrained", "raw pixels", "trained"}
    rows = (tmp_path / "runs" / "mrcl_digits" / "metrics.jsonl").read_text()
    assert "loss/align" in rows and "loss/uniform" in rows


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+_(?:digits|cifar10|imagenette96|imagenet))`", README))))
def test_every_recipe_named_here_is_shipped(name):
    assert name in recipe_names()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w/.]+)\)", README))))
def test_every_file_linked_here_exists(path):
    assert (ROOT / path).is_file()
