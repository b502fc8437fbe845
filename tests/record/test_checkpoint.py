"""Whatever goes wrong while a checkpoint is written, the one before can still be read."""

import errno
import io
import os
import random

import pytest
import torch

from ssl_ib import UserError
from ssl_ib.record.checkpoint import load, save


def state(step):
    return {"step": step, "weights": torch.full((500,), float(step)), "config": {"name": "x", "list": [1, 2.5, None]}}


def step_in(folder):
    found, warnings = load(folder)
    assert torch.equal(found["weights"], state(found["step"])["weights"]) and warnings == []
    return found["step"]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_newest_is_read(tmp_path):
    folder = tmp_path / "checkpoints"
    assert save(state(1), folder) == folder / "last.pt"
    assert step_in(folder) == 1 and files(folder) == ["last.pt"]
    for step in (2, 3):
        save(state(step), folder)
    assert step_in(folder) == 3 and files(folder) == ["last.pt", "previous.pt"]
    assert torch.load(folder / "previous.pt", weights_only=True)["step"] == 2


def test_everything_loads_as_weights_only(tmp_path):
    save(state(1), tmp_path)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["config"] == state(1)["config"]


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"step": Trap()}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="no checkpoint can be read"):
        load(tmp_path)
    assert not (tmp_path / "trapped").exists()


def test_epochs_that_are_kept(tmp_path):
    save(state(1), tmp_path, keep_as="epoch_00001.pt")
    save(state(2), tmp_path, keep_as="epoch_00002.pt")
    save(state(3), tmp_path)
    assert files(tmp_path) == ["epoch_00001.pt", "epoch_00002.pt", "last.pt", "previous.pt"]
    assert [torch.load(tmp_path / f"epoch_0000{k}.pt", weights_only=True)["step"] for k in (1, 2)] == [1, 2]
    # They are a last resort, the newest first.
    (tmp_path / "last.pt").write_bytes(b"")
    (tmp_path / "previous.pt").unlink()
    found, warnings = load(tmp_path)
    assert found["step"] == 2 and len(warnings) == 1


# --- a disk that refuses ----------------------------------------------------------------------------------------------


def fail_in_fsync(monkeypatch):
    monkeypatch.setattr("os.fsync", full)


def fail_at_once(monkeypatch):
    monkeypatch.setattr("torch.save", full)


def fail_half_way(monkeypatch):
    """The disk fills up within the file: torch reports it from its own zip writer."""
    write = torch.save

    class Full(io.FileIO):
        room = 1500

        def write(self, data):
            self.room -= len(data)
            return super().write(data) if self.room >= 0 else full()

    monkeypatch.setattr("torch.save", lambda state, file: write(state, Full(file.fileno(), "w", closefd=False)))


def fail_in_rename(number):
    def patch(monkeypatch):
        replace, calls = os.replace, []

        def refuse(*arguments):
            calls.append(arguments)
            return full() if len(calls) == number else replace(*arguments)

        monkeypatch.setattr("os.replace", refuse)

    patch.__name__ = f"fail_in_rename_{number}"
    return patch


def fail_in_copy(monkeypatch):
    """No links on this file system, and no room for a copy."""
    monkeypatch.setattr("os.link", full)
    monkeypatch.setattr("shutil.copyfile", lambda source, target: (target.write_bytes(b"torn"), full()))


STAGES = [fail_at_once, fail_half_way, fail_in_fsync, fail_in_copy, fail_in_rename(1), fail_in_rename(2)]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_a_full_disk_costs_nothing(tmp_path, monkeypatch, stage):
    save(state(1), tmp_path)
    save(state(2), tmp_path)
    with monkeypatch.context() as patched:
        stage(patched)
        with pytest.raises(UserError, match="No space left on device") as caught:
            save(state(3), tmp_path, keep_as="epoch_00003.pt")
    assert f"{tmp_path / 'last.pt'} is intact" in str(caught.value) and "--resume" in str(caught.value)
    assert step_in(tmp_path) == 2 and files(tmp_path) == ["last.pt", "previous.pt"]
    assert torch.load(tmp_path / "previous.pt", weights_only=True)["step"] in (1, 2)
    # Once there is room, it goes on as if nothing had been.
    save(state(4), tmp_path)
    save(state(5), tmp_path)
    assert step_in(tmp_path) == 5 and files(tmp_path) == ["last.pt", "previous.pt"]
    assert torch.load(tmp_path / "previous.pt", weights_only=True)["step"] == 4


