"""Batches made ahead: in their order, no further ahead than asked, errors where they belong, and no thread left."""

import threading

import pytest
import torch

from ssl_ib.data.transfer import made_in_thread, on_device
from ssl_ib.types import Sample


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ssl_ib")]


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_the_same_items_in_the_same_order(count):
    assert list(made_in_thread(iter(range(count)), 2)) == list(range(count))
    assert not threads()


def test_a_thread_makes_ahead_and_waits():
    third, made = threading.Event(), []

    def source():
        for i in range(9):
            made.append(i)
            if i == 3:
                third.set()
            yield i

    items = made_in_thread(source(), 2)
    assert next(items) == 0
    # Two wait to be taken and a third one is at the door; nothing more can be made.
    assert third.wait(10) and made == [0, 1, 2, 3]
    items.close()
    assert not threads() and len(made) <= 5


def test_an_error_comes_where_its_item_would_have():
    def source():
        yield 1
        raise KeyError("lost")

    items = made_in_thread(source(), 2)
    assert next(items) == 1
    with pytest.raises(KeyError, match="lost"):
        next(items)
    assert not threads()


def test_on_a_cpu_nothing_is_made_ahead():
    made = []
    samples = (made.append(i) or Sample.unlabelled(torch.zeros(2, 3, 4, 4)) for i in range(3))
    next(on_device(samples, torch.device("cpu")))
    assert made == [0] and not threads()
