"""The loop: what one step does, in which order the parts are asked, and what repeats."""

import math
import socket
import subprocess
import sys

import pytest
import torch
from harness import (
    STEPS,
    assert_same_state,
    checkpoint,
    command,
    environment,
    finished,
    losses,
    parts,
    rows,
    start,
    train,
    trainer,
    wait_for_step,
)
from torch import nn

from ssl_ib import Sample, UserError
from ssl_ib.config.schedule import Schedule

RECORDED = ("criterion=recorded", "criterion.inner=info_nce")
#: No batch norm after the encoder, so that an image's projection does not depend on its batch.
NO_NORM = ("model.projector_layers=1", "model.projector_norm=false")


def sample(instance, epoch: int = 0):
    return next(instance.loader.epoch(epoch))


def gradients(instance) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in instance.state.named_parameters() if p.grad is not None}


def weights(instance) -> torch.Tensor:
    return nn.utils.parameters_to_vector(instance.state.parameters()).detach()


# --- a run repeats ----------------------------------------------------------------------------------------------------


def test_the_same_seed_repeats_and_another_does_not(tmp_path):
    drop = "model.backbone_args.proj_drop_rate=0.2"
    outs = [tmp_path / name for name in "abc"]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        # A short run logs every step, whatever it was asked for.
        assert train(out, drop, "epochs=1", "log_every=50", f"seed={seed}") == 0
    a, b, c = map(losses, outs)
    assert a == b and len(a) == STEPS
    assert all(x != y for (_, x), (_, y) in zip(a, c, strict=True))
    results = [checkpoint(out)["results"] for out in outs]
    assert results[0] == results[1] and results[0]["trained"] != results[2]["trained"]
    assert results[0]["raw_pixels"] == results[2]["raw_pixels"]


def test_evaluation_and_logging_do_not_move_the_run(tmp_path):
    drop = ("model.backbone_args.proj_drop_rate=0.2", "batch_size=64")
    often, seldom = tmp_path / "often", tmp_path / "seldom"
    assert train(often, *drop) == 0
    assert train(seldom, *drop, "eval.every_epochs=10", "eval.linear.enabled=false", "log_every=2") == 0
    assert len([row for row in rows(often) if "knn/top1" in row]) == 3
    assert len([row for row in rows(seldom) if "knn/top1" in row]) == 2
    assert losses(seldom) == [(step, loss) for step, loss in losses(often) if step % 2 == 0]
    assert_same_state(checkpoint(often), checkpoint(seldom))


def test_a_short_run_logs_often_enough_to_draw():
    assert [trainer(f"epochs={n}", "log_every=50").log_every for n in (1, 10, 100)] == [1, 5, 50]
    assert trainer("epochs=100").log_every == 1


def test_steps_differ_in_what_they_drop():
    instance = trainer("model.backbone_args.proj_drop_rate=0.5", "optim.lr=0", "masker=none")
    batch = sample(instance)
    first, second = (instance.train_step(batch)["loss"] for _ in range(2))
    assert first != second
    instance.step = 0
    assert instance.train_step(batch)["loss"] == first


# --- one step ---------------------------------------------------------------------------------------------------------


