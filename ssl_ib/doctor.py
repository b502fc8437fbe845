"""What this machine can run, and what to do about what it cannot: the findings of `ssl-ib-doctor`.

Nothing is built, downloaded or changed; one small file is written to the folder that is looked at, and removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__, ops
from .data.decode import num_threads
from .device import free_memory
from .flops import peak

#: Bytes of shared memory that the workers of a loader want: some batches of 256 images of 256 x 256 pixels.
ENOUGH_SHM = 1 << 30
#: Open files: sharing tensors between processes takes one each.
ENOUGH_FILES = 4096
#: Bytes on the disk below which checkpoints of a ViT-B run out of room soon.
ENOUGH_DISK = 5 << 30
#: Packages that add something, and what.
OPTIONAL = {
    "wandb": "logger=[wandb]: pip install 'ssl-ib[wandb]'",
    "pyarrow": "ssl-ib-embed --out FILE.parquet: pip install 'ssl-ib[embed]'",
    "submitit": "ssl-ib-sweep --launch: pip install 'ssl-ib[slurm]'",
    "segmentation-models-pytorch": "segmentation: pip install 'ssl-ib[dense]'",
    "faster-coco-eval": "detection: pip install 'ssl-ib[dense]'",
    "webdataset": "source=webdataset: pip install 'ssl-ib[stream]'",
    "datasets": "source=hf: pip install 'ssl-ib[stream]'",
    "onnx": "ssl-ib-export --to onnx: pip install 'ssl-ib[export]'",
    "transformers": "ssl-ib-export --to hf: pip install 'ssl-ib[export]'",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    status: "ok", "missing" (something optional is not there) or "problem" (a run would fail or be slow for it).
    advice: what to do about it; empty where nothing is to be done.
    """

    status: str
    what: str
    found: str
    advice: str = ""

    def lines(self) -> str:
        mark = {"ok": "ok", "missing": "--", "problem": "!!"}[self.status]
        line = f"{mark}  {self.what:<14} {self.found}"
        return f"{line}\n{'':19}{self.advice}" if self.advice else line


