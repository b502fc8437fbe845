"""The pages for Python and for plugins, and the notebook: every block of code runs as it stands there.

What they train is cut down to the tests' small recipe, after the recipe and the overrides were resolved as written.
"""

import json
import re
import shlex
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from harness import FIGURES, TINY
from PIL import Image
from sklearn.datasets import load_digits

import ssl_ib
from ssl_ib import api
from ssl_ib.cli.train import main

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTEBOOK = json.loads((DOCS / "first_steps.ipynb").read_text(encoding="utf-8"))


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of the code blocks of a page, in their order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(here, monkeypatch):
    """Training as written, on a small recipe, and without figures."""
    configure = api.configure

    def smaller(recipe, overrides, plugins, say):
        configure(recipe, overrides, plugins, say)
        return configure(TINY, [*overrides, "epochs=1"], plugins, say)

    monkeypatch.setattr(api, "configure", smaller)
    for name in FIGURES:
        monkeypatch.setattr(f"ssl_ib.record.{name}", lambda *given, **more: None)


def test_python(small, capsys):
    found = {}
    for language, code in blocks("python.md"):
        assert language == "python"
        exec(compile(code, "docs/python.md", "exec"), found)
    assert "epochs: expected a valid integer, got 'many'" in capsys.readouterr().out
    assert (Path("runs/first") / "results.json").is_file() and len(found["losses"]) == 11
    assert found["names"] == sorted(f"{number}.png" for number in range(10))
    order = [int(name.split(".")[0]) for name in found["names"]]
    assert (found["features"][order] - found["features_of_files"]).abs().max() < 1e-4
    assert 0.5 < found["accuracy"] <= 1 and 0.5 < found["probe"] <= 1
    assert found["history"][-1] < 0.9 * found["history"][0]
    assert found["again"].item() == pytest.approx(found["loss"].item(), rel=1e-5)


def test_your_images(small):
    for number, digit in enumerate(load_digits().images[:40]):
        folder = Path("photos") / ("left" if number % 2 else "right")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digit * 15).astype("uint8")).save(folder / f"{number}.png")
    ssl_ib.train("simclr_digits", out="runs/simclr_vit_tiny_224")
    found = {}
    for language, code in blocks("your_images.md"):
        if language == "python":
            exec(compile(code, "docs/your_images.md", "exec"), found)
    assert found["features"].shape == (40, 24) and [*found["classifier"].classes_] == ["left", "right"]


PLUGINS = blocks("plugins.md")


def test_plugins_of_every_kind_are_shown():
    shown = re.findall(r"^@(register_\w+)\(", "".join(code for _, code in PLUGINS), re.MULTILINE)
    assert {*shown} == {f"register_{kind}" for kind in ("masker", "criterion", "model", "task", "views", "source")}


def test_plugins(here, capsys):
    """Each plugin goes through the command that is shown below it."""
    passed = 0
    for language, code in PLUGINS:
        if name := re.match(r"# (\w+\.py)\n", code):
            Path(name[1]).write_text(code)
        elif language == "python":
            exec(compile(code, "docs/plugins.md", "exec"), {})
        else:
            program, *arguments = shlex.split(code.replace("\\\n", " "))
            assert program == "ssl-ib-train" and "--plugin" in arguments
            assert main([*arguments, "--dry-run"]) == 0, capsys.readouterr().err
            passed += 1
    assert passed == 8


def test_the_notebook_is_stripped():
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert len(NOTEBOOK["cells"]) == 10 and len(code) == 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_notebook(small, monkeypatch):
    monkeypatch.setattr(plt, "switch_backend", plt.switch_backend)
    plt.switch_backend("agg")
    found = {}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "docs/first_steps.ipynb", "exec"), found)
    assert found["features"].shape == (1797, 24) and found["accuracy"] > 0.5
    assert len(found["axes"].lines) >= 1 and all(panel.images for panel in found["panels"].flat)
    plt.close("all")
