"""The CUDA C++ kernels as a Python module: found where they were built ahead of time, else built at first use.

`load()` gives the module for the GPUs of this machine; `why_not()` says what is in the way. `load_emulated()` builds
the very same sources with a plain C++ compiler into a module that runs them on CPU tensors, thread by thread: for
tests, where there is no GPU.

Builds lie in torch's folder for extensions (`TORCH_EXTENSIONS_DIR`). Sources are copied there first, and only those
whose content has changed, so that ninja compiles what changed however the package came to be installed. A file lock
lets one process build while others wait; the operating system releases it even where the builder was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import UserError

#: The module that `SSL_IB_BUILD_CSRC=1 pip install --no-build-isolation .` builds. Where it is found, it is what runs:
#: sources that have changed since are not looked at.
AHEAD_OF_TIME = "ssl_ib_csrc"

#: Tensor cores with bf16 and asynchronous copies.
OLDEST_CAPABILITY = (8, 0)

CXX_FLAGS = ["-std=c++20", "-O2"]
NVCC_FLAGS = ["-std=c++20", "-O3"]
# The emulator jumps between stacks and reads vectors out of arrays of numbers; hidden symbols keep two versions of it
# in one process apart. -O1: the build takes longer than the tests.
_EMULATED_FLAGS = ["-O1", "-DSSL_IB_EMULATED", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-fvisibility=hidden"]
_EMULATED_FLAGS += ["-fno-gnu-unique"]

#: Why a module could not be built or loaded in this process; it is not tried again.
_failures: dict[str, str] = {}


def why_not() -> str | None:
    """Why `load` cannot give the kernels here, or None where it can (or has not tried yet). Builds nothing."""
    return _failures.get(AHEAD_OF_TIME) or _obstacle()


@functools.cache
def _obstacle() -> str | None:
    """What is missing on this machine."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch finds no CUDA device"
    oldest = min(_capabilities())
    if oldest < OLDEST_CAPABILITY:
        return "the kernels need compute capability {}.{}, and a device here has {}.{}".format(
            *OLDEST_CAPABILITY, *oldest
        )
    if importlib.util.find_spec(AHEAD_OF_TIME) is not None:
        return None
    if not _sources_folder().is_dir():
        return f"the kernels' sources are not at {_sources_folder()}"
    if find_nvcc() is None:
        return "nvcc, CUDA's compiler, is neither on the PATH nor under CUDA_HOME"
    return None


@functools.cache
def load() -> ModuleType:
    """The kernels for the GPUs of this machine; the first call on a machine builds them, which takes minutes.

    Raises UserError where `why_not` gives a reason, and where the build fails, naming the compiler's output.
    """
    if (reason := why_not()) is not None:
        raise UserError(f"the CUDA kernels cannot be used: {reason}")
    if importlib.util.find_spec(AHEAD_OF_TIME) is not None:
        try:
            return importlib.import_module(AHEAD_OF_TIME)
        except ImportError as error:
            _failures[AHEAD_OF_TIME] = f"{AHEAD_OF_TIME}, built ahead of time, does not load: {error}"
            raise UserError(_failures[AHEAD_OF_TIME]) from error
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in map(_arch, _capabilities())]
    return _build(AHEAD_OF_TIME, ["bindings/*.cpp", "cuda/*.cu"], CXX_FLAGS, NVCC_FLAGS + gencode)


def find_nvcc() -> str | None:
    """CUDA's compiler: under `CUDA_HOME`, on the PATH, or in its usual place; None where it is not found."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else []
    places += [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def cuda_home(nvcc: str) -> str:
    """The toolkit that nvcc belongs to; asked of nvcc itself, since the one on the PATH may be a wrapper elsewhere."""
    answer = subprocess.run([nvcc, "-dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", answer.stderr, re.MULTILINE)
    return os.path.realpath(top[1].strip()) if top else str(Path(nvcc).parents[1])


@functools.cache
def load_emulated() -> ModuleType:
    """The same kernels on CPU tensors, one emulated thread after another: slow, and for tests.

    Besides the kernels the module has `set_thread_order("forward" | "reverse" | "random")`. Raises UserError where the
    build fails, naming the compiler's output.
    """
    if not _sources_folder().is_dir():
        raise UserError(f"the kernels' sources are not at {_sources_folder()}")
    return _build(f"{AHEAD_OF_TIME}_emulated", ["bindings/*.cpp", "cuda/*.cpp"], CXX_FLAGS + _EMULATED_FLAGS)


def _sources_folder() -> Path:
    """`csrc/`: in the installed package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / "csrc"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "csrc"


