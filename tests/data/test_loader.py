"""The loader: what a batch holds depends on (seed, epoch, step) alone."""

import logging
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_ib import Sample, UserError, random
from ssl_ib.data.loader import Loader, ordered
from ssl_ib.data.sources.base import InMemory, Streamed
from ssl_ib.data.sources.folder import Folder

N = 26


def in_memory(n: int = N) -> InMemory:
    """Images whose first pixel is their number."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 2, 2).contiguous()
    return InMemory(images, torch.arange(n) % 3, ["a", "b", "c"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two sizes and two classes."""
    root = tmp_path_factory.mktemp("images")
    for number in range(N):
        path = root / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (4 + number % 3, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


def assert_same(left: list[Sample], right: list[Sample]) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.index, b.index) and torch.equal(a.label, b.label)
        assert a.extra.keys() == b.extra.keys()
        assert all(torch.equal(a.extra[key], b.extra[key]) for key in a.extra)


def test_an_epoch_visits_each_image_once_in_the_shuffled_order() -> None:
    loader = Loader(in_memory(), batch_size=4, seed=3)
    batches = list(loader.epoch(2))
    assert loader.steps_per_epoch == len(batches) == 6
    assert torch.cat([b.index for b in batches]).tolist() == random.shuffled(3, 2, N)[:24].tolist()
    for batch in batches:
        assert batch.images[:, 0, 0, 0].tolist() == batch.index.tolist()
        assert batch.label.tolist() == (batch.index % 3).tolist()


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat([b.index for b in Loader(in_memory(), 4, seed).epoch(epoch)]).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_together_are_one_process(world_size: int) -> None:
    alone = list(Loader(in_memory(), batch_size=2 * world_size, seed=1).epoch(5))
    ranks = [list(Loader(in_memory(), 2, 1, rank=r, world_size=world_size).epoch(5)) for r in range(world_size)]
    assert len(alone) == N // (2 * world_size) == len(ranks[0])
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(whole.index, torch.cat([part.index for part in parts]))
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))


def test_start_step_goes_on_where_it_left_off() -> None:
    loader = Loader(in_memory(), 4, seed=0)
    whole = list(loader.epoch(1))
    for step in range(loader.steps_per_epoch):
        assert_same(list(loader.epoch(1, start_step=step)), whole[step:])
    assert list(loader.epoch(1, start_step=loader.steps_per_epoch)) == []


def test_a_set_smaller_than_a_batch_is_an_error() -> None:
    assert Loader(in_memory(8), 4, 0, world_size=2).steps_per_epoch == 1
    with pytest.raises(
        UserError, match="takes 12 images.*batch_size=6 in each of 2.*has 8; lower batch_size to at most 4"
    ):
        Loader(in_memory(8), 6, 0, world_size=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_equal_those_in_memory(folder: Path, workers: int) -> None:
    held, streamed = Folder(str(folder)).train(), Folder(str(folder), memory_gb=1e-9).train()
    assert held.in_memory and not streamed.in_memory and len(held) == 24
    expected, found = Loader(held, 5, seed=0), Loader(streamed, 5, seed=0, workers=workers)
    state = torch.get_rng_state()
    for epoch in range(2):
        assert_same(list(found.epoch(epoch)), list(expected.epoch(epoch)))
    assert_same(list(found.epoch(2, start_step=2)), list(expected.epoch(2))[2:])
    # An epoch that was broken off leaves nothing behind.
    next(iter(found.epoch(3)))
    assert_same(list(found.epoch(4)), list(expected.epoch(4)))
    assert torch.equal(state, torch.get_rng_state())


def spoiled(root: Path, bad: int) -> Path:
    for number in range(120):
        if number < bad:
            (root / f"{number:03}.png").write_text("not an image")
        else:
            Image.new("RGB", (3, 3), (number, 0, 0)).save(root / f"{number:03}.png")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_report_unreadable_images(tmp_path: Path, workers: int) -> None:
    images = Folder(str(spoiled(tmp_path, 1)), val_fraction=0.0, memory_gb=1e-9).train()
    loader = Loader(images, 40, seed=0, workers=workers)
    for epoch in range(2):
        batches = list(loader.epoch(epoch))
        pixels, numbers = torch.cat([b.images for b in batches])[:, 0, 0, 0], torch.cat([b.index for b in batches])
        assert torch.equal(pixels.long(), numbers) and numbers.bincount().tolist() == [0, 2] + [1] * 118
        assert images.bad == ["000.png"]


@pytest.mark.parametrize("bad", [2, 120])
@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images_stop_the_run(tmp_path: Path, workers: int, bad: int) -> None:
    names, labels = [f"{number:03}.png" for number in range(120)], torch.full((120,), -1)
    root = spoiled(tmp_path, bad)
    images = Streamed(lambda name: (root / name).read_bytes(), names, labels, [], max_side=8)
    loader = Loader(images, 40, seed=0, workers=workers)
    with pytest.raises(UserError, match=r"^source.max_unreadable: \d+ of 120 images cannot be read"):
        list(loader.epoch(0))


def test_ordered_gives_every_image_once() -> None:
    batches = list(ordered(in_memory(), 10))
    assert [len(b) for b in batches] == [10, 10, 6]
    assert torch.cat([b.index for b in batches]).tolist() == list(range(N))


@pytest.mark.parametrize("limit", [1, 9, 100])
def test_ordered_limit_is_spread_over_set_and_classes(limit: int) -> None:
    batches = list(ordered(in_memory(24), 4, limit))
    index = torch.cat([b.index for b in batches])
    assert len(index) == min(limit, 24) and torch.equal(index, index.sort().values)
    if limit == 9:
        assert (index % 3).bincount().tolist() == [3, 3, 3]
        assert index.min() < 6 and index.max() >= 18


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_workers_leave_signals_to_the_run_which_can_end_its_step(folder: Path, signum: signal.Signals, caplog) -> None:
    streamed = Folder(str(folder), memory_gb=1e-9, val_fraction=0.0).train()
    assert not streamed.in_memory
    epoch = Loader(streamed, batch_size=2, seed=0, workers=2).epoch(0)
    # The workers take turns: a batch of each, so that each has begun.
    batches = [next(epoch), next(epoch)]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signum)
    batches += epoch
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert_same(batches, list(Loader(streamed, batch_size=2, seed=0).epoch(0)))
