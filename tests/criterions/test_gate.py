"""When the gate of a term opens, and what of it a checkpoint keeps."""

import pytest
import torch

from ssl_ib import Progress
from ssl_ib.criterions.gate import Gate

STEPS_PER_EPOCH = 5


def progress(step: int) -> Progress:
    return Progress(step, step // STEPS_PER_EPOCH, 8 * STEPS_PER_EPOCH, 8)


def train(gate: Gate, losses, first: int = 0) -> list[float]:
    """Whether the gate was open in each step, as the trainer asks: forward, then update."""
    states = []
    for step, value in enumerate(losses, first):
        loss = torch.tensor(value)
        states.append(gate(loss, progress(step)).item())
        gate.update(loss, progress(step))
    return states


def first_below(losses, threshold: float, momentum: float) -> int:
    running = losses[0]
    for step, loss in enumerate(losses):
        running = momentum * running + (1 - momentum) * loss
        if running < threshold:
            return step
    return -1


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_a_latch_opens_once_the_running_mean_is_below_and_stays_open(momentum):
    losses = [1.0, 0.9, 0.2, 0.8, 0.3, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 5.0, 50.0, 500.0]
    gate, at = Gate("latch", 0.5, momentum, None), first_below(losses, 0.5, momentum)
    assert {0.0: 2, 0.5: 4, 0.9: 12}[momentum] == at
    states = train(gate, losses)
    assert states == [0.0] * (at + 1) + [1.0] * (len(losses) - at - 1)
    assert gate.opened_at.item() == at and gate.running_mean > 0.5


def test_a_latch_that_opens_counts_from_the_next_step_on_and_not_within_the_step():
    """A step of several micro-batches asks and tells the gate more than once."""
    gate = Gate("latch", 0.5, 0.9, None)
    for _ in range(3):
        assert gate(torch.tensor(0.1), progress(7)) == 0
        gate.update(torch.tensor(0.1), progress(7))
    assert gate.opened_at == 7 and gate(torch.tensor(9.0), progress(8)) == 1


def test_one_low_loss_does_not_open_a_latch_with_a_long_memory():
    assert train(Gate("latch", 0.5, 0.9, None), [1.0, 0.0, 1.0, 1.0, 1.0]) == [0.0] * 5
    assert train(Gate("latch", 0.5, 0.0, None), [1.0, 0.0, 1.0, 1.0, 1.0]) == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_the_first_loss_starts_the_running_mean():
    gate = Gate("latch", 0.5, 0.9, None)
    gate.update(torch.tensor(0.75), progress(0))
    assert gate.running_mean.item() == pytest.approx(0.75)
    gate.update(torch.tensor(0.25), progress(1))
    assert gate.running_mean.item() == pytest.approx(0.7)


def test_the_threshold_itself_is_not_below_it():
    for mode in ("latch", "instant"):
        gate = Gate(mode, 0.5, 0.0, None)
        train(gate, [0.5])
        assert gate(torch.tensor(0.5), progress(1)) == 0


def test_an_instant_gate_follows_each_steps_loss():
    gate = Gate("instant", 0.5, 0.9, None)
    assert train(gate, [1.0, 0.4, 0.6, 0.1, 0.5]) == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert gate.opened_at == -1


def test_no_gate_is_always_open_and_needs_no_loss():
    gate = Gate("none", 0.5, 0.9, None)
    assert train(gate, [9.0, 0.1]) == [1.0, 1.0] and gate(None, progress(0)) == 1
    assert gate.opened_at == -1 and not gate.opened_in(progress(0))


@pytest.mark.parametrize("mode", ["latch", "instant"])
@pytest.mark.parametrize("max_epoch", [0, 2])
def test_from_the_last_epoch_on_it_is_open(mode, max_epoch):
    gate, first = Gate(mode, 0.5, 0.9, max_epoch), max_epoch * STEPS_PER_EPOCH
    steps = 4 * STEPS_PER_EPOCH
    assert train(gate, [9.0] * steps) == [0.0] * first + [1.0] * (steps - first)
    assert gate.opened_at == (first if mode == "latch" else -1)


def test_an_epoch_is_told_of_the_opening_that_was_in_it():
    gate = Gate("latch", 0.5, 0.0, None)
    train(gate, [1.0] * 7 + [0.1] * 8)
    assert gate.opened_at == 7
    assert [gate.opened_in(progress(epoch * STEPS_PER_EPOCH)) for epoch in range(3)] == [False, True, False]


def test_its_state_is_in_the_checkpoint():
    losses = [1.0, 0.9, 0.5, 0.1, 0.1, 0.1, 0.1, 3.0, 3.0, 3.0]
    whole, part, resumed = (Gate("latch", 0.5, 0.7, None) for _ in range(3))
    states = train(whole, losses)
    assert 0.0 in states and 1.0 in states
    for stop in (3, 8):  # before it opened, and after
        part = Gate("latch", 0.5, 0.7, None)
        before = train(part, losses[:stop])
        resumed = Gate("latch", 0.5, 0.7, None)
        resumed.load_state_dict(part.state_dict())
        assert before + train(resumed, losses[stop:], stop) == states
        assert torch.equal(resumed.running_mean, whole.running_mean)
        assert torch.equal(resumed.opened_at, whole.opened_at)