def examine(folder: Path) -> Iterator[Finding]:
    """The findings, one after the other; folder: where runs would go, which need not exist yet."""
    yield Finding("ok", "ssl_ib", f"{__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    yield from _gpus()
    yield from _processes()
    yield from _kernels()
    yield _cores()
    yield _memory()
    yield _shared_memory(Path("/dev/shm"))
    yield _open_files()
    below = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    yield from (_writable(below), _disk(below))
    yield from _packages()


def _gpus() -> Iterator[Finding]:
    for number in range(torch.cuda.device_count()):
        device, known = torch.device("cuda", number), torch.cuda.get_device_properties(number)
        name, most = f"{known.name} (sm_{known.major}{known.minor})", peak(device, "bf16")
        try:
            torch.zeros(1, device=device).add_(1).item()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            yield Finding("problem", f"GPU {number}", f"{name}: {reason}", "does this torch fit it? see pytorch.org")
            continue
        speed = "" if most is None else f", {most / 1e12:.0f} TFLOP/s in bf16"
        yield Finding("ok", f"GPU {number}", f"{name}, {known.total_memory / 1e9:.0f} GB{speed}")
    if torch.cuda.device_count():
        return
    if shutil.which("nvidia-smi") is None:
        yield Finding("missing", "GPU", "none: runs use the CPU", "precision=bf16 and small recipes (*_digits) suit it")
    elif torch.version.cuda is None:
        advice = "install one with CUDA, from pytorch.org"
        yield Finding("problem", "GPU", "there is a driver, but this torch is built without CUDA", advice)
    else:
        found = f"there is a driver, but torch (built for CUDA {torch.version.cuda}) sees no GPU"
        advice = "does nvidia-smi show one, with this CUDA version or a later one? is CUDA_VISIBLE_DEVICES set?"
        yield Finding("problem", "GPU", found, advice)


def _processes() -> Iterator[Finding]:
    if not torch.distributed.is_available():
        yield Finding("problem", "processes", "this torch has no torch.distributed: a run is one process")
        return
    backends = [name for name in ("nccl", "gloo") if getattr(torch.distributed, f"is_{name}_available")()]
    found = ", ".join(backends) or "none"
    if "nccl" in backends and torch.cuda.is_available():
        found += f" (NCCL {'.'.join(map(str, torch.cuda.nccl.version()))})"
    if torch.cuda.is_available() and "nccl" not in backends:
        yield Finding("problem", "processes", found, "several GPUs need NCCL: install torch from pytorch.org")
    else:
        yield Finding("ok", "processes", f"{found}; torchrun --nproc-per-node N -m ssl_ib.cli.train ... parallel=ddp")


def _kernels() -> Iterator[Finding]:
    """The backends of `ssl_ib.ops` on the device that runs would take, and CUDA's compiler."""
    from .ops import extension

    if torch.cuda.is_available():
        for backend, how in (("cuda", "can be built, or is"), ("triton", "can run")):
            reason = ops.why_not(backend, "cuda")
            advice = "until then the ops run in something slower, with more memory"
            found = ("ok", f"ops: {backend}", how) if reason is None else ("problem", f"ops: {backend}", reason, advice)
            yield Finding(*found)
    else:
        yield Finding("ok", "ops", "plain torch, by pieces; the kernels in Triton and CUDA want a GPU")
    nvcc = extension.find_nvcc()
    if nvcc is None:
        yield Finding("missing", "nvcc", "not found on the PATH, nor under CUDA_HOME", "only ops.backend=cuda needs it")
    else:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
        release = next((line for line in done.stdout.splitlines() if "release" in line), "its version is unknown")
        yield Finding("ok", "nvcc", f"{nvcc}: {release.strip()}")


def _cores() -> Finding:
    there, usable = os.cpu_count() or 1, num_threads()
    threads = torch.get_num_threads()
    found = f"{there}, of which {usable} decode images; torch computes on {threads}"
    if not torch.cuda.is_available() and threads < min(usable, there):
        return Finding("problem", "CPU cores", found, "unset OMP_NUM_THREADS, which keeps the others idle")
    return Finding("ok", "CPU cores", found)


def _memory() -> Finding:
    free = free_memory()
    found = f"{free / 1e9:.1f} GB free"
    if free < 4e9:
        return Finding("problem", "memory", found, "lower batch_size, and source.memory_gb where images are held in it")
    return Finding("ok", "memory", found)


def _shared_memory(place: Path) -> Finding:
    try:
        size = shutil.disk_usage(place)
    except OSError:
        return Finding("problem", "shared memory", f"there is no {place}", "use workers=0, or --ipc=host with docker")
    found = f"{size.free / 1e9:.1f} of {size.total / 1e9:.1f} GB free in {place}"
    if size.free < ENOUGH_SHM:
        advice = "workers>0 wants more: docker run --shm-size=8g; or use workers=0"
        return Finding("problem", "shared memory", found, advice)
    return Finding("ok", "shared memory", found)


def _open_files() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= ENOUGH_FILES:
        return Finding("ok", "open files", "any number" if soft == resource.RLIM_INFINITY else f"at most {soft:,}")
    return Finding("problem", "open files", f"at most {soft:,}", f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}")


def _writable(folder: Path) -> Finding:
    """Whether the folder can be written to, and its file system keeps locks."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".ssl_ib_doctor") as file:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                return Finding(
                    "problem",
                    "locks",
                    f"the file system of {folder} keeps none",
                    "two runs could share a folder: give each its own --out, or mount with locks (NFS: nolock off)",
                )
    except OSError as error:
        return Finding("problem", "folder", f"{folder}: {error.strerror}", "give --out a folder that you may write to")
    return Finding("ok", "locks", f"{folder} can be written to, and keeps locks")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.0f} GB free in {folder}"
    if free < ENOUGH_DISK:
        return Finding("problem", "disk", found, "a ViT-B run keeps two checkpoints of about 1.5 GB each")
    return Finding("ok", "disk", found)


def _packages() -> Iterator[Finding]:
    there = []
    for name, what in OPTIONAL.items():
        try:
            there.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            yield Finding("missing", name, "not installed", f"for {what}")
    if there:
        yield Finding("ok", "extras", ", ".join(there))
