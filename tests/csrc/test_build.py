"""Building the CUDA kernels: what nvcc makes of them, and what `ssl_ib.ops.extension` says where it cannot build."""

import itertools
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ssl_ib import UserError
from ssl_ib.ops import extension

SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "cuda").glob("*.cu"))
#: Half a minute each to optimise.
HEAVY = ("lse.cu", "posterior.cu")
#: What has to be found in a file's PTX: the widest accesses of global memory, and tensor cores.
INSTRUCTIONS = {
    "token_gather.cu": (r"ld\.global\.nc\.v4", r"st\.global\.v4"),
    "token_scatter.cu": (r"ld\.global\.nc\.v4", r"st\.global\.v4"),
}


def compilations() -> list:
    params = []
    for source, arch in itertools.product(SOURCES, ("90a", "80")):
        slow = arch == "80" or source.name in HEAVY
        marks = pytest.mark.slow if slow else ()
        params.append(pytest.param(source, arch, id=f"{source.stem} sm_{arch}", marks=marks))
    return params


@pytest.fixture(scope="module")
def nvcc():
    if (nvcc := extension.find_nvcc()) is None:
        pytest.skip("nvcc, CUDA's compiler, is neither on the PATH nor under CUDA_HOME")
    return nvcc


@pytest.mark.parametrize(("source", "arch"), compilations())
def test_kernels_fit_into_registers(nvcc, tmp_path, source, arch):
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    flags = [
        *extension.NVCC_FLAGS,
        gencode,
        "-Xptxas",
        "-v",
        "-Werror",
        "all-warnings",
        "--keep",
        "--keep-dir",
        tmp_path,
    ]
    command = [nvcc, *flags, "--cubin", source, "-o", tmp_path / "kernels.cubin"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'", answer.stderr)
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", answer.stderr)
    assert kernels and len(usage) >= len(kernels)
    assert {numbers for numbers in usage} == {("0", "0", "0")}, answer.stderr
    ptx = next(tmp_path.glob("*.ptx")).read_text()
    for instruction in INSTRUCTIONS.get(source.name, ()):
        assert re.search(instruction, ptx), instruction


@pytest.mark.parametrize("source", [s for s in SOURCES if s.name in HEAVY], ids=lambda source: source.stem)
def test_heavy_kernels_compile(nvcc, tmp_path, source):
    """Without optimising them, which takes seconds."""
    flags = [*extension.NVCC_FLAGS, "-gencode=arch=compute_90a,code=sm_90a", "-Xcicc", "-O0"]
    answer = subprocess.run([nvcc, *flags, "--ptx", source, "-o", tmp_path / "x.ptx"], capture_output=True, text=True)
    assert answer.returncode == 0 and ".entry" in (tmp_path / "x.ptx").read_text(), answer.stderr


# ---- ssl_ib.ops.extension ----

#: An extension without pybind11, which compiles at once.
MODULE = """
#include <Python.h>
#define JOIN(a, b) a##b
#define INIT(name) JOIN(PyInit_, name)
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "fake", 0, -1, 0};
PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)(void) {
    PyObject* m = PyModule_Create(&module);
    PyModule_AddIntConstant(m, "answer", ANSWER);
    return m;
}
"""


@pytest.fixture
def fresh():
    """Nothing looked for or loaded yet, and nothing of it kept."""

    def forget():
        extension._obstacle.cache_clear()
        extension.load.cache_clear()

    forget()
    yield forget
    forget()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Sources of our own in place of the package's, a folder for builds of our own, and nothing built yet."""
    sources = tmp_path / "csrc"
    (sources / "bindings").mkdir(parents=True)
    (sources / "cuda").mkdir()
    (sources / "bindings" / "module.cpp").write_text('#include "../answer.h"\n' + MODULE)
    (sources / "answer.h").write_text("#define ANSWER 42\n")
    monkeypatch.setattr(extension, "_sources_folder", lambda: sources)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "builds"))
    monkeypatch.setattr(extension, "_failures", {})
    yield sources


