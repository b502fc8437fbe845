"""What importing costs, and the order of the rooms: no module imports one of a higher room."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import ssl_ib

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


@pytest.mark.parametrize("command", ["train", "sweep", "bench", "embed", "export", "eval", "info"])
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
    "errors types random distributed device config part contract ops info run data record pretrained initialise "
    "maskers tasks models criterions evals embed export optim trainer api bench sweep instruments cli"
).split()


def imports() -> dict[str, set[str]]:
    """Which modules of the package each module imports anywhere in it, also lazily and for type checkers alone."""
    package = Path(ssl_ib.__file__).parent
    files = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    files = {name.removesuffix("__init__").removesuffix("."): path for name, path in files.items()}
    del files[""]  # It shows names of every room, and needs none of them.
    found = {}
    for name, path in files.items():
        inside = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = inside[: len(inside) + 1 - node.level] + (node.module or "").split(".")
                base = ".".join(filter(None, base))
                for alias in node.names:
                    target = f"{base}.{alias.name}".lstrip(".")
                    found[name].add(target if target in files else base)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                assert not any(n.split(".")[0] == "ssl_ib" for n in names), f"{path}: imports within are relative"
        found[name] -= {"", name}
    return found


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
