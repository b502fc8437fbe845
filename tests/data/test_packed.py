"""Packed sets: they give what their source gives, and are whole or refused."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from ssl_ib import UserError
from ssl_ib.cli import data
from ssl_ib.data.packed_files import INDEX, PIXELS
from ssl_ib.data.sources.base import InMemory
from ssl_ib.data.sources.folder import Folder
from ssl_ib.data.sources.packed import Packed


def photos(root: Path, sizes: list[tuple[int, int]]) -> Path:
    """train/{ant,bee}/N.png and val/{ant,bee}/N.png, of the sizes (width, height) in turn."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 9), ("val", 4)):
        for number in range(count):
            width, height = sizes[number % len(sizes)]
            pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
            folder = root / split / ("bee" if number % 2 else "ant")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return root


def packed(source: Path, out: Path, *overrides: str) -> Packed:
    assert data.main(["pack", str(source), str(out), *overrides]) == 0
    return Packed(str(out))


@pytest.mark.parametrize("sizes", [[(8, 6)], [(8, 6), (5, 12), (20, 16)]], ids=["one size", "several"])
def test_a_packed_set_gives_what_its_source_gives(tmp_path, sizes):
    folder = photos(tmp_path / "photos", sizes)
    (folder / "train" / "bee" / "3.png").write_bytes(b"no picture")
    expected = Folder(str(folder), max_side=10, max_unreadable=0.2)
    found = packed(folder, tmp_path / "out", "max_side=10", "max_unreadable=0.2")
    for theirs, ours in ((expected.train(), found.train()), (expected.val(), found.val())):
        assert len(ours) == len(theirs) and ours.names == theirs.names and ours.classes == theirs.classes
        for index in (torch.arange(len(ours)), torch.tensor([3, 0, 3]), torch.tensor([1])):
            one, other = ours.gather(index), theirs.gather(index)
            assert torch.equal(one.images, other.images) and torch.equal(one.label, other.label)
            assert torch.equal(one.index, other.index) and one.extra.keys() == other.extra.keys()
            assert all(torch.equal(one.extra[key], other.extra[key]) for key in one.extra)
    assert len(found.train()) == 8 and isinstance(found.train(), InMemory) == (len(sizes) == 1)
    assert found.statistics() == expected.statistics() and list(found.notes) == list(expected.notes)


def test_what_streams_is_packed_too(tmp_path):
    folder = photos(tmp_path / "photos", [(8, 6), (5, 12)])
    (folder / "train" / "ant" / "0.png").write_bytes(b"no picture")
    streamed = packed(folder, tmp_path / "streamed", "memory_gb=1e-9", "max_unreadable=0.2")
    held = packed(folder, tmp_path / "held", "max_unreadable=0.2")
    assert len(streamed.train()) == 8 and streamed.train().fingerprint() == held.train().fingerprint()
    assert (tmp_path / "streamed" / PIXELS).read_bytes() == (tmp_path / "held" / PIXELS).read_bytes()


def test_limit_and_fingerprint(tmp_path):
    found = packed(photos(tmp_path / "photos", [(8, 6)]), tmp_path / "out")
    few = Packed(str(tmp_path / "out"), limit=4).train()
    assert sorted(few.labels.tolist()) == [0, 0, 1, 1]
    numbers = torch.tensor([found.train().names.index(name) for name in few.names])
    assert torch.equal(few.gather(torch.arange(4)).images, found.train().gather(numbers).images)
    before = found.train().fingerprint()
    (tmp_path / "photos" / "train" / "ant" / "0.png").write_bytes(
        (tmp_path / "photos" / "train" / "ant" / "2.png").read_bytes()
    )
    other = packed(tmp_path / "photos", tmp_path / "other").train().fingerprint()
    assert {key for key in before if before[key] != other[key]} == {"pixels"}


def refused(capsys, *arguments: str) -> str:
    assert data.main(list(arguments)) == 2
    message = capsys.readouterr().err
    assert message.startswith("ssl-ib-data: ") and "Traceback" not in message
    return message


def test_refusals(tmp_path, capsys):
    folder = photos(tmp_path / "photos", [(8, 6)])
    out = tmp_path / "out"
    packed(folder, out)
    assert "--overwrite replaces it" in refused(capsys, "pack", str(folder), str(out))
    assert "expected a new folder" in refused(capsys, "pack", str(folder), str(folder))
    assert "max_sid" in refused(capsys, "pack", str(folder), str(tmp_path / "new"), "max_sid=3")
    assert "expected a packed set" in refused(capsys, "check", str(folder))
    packed(folder, out, "--overwrite")
    assert data.main(["check", str(out)]) == 0
    # One pixel is another: the set can be read, and `check` sees it.
    content = bytearray((out / PIXELS).read_bytes())
    content[2 * 144 + 5] ^= 1
    (out / PIXELS).write_bytes(content)
    message = refused(capsys, "check", str(out))
    assert "1 of 13 images" in message and Packed(str(out)).train().names[2] in message
    (out / PIXELS).write_bytes(content[:-1])
    assert "found 1,871" in refused(capsys, "check", str(out))
    (out / PIXELS).write_bytes(content)
    index = bytearray((out / INDEX).read_bytes())
    for place in (len(index) - 1, 20, 4):
        damaged = bytearray(index)
        damaged[place] ^= 0x55
        (out / INDEX).write_bytes(damaged)
        with pytest.raises(UserError, match="damaged|no index"):
            Packed(str(out))


def test_nothing_is_left_of_a_refused_set(tmp_path, capsys):
    folder = photos(tmp_path / "photos", [(8, 6)])
    for number in range(0, 9, 2):
        (folder / "train" / "ant" / f"{number}.png").write_bytes(b"no picture")
    assert "cannot be read" in refused(capsys, "pack", str(folder), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