def _capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the devices here, each once."""
    return sorted({torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())})


def _arch(capability: tuple[int, int]) -> str:
    """The architecture to compile for; on Hopper the one with its own instructions."""
    return "90a" if capability == (9, 0) else "{}{}".format(*capability)


def _build_folder(name: str, flags: list[str]) -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    key = "\n".join([torch.__version__, sys.version, str(_sources_folder()), *flags])
    return Path(root, f"{name}_{hashlib.sha256(key.encode()).hexdigest()[:16]}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it against other processes; says so where it has to wait for one."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "building", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            warnings.warn(f"waiting for another process that builds in {folder}", stacklevel=2)
            fcntl.flock(file, fcntl.LOCK_EX)
        # Older versions of torch wait for ever where a build that was killed left this file behind.
        (folder / "lock").unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def _set(mapping: MutableMapping[str, Any], key: str, value: Any) -> Iterator[None]:
    before, mapping[key] = mapping[key], value
    try:
        yield
    finally:
        mapping[key] = before


def _copy_changed(source: Path, target: Path) -> None:
    """Makes the folder `target` hold what `source` does, leaving files alone that are the same already."""
    files = {path.relative_to(source): path for path in source.rglob("*") if path.is_file()}
    # A plain compiler takes .cu files for linker scripts.
    shims = {path.with_suffix(".cpp"): f'#include "{path.name}"\n' for path in files if path.suffix == ".cu"}
    contents = {path: files[path].read_bytes() for path in files} | {p: text.encode() for p, text in shims.items()}
    for path in list(target.rglob("*")):
        if path.is_file() and path.relative_to(target) not in contents:
            path.unlink()
    for path, content in contents.items():
        copy = target / path
        if not copy.is_file() or copy.read_bytes() != content:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)


def _build(name: str, patterns: list[str], cxx_flags: list[str], nvcc_flags: list[str] | None = None) -> ModuleType:
    """Compiles the sources that match the patterns and imports the module `name` that they make."""
    if name in _failures:
        raise UserError(_failures[name])
    from torch.utils import cpp_extension

    folder = _build_folder(name, cxx_flags + (nvcc_flags or []))
    sources = folder / "csrc"
    home = cpp_extension.CUDA_HOME if nvcc_flags is None else cuda_home(find_nvcc())
    # Programs that pip installs beside Python, ninja among them, are on the PATH of activated environments only.
    path = os.environ["PATH"] + os.pathsep + sysconfig.get_path("scripts")
    try:
        with _locked(folder), _set(os.environ, "PATH", path), _set(vars(cpp_extension), "CUDA_HOME", home):
            _copy_changed(_sources_folder(), sources)
            # Torch would number a name that this process has built from other sources, and so compile everything anew.
            cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop(name, None)
            return cpp_extension.load(
                name,
                sorted(str(path) for pattern in patterns for path in sources.glob(pattern)),
                extra_cflags=cxx_flags,
                extra_cuda_cflags=nvcc_flags,
                build_directory=str(folder),
                with_cuda=nvcc_flags is not None,
            )
    except OSError as error:
        _failures[name] = f"building {name} in {folder} failed: {error} (TORCH_EXTENSIONS_DIR names another folder)"
        raise UserError(_failures[name]) from error
    except (RuntimeError, ImportError) as error:
        log = folder / "build.log"
        log.write_text(str(error))
        first = re.search(r"^.*\berror\b.*$", str(error), re.MULTILINE)
        what = first[0].strip() if first else str(error).strip().splitlines()[-1]
        _failures[name] = f"building {name} failed: {what}; the compiler's output is in {log}"
        raise UserError(_failures[name]) from error
