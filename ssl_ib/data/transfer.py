"""Batches on their way to a GPU: pinned, and copied on a stream of their own while earlier steps are computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import chain, islice
from typing import TypeVar

import torch

from ..types import Sample

#: Batches that are made and copied before they are asked for.
AHEAD = 2

T = TypeVar("T")


def on_device(samples: Iterator[Sample], device: torch.device) -> Iterator[Sample]:
    """The samples on `device`, in their order; for a GPU the next two are made and copied meanwhile, in a thread."""
    if device.type != "cuda":
        yield from (sample.to(device) for sample in samples)
        return
    # The first one here: it may start processes, which a thread had better not do.
    first = list(islice(samples, 1))
    copies = map(partial(_copy, device, torch.cuda.Stream(device)), chain(first, samples))
    with closing(made_in_thread(copies, AHEAD)) as copied:
        for arrived in copied:
            yield arrived()


def _copy(device: torch.device, stream: torch.cuda.Stream, sample: Sample) -> Callable[[], Sample]:
    """Begins a copy; what comes back waits for it on the device, and gives the sample."""
    if sample.images.is_cuda:
        return lambda: sample
    pinned = sample.pin_memory()
    with torch.cuda.stream(stream):
        there = pinned.to(device)
        copied = stream.record_event()

    def arrived() -> Sample:
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        tensors = (there.images, there.label, *there.extra.values(), *there.factors.values())
        for tensor in (tensor for tensor in tensors if tensor.is_cuda):
            # Its memory is the copying stream's, which may not use it anew before this one is done with it.
            tensor.record_stream(current)
        return there

    return arrived


def made_in_thread(items: Iterable[T], ahead: int) -> Iterator[T]:
    """The items, made in a thread, at most `ahead` before they are asked for. What making them raises is raised here.

    Closing this iterator ends the thread.
    """
    made: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(ahead)
    ended = threading.Event()

    def put(kind: str, value: T | BaseException | None) -> None:
        while not ended.is_set():
            try:
                made.put((kind, value), timeout=0.1)
                return
            except queue.Full:
                pass

    def make() -> None:
        try:
            for item in items:
                put("item", item)
                if ended.is_set():
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=make, name="ssl_ib batches", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = made.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        ended.set()
        thread.join()
