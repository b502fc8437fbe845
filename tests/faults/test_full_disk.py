"""A disk that is full at the end of a run: the file is named, nothing half-written stays, and the run can be ended
later. Every write to /dev/full is refused as on a full disk. A full disk before: record/test_checkpoint.py."""

import shutil

import pytest
import safetensors.torch
from harness import finished, rows, train
from safetensors import SafetensorError

from ssl_ib.record.log import RunLog

ENDS = ["results.json", "backbone.json", "about.json", "environment.json"]


@pytest.fixture
def out(tmp_path):
    """A run that has been trained, and not ended."""
    shutil.copytree(finished(), tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    return tmp_path / "run"


@pytest.mark.parametrize("name", ENDS)
def test_the_file_is_named_and_no_part_of_it_stays(out, capsys, name):
    (out / f"{name}.tmp").symlink_to("/dev/full")
    assert train(out, "--resume") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message == f"ssl-ib-train: [Errno 28] No space left on device: '{out / name}'"
    assert not list(out.glob("**/*.tmp")) and not (out / "results.json").exists()
    assert train(out, "--resume") == 0 and (out / "results.json").is_file()


def test_weights_are_named(out, capsys, monkeypatch):
    def refused(tensors, path, metadata):
        path.write_bytes(b"half")
        # What safetensors says where a small tmpfs is full.
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", refused)
        assert train(out, "--resume") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message == f"ssl-ib-train: [Errno 28] No space left on device: '{out / 'backbone.safetensors'}'"
    assert not list(out.glob("**/*.tmp")) and not (out / "results.json").exists()
    assert train(out, "--resume") == 0 and (out / "results.json").is_file()


def test_a_figure_is_named(out, capsys):
    figure = out / "figures" / "loss_curves.png"
    figure.unlink(missing_ok=True)
    figure.symlink_to("/dev/full")
    assert train(out, "--resume", draw=True) == 2
    assert f"No space left on device: '{figure}'" in capsys.readouterr().err


def test_a_run_without_its_page_is_done(out, caplog):
    (out / "report.html.tmp").symlink_to("/dev/full")
    assert train(out, "--resume") == 0
    assert f"its page could not be written: OSError: [Errno 28] No space left on device: '{out / 'report.html'}'" in (
        caplog.text
    )
    assert (out / "results.json").is_file() and not list(out.glob("*.tmp"))


def test_a_row_is_named(out):
    (out / "metrics.jsonl").unlink()
    log = RunLog(out, loggers=())
    log._file = open("/dev/full", "a")
    with pytest.raises(OSError, match="metrics.jsonl"):
        log.write({"step": 1, "epoch": 0.1})
    assert rows(out) == []
