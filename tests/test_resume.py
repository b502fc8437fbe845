"""A run that was stopped in any way and resumed is the run that never stopped, bit for bit."""

import shutil
import signal

import pytest
import torch
import yaml
from harness import (
    STEPS,
    assert_same_run,
    assert_same_state,
    checkpoint,
    finished,
    losses,
    parts,
    rows,
    start,
    train,
    trainer,
    wait_for_step,
)

from ssl_ib import UserError

EVERY_STEP = "checkpoint.every_steps=1"
#: A queue, noise in forward and in hooks, dropout in the encoder, batch norm: all the state there is.
STATEFUL = ("criterion=queued", "model.backbone_args.proj_drop_rate=0.2", "accumulate=2")
RECORDED = ("criterion=recorded", "criterion.inner=info_nce")


def stopped(out, at: int, *overrides: str, by: signal.Signals = signal.SIGTERM) -> int:
    """Runs until the signal arrives at step `at`; returns the exit code."""
    parts().SIGNALS[at] = by
    return train(out, *RECORDED, *overrides)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Two runs in processes of their own, one terminated in its first epoch and one killed in its second.

    Both are slowed down, and start together, as most of their time goes into imports.
    """
    folder = tmp_path_factory.mktemp("processes")
    outs = folder / "terminated", folder / "killed"
    slow = {"SSL_IB_TEST_PAUSE": "0.05"}
    terminated, killed = started = [start(out, *STATEFUL, EVERY_STEP, **slow) for out in outs]
    try:
        wait_for_step(outs[0], terminated, 3)
        terminated.terminate()
        wait_for_step(outs[1], killed, STEPS + 5)
        killed.kill()
        errors = [process.communicate()[1] for process in started]
        return [(out, process.returncode, error) for out, process, error in zip(outs, started, errors, strict=True)]
    finally:
        for process in started:
            process.kill()


def test_killed_process(processes):
    out, code, _ = processes[1]
    assert code == -signal.SIGKILL
    assert STEPS < checkpoint(out)["step"] < 2 * STEPS
    assert train(out, "--resume", *STATEFUL) == 0
    assert_same_run(out, finished(*STATEFUL))


def test_terminated_process(processes):
    out, code, errors = processes[0]
    assert code == 128 + signal.SIGTERM
    step = checkpoint(out)["step"]
    assert 3 <= step < STEPS and losses(out)[-1][0] == step
    assert f"stopped by SIGTERM at step {step}" in errors and str(out / "checkpoints" / "last.pt") in errors
    # One line: not a terminal, so no progress bar, which would fill a log file.
    said = [line for line in errors.splitlines() if not line.startswith("ops: ")]
    assert "--resume" in errors and "\r" not in errors and len(said) == 1
    assert train(out, "--resume", *STATEFUL) == 0
    assert_same_run(out, finished(*STATEFUL))


@pytest.mark.parametrize("by, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals(tmp_path, capsys, ctrl_c, by, code):
    out = tmp_path / "run"
    assert stopped(out, 7, by=by) == code
    assert f"stopped by {by.name} at step 7" in capsys.readouterr().err
    assert checkpoint(out)["step"] == 7 and len(losses(out)) == 7
    # In the last step of an epoch, and twice in one run.
    parts().SIGNALS[STEPS] = by
    assert train(out, *RECORDED, "--resume") == code
    assert checkpoint(out)["step"] == STEPS and len(losses(out)) == STEPS
    assert train(out, *RECORDED, "--resume") == 0
    assert_same_run(out, finished(*RECORDED))
    # The handlers are as they were.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_ctrl_c_stays_ignored(tmp_path, ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert stopped(tmp_path / "run", 3, by=signal.SIGINT) == 0
    assert checkpoint(tmp_path / "run")["step"] == 2 * STEPS
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_second_ctrl_c_does_not_wait(tmp_path, capsys, ctrl_c, monkeypatch):
    parts().SIGNALS[3] = signal.SIGINT
    instance = trainer(*RECORDED, out=tmp_path / "run")
    # The second one comes while the first is being answered.
    monkeypatch.setattr(instance, "save", lambda *a: instance.step and signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        instance.fit()


def test_a_second_sigterm_waits(tmp_path):
    parts().SIGNALS[3] = signal.SIGTERM
    out = tmp_path / "run"
    instance = trainer(*RECORDED, out=out)
    save = instance.save

    def terminated_again(*arguments):
        if instance.step:
            signal.raise_signal(signal.SIGTERM)
        return save(*arguments)

    instance.save = terminated_again
    with pytest.raises(Exception, match="SIGTERM"):
        instance.fit()
    assert checkpoint(out)["step"] == 3


def test_hooks_are_not_repeated(tmp_path):
    events = parts().EVENTS
    events.clear()
    out = tmp_path / "run"
    scheduled = "criterion.amount={from: 1.0, to: 2.0}"
    for at in (5, STEPS, STEPS + 1):
        assert stopped(out, at, scheduled, *(["--resume"] if out.exists() else [])) == 143
    assert train(out, *RECORDED, scheduled, "--resume") == 0
    in_sittings = events.copy()
    events.clear()
    assert train(tmp_path / "whole", *RECORDED, scheduled) == 0
    # At the same place, at the same values of what is scheduled.
    assert in_sittings == events and len({amount for *_, amount in events}) == 2 * STEPS


def test_a_finished_run(tmp_path, capsys):
    whole, out = finished(*RECORDED), tmp_path / "run"
    shutil.copytree(whole, out)
    capsys.readouterr()
    assert train(out, *RECORDED, "--resume") == 0
    # Nothing is trained or evaluated again, and the closing line says what it said.
    assert rows(out) == rows(whole)
    assert f"resumed    at step {2 * STEPS}" in (text := capsys.readouterr().out)
    assert text.splitlines()[-1].startswith("kNN top-1: chance ")


def test_changed_configuration(tmp_path, capsys):
    out = tmp_path / "run"
    assert stopped(out, 3) == 143
    before = rows(out)
    capsys.readouterr()
    assert train(out, *RECORDED, "--resume", "optim.lr=1e-2", "masker.ratio=0.5", "epochs=3") == 2
    error = capsys.readouterr().err
    assert error.startswith("ssl-ib-train: 3 problems")
    for line in ("masker.ratio: 0.25 -> 0.5", "optim.lr: 0.002 -> 0.01", "epochs: 2 -> 3"):
        assert f"--resume cannot change {line}" in error
    assert rows(out) == before and checkpoint(out)["step"] == 3
    # What moves no loss may change.
    assert train(out, *RECORDED, "--resume", "checkpoint.every_steps=5", "workers=1", "device=cpu", "logger=[]") == 0
    assert losses(out) == losses(finished(*RECORDED))


def test_a_key_that_the_saved_configuration_lacks(tmp_path, capsys):
    """Such a run was started before there was the key: it has the default, and another value is a change."""
    out = tmp_path / "run"
    assert stopped(out, 3) == 143
    saved = out / "config.yaml"
    config = yaml.safe_load(saved.read_text())
    del config["accumulate"], config["optim"]["clip"], config["eval"]["knn_k"], config["model"]["positions"]
    saved.write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert train(out, *RECORDED, "--resume", "accumulate=2", "optim.clip=1.0") == 2
    error = capsys.readouterr().err
    assert error.startswith("ssl-ib-train: 2 problems")
    assert "accumulate: 1 -> 2" in error and "optim.clip: None -> 1.0" in error
    assert train(out, *RECORDED, "--resume") == 0
    assert_same_run(out, finished(*RECORDED))


def test_a_saved_configuration_with_a_key_that_is_no_more(tmp_path, capsys):
    out = tmp_path / "run"
    assert stopped(out, 3) == 143
    saved = out / "config.yaml"
    saved.write_text(saved.read_text() + "colour: red\n")
    assert train(out, *RECORDED, "--resume") == 2
    error = capsys.readouterr().err
    assert f"{saved} cannot be continued" in error and "colour: unknown key" in error


def test_without_a_run(tmp_path, capsys):
    for out in (tmp_path / "nowhere", tmp_path):
        assert train(out, "--resume") == 2
        assert f"nothing to resume: {out} holds no run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_a_checkpoint(tmp_path, capsys):
    out = tmp_path / "run"
    assert stopped(out, 3) == 143
    shutil.rmtree(out / "checkpoints")
    assert train(out, *RECORDED, "--resume") == 0
    assert "has no checkpoint yet: starting from the beginning" in capsys.readouterr().err
    assert_same_run(out, finished(*RECORDED))


def test_torn_checkpoint(tmp_path, capsys):
    out = tmp_path / "run"
    assert stopped(out, 7, EVERY_STEP) == 143
    last = out / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    assert train(out, *RECORDED, "--resume", EVERY_STEP) == 0
    assert f"{last} cannot be read" in (error := capsys.readouterr().err) and "falling back" in error
    assert_same_run(out, finished(*RECORDED))
    for file in (out / "checkpoints").iterdir():
        file.write_bytes(b"")
    assert train(out, *RECORDED, "--resume", EVERY_STEP) == 2
    assert "no checkpoint can be read" in capsys.readouterr().err


def test_the_checkpoint_must_fit(tmp_path):
    whole = finished()
    state = checkpoint(whole)
    fresh = trainer()
    with pytest.raises(UserError, match="trained on 1437 images, and now there are 1438"):
        fresh.restore(state | {"images": 1437})
    with pytest.raises(UserError, match="code changed"):
        trainer("model.projector_dim=8").restore(state)
    with pytest.raises(UserError, match="code changed"):
        trainer().restore(state | {"optimizer": {"state": {}, "param_groups": []}})
    fresh = trainer()
    fresh.restore(state)
    assert fresh.step == 2 * STEPS and fresh.seconds >= state["seconds"] > 0
    assert_same_state(state, {"parts": fresh.state.state_dict(), "optimizer": fresh.optimizer.state_dict()})


def test_a_run_does_not_go_on_with_other_images_held_out():
    state = checkpoint(finished())
    del state["fingerprint"]  # Earlier versions saved none.
    fresh = trainer()
    fresh.images.labels = torch.full_like(fresh.images.labels, -1)
    with pytest.raises(UserError, match="began with labels, and now there are none: set source.labels to folders"):
        fresh.restore(state)
    del state["results"]["untrained"]["knn/top1"]
    fresh.restore(state)
    del state["results"]["untrained"]["held_out/loss"]
    with pytest.raises(UserError, match="without held-out images, and now there are 359: set source.val_fraction to 0"):
        fresh.restore(state)


def test_edited_labels_of_as_many_images_are_seen():
    state = checkpoint(finished())
    trainer().restore(state)
    fresh = trainer()
    fresh.images.labels = fresh.images.labels.flip(0)
    with pytest.raises(UserError, match="the training images have other labels, or another order"):
        fresh.restore(state)


def test_kept_checkpoints(tmp_path):
    out = tmp_path / "run"
    assert train(out, "epochs=3", "checkpoint.keep=1", "checkpoint.every_epochs=5") == 0
    for epoch in (1, 2, 3):
        assert checkpoint(out, f"epoch_{epoch:05d}.pt")["step"] == epoch * STEPS
    assert_same_state(checkpoint(out), checkpoint(out, "epoch_00003.pt"))