def test_views_are_normalised():
    instance = trainer("views.scale=[1.0,1.0]", "views.jitter_p=0.0", "views.grey_p=0.0")
    batch = instance.run.task.prepare(sample(instance), instance.progress())
    pixels = torch.cat(batch.views)
    assert pixels.mean().abs() < 0.1 and (pixels.std() - 1).abs() < 0.1
    plain = instance.run.views.center(Sample.unlabelled(instance.images.images))
    torch.testing.assert_close(plain.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(plain.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_accumulated_gradient_is_the_mean_of_the_micro_batches():
    whole, halves = trainer(), trainer("accumulate=2")
    batch = sample(whole)
    found = halves.train_step(batch)
    expected, each = {}, []
    for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
        whole.optimizer.zero_grad()
        _, loss = whole.step_module(whole.run.task.prepare(half, whole.progress()), whole.progress())
        loss.total.backward()
        each.append(loss.total.item())
        for name, gradient in gradients(whole).items():
            expected[name] = expected.get(name, 0) + gradient / 2
    assert found["loss"] == pytest.approx(sum(each) / 2, rel=1e-6) and each[0] != each[1]
    assert gradients(halves).keys() == expected.keys()
    for name, gradient in gradients(halves).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_accumulating_a_plain_mean_changes_nothing():
    options = ("criterion=plain_mean", *NO_NORM, "batch_size=64")
    whole, quarters = trainer(*options), trainer(*options, "accumulate=4")
    rows = [instance.train_step(sample(instance)) for instance in (whole, quarters)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)
    expected, found = gradients(whole), gradients(quarters)
    assert found.keys() == expected.keys() and max(g.abs().max() for g in expected.values()) > 0.1
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("mode", ["part", "param"])
def test_clipping(mode):
    free, clipped = trainer(), trainer("optim.clip=0.01", f"optim.clip_mode={mode}")
    batch = sample(free)
    rows = [instance.train_step(batch) for instance in (free, clipped)]
    # What is logged is the norm before.
    assert rows[0]["gradient_norm"] == rows[1]["gradient_norm"] > 1
    assert rows[0]["gradient_norm"] == pytest.approx(
        torch.stack([g.double().square().sum() for g in gradients(free).values()]).sum().sqrt().item()
    )
    norms = [g.double().norm().item() for g in gradients(clipped).values()]
    if mode == "part":
        assert math.hypot(*norms) == pytest.approx(0.01, rel=1e-3)
    else:
        assert max(norms) == pytest.approx(0.01, rel=1e-3) and max(norms) < 0.0101


def test_bf16_is_close_to_fp32():
    full, half = trainer(), trainer("precision=bf16")
    found = []
    for instance in (full, half):
        batches = instance.loader.epoch(0)
        found.append([instance.train_step(next(batches))["loss"] for _ in range(6)])
    assert all(a != b for a, b in zip(*found, strict=True))
    assert found[0] == pytest.approx(found[1], rel=0.02)
    assert all(v.dtype == torch.float32 for v in half.state.state_dict().values() if v.is_floating_point())


@pytest.mark.slow
def test_compiled_is_eager():
    eager, compiled = trainer(), trainer("compile=true")
    assert eager.state.state_dict().keys() == compiled.state.state_dict().keys()
    for _ in range(3):
        batch = sample(eager)
        assert eager.train_step(batch) == pytest.approx(compiled.train_step(batch), rel=1e-3)
        expected = gradients(eager)
        for name, gradient in gradients(compiled).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-3, rtol=1e-3, msg=name)
    collected = [instance.online.collect("features", 64) for instance in (eager, compiled)]
    torch.testing.assert_close(*collected, atol=1e-2, rtol=1e-2)


# --- schedules and hooks ----------------------------------------------------------------------------------------------


def test_scheduled_numbers(tmp_path):
    out = tmp_path / "run"
    spec = "{from: 2.0, to: 0.5, shape: cosine, epochs: 1, delay: 0.5}"
    assert train(out, *RECORDED, f"criterion.amount={spec}", "optim.weight_decay={from: 0.1, to: 0.2}") == 0
    schedule = Schedule(2.0, 0.5, "cosine", epochs=1, delay=0.5)
    trained = [row for row in rows(out) if "loss" in row]
    assert len(trained) == 2 * STEPS
    for done, row in enumerate(trained):
        assert row["step"] == done + 1 and row["epoch"] == (done + 1) / STEPS
        assert row["loss/amount"] == pytest.approx(schedule.at(done / STEPS, 2), rel=1e-6)
        warm = 2e-3 * done / STEPS if done < STEPS else 1e-3 * (1 + math.cos(math.pi * (done - STEPS) / STEPS))
        assert row["lr"] == pytest.approx(warm, rel=1e-9, abs=1e-12)
    assert trained[0]["loss/amount"] == 2 and trained[-1]["loss/amount"] == 0.5


def test_hooks(tmp_path):
    events = parts().EVENTS
    events.clear()
    assert train(tmp_path / "run", *RECORDED, "accumulate=2", "batch_size=400") == 0
    expected = []
    for epoch in range(2):
        expected.append(("on_epoch_start", 3 * epoch, epoch))
        for step in range(3 * epoch, 3 * epoch + 3):
            expected += [("forward", step, epoch), ("after_forward", step, epoch)] * 2
            expected += [("before_step", step, epoch), ("after_step", step + 1, epoch)]
        expected.append(("on_epoch_end", 3 * epoch + 3, epoch))
    # Evaluating asks the criterion for a held-out loss, in evaluation mode, and no hook; drawing asks neither.
    assert events == [(*event, 1.0) for event in expected]


def test_collect():
    instance = trainer("model.backbone_args.proj_drop_rate=0.5", "eval.batch_size=64")
    context = instance.context()
    state = {k: v.clone() for k, v in instance.state.state_dict().items()}
    features = context.collect("features", 100)
    assert features.shape == (100, 24) and not features.requires_grad
    assert context.collect("tokens", 30).shape == (30, 5, 24)
    # Plain images, every patch visible, nothing dropped: what `encode` sees.
    torch.testing.assert_close(features, context.collect("features", 100), atol=0, rtol=0)
    plain = instance.run.views.center(Sample.unlabelled(instance.images.images))
    with torch.no_grad(), instance.online.evaluating():
        everything = instance.run.model.encode(plain)
    torch.testing.assert_close(context.collect("features", 10**6), everything, atol=1e-5, rtol=1e-4)
    # And the model is as it was: in training mode, its running statistics untouched.
    assert instance.run.model.training
    assert all(torch.equal(state[k], v) for k, v in instance.state.state_dict().items())


def test_reset_optimizer_state():
    instance = trainer()
    for _ in range(2):
        instance.train_step(sample(instance))
    first, second, *_ = instance.run.model.parameters()
    assert instance.optimizer.state[first]["step"] == 2
    instance.context().reset_optimizer_state(first)
    assert first not in instance.optimizer.state
    instance.train_step(sample(instance))
    assert instance.optimizer.state[first]["step"] == 1 and instance.optimizer.state[second]["step"] == 3


# --- trouble ----------------------------------------------------------------------------------------------------------

BROKEN = ("criterion=broken", "criterion.inner=info_nce", f"criterion.at={STEPS + 4}")


@pytest.mark.parametrize("what", ["loss", "gradient", "statistic"])
def test_a_loss_that_is_no_longer_finite(tmp_path, capsys, what):
    out = tmp_path / "run"
    assert train(out, *BROKEN, f"criterion.what={what}", "checkpoint.every_steps=4") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ssl-ib-train: the {'gradient' if what == 'gradient' else 'loss'} is no longer finite at")
    assert f"at step {STEPS + 4}: " in error and "learning rate 0.00" in error and "Traceback" not in error
    if what != "gradient":
        assert f"step {STEPS + 4}: root (info_nce=" in error
    instance = trainer(*BROKEN, f"criterion.what={what}")
    batch = next(instance.loader.epoch(1, 4))
    assert [int(i) for i in (out / "bad_batch.txt").read_text().split()] == batch.index.tolist()
    assert str(out / "bad_batch.txt") in error and str(out / "checkpoints" / "last.pt") in error
    state = checkpoint(out)
    assert state["step"] == (STEPS + 4) // 4 * 4 > STEPS
    assert all(t.isfinite().all() for t in state["parts"].values() if t.is_floating_point())
    # It is on the way of a run without trouble, and leads to the same trouble again.
    assert losses(out) == losses(finished(*BROKEN[:2], "criterion.at=1000"))[: STEPS + 4]
    assert train(out, *BROKEN, f"criterion.what={what}", "checkpoint.every_steps=4", "--resume") == 2
    assert len(losses(out)) == STEPS + 4


def test_a_bad_gradient_does_not_reach_the_weights():
    instance = trainer("criterion={name: broken, inner: info_nce, at: 1, what: gradient}")
    instance.train_step(sample(instance))
    before = weights(instance)
    with pytest.raises(UserError, match="the gradient is no longer finite at step 1"):
        instance.train_step(sample(instance))
    assert torch.equal(weights(instance), before) and before.isfinite().all() and instance.step == 1


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"

    def full(descriptor):
        if parts().EVENTS and parts().EVENTS[-1][1] >= STEPS:
            raise OSError(28, "No space left on device")

    parts().EVENTS.clear()
    monkeypatch.setattr("os.fsync", full)
    assert train(out, *RECORDED, "checkpoint.every_steps=5") == 2
    error = capsys.readouterr().err
    assert error.startswith("ssl-ib-train: could not save") and "No space left on device" in error
    assert len(error.splitlines()) == 1
    assert checkpoint(out)["step"] == 10 == STEPS - 1
    monkeypatch.undo()
    assert train(out, *RECORDED, "checkpoint.every_steps=5", "--resume") == 0
    assert losses(out) == losses(finished(*RECORDED))


def test_a_full_disk_at_the_record(tmp_path, capsys, monkeypatch):
    def full(log, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssl_ib.record.log.RunLog.write", full)
    assert train(tmp_path / "run") == 2
    assert capsys.readouterr().err == "ssl-ib-train: [Errno 28] No space left on device\n"


def test_nothing_is_written_before_the_first_step(tmp_path):
    trainer(out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="1438"):
        trainer("batch_size=1439", out=tmp_path / "run")


# --- two processes ----------------------------------------------------------------------------------------------------

TWO = (*NO_NORM, "parallel=ddp", "batch_size=128", "checkpoint.every_steps=1")
#: Gradients that stay in their process until the last micro-batch; slow where asked.
ACCUMULATED = (*TWO, "criterion={name: recorded, inner: plain_mean}", "accumulate=2")


def start_two(out, *arguments: str, **variables: str) -> list[subprocess.Popen]:
    """Both processes of a run, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **variables}
    return [start(out, *arguments, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01"]


@pytest.mark.slow
def test_torchrun_is_one_process_on_the_whole_batch(tmp_path):
    out = tmp_path / "two"
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launched, *command(out, *TWO)[1:]], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kNN top-1: chance") == 1
    assert_same_to_rounding(out, finished(*TWO))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both(tmp_path):
    out = tmp_path / "two"
    first, second = start_two(out, *ACCUMULATED, SSL_IB_TEST_PAUSE="0.1")
    wait_for_step(out, first, 3)
    second.terminate()
    output, errors = zip(*(process.communicate(timeout=100) for process in (first, second)), strict=True)
    assert (first.returncode, second.returncode) == (143, 143), errors
    step = checkpoint(out)["step"]
    assert 3 <= step < 2 * 11 and losses(out)[-1][0] == step
    # Said and saved once, by the first.
    assert f"stopped by SIGTERM at step {step}; saved {out}" in errors[0] and "stopped" not in errors[1]
    assert "device" in output[0] and output[1] == ""
    # Resumed by one process, for a change.
    assert train(out, *ACCUMULATED, "--resume") == 0
    assert_same_to_rounding(out, finished(*ACCUMULATED))


@pytest.mark.slow
def test_a_bad_loss_in_two_processes_stops_both(tmp_path):
    out = tmp_path / "two"
    broken = ("criterion={name: broken, inner: info_nce, at: 5}", "parallel=ddp", "model.projector_norm=false")
    processes = start_two(out, *broken)
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    assert "Traceback" not in "".join(errors)
    # Said once, by the first.
    assert ["no longer finite at step 5: root" in error for error in errors] == [True, False]
    batch = [int(i) for i in (out / "bad_batch.txt").read_text().split()]
    assert batch == next(trainer().loader.epoch(0, 5)).index.tolist()


@pytest.mark.slow
def test_a_folder_in_use_is_refused_by_both(tmp_path):
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "notes.txt").write_text("mine")
    processes = start_two(tmp_path / "two", *TWO)
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    # The first of them says it.
    assert "is not empty" in errors[0] and "Traceback" not in errors[0] and errors[1] == ""
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["notes.txt"]


def assert_same_to_rounding(a, b):
    assert [step for step, _ in losses(a)] == [step for step, _ in losses(b)] == list(range(1, 23))
    first, second = ([row for row in rows(out) if "loss" in row] for out in (a, b))
    for x, y in zip(first, second, strict=True):
        for key in ("loss", "gradient_norm", "lr"):
            assert x[key] == pytest.approx(y[key], rel=1e-3), (x["step"], key)
    assert first[0]["loss"] == pytest.approx(second[0]["loss"], rel=1e-6)
