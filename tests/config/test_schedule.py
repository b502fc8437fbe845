"""Every shape of a schedule against its closed form, and what is refused."""

import math

import pytest

from ssl_ib.config.schedule import Schedule

EPOCHS = 40


def parse(**value):
    problems = []
    schedule = Schedule.parse({"from": 0.5, "to": 0.01, **value}, "x", problems)
    return schedule, problems


CLOSED = {
    "linear": lambda a, b, t: a + (b - a) * t,
    "cosine": lambda a, b, t: b + (a - b) * (1 + math.cos(math.pi * t)) / 2,
    "exponential": lambda a, b, t: a * (b / a) ** t,
    "constant": lambda a, b, t: a,
}


@pytest.mark.parametrize("shape", CLOSED)
@pytest.mark.parametrize("a, b", [(0.5, 0.01), (0.04, 0.4), (-1.0, -3.0)])
def test_shapes(shape, a, b):
    schedule, problems = parse(**{"from": a, "to": b, "shape": shape})
    assert problems == []
    for epoch in (0, 0.25, 7, 20, 39.9, 40):
        assert schedule.at(epoch, EPOCHS) == pytest.approx(CLOSED[shape](a, b, epoch / EPOCHS), rel=1e-12)
    assert schedule.at(0, EPOCHS) == pytest.approx(a)


def test_the_bottleneck_weight_of_svib():
    schedule, _ = parse(shape="exponential")
    for t in (0.0, 0.1, 0.5, 1.0):
        assert schedule.at(300 * t, 300) == pytest.approx(0.5 * 0.02**t, rel=1e-12)


def test_span_and_delay():
    schedule, _ = parse(**{"from": 0.0, "to": 1.0, "epochs": 10, "delay": 5})
    values = [schedule.at(epoch, EPOCHS) for epoch in (0, 5, 7.5, 15, 30)]
    assert values == pytest.approx([0.0, 0.0, 0.25, 1.0, 1.0])
    # Without a span of its own it lasts from the delay to the end of the run.
    schedule, _ = parse(**{"from": 0.0, "to": 1.0, "delay": 20})
    assert [schedule.at(epoch, EPOCHS) for epoch in (10, 20, 30, 40)] == pytest.approx([0.0, 0.0, 0.5, 1.0])
    # A delay beyond the end leaves the first value.
    schedule, _ = parse(**{"from": 0.0, "to": 1.0, "delay": 50})
    assert schedule.at(EPOCHS, EPOCHS) == 0.0


def test_a_span_may_be_longer_than_the_run():
    schedule, _ = parse(**{"from": 0.0, "to": 1.0, "epochs": 80})
    assert schedule.at(EPOCHS, EPOCHS) == 0.5


def test_the_larger_end():
    assert parse()[0].largest == 0.5
    assert parse(**{"from": 0.1, "to": -3.0})[0].largest == -3.0


def test_whole_numbers_are_rounded():
    schedule = Schedule(1, 4, whole=True)
    values = [schedule.at(epoch, 10) for epoch in range(11)]
    assert values == [1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4] and all(isinstance(value, int) for value in values)


def test_it_is_spelt_as_it_was_read():
    for value in ({"shape": "cosine"}, {"shape": "linear", "epochs": 3, "delay": 1.5}):
        schedule, _ = parse(**value)
        assert schedule.spec() == {"from": 0.5, "to": 0.01, **value}


@pytest.mark.parametrize(
    "value, message",
    [
        ({"from": "a"}, "x.from: expected a number, got 'a'"),
        ({"from": True}, "x.from: expected a number, got True"),
        ({"to": None}, "x.to: expected a number, got None"),
        ({"to": float("nan")}, "x.to: expected a number, got nan"),
        ({"epochs": 0}, "x.epochs: expected a number of epochs above 0, got 0"),
        ({"delay": -1}, "x.delay: expected a number of epochs of at least 0, got -1"),
        ({"shape": "cosin"}, "x.shape: unknown shape 'cosin'; did you mean 'cosine'?"),
        ({"shapes": "cosine"}, "x.shapes: unknown key; did you mean 'shape'?"),
        ({"to": 0.0, "shape": "exponential"}, "x: an exponential schedule needs two numbers of one sign"),
        ({"to": -1.0, "shape": "exponential"}, "x: an exponential schedule needs two numbers of one sign"),
    ],
)
def test_mistakes(value, message):
    schedule, problems = parse(**value)
    assert schedule is None and len(problems) == 1 and problems[0].startswith(message)


def test_all_mistakes_are_reported():
    _, problems = parse(**{"from": "a", "epochs": -1, "shape": "round", "extra": 1})
    assert len(problems) == 4
