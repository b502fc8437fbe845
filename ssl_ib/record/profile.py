"""Where a step's time goes: a table of its phases and of its costliest operations, and a trace to look into."""

from __future__ import annotations

import gzip
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .files import replace
from .terminal import say

#: Steps that are let pass first: the first ones compile, allocate and choose algorithms.
WARM_UP = 5
#: What a step consists of, in its order.
PHASES = ("data", "views", "forward", "backward", "optimiser", "hooks", "waiting")
_MEANING = {
    "data": "until the next batch is there",
    "views": "views and masks",
    "forward": "model and loss",
    "backward": "gradients, and exchanging them with other processes",
    "optimiser": "clipping, and the step itself",
    "hooks": "queues, banks, teachers, prototypes",
    "waiting": "until the device has done all that it was given",
    "other": "log, terminal and checkpoints",
}
_OPERATIONS = 15


class Profile:
    """Watches `steps` steps of a run after the first five, and writes what it saw to `out`.

    steps: how many.
    flops: floating-point operations that the model needs for a step; peak: those that the device could do in a second,
           None where that is not known.
    out:   the folder `profile` of a run, which gets `steps.txt` and `trace.json.gz` (for Perfetto or chrome://tracing).
    """

    def __init__(self, steps: int, images: int, flops: float, peak: float | None, device: torch.device, out: Path):
        self.steps, self.images, self.flops, self.peak, self.device, self.out = steps, images, flops, peak, device, out
        self.table: str | None = None
        self._left = WARM_UP
        self._profiler: Any = None
        self._began = 0.0
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done inside is a step's phase `name`, one of PHASES."""
        if self._profiler is None:
            yield
            return
        began, start = time.perf_counter(), self._mark()
        with record_function(f"ssl_ib: {name}"):
            yield
        self._seconds[name] += time.perf_counter() - began
        if start is not None:
            self._events[name].append((start, self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.end()

    def step(self) -> None:
        """A step is over. Begins to watch, or writes what was seen, where it is time."""
        self._left -= 1
        if self._left:
            return
        if self._profiler is None and self.table is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self._profiler, self._left = profile(activities=activities), self.steps
            self._profiler.start()
            self._began = time.perf_counter()
        elif self._profiler is not None:
            self.end()

    def end(self) -> None:
        """Ends watching, also where the run ends before `steps` steps were seen; once more does nothing."""
        if self.table is not None:
            return
        profiler, self._profiler = self._profiler, None
        seen = 0 if profiler is None else self.steps - self._left
        if profiler is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            total = time.perf_counter() - self._began
            profiler.stop()
        if not seen:
            self.table = ""
            say(f"profile: the run has ended, and its first {WARM_UP} steps are let pass: there is nothing to show")
            return
        self.out.mkdir(exist_ok=True)
        self.table = self._table(seen, total) + "\n" + self._costliest(profiler, seen)
        replace(self.out / "steps.txt", self.table)
        plain = self.out / "trace.json"
        profiler.export_chrome_trace(str(plain))
        with open(plain, "rb") as trace, gzip.open(self.out / "trace.json.gz", "wb") as packed:
            shutil.copyfileobj(trace, packed)
        plain.unlink()
        say(f"{self.table}profile: {self.out / 'steps.txt'}, {self.out / 'trace.json.gz'}")

    def _table(self, seen: int, total: float) -> str:
        self._seconds["other"] = total - sum(self._seconds.values())
        on_device = {
            name: sum(start.elapsed_time(end) for start, end in pairs) / seen for name, pairs in self._events.items()
        }
        head = f"{'phase':<10} {'ms a step':>10} {'share':>6}" + (f" {'ms on GPU':>10}" if on_device else "")
        lines = [head]
        for name in (*PHASES, "other"):
            seconds = self._seconds[name]
            line = f"{name:<10} {1e3 * seconds / seen:>10.2f} {seconds / total:>6.1%}"
            if on_device:
                line += f" {on_device[name]:>10.2f}" if name in on_device else " " * 11
            lines.append(f"{line}  {_MEANING[name]}")
        lines.append(f"{'step':<10} {1e3 * total / seen:>10.2f}")
        rate = self.flops * seen / total
        used = "" if self.peak is None else f", {rate / self.peak:.1%} of what the device can do"
        lines.append(f"{self.images * seen / total:.1f} images/s, {rate / 1e12:.3g} TFLOP/s{used} ({seen} steps)")
        return "\n".join(lines) + "\n"

    def _costliest(self, profiler: Any, seen: int) -> str:
        on_gpu = self.device.type == "cuda"
        attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        found = [event for event in profiler.key_averages() if not event.key.startswith(("ssl_ib: ", "ProfilerStep"))]
        found.sort(key=lambda event: -getattr(event, attribute))
        lines = [f"{'ms a step':>10} {'calls':>7}  operation, the costliest first, without what it calls"]
        for event in found[:_OPERATIONS]:
            milliseconds = getattr(event, attribute) / 1e3 / seen
            lines.append(f"{milliseconds:>10.3f} {event.count / seen:>7.1f}  {event.key[:100]}")
        return "\n".join(lines) + "\n"
