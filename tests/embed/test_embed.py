"""The features of a folder as a file: in order, with labels, piece by piece, and again after a kill."""

import csv
import json
from itertools import count

import numpy as np
import pytest
import safetensors.numpy
import timm
import torch
from harness import finished
from PIL import Image

import ssl_ib
from ssl_ib import UserError, distributed
from ssl_ib.cli.embed import main
from ssl_ib.embed import features, files
from ssl_ib.embed.features import embed_to_file
from ssl_ib.embed.listing import look, walk

FILES = ("cats/b.png", "cats/a.png", "cats/2/c.png", "dogs-big/e.png", "dogs/d.png", "dogs/.hidden.png", "dogs/f.jpg")


@pytest.fixture
def folder(tmp_path):
    """Images of two sizes, in folders that are classes."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(name for name in FILES if "/2/" not in name):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (16 + 4 * (number % 2), 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


@pytest.fixture
def encoder():
    return ssl_ib.load(finished())


def table(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


NAMES = ["cats/a.png", "cats/b.png", "dogs-big/e.png", "dogs/d.png", "dogs/f.jpg"]
LABELS = ["cats", "cats", "dogs-big", "dogs", "dogs"]


def test_the_command(folder, encoder, tmp_path, capsys):
    """The features of `embed_folder`, its order, and the classes, in each kind of file."""
    expected, names = encoder.embed_folder(folder)
    assert names == NAMES
    for ending in (".npy", ".safetensors"):
        out = tmp_path / f"f{ending}"
        assert main([str(finished()), str(folder), "--out", str(out), "--batch-size", "2", "--device", "cpu"]) == 0
        said = capsys.readouterr().out
        assert f"features 5 x 24 in {out}" in said and "labels: 3 classes: cats, dogs, dogs-big" in said
        found = np.load(out) if ending == ".npy" else safetensors.numpy.load_file(out)["features"]
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
        assert table(tmp_path / f"f{ending}.csv") == [["file", "label"], *map(list, zip(NAMES, LABELS, strict=True))]
        assert sorted(path.name for path in tmp_path.glob(f"f{ending}*")) == [f"f{ending}", f"f{ending}.csv"]
    assert safetensors.numpy.load_file(out)["labels"].tolist() == [0, 0, 2, 1, 1]
    with safetensors.safe_open(out, "np") as file:
        assert json.loads(file.metadata()["classes"]) == ["cats", "dogs", "dogs-big"]


def test_parquet(folder, encoder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    embed_to_file(encoder, folder, tmp_path / "f.parquet")
    found = parquet.read_table(tmp_path / "f.parquet").to_pydict()
    assert found["file"] == NAMES and found["label"] == LABELS
    np.testing.assert_allclose(found["features"], encoder.embed_folder(folder)[0].numpy(), atol=1e-5)
    assert [path.name for path in tmp_path.glob("f.*")] == ["f.parquet"]


def test_parquet_without_pyarrow(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ssl_ib.embed.files.find_spec", lambda name: None)
    assert main([str(finished()), str(folder), "--out", str(tmp_path / "f.parquet")]) == 2
    assert "needs pyarrow: pip install 'ssl-ib[embed]'" in capsys.readouterr().err


def test_tokens(encoder):
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = encoder.model.forward_features(images)
        assert torch.equal(encoder.tokens(images), encoder(images))
        assert torch.equal(encoder.tokens(images, "cls"), tokens[:, 0])
        torch.testing.assert_close(encoder.tokens(images, "mean"), tokens[:, 1:].mean(dim=1))
        assert torch.equal(encoder.tokens(images, "patches"), tokens[:, 1:])
        # Of a convolutional network and of a Swin, whose channels come last: the positions of the final map.
        swin = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4]}
        for name, arguments in (("resnet10t", {}), ("swin_tiny_patch4_window7_224", swin)):
            other = ssl_ib.Backbone(timm.create_model(name, num_classes=0, **arguments), None)
            images = torch.randn(1, 3, 64, 64)
            patches = other.tokens(images, "patches")
            assert patches.shape == (1, 64 if arguments else 4, other.model.num_features)
            torch.testing.assert_close(other.tokens(images, "mean"), patches.mean(dim=1))
            torch.testing.assert_close(other.tokens(images), other.tokens(images, "mean"), atol=1e-5, rtol=1e-4)
            with pytest.raises(UserError, match="tokens=cls needs a class token, and .* has none"):
                other.tokens(images, "cls")
    with pytest.raises(UserError, match="tokens: expected one of these, got 'class'"):
        other.tokens(images, "class")


def test_patches(folder, encoder, tmp_path):
    embed_to_file(encoder, folder, tmp_path / "f.npy", tokens="patches", batch_size=3)
    found = np.load(tmp_path / "f.npy")
    assert found.shape == (5, 4, 24)
    np.testing.assert_allclose(found, encoder.embed((folder / name for name in NAMES), tokens="patches"), atol=1e-5)


def test_it_goes_on_after_a_kill(folder, encoder, tmp_path, monkeypatch, capsys):
    """With the rows that are there, and half a row that is not counted."""
    out, encoded, plain = tmp_path / "f.npy", [], type(encoder).tokens
    expected = encoder.embed_folder(folder)[0]
    calls = count()

    def tokens(self, images, which):
        encoded.append(len(images))
        if next(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, images, which)

    monkeypatch.setattr(type(encoder), "tokens", tokens)
    with pytest.raises(KeyboardInterrupt):
        embed_to_file(encoder, folder, out, batch_size=1)
    assert not out.exists()
    with (tmp_path / "f.npy.part").open("ab") as file:
        file.write(b"half")
    encoded.clear()
    assert embed_to_file(encoder, folder, out, batch_size=1).shape == (5, 24)
    # Two were encoded, of which the second was not yet written.
    assert len(encoded) == 4 and "goes on after 1 images" in capsys.readouterr().out
    np.testing.assert_allclose(np.load(out), expected, atol=1e-5)


def test_what_was_begun_otherwise(folder, encoder, tmp_path, monkeypatch):
    out = tmp_path / "f.npy"
    with monkeypatch.context() as patch:
        patch.setattr(features, "finish", lambda *given: None)
        embed_to_file(encoder, folder, out)
    with pytest.raises(UserError, match=r"was begun otherwise \(tokens: None -> cls\): --overwrite begins anew"):
        embed_to_file(encoder, folder, out, tokens="cls")
    (folder / NAMES[0]).unlink()
    with pytest.raises(UserError, match=r"was begun otherwise \(images: 5 in .* -> 4 in "):
        embed_to_file(encoder, folder, out)
    assert embed_to_file(encoder, folder, out, tokens="cls", overwrite=True).shape == (4, 24)


def test_unreadable_images_are_left_out_and_counted(folder, encoder, tmp_path, capsys):
    (folder / "cats/aa.png").write_bytes(b"no image")
    command = [str(finished()), str(folder), "--out", str(tmp_path / "f.safetensors"), "--batch-size", "2"]
    assert main(command) == 0
    assert "1 images could not be read and are left out" in capsys.readouterr().out
    assert "cats/aa.png: not an image" in (tmp_path / "f.safetensors.unreadable.txt").read_text()
    found = safetensors.numpy.load_file(tmp_path / "f.safetensors")
    expected = encoder.embed(folder / name for name in NAMES)
    np.testing.assert_allclose(found["features"], expected, atol=1e-5)
    assert found["labels"].tolist() == [0, 0, 2, 1, 1] and len(table(tmp_path / "f.safetensors.csv")) == 6
    (folder / "dogs/g.png").write_bytes(b"none either")
    assert main([*command, "--overwrite"]) == 2
    assert (
        "2 of 7 images cannot be read, and 1 may be (--max-unreadable): such as cats/aa.png" in capsys.readouterr().err
    )
    assert main([*command, "--overwrite", "--max-unreadable", "0.5"]) == 0


def test_what_is_finished_has_its_list_of_unreadable_images(folder, encoder, tmp_path, monkeypatch):
    """Ended at any time: where the file has its name, the command is not given again."""
    (folder / "cats/aa.png").write_bytes(b"no image")
    out, moved = tmp_path / "f.npy", files.os.replace

    def ended(place, to):
        moved(place, to)
        if to == out:
            raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", ended)
    with pytest.raises(KeyboardInterrupt):
        embed_to_file(encoder, folder, out)
    assert len(np.load(out)) == 5 and "cats/aa.png" in (tmp_path / "f.npy.unreadable.txt").read_text()


@pytest.mark.parametrize("ending", [".npy", ".safetensors"])
def test_several_processes_share_the_images(folder, encoder, tmp_path, monkeypatch, ending):
    alone, shared = tmp_path / f"alone{ending}", tmp_path / f"shared{ending}"
    (folder / "cats/aa.png").write_bytes(b"no image")
    embed_to_file(encoder, folder, alone, batch_size=2)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for rank in (2, 1, 0):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found = embed_to_file(encoder, folder, shared, batch_size=2)
        assert (found is None) == (rank > 0)
    assert found.shape == (5, 24)
    load = np.load if ending == ".npy" else lambda path: safetensors.numpy.load_file(path)["features"]
    # Bit for bit: the batches are the same.
    np.testing.assert_array_equal(load(shared), load(alone))
    assert sorted(path.name for path in tmp_path.glob("shared*")) == [
        f"shared{ending}{more}" for more in ("", ".csv", ".unreadable.txt")
    ]


def test_images_are_read_a_few_batches_ahead(encoder, tmp_path):
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(tmp_path / "0.png")
    drawn = count()
    names = ((next(drawn), "0.png") for _ in range(1000))
    next(features._encoded(encoder, tmp_path, names, None, 4, False))
    assert next(drawn) < 40


def test_the_walk_is_sorted_and_labels_are_those_of_the_source(tmp_path):
    names = ["train/a/1.png", "train/a-b/2.png", "train/a.png", "val/a/3.png", "test/a-b/4.png", "test/.x/5.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    assert list(walk(tmp_path)) == sorted(names[:5])
    (tmp_path / "train/a.png").unlink()
    listing = look(tmp_path)
    assert listing.total == 4 and listing.classes == ["a", "a-b"]
    assert [listing.label(name) for name in names[:5]] == ["a", "a-b", "", "a", "a-b"]


def test_a_dry_run_writes_nothing(folder, tmp_path, capsys):
    command = [str(finished()), str(folder), "--out", str(tmp_path / "f.npy"), "--tokens", "patches", "--dry-run"]
    assert main(command) == 0
    assert "features 5 x 4 x 24" in capsys.readouterr().out and not list(tmp_path.glob("f*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "f.txt"], "expected a file that ends in .npy, .safetensors, .parquet, got f.txt"),
        (["--out", "absent/f.npy"], "there is no folder absent"),
        (["--out", "folder.npy", "--overwrite"], "folder.npy is a folder: expected the name of a file"),
        (["--out", "taken.npy"], "taken.npy is there already: replace it with --overwrite"),
        (["--out", "f.npy", "--batch-size", "0"], "--batch-size: expected a number above 0, got 0"),
        (["--out", "f.npy", "--max-unreadable", "2"], "--max-unreadable: expected a share from 0 to 1"),
    ],
)
def test_mistakes(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.npy").touch()
    (tmp_path / "folder.npy").mkdir()
    assert main([str(finished()), str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_images(tmp_path, capsys):
    assert main([str(finished()), str(tmp_path), "--out", str(tmp_path / "f.npy")]) == 2
    assert "expected a folder of images, found no image in it" in capsys.readouterr().err