@pytest.fixture
def gpu(monkeypatch, folder, fresh):
    """As if there were a Hopper, and no module built ahead of time."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extension, "_capabilities", lambda: [(9, 0)])
    monkeypatch.setattr(extension, "AHEAD_OF_TIME", "ssl_ib_csrc_of_this_test")
    monkeypatch.setattr(extension, "find_nvcc", lambda: "nvcc")


def build(name="fake_csrc"):
    return extension._build(name, ["bindings/*.cpp"], extension.CXX_FLAGS)


def test_without_a_gpu(monkeypatch, fresh):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert extension.why_not() == "torch finds no CUDA device"
    with pytest.raises(UserError, match="cannot be used: torch finds no CUDA device"):
        extension.load()


def test_reasons_on_a_machine_with_a_gpu(gpu, fresh, monkeypatch, tmp_path):
    assert extension.why_not() is None
    fresh()
    monkeypatch.setattr(extension, "find_nvcc", lambda: None)
    assert "nvcc" in extension.why_not()
    fresh()
    monkeypatch.setattr(extension, "_sources_folder", lambda: tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in extension.why_not()
    fresh()
    monkeypatch.setattr(extension, "_capabilities", lambda: [(7, 5), (9, 0)])
    assert "need compute capability 8.0, and a device here has 7.5" in extension.why_not()
    with pytest.raises(UserError, match="has 7.5"):
        extension.load()


def test_nvcc_is_found(monkeypatch, tmp_path):
    for place in ("home", "path"):
        (tmp_path / place / "bin").mkdir(parents=True)
        (tmp_path / place / "bin" / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / place / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert extension.find_nvcc() == str(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.delenv("CUDA_HOME")
    assert extension.find_nvcc() == str(tmp_path / "path" / "bin" / "nvcc")
    # One that does not say where its toolkit lies is taken to lie in it.
    assert extension.cuda_home(extension.find_nvcc()) == str(tmp_path / "path")


def test_the_toolkit_behind_a_wrapper(nvcc, monkeypatch, tmp_path):
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    wrapper.chmod(0o755)
    home = Path(extension.cuda_home(str(wrapper)))
    assert home != tmp_path and (home / "include" / "cuda_runtime.h").is_file()


def test_architectures():
    assert [extension._arch(c) for c in ((8, 0), (8, 9), (9, 0), (12, 0))] == ["80", "89", "90a", "120"]


def test_a_failed_build_names_its_log_and_is_not_tried_again(gpu, folder, monkeypatch, tmp_path):
    """nvcc is a script that counts its calls and fails."""
    compiler = tmp_path / "toolkit" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *dryrun*) exit;; esac\necho called >> "$0.calls"\necho no such luck\nexit 1\n'
    )
    compiler.chmod(0o755)
    (folder / "cuda" / "kernel.cu").write_text("__global__ void kernel() {}\n")
    monkeypatch.setattr(extension, "find_nvcc", lambda: str(compiler))
    with pytest.raises(UserError, match=r"building ssl_ib_csrc_of_this_test failed: .*build\.log") as error:
        extension.load()
    log = Path(str(error.value).rsplit(" ", 1)[-1])
    assert "no such luck" in log.read_text() and str(compiler) in log.read_text()
    assert str(log) in extension.why_not()
    with pytest.raises(UserError, match=re.escape(str(log))):
        extension.load()
    assert Path(f"{compiler}.calls").read_text() == "called\n"


def test_a_failed_emulation_names_its_log(folder):
    (folder / "answer.h").write_text("#error nothing to answer\n")
    with pytest.raises(UserError, match=r"failed: .*#error nothing to answer; the .*build\.log") as error:
        extension.load_emulated.__wrapped__()
    log = Path(str(error.value).rsplit(" ", 1)[-1])
    assert "nothing to answer" in log.read_text()
    log.unlink()
    with pytest.raises(UserError, match=re.escape(str(log))):
        extension.load_emulated.__wrapped__()
    assert not log.exists()


def test_a_folder_that_cannot_be_made(folder, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="Not a directory.*TORCH_EXTENSIONS_DIR"):
        build()


def test_a_module_built_ahead_of_time_is_used(gpu, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(extension, "find_nvcc", lambda: None)
    (tmp_path / "ssl_ib_csrc_of_this_test.py").write_text("answer = 43\n")
    assert extension.why_not() is None and extension.load().answer == 43
    sys.modules.pop("ssl_ib_csrc_of_this_test")


def test_a_module_built_ahead_of_time_that_does_not_load(gpu, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ssl_ib_csrc_of_this_test.py").write_text("raise ImportError('undefined symbol')\n")
    with pytest.raises(UserError, match="built ahead of time, does not load: undefined symbol"):
        extension.load()
    assert "does not load" in extension.why_not()


def test_builds_follow_the_content_of_the_sources(folder, monkeypatch):
    assert build().answer == 42
    (copy,) = Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("fake_csrc_*/csrc/answer.h")
    copied = copy.stat().st_mtime_ns
    # As after installing another version: the content is new and the file is old.
    (folder / "answer.h").write_text("#define ANSWER 7\n")
    os.utime(folder / "answer.h", (0, 0))
    command = [sys.executable, "-c", CHILD, str(folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1] == "7"
    changed = copy.stat().st_mtime_ns
    assert changed > copied
    os.utime(folder / "answer.h")
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1] == "7"
    assert copy.stat().st_mtime_ns == changed
    (folder / "answer.h").rename(folder / "question.h")
    extension._copy_changed(folder, copy.parent)
    assert not copy.exists() and copy.with_name("question.h").exists()


#: A process that builds from the folder in its argument.
CHILD = """
import sys
from pathlib import Path
from ssl_ib.ops import extension
extension._sources_folder = lambda: Path(sys.argv[1])
print(extension._build("fake_csrc", ["bindings/*.cpp"], extension.CXX_FLAGS).answer)
"""


def test_a_killed_build_blocks_nobody(folder):
    """What older torch waits for without end: the lock file of a build that is no longer there."""
    build_folder = extension._build_folder("fake_csrc", extension.CXX_FLAGS)
    build_folder.mkdir(parents=True)
    (build_folder / "lock").touch()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(build().answer), daemon=True)
    thread.start()
    thread.join(timeout=120)
    assert answers == [42]


def test_two_processes_that_build_at_once(folder):
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [child.communicate(timeout=300) for child in children]
    assert [out.split()[-1] for out, _ in outputs] == ["42", "42"], outputs


def test_ops_do_not_import_the_tools_that_build():
    code = "import sys, ssl_ib.ops.extension; sys.exit('torch.utils.cpp_extension' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_packaging_needs_no_torch(tmp_path):
    """Unless it builds the kernels; their sources are always among the package's data."""
    root = Path(__file__).parents[2]
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', 'build_py', '-d', sys.argv[1], '-q']\n"
    )
    code += "runpy.run_path('setup.py', run_name='__main__')"
    env = {name: value for name, value in os.environ.items() if name != "SSL_IB_BUILD_CSRC"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    answer = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    packaged = {path.relative_to(tmp_path / "ssl_ib" / "csrc") for path in (tmp_path / "ssl_ib" / "csrc").rglob("*.*")}
    assert packaged == {path.relative_to(root / "csrc") for path in (root / "csrc").rglob("*.*")}
