"""Runs that are ended with the test that began them."""

from collections.abc import Callable, Iterator

import pytest
from faults.processes import Running


@pytest.fixture
def begin() -> Iterator[Callable[..., Running]]:
    begun: list[Running] = []

    def start(*arguments, **more) -> Running:
        begun.append(Running(*arguments, **more))
        return begun[-1]

    yield start
    for run in begun:
        run.end()
