"""Resuming on images of the same number that are not the same: refused, or accepted and said."""

import shutil
from functools import partial

import pytest
import torch
from harness import PARTS, TINY, checkpoint, train
from PIL import Image

import ssl_ib
from ssl_ib import UserError
from ssl_ib.data.sources.folder import Folder

SMALL = ("epochs=2", "batch_size=8", "eval.linear.enabled=false", "source.val_fraction=0.25")


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "images"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (16, 16), (i * 20, 0, 255 * (name == "b"))).save(root / name / f"{i}.png")
    return root


def renamed(root):
    (root / "a" / "0.png").rename(root / "a" / "00.png")


def relabelled(root):
    (root / "a" / "7.png").rename(root / "b" / "x.png")
    (root / "b" / "0.png").rename(root / "a" / "x.png")


def changed(root):
    Image.effect_noise((16, 16), 99).convert("RGB").save(root / "a" / "3.png")


@pytest.mark.parametrize("change, what", [(renamed, {"names"}), (relabelled, {"names"}), (changed, {"sizes"})])
def test_a_fingerprint_tells_images_apart(images, change, what):
    def fingerprint():
        return Folder(str(images), val_fraction=0.0).train().fingerprint()

    before = fingerprint()
    assert before == fingerprint() and set(before) == {"names", "sizes", "labels"}
    change(images)
    after = fingerprint()
    assert what <= {key for key in before if before[key] != after[key]}


def test_a_changed_image_is_refused_or_accepted_at_resume(images, tmp_path, capsys):
    out = tmp_path / "run"
    source = f"source={{name: folder, path: {images}}}"
    assert train(out, source, *SMALL) == 0
    assert set(checkpoint(out)["fingerprint"]) == {"names", "sizes", "labels"}
    # As if it had been stopped after the first epoch.
    state = checkpoint(out)
    del state["results"]["trained"]
    torch.save(state, out / "checkpoints" / "last.pt")
    for name in "0123456":
        shutil.copy(images / "b" / "7.png", images / "a" / f"{name}.png")
        (images / "a" / f"{name}.png").open("ab").write(b"more")
    shutil.copytree(out, tmp_path / "python")
    capsys.readouterr()
    assert train(out, source, *SMALL, "--resume") == 2
    assert "--resume: the training images have other sizes, or another order" in capsys.readouterr().err
    assert train(out, source, *SMALL, "--resume", "--accept-changed-images") == 0
    accepted = "resumed, as was asked, though the training images have other sizes"
    assert accepted in "".join(capsys.readouterr())
    python = partial(ssl_ib.train, TINY, source, *SMALL, out=tmp_path / "python", plugins=PARTS, resume=True)
    with pytest.raises(UserError, match="the training images have other sizes"):
        python()
    assert python(accept_changed_images=True).results["trained"]
    assert accepted in "".join(capsys.readouterr())


def test_accepting_is_for_resuming(tmp_path, capsys):
    assert train(tmp_path / "run", "--accept-changed-images") == 2
    assert "--accept-changed-images is for --resume" in capsys.readouterr().err
    with pytest.raises(UserError, match="accept_changed_images is for resume"):
        ssl_ib.train(TINY, accept_changed_images=True)
