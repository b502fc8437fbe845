"""Time, memory and error of several ways to do one thing, measured side by side in one process.

Contenders take turns, each on the round's fresh random inputs, so that a busy machine disturbs all alike. Medians and
the 20th and 80th percentiles are kept.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .baselines import Unsupported
from .cases import Case

#: Bytes to read between two samples on a GPU, more than any cache holds.
FLUSH = 1 << 28

#: Clock cycles that a GPU is kept waiting for the host: about 1 ms, and about 0.3 s.
SHORTEST_WAIT, LONGEST_WAIT = 1 << 21, 1 << 29


@dataclass(frozen=True)
class Sample:
    """One call: seconds it took; seconds until the host had the program counter back; and whether the first are the
    device's alone (False: they hold the host's time too).
    """

    seconds: float
    host: float
    alone: bool


@dataclass
class Result:
    """What one contender did: seconds of each sample, bytes, and errors relative to the largest number of the truth.

    host: seconds that the host took to launch forward and backward, a sample each; alone: whether the other seconds are
    without them.
    failure: why there are no figures; broken: whether that is a defect, not a lack of memory or of a package.
    """

    name: str
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    alone: bool = True
    compile_seconds: float = 0.0
    memory: int | None = None
    error: float | None = None
    gradient_error: float | None = None
    repeats: bool | None = None
    failure: str | None = None
    broken: bool = False

    @property
    def total(self) -> list[float]:
        """Seconds of forward and backward together, a sample each."""
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]


@dataclass
class Contender:
    """A name, what it calls, on what backend, and in which dtype it is fed."""

    name: str
    call: Callable[..., Any]
    backend: str
    dtype: torch.dtype
    unfused: bool

    def __call__(self, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        with ops.use_backend(self.backend):
            outputs = self.call(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def available_bytes(device: torch.device) -> int:
    """Memory that is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), sys.maxsize)