def test_a_full_disk_at_the_kept_copy_keeps_the_newest(tmp_path, monkeypatch):
    save(state(1), tmp_path)
    with monkeypatch.context() as patched:
        fail_in_rename(3)(patched)
        with pytest.raises(UserError, match="is intact"):
            save(state(2), tmp_path, keep_as="epoch_00002.pt")
    assert step_in(tmp_path) == 2 and files(tmp_path) == ["last.pt", "previous.pt"]


@pytest.mark.parametrize("stage", STAGES[:3], ids=lambda stage: stage.__name__)
def test_a_full_disk_at_the_first_checkpoint(tmp_path, monkeypatch, stage):
    with monkeypatch.context() as patched:
        stage(patched)
        with pytest.raises(UserError, match="no checkpoint was saved before"):
            save(state(1), tmp_path)
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not save the checkpoint in"):
        save(state(1), tmp_path / "file" / "checkpoints")


def test_our_own_mistakes_keep_their_traceback(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("ours")

    monkeypatch.setattr("torch.save", broken)
    with pytest.raises(RuntimeError, match="ours"):
        save(state(1), tmp_path)
    assert files(tmp_path) == []


def test_a_kill_while_writing(tmp_path):
    save(state(1), tmp_path)
    (tmp_path / "last.pt.tmp").write_bytes(b"half a file")
    (tmp_path / "previous.tmp").write_bytes(b"half a file")
    assert step_in(tmp_path) == 1
    save(state(2), tmp_path)
    assert step_in(tmp_path) == 2 and files(tmp_path) == ["last.pt", "previous.pt"]


def test_without_links(tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", full)
    for step in (1, 2, 3):
        save(state(step), tmp_path, keep_as=f"epoch_0000{step}.pt")
    assert step_in(tmp_path) == 3
    assert torch.load(tmp_path / "previous.pt", weights_only=True)["step"] == 2
    assert torch.load(tmp_path / "epoch_00003.pt", weights_only=True)["step"] == 3


# --- torn files -------------------------------------------------------------------------------------------------------


def test_any_truncation_falls_back(tmp_path):
    save(state(1), tmp_path)
    save(state(2), tmp_path)
    whole = (tmp_path / "last.pt").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "last.pt").unlink()
        (tmp_path / "last.pt").write_bytes(whole[:length])
        found, warnings = load(tmp_path)
        assert found["step"] == 1
        assert len(warnings) == 1 and warnings[0].startswith(f"{tmp_path / 'last.pt'} cannot be read (")
        assert "falling back to the one before" in warnings[0]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_garbage_falls_back(tmp_path):
    save(state(1), tmp_path)
    save(state(2), tmp_path)
    (tmp_path / "last.pt").unlink()
    generator = random.Random(0)
    for _ in range(200):
        (tmp_path / "last.pt").write_bytes(generator.randbytes(generator.randrange(1, 200)))
        assert load(tmp_path)[0]["step"] == 1


def test_only_the_previous_one_is_there(tmp_path):
    save(state(1), tmp_path)
    save(state(2), tmp_path)
    (tmp_path / "last.pt").unlink()
    assert step_in(tmp_path) == 1


def test_nothing_can_be_read(tmp_path):
    save(state(1), tmp_path)
    save(state(2), tmp_path)
    for name in ("last.pt", "previous.pt"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(whole[:100])
    with pytest.raises(UserError, match="no checkpoint can be read") as caught:
        load(tmp_path)
    assert "last.pt" in str(caught.value) and "previous.pt" in str(caught.value)


def test_nothing_is_there(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        load(tmp_path / "nowhere")
