"""The Triton kernels compiled ahead of time, without a GPU: nothing spills, everything fits, the table is right.

Compiling takes a process in which the interpreter is off, and some seconds a variant: a few of each module by default,
all of them with `pytest -m slow`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import triton, triton_table
work = json.loads(sys.argv[1])
usages = [triton_table.compiled(*task) for task in work]
print(json.dumps([triton.__version__, [vars(usage) | {"line": usage.line()} for usage in usages]]))
"""


@pytest.fixture(scope="module")
def table():
    """tools/triton_table.py as a module."""
    specification = importlib.util.spec_from_file_location("triton_table", ROOT / "tools" / "triton_table.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["triton_table"] = module
    specification.loader.exec_module(module)
    return module


def child(script: str, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def tasks() -> list:
    """Every (module, number, capability)."""
    return json.loads(child("import json, triton_table; print(json.dumps(triton_table.tasks()))"))


def check(table, work: list) -> None:
    version, usages = json.loads(child(SCRIPT, json.dumps(work)))
    committed_version, lines = table.committed()
    assert len(usages) == len(work) > 0
    for usage in usages:
        assert usage["spilled"] == 0, usage
        assert usage["shared"] <= table.SHARED_LIMIT[usage["capability"]], usage
        if version == committed_version:
            assert lines[usage["name"], usage["capability"]] == usage["line"]


def test_every_variant_stands_in_the_table_without_spills(table, tasks):
    _, lines = table.committed()
    assert len(lines) == len(tasks)
    for (_, capability), line in lines.items():
        registers, spilled, shared = (int(cell) for cell in line.split("|")[3:6])
        assert 0 < registers <= 255 and spilled == 0 and shared <= table.SHARED_LIMIT[capability], line
    hopper = [line for (name, capability), line in lines.items() if capability == 90 and "bf16" in name]
    for kernel in ("softmax_forward", "lse_gradient", "prototype_gradient"):
        assert all(line.endswith("| yes |") for line in hopper if line.startswith(f"| {kernel} ")), kernel


def test_some_variants_of_every_module_compile_as_the_table_says(table, tasks):
    """One variant of a module: the first and the last in turn, for each architecture in turn."""
    chosen = []
    for i, module in enumerate(table.MODULES):
        mine = [task for task in tasks if task[0] == module and task[2] == table.CAPABILITIES[i % 3]]
        chosen.append(mine[-(i % 2)])
    check(table, chosen)


@pytest.mark.slow
def test_all_variants_compile_as_the_table_says(table, tasks):
    check(table, tasks)