def _inputs(case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator(device=device).manual_seed(seed)
    drawn = case.draw(generator, dtype)
    return (*(x.detach().requires_grad_() for x in drawn[: case.leaves]), *drawn[case.leaves :])


def _upstream(outputs: tuple[Tensor, ...], device: torch.device) -> list[Tensor]:
    """Gradients of the outputs: those of a mean for losses, random ones for tokens."""
    generator = torch.Generator(device=device).manual_seed(1)
    return [
        torch.full_like(x, 1 / max(x.numel(), 1))
        if x.ndim <= 1
        else torch.randn(x.shape, generator=generator, device=device).to(x.dtype) / len(x)
        for x in outputs
    ]


def _gradients(
    outputs: tuple[Tensor, ...], leaves: tuple[Tensor, ...], upstream: list[Tensor], again: bool = False
) -> tuple[Tensor, ...]:
    """Gradients to the leaves, none for views, which have none; again: the same outputs may be asked once more."""
    return torch.autograd.grad(outputs, leaves, upstream, retain_graph=again) if leaves else ()


class _Timer:
    """Times a function: on a GPU its kernels, without the time that the host takes to launch them.

    There the host runs ahead. A kernel that does nothing keeps the GPU busy while the host queues all of the function's
    launches between two events; the GPU then comes to them one straight after the other. Where it came to the first
    event before the host was done, the sample is made again behind a longer wait. A function that itself waits for the
    GPU never gets ahead; its samples hold the host's time too, and are marked.

    Before a sample the caches are filled by reading: what was written before has then been written back, and none of it
    is written back within the sample.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.scratch = torch.zeros(FLUSH // 4, device=device) if self.cuda else None
        self.cycles = SHORTEST_WAIT

    def __call__(self, function: Callable[[], Any], tries: int = 6) -> tuple[Any, Sample]:
        """What the function answers, and what it took; it is called up to `tries` times."""
        if not self.cuda:
            start = time.perf_counter()
            answer = function()
            seconds = time.perf_counter() - start
            return answer, Sample(seconds, seconds, True)
        while True:
            answer, sample = self._sample(function)
            tries -= 1
            if sample.alone or tries <= 0:
                return answer, sample
            answer = None
            self.cycles = min(4 * self.cycles, LONGEST_WAIT)

    def _sample(self, function: Callable[[], Any]) -> tuple[Any, Sample]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.scratch.sum()
        torch.cuda._sleep(self.cycles)
        start.record()
        before = time.perf_counter()
        answer = function()
        host = time.perf_counter() - before
        alone = not start.query()
        end.record()
        end.synchronize()
        return answer, Sample(start.elapsed_time(end) / 1e3, host, alone)


@contextmanager
def failing_alone(result: Result) -> Iterator[None]:
    """Notes an exception in the contender's result, so that the other contenders are still measured."""
    try:
        yield
    except torch.OutOfMemoryError:
        result.failure = "out of memory"
    except Unsupported as error:
        result.failure = str(error)
    except Exception as error:
        traceback.print_exc()
        result.failure = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        result.broken = True


def measure(case: Case, contenders: list[Contender], device: torch.device, rounds: int) -> list[Result]:
    """Results in the order of the contenders. One that cannot do it has a `failure`, and its figures mean nothing."""
    results = [Result(c.name) for c in contenders]
    timer, upstream = _Timer(device), {}
    for contender, result in zip(contenders, results, strict=True):
        if contender.unfused and case.unfused > 0.8 * available_bytes(device):
            result.failure = f"out of memory (needs {case.unfused / 2**30:.0f} GiB)"
            continue
        with failing_alone(result):
            start = time.perf_counter()
            inputs = _inputs(case, device, contender.dtype, 0)
            outputs = contender(inputs)
            upstream[contender.name] = _upstream(outputs, device)
            _gradients(outputs, inputs[: case.leaves], upstream[contender.name])
            result.compile_seconds = time.perf_counter() - start if "compiled" in contender.name else 0.0
    pairs = list(zip(contenders, results, strict=True))
    for number in range(rounds):
        running = [(c, r) for c, r in pairs if r.failure is None]
        inputs = {dtype: _inputs(case, device, dtype, number) for dtype in {c.dtype for c, _ in running}}
        for contender, result in running:
            with failing_alone(result):
                mine = inputs[contender.dtype]
                # One that was never alone will not be.
                tries = 6 if result.alone else 1
                outputs, forward = timer(lambda c=contender, x=mine: c(x), tries)
                leaves, given = mine[: case.leaves], upstream[contender.name]
                _, backward = timer(lambda o=outputs, x=leaves, u=given: _gradients(o, x, u, again=True), tries)
                result.forward.append(forward.seconds)
                result.backward.append(backward.seconds)
                result.host.append(forward.host + backward.host)
                result.alone = result.alone and forward.alone and backward.alone
            outputs = None
    for contender, result in pairs:
        if result.failure is None:
            with failing_alone(result):
                _examine(case, contender, result, device, upstream[contender.name])
    return results


def _examine(case: Case, contender: Contender, result: Result, device: torch.device, upstream: list[Tensor]) -> None:
    """Error against float64, and whether a second run gives the same bits."""
    inputs = _inputs(case, device, contender.dtype, 0)
    answers = []
    for _ in range(2):
        outputs = contender(inputs)
        answers.append([*(x.detach() for x in outputs), *_gradients(outputs, inputs[: case.leaves], upstream)])
        del outputs
    result.repeats = all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    exact = tuple(
        (x.detach().double().requires_grad_(x.requires_grad) if torch.is_tensor(x) and x.is_floating_point() else x)
        for x in inputs
    )
    with ops.use_backend("chunked"):
        truth = case.call(*exact)
    truth = truth if isinstance(truth, tuple) else (truth,)
    given = [u.double() for u in upstream]
    if len(truth) == len(upstream) and all(t.shape != u.shape for t, u in zip(truth, upstream, strict=True)):
        # A contender that answers with the mean.
        truth = tuple(t.mean() for t in truth)
    gradients = _gradients(truth, exact[: case.leaves], given)
    count = len(truth)
    result.error = max(_error(a, t) for a, t in zip(answers[0][:count], truth, strict=True))
    found = zip(answers[0][count:], gradients, strict=True)
    result.gradient_error = max((_error(a, t) for a, t in found), default=0.0)


def _error(answer: Tensor, truth: Tensor) -> float:
    answer, truth = answer.detach().double(), truth.detach()
    return float((answer - truth).abs().max() / truth.abs().max().clamp(min=1e-300))


def measure_memory(case: Case, contender: Contender, device: torch.device) -> int | None:
    """Bytes at the peak of forward and backward beyond inputs, outputs and returned gradients; None if unknown.

    On a CPU this is what the operating system counted for the process (Linux), so nothing else should run in it.
    """
    inputs = _inputs(case, device, contender.dtype, 0)
    outputs = contender(inputs)
    upstream = _upstream(outputs, device)
    held = _gradients(outputs, inputs[: case.leaves], upstream)
    returned = sum(x.numel() * x.element_size() for x in (*outputs, *held))
    del outputs, held
    peak = _Peak(device)
    if not peak.known:
        return None
    outputs = contender(inputs)
    gradients = _gradients(outputs, inputs[: case.leaves], upstream)
    grown = peak.grown()
    del outputs, gradients
    return max(grown - returned, 0)


class _Peak:
    """Growth of the memory in use from here to its peak."""

    def __init__(self, device: torch.device):
        gc.collect()
        self.device = device if device.type == "cuda" else None
        self.known = self.device is not None or Path("/proc/self/clear_refs").exists()
        if self.device is not None:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        elif self.known:
            libc = ctypes.CDLL(None)
            # Blocks from 64 KiB on are taken from the system and given back at once, so that the count is exact.
            libc.mallopt(-3, 1 << 16)
            libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = memory_status("VmRSS")

    def grown(self) -> int:
        if self.device is not None:
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return memory_status("VmHWM") - self.before


def memory_status(key: str) -> int:
    """A memory figure of this process in bytes (Linux): "VmRSS" what it holds, "VmHWM" its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def ceilings(device: torch.device) -> dict[str, float]:
    """What this machine does at best, measured: bytes/s of a copy (read and written), and FLOP/s of matrix products."""
    timer = _Timer(device)
    cuda = device.type == "cuda"
    source = torch.empty((1 << 32) if cuda else (1 << 28), dtype=torch.uint8, device=device).random_()
    copy = torch.empty_like(source)
    rates = {"copy": 2 * source.numel() / _best(timer, lambda x=source, y=copy: y.copy_(x))}
    del source, copy
    side = 8192 if cuda else 1536
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / _best(timer, lambda a=a, b=b: a @ b)
    return rates


def _best(timer: _Timer, function: Callable[[], Any]) -> float:
    function()
    return statistics.median(timer(function)[1].seconds for _ in range(7))
