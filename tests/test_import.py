"""What importing costs, and the order of the rooms: no module imports one of a higher room."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ssl_ib
from tools.draw_rooms import PAGE, imports, mermaid

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"timm", "torchvision", "pydantic", "yaml", "sklearn", "matplotlib", "tensorboard", "safetensors", "PIL"}


def modules_after(code):
    """Top-level packages in a fresh interpreter after some code."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", script]
    return set(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split())


def test_a_decorator_needs_torch_alone():
    loaded = modules_after(
        "import ssl_ib\n"
        "@ssl_ib.register_criterion('mine')\n"
        "class Mine(ssl_ib.Criterion):\n"
        "    def forward(self, outputs, batch, progress): ...\n"
        "assert 'ssl_ib.criterions' not in sys.modules\n"
        "import torch; assert not torch.cuda.is_initialized()\n"
    )
    assert {"ssl_ib", "torch"} <= loaded and not loaded & HEAVY


def test_ops_need_torch_and_triton_alone():
    loaded = modules_after("sys.path.append('kernels')\nimport ssl_ib.ops, ssl_ib_kernels")
    assert {"ssl_ib", "ssl_ib_kernels", "torch"} <= loaded and not loaded & (HEAVY | {"annotated_types"})


@pytest.mark.parametrize("command", "train sweep bench embed export eval info report data doctor".split())
def test_help_needs_no_torch(command):
    loaded = modules_after(
        f"import contextlib, io\nfrom ssl_ib.cli import {command}\n"
        f"with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): {command}.main(['--help'])"
    )
    assert "ssl_ib" in loaded and not loaded & (HEAVY | {"torch", "annotated_types"})


@pytest.mark.parametrize("arguments", [["--list"], ["--list", "recipes"], ["--describe", "recipe:mrcl_digits"]])
def test_names_need_no_torch(arguments):
    loaded = modules_after(
        "import contextlib, io\nfrom ssl_ib.cli import train\n"
        f"with contextlib.redirect_stdout(io.StringIO()): assert train.main({arguments}) == 0"
    )
    assert "yaml" in loaded and not loaded & ((HEAVY | {"torch"}) - {"yaml"})


def test_public_names():
    code = "import ssl_ib; assert {*ssl_ib.__all__} <= {*dir(ssl_ib)}; from ssl_ib import *; print('names', len(dir()))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("names ")
    with pytest.raises(AttributeError, match="has no attribute 'register_nothing'"):
        ssl_ib.register_nothing  # noqa: B018
    # What is loaded lazily is what type checkers and editors are told.
    block = next(node for node in ast.parse(Path(ssl_ib.__file__).read_text()).body if isinstance(node, ast.If))
    told = {alias.name: statement.module for statement in block.body for alias in statement.names}
    assert set(told) == set(ssl_ib.__all__)
    for name, module in told.items():
        assert getattr(ssl_ib, name) is getattr(importlib.import_module(f"ssl_ib.{module}"), name)


def test_a_configuration_needs_no_parts():
    loaded = modules_after("import ssl_ib.config.config, ssl_ib.config.recipe\nssl_ib.config.recipe.recipe_names()")
    assert "pydantic" in loaded and not loaded & (HEAVY - {"pydantic", "yaml"})


#: The rooms of the package, lowest first: a module imports its own room and those before it.
ROOMS = (
    "errors types random heartbeat distributed device flops config part contract ops info run data record pretrained "
    "initialise maskers tasks models criterions evals embed export optim sharding graphs trainer sweep report api "
    "bench instruments doctor cli"
).split()


def test_rooms_import_downwards():
    graph = imports()
    assert {name.split(".")[0] for name in graph} == set(ROOMS)
    upwards = [
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in targets
        if ROOMS.index(target.split(".")[0]) > ROOMS.index(name.split(".")[0])
    ]
    assert not upwards


def test_no_import_circle():
    graph = imports()
    done: set[str] = set()
    while ready := [name for name, targets in graph.items() if name not in done and targets <= done]:
        done.update(ready)
    assert not {name: targets - done for name, targets in graph.items() if name not in done}


def test_the_drawing_of_the_rooms_is_of_these_imports():
    assert f"```mermaid\n{mermaid()}```\n" in PAGE.read_text(encoding="utf-8"), "python tools/draw_rooms.py --write"
    table = PAGE.read_text(encoding="utf-8").partition("## The house")[2].partition("Beside it:")[0]
    assert {name.strip("/") for name in re.findall(r"`(\w+/?)`", table)} >= set(ROOMS)
