"""A run from Python is the command's run, and leaves the process as it was."""

import logging
import shutil
import signal
import threading

import pytest
import torch
from harness import PARTS, STEPS, TINY, checkpoint, finished, parts, rows

import ssl_ib
from ssl_ib import UserError, ops
from ssl_ib.record.signals import StopRequest

SHORT = ("epochs=1", "eval.linear.enabled=false")
#: What depends on the machine and not on the run.
TIMES = {"seconds", "images_per_s", "data_share"}


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    for name in ("loss_curves", "knn_curve", "reconstructions", "attention"):
        monkeypatch.setattr(f"ssl_ib.record.figures.{name}", lambda *given, **more: None)


def untimed(row):
    return {key: value for key, value in row.items() if key not in TIMES}


def test_in_memory_it_is_the_commands_run_and_writes_nothing(tmp_path, monkeypatch, capsys):
    out = finished()
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with ops.use_backend("reference"):
        run = ssl_ib.train(TINY)
        assert ops.wanted() == "reference"
    assert torch.equal(torch.get_rng_state(), before) and list(tmp_path.iterdir()) == [] and run.out is None
    assert list(map(untimed, run.metrics)) == list(map(untimed, rows(out)))
    assert untimed(run.results) == checkpoint(out)["results"] | {"step": 2 * STEPS} and run.results["seconds"] > 0
    state, expected = run.backbone.state_dict(), ssl_ib.load(out).state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    assert not run.backbone.training
    assert "labels: 10 classes: 0 1" in capsys.readouterr().out


def test_a_folder_is_the_commands_folder(tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished(), out)
    first = rows(out)
    with pytest.raises(UserError, match="is not empty"):
        ssl_ib.train(TINY, out=out)
    run = ssl_ib.train(TINY, out=str(out), plugins=[PARTS], resume=True)
    assert run.metrics == rows(out) == first and run.out == out and (out / "results.json").is_file()


def test_mistakes():
    with pytest.raises(ssl_ib.ConfigError, match="2 problems in the configuration") as caught:
        ssl_ib.train(TINY, "epochs=0", "masker.ration=0.5")
    assert len(caught.value.problems) == 2
    with pytest.raises(UserError, match="unknown recipe"):
        ssl_ib.train("tinny")
    with pytest.raises(UserError, match="expected overrides as texts KEY=VALUE, .* got {'epochs': 2}"):
        ssl_ib.train(TINY, {"epochs": 2})
    with pytest.raises(UserError, match="plugin 'absent.py' is neither"):
        ssl_ib.train(TINY, plugins="absent.py")
    for option in ("resume", "overwrite"):
        with pytest.raises(UserError, match=f"{option} is about a run's folder: give out"):
            ssl_ib.train(TINY, **{option: True})


def test_what_another_backbone_drops_is_said(caplog, monkeypatch):
    def nothing(*given, **more):
        raise UserError("enough")

    monkeypatch.setattr("ssl_ib.api.pretrain", nothing)
    with pytest.raises(UserError, match="enough"):
        ssl_ib.train(TINY, "model.backbone=resnet10t", "masker=none")
    assert "model.backbone=resnet10t: drops what was for vit_tiny" in caplog.text


def test_ctrl_c_saves_and_interrupts(tmp_path, ctrl_c, caplog):
    out = tmp_path / "run"
    parts().SIGNALS[3] = signal.SIGINT
    recorded = ("criterion=recorded", "criterion.inner=info_nce")
    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING, "ssl_ib"):
        ssl_ib.train(TINY, *SHORT, *recorded, out=out)
    assert checkpoint(out)["step"] == 3 and "stopped by SIGINT; saved" in caplog.text
    # The encoder of an unfinished run is in its checkpoint.
    with pytest.raises(UserError, match="is not finished.*last.pt"):
        ssl_ib.load(out)
    encoder = ssl_ib.load(out / "checkpoints" / "last.pt")
    assert torch.equal(encoder.model.cls_token, checkpoint(out)["parts"]["model.encoder.backbone.cls_token"])


def test_the_callers_own_handler_gets_the_signal(tmp_path):
    got = []
    former = signal.signal(signal.SIGTERM, lambda signum, frame: got.append(signum))
    parts().SIGNALS[1] = signal.SIGTERM
    try:
        with pytest.raises(Exception, match="SIGTERM"):
            ssl_ib.train(TINY, *SHORT, "criterion=recorded", "criterion.inner=info_nce")
    finally:
        signal.signal(signal.SIGTERM, former)
    assert got == [signal.SIGTERM]


def test_in_another_thread_signals_are_left_alone():
    former, found = signal.getsignal(signal.SIGTERM), []

    def enter():
        with StopRequest() as stop:
            found.append((signal.getsignal(signal.SIGTERM), stop.signum))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(former, 0)]
