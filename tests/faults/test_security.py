"""What comes from outside runs no code: each file below would make `ran` if it were trusted."""

import io
import os
import pickle
import tarfile

import pytest
import torch
from harness import TINY, finished, train
from PIL import Image

import ssl_ib
from ssl_ib.cli import eval as evaluation
from ssl_ib.cli import export
from ssl_ib.cli.train import main


class Evil:
    """What unpickling it would do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def evil(tmp_path):
    """A file that torch reads, with code in it; checked to do its harm where it is trusted."""
    file = tmp_path / "evil.pt"
    torch.save({"model": {"weight": torch.zeros(1)}, "step": 1, "more": Evil(tmp_path / "ran")}, file)
    torch.load(file, weights_only=False)["more"].close()
    (tmp_path / "ran").unlink()
    return file


def test_weights_and_checkpoints(tmp_path, evil, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_bytes((finished() / "config.yaml").read_bytes())
    (run / "checkpoints" / "last.pt").write_bytes(evil.read_bytes())
    assert train(run, "--resume") == 2
    assert main([str(TINY), "--init", str(evil), "--dry-run"]) == 2
    assert evaluation.main(["knn", str(evil), "source=digits", "--out", "evals"]) == 2
    assert export.main(["--from", "mae", str(evil), "--out", "exported"]) == 2
    with pytest.raises(ssl_ib.UserError):
        ssl_ib.load(evil)
    assert not (tmp_path / "ran").exists() and "Traceback" not in capsys.readouterr().err


def test_a_recipe(tmp_path, capsys):
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(f"base: mrcl_digits\nseed: !!python/object/apply:builtins.open ['{tmp_path / 'ran'}', w]\n")
    assert main([str(recipe), "--dry-run"]) == 2 and "not YAML" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_an_archive_writes_nothing(tmp_path, monkeypatch):
    """Names that lead out of it are names; members are read, and nothing is unpacked."""
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    with tarfile.open("images.tar", "w") as archive:
        for number in range(40):
            picture = io.BytesIO()
            Image.new("RGB", (16, 16), (6 * number, 0, 99)).save(picture, "PNG")
            for name in (f"../out_{number}.png", f"{tmp_path}/absolute_{number}.png"):
                member = tarfile.TarInfo(name)
                member.size = picture.tell()
                archive.addfile(member, io.BytesIO(picture.getvalue()))
    before = sorted(tmp_path.rglob("*"))
    more = ["source=archive", "source.path=images.tar", "batch_size=8", "--dry-run"]
    main([str(TINY), *more])
    assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts) == before


def test_images_are_no_pickles(tmp_path):
    (tmp_path / "evil.png").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    assert main([str(TINY), "source=folder", f"source.path={tmp_path}", "--dry-run"]) == 2
    assert not (tmp_path / "ran").exists()


def test_a_recipes_plugin_is_named_before_it_is_imported(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("print('imported')\n")
    (tmp_path / "mine.yaml").write_text(f"base: mrcl_digits\nplugins: [{tmp_path}/mine.py]\n")
    assert main([str(tmp_path / "mine.yaml"), "--print-config"]) == 0
    said = capsys.readouterr()
    assert "asks for the plugin" in said.err or said.out.index("asks for the plugin") < said.out.index("imported\n")


def test_a_runs_plugin_is_named_by_what_evaluates_it(tmp_path, caplog):
    """The run of the tests' own recipe, which needs one."""
    assert evaluation.main(["knn", str(finished()), "--out", str(tmp_path / "evals"), "--dry-run"]) == 0
    assert "the run asks for the plugin" in caplog.text


def test_no_image_starts_an_interpreter(tmp_path, monkeypatch):
    """Pillow knows a format by its content, and would hand PostScript to Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for number in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"evil_{number}.png", "EPS")
    assert main([str(TINY), "source=folder", f"source.path={tmp_path}", "--dry-run"]) == 2
    assert not (tmp_path / "ran").exists()
