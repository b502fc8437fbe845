"""Folders and archives that are not what they seem: read whole, once, within bounds, or refused in one message."""

import gzip
import io
import os
import stat
import tarfile
import zipfile

import pytest
from PIL import Image

from ssl_ib.data import decode, tars
from ssl_ib.data.decode import image_files
from ssl_ib.data.sources import archive
from ssl_ib.data.sources.archive import Archive
from ssl_ib.data.sources.folder import Folder
from ssl_ib.embed.listing import look, walk
from ssl_ib.errors import UserError

COUNT = 6


def picture() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(COUNT // 2):
            (root / name / f"{i}.png").write_bytes(picture())
    return root


def names(source):
    return [name for images in (source.train(), source.val()) if images is not None for name in images.names]


@pytest.mark.parametrize(
    "link, to", [("a/up", ".."), ("itself", "."), ("0", "b"), ("above", "../.."), ("a/x.png", "x.png")]
)
def test_a_link_leads_to_no_image_twice(folder, caplog, link, to):
    os.symlink(to, folder / link)
    caplog.set_level("INFO")
    found = names(Folder(str(folder), val_fraction=0.0, max_unreadable=0.5))
    assert found == [f"{name}/{i}.png" for name in "ab" for i in range(COUNT // 2)]
    assert (
        link.endswith(".png")
        or f"1 links to folders that are read already are passed over, such as {link}" in caplog.text
    )


def test_two_links_to_one_another_end(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "c.png").write_bytes(picture())
    os.symlink(folder, tmp_path / "other" / "back")
    os.symlink(tmp_path / "other", folder / "c")
    assert len(names(Folder(str(folder), val_fraction=0.0))) == COUNT + 1


def test_a_folder_that_cannot_be_read_is_said(folder, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot read the folder .*/b: Permission denied"):
        Folder(str(folder)).train()


def test_a_pipe_and_a_device_are_unreadable_images(folder):
    os.mkfifo(folder / "a" / "pipe.png")
    os.symlink("/dev/zero", folder / "a" / "zero.png")
    with pytest.raises(UserError, match=r"a/pipe.png \(a pipe, not a file\); a/zero.png \(a device, not a file\)"):
        Folder(str(folder), val_fraction=0.0).train()


def tar(count=COUNT) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as file:
        for i in range(count):
            member = tarfile.TarInfo(f"{'ab'[i % 2]}/{i}.png")
            member.size = len(picture())
            file.addfile(member, io.BytesIO(picture()))
    return data.getvalue()


@pytest.mark.parametrize(
    "end", [COUNT * 1024, COUNT * 1024 + 1, 3 * 1024, 3 * 1024 + 100, 3 * 1024 + 512, 3 * 1024 + 600]
)
@pytest.mark.parametrize("ending, pack", [(".tar", bytes), (".tar.gz", gzip.compress)])
def test_a_tar_cut_short_is_no_smaller_tar(tmp_path, end, ending, pack):
    path = tmp_path / f"images{ending}"
    path.write_bytes(pack(tar()[:end]))
    with pytest.raises(UserError, match="cannot read the archive .*(it has no end after|unexpected end of data)"):
        Archive(str(path)).train()
    path.write_bytes(pack(tar()))
    assert len(names(Archive(str(path)))) == COUNT


def test_a_tar_damaged_in_the_middle_is_no_smaller_tar(tmp_path):
    whole = tar()
    (tmp_path / "images.tar").write_bytes(whole[:2048] + b"x" * 512 + whole[2560:])
    with pytest.raises(UserError, match="it has no end after 2 members, at byte 2,048"):
        Archive(str(tmp_path / "images.tar")).train()


def test_looking_into_a_compressed_tar_is_bounded(tmp_path):
    with gzip.open(tmp_path / "bomb.tar.gz", "wb", compresslevel=1) as file:
        member = tarfile.TarInfo("zeros.bin")
        member.size = 1 << 25
        file.write(member.tobuf())
        file.write(bytes(member.size))
        file.write(tar())
    with pytest.raises(UserError, match=r"^source.path: \S+ takes more than source.memory_gb=0.01 decomp"):
        Archive(str(tmp_path / "bomb.tar.gz"), memory_gb=0.01)


def test_what_is_decompressed_is_neither_read_nor_passed_over_beyond_the_bound():
    file = archive._UpTo(io.BytesIO(b"abcdef"), 4, lambda: UserError("too large"))
    assert file.seek(4) == 4 and file.seek(0) == 0 and file.read(4) == b"abcd"
    with pytest.raises(UserError, match="too large"):
        file.read(1)
    with pytest.raises(UserError, match="too large"):
        file.seek(5)


def test_a_member_that_lies_outside_is_an_unreadable_image():
    archive._bounded(2, 8, 10)
    for size, offset in ((3, 8), (1, -1)):
        with pytest.raises(OSError, match="it lies outside the archive"):
            archive._bounded(size, offset, 10)


@pytest.fixture
def zipped(tmp_path):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for i in range(COUNT):
            file.writestr(f"{'ab'[i % 2]}/{i}.png", picture())
    found = bytearray(data.getvalue())
    return found, found.index(b"PK\x01\x02"), tmp_path / "images.zip"


def test_a_zip_of_another_version_or_with_a_damaged_name(zipped):
    data, entry, path = zipped
    for change, says in (({6: 200}, "zip file version 20.0"), ({9: 8, 46: 255}, "can't decode byte 0xff")):
        damaged = bytearray(data)
        for place, byte in change.items():
            damaged[entry + place] = byte
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"cannot read the archive .*{says}"):
            Archive(str(path))


def test_a_member_that_says_it_is_huge_is_an_unreadable_image(zipped):
    data, entry, path = zipped
    data[entry + 24 : entry + 28] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    images = Archive(str(path), val_fraction=0.0).train()
    assert images.bad == ["a/0.png"] and "at most 1,073,741,824 are read" in images._unreadable["a/0.png"]


def test_the_members_of_an_archive_are_bounded(zipped, tmp_path, monkeypatch):
    data, _, path = zipped
    path.write_bytes(data)
    (tmp_path / "images.tar").write_bytes(tar())
    for name in ("images.zip", "images.tar"):
        monkeypatch.setattr(tars, "MOST_MEMBERS", COUNT)
        assert len(names(Archive(str(tmp_path / name)))) == COUNT
        monkeypatch.setattr(tars, "MOST_MEMBERS", COUNT - 1)
        with pytest.raises(UserError, match=f"cannot read the archive .*more than {COUNT - 1} members"):
            Archive(str(tmp_path / name)).train()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_tar_are_said(tmp_path, caplog, kind):
    data = io.BytesIO(tar())
    with tarfile.open(fileobj=data, mode="a") as file:
        member = tarfile.TarInfo("a/again.png")
        member.type, member.linkname = kind, "0.png" if kind == tarfile.SYMTYPE else "a/0.png"
        file.addfile(member)
    (tmp_path / "images.tar").write_bytes(data.getvalue())
    caplog.set_level("INFO")
    assert len(names(Archive(str(tmp_path / "images.tar")))) == COUNT
    assert caplog.text.count("1 links are passed over, such as a/again.png") == 1


def test_links_in_a_zip_are_said(zipped, caplog):
    data, _, path = zipped
    path.write_bytes(data)
    with zipfile.ZipFile(path, "a") as file:
        link = zipfile.ZipInfo("a/again.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "0.png")
    caplog.set_level("INFO")
    images = Archive(str(path), val_fraction=0.0).train()
    assert len(images) == COUNT and images.bad == []
    assert caplog.text.count("1 links are passed over, such as a/again.png") == 1


@pytest.mark.parametrize("link, to", [("a/up", ".."), ("0", "b"), ("above", "../.."), ("a/itself", ".")])
def test_features_are_of_the_images_that_a_run_would_be_trained_on(folder, caplog, link, to):
    os.symlink(to, folder / link)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "0.png").write_bytes(picture())
    os.symlink(".hidden", folder / "c")
    caplog.set_level("INFO")
    expected = sorted([*(f"{name}/{i}.png" for name in "ab" for i in range(COUNT // 2)), "c/0.png"])
    assert sorted(names(Folder(str(folder), labels="none"))) == sorted(image_files(folder)) == expected
    caplog.clear()
    assert look(folder).total == len(expected) and list(walk(folder)) == expected
    assert caplog.text.count(f"1 links to folders that are read already are passed over, such as {link}") == 1


def test_two_links_to_one_folder_elsewhere(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "0.png").write_bytes(picture())
    for link in ("c", "d"):
        os.symlink(tmp_path / "other", folder / link)
    assert len(list(walk(folder))) == len(list(image_files(folder))) == COUNT + 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_of_too_many_pixels_is_unreadable(folder, monkeypatch, kind):
    monkeypatch.setattr(decode, "MOST_PIXELS", 64)
    Image.new("RGB", (13, 5)).save(folder / "a" / "0.png", kind)
    images = Folder(str(folder), val_fraction=0.0).train()
    assert images._unreadable == {"a/0.png": "13 x 5 pixels, at most 64 are decoded"}
    assert names(Folder(str(folder), val_fraction=0.0)) == [f"{n}/{i}.png" for n in "ab" for i in range(3)][1:]


def test_what_is_about_more_than_one_image_is_no_unreadable_image():
    """Such as a server that does not answer."""

    def read(name):
        raise UserError("no server")

    with pytest.raises(UserError, match="^no server$"):
        decode.decode_file(read, "a.png", None)


@pytest.mark.filterwarnings("ignore:Image size")
def test_the_bound_of_pixels_is_above_the_cameras_and_below_pillows():
    data = io.BytesIO()
    Image.new("L", (12_000, 9_000)).save(data, "JPEG")  # Shrunk while it is decoded.
    assert decode.decode(data.getvalue(), 8).shape == (3, 6, 8)
    assert decode.MOST_PIXELS < 2 * Image.MAX_IMAGE_PIXELS  # From where on Pillow refuses.


def test_a_pipe_is_no_archive(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(UserError, match="expected an archive of images, found a pipe"):
        Archive(str(tmp_path / "pipe.tar"))


def test_names_that_are_no_utf8_are_read_and_can_be_printed(folder):
    os.rename(folder / "a", os.fsencode(folder) + b"/\xfa")
    os.rename(folder / "b" / "0.png", os.fsencode(folder) + b"/b/\xff.png")
    source = Folder(str(folder), val_fraction=0.0)
    images = source.train()
    assert len(images) == COUNT and images.bad == []
    assert sorted(images.classes) == ["\\xfa", "b"]
    for text in (*images.classes, *source.notes):
        text.encode("utf-8")
    assert images.fingerprint()
