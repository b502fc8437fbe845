"""tools/gpu_check.sh without a GPU: what its programs import, which steps run, and what it makes of their ends.

Where it runs there is torch, triton, numpy and pytest, and nothing else that the package requires.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
STEPS = ["build", "bench", "tests", "sanitizer", "training"]

#: Hides packages from this process as if they were not installed, then imports whatever the check does.
BARE = """
import importlib, pkgutil, runpy, sys

HIDDEN = {"annotated_types", "lightly", "matplotlib", "PIL", "pydantic", "safetensors", "scipy", "sklearn",
          "tensorboard", "timm", "torchmetrics", "torchvision", "tqdm", "yaml"}

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
assert not HIDDEN & {name.partition(".")[0] for name in sys.modules}

for package in ("ssl_ib.ops", "ssl_ib_kernels", "ssl_ib.bench"):
    folder = importlib.import_module(package).__path__
    for module in pkgutil.walk_packages(folder, package + "."):
        importlib.import_module(module.name)
from ssl_ib.cli import bench
for tool in ("small_shapes", "crossover", "triton_table"):
    runpy.run_path(f"tools/{tool}.py")
bench.main(["token_gather", "--quick", "--device", "cpu", "--rounds", "1", "--baselines"])

import pytest
code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]])
assert code == 0, code
loaded = HIDDEN & {name.partition(".")[0] for name in sys.modules}
assert not loaded, loaded
print("nothing was missing")
"""


def check(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)


def test_what_the_check_runs_needs_torch_triton_and_pytest_alone():
    files = re.search("^tests: (.*)$", check("--plan").stdout, re.MULTILINE)[1].split()
    assert len(files) >= 4 and all((ROOT / file).is_file() for file in files)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", BARE, *files]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0 and "nothing was missing" in child.stdout, child.stdout + child.stderr


def test_the_plan_names_the_steps_and_limits_and_runs_nothing(machine):
    answer = machine("--plan")
    limits = dict(re.findall(r"^(\w+) +(\d+) s ", answer.stdout, re.MULTILINE))
    assert answer.returncode == 0 and list(limits)[: len(STEPS)] == STEPS
    assert all(0 < int(seconds) <= 9 * 60 for seconds in limits.values())
    assert not machine.calls.exists()


@pytest.fixture
def machine(tmp_path):
    """Runs the check with stand-ins for the programs that it calls: each notes its call in the file `calls`.

    FAIL: a pattern of calls that fail. SANITIZER, SANITIZER_CODE: what the sanitizer says and exits with.
    """
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    note = f'#!/bin/bash\necho "$(basename "$0") $* | PYTHONPATH=$PYTHONPATH" >> {calls}\n'
    programs = {
        "python3": 'echo "off: $PYTORCH_NO_CUDA_MEMORY_CACHING"\n[[ -n "$FAIL" && "$*" =~ $FAIL ]] && exit 3\n'
        'while [ $# -gt 0 ]; do [ "$1" = --json ] && touch "$2"; shift; done\nexit 0\n',
        "compute-sanitizer": 'echo "$SANITIZER"\nexit ${SANITIZER_CODE:-0}\n',
        "nvidia-smi": "",
        "nvcc": "",
    }

    def run(*arguments: object, without: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess:
        for name, body in programs.items():
            program = folder / name
            program.write_text(note + body)
            program.chmod(0o755)
            if name in without:
                program.unlink()
        path = os.pathsep.join([str(folder), "/usr/bin", "/bin"])
        return check(*arguments, PATH=path, **variables)

    run.calls, run.out = calls, tmp_path / "out"
    run.summary = lambda: (run.out / "summary.txt").read_text().splitlines()
    return run


def test_all_steps_in_order(machine):
    answer = machine(machine.out, SANITIZER="========= ERROR SUMMARY: 0 errors")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert [line.partition(":")[0] for line in machine.summary()] == STEPS
    assert all(re.search("passed after [0-9]+ s$", line) for line in machine.summary())
    calls = machine.calls.read_text()
    wanted = ("extension.load()", "--goals", "-m pytest", "memcheck", "racecheck")
    places = [calls.index(text) for text in wanted]
    assert places == sorted(places)
    for tool in ("memcheck", "racecheck"):
        for backend in ("cuda", "triton"):
            assert re.search(f"--tool {tool} .*small_shapes.py {backend} ", calls)
    # Memory that torch's allocator caches would hide a read past a tensor's end.
    assert "off: 1" in (machine.out / "sanitizer.log").read_text()


def test_steps_that_are_named_run_alone_and_as_named(machine):
    answer = machine(machine.out, "tests", "build")
    assert answer.returncode == 0
    assert [line.partition(":")[0] for line in machine.summary()] == ["tests", "build"]
    calls = machine.calls.read_text()
    assert "bench" not in calls and "small_shapes" not in calls


def test_training_is_timed_case_by_case_and_goes_on_where_it_was(machine):
    def cases() -> list[str]:
        pattern = r"bench_train.py (?:simclr|dino|mae|moco)_.*compile=\w+ .*--json \S+/training/(\S+).json"
        found = re.findall(pattern, machine.calls.read_text())
        machine.calls.unlink()
        return found

    assert machine(machine.out, "training", FAIL="graphs|compile=true").returncode == 1
    assert cases() == [
        f"{name}-{mode}" for mode in ("false", "graphs", "true") for name in ("simclr", "dino", "mae", "moco")
    ]
    assert "training: failed (exit 3)" in machine.summary()[-1]
    (machine.out / "training" / "mae-false.json").unlink()
    (machine.out / "training" / "dino-true.failed").unlink()
    answer = machine(machine.out, "training", TRAINING="log_every=7")
    assert answer.returncode == 0
    calls = machine.calls.read_text()
    assert cases() == ["mae-false", "dino-true"] and calls.count("log_every=7") == 2


def test_training_needs_what_the_package_needs(machine):
    answer = machine(machine.out, "training", FAIL="import pydantic")
    assert answer.returncode == 0 and "training: skipped: it needs the package's requirements" in machine.summary()[0]


def test_a_python_path_is_extended(machine):
    machine(machine.out, "build", PYTHONPATH="/somewhere:/else")
    paths = set(re.findall("PYTHONPATH=(.*)$", machine.calls.read_text(), re.MULTILINE))
    assert f"{ROOT}:{ROOT}/kernels:/somewhere:/else" in paths


def test_a_step_that_fails_stops_no_other(machine):
    answer = machine(machine.out, "build", "bench", "tests", FAIL="ssl_ib.cli.bench")
    assert answer.returncode == 1
    found = [re.sub(" after .*", "", line) for line in machine.summary()]
    assert found == ["build: passed", "bench: failed (exit 3)", "tests: passed"]


def test_a_step_at_its_limit_is_a_failure(machine, tmp_path):
    (tmp_path / "bin" / "timeout").write_text("#!/bin/bash\nexit 124\n")
    (tmp_path / "bin" / "timeout").chmod(0o755)
    assert machine(machine.out, "build").returncode == 1
    assert machine.summary()[0].startswith("build: stopped at its limit")


def test_a_sanitizer_that_is_refused_is_skipped(machine):
    answer = machine(machine.out, "sanitizer", SANITIZER="========= Error: Device not supported", SANITIZER_CODE="9")
    assert answer.returncode == 0
    assert machine.summary() == ["sanitizer: skipped: the machine refuses it (Device not supported)"]
    answer = machine(machine.out, "sanitizer", without=("compute-sanitizer",))
    assert answer.returncode == 0 and "not installed" in machine.summary()[-1]


def test_what_a_sanitizer_finds_is_a_failure(machine):
    answer = machine(machine.out, "sanitizer", SANITIZER="========= ERROR SUMMARY: 2 errors", SANITIZER_CODE="9")
    assert answer.returncode == 1 and machine.summary()[0].startswith("sanitizer: failed (exit 9)")
    assert (machine.out / "sanitizer.log").read_text().count("2 errors") == 4


def test_an_unknown_step_is_named(machine):
    answer = machine(machine.out, "benhc")
    assert answer.returncode == 2 and "unknown step 'benhc'; choices: build bench" in answer.stderr
    assert machine().returncode == 2 and not machine.calls.exists()
