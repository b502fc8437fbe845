"""Sources: what is found, how it is labelled and split, and that every way to the same images gives the same pixels."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_ib import UserError
from ssl_ib.config.registry import SOURCES, build_part, check_part
from ssl_ib.data import decode as decoding
from ssl_ib.data.decode import decode, is_image, pack
from ssl_ib.data.sources import base, folder
from ssl_ib.data.sources import files as file_sources
from ssl_ib.data.sources.archive import Archive
from ssl_ib.data.sources.base import InMemory, Streamed, stratified
from ssl_ib.data.sources.digits import Digits
from ssl_ib.data.sources.folder import Folder
from ssl_ib.data.statistics import KNOWN, recognise

STREAM = 1e-9  # memory_gb that nothing fits in


def noise(number: int, height: int = 6, width: int = 6) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path: Path, number: int, height: int = 6, width: int = 6) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(number, height, width)).save(path)


def encoded(image: Image.Image, fmt: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def chw(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def everything(images) -> torch.Tensor:
    return images.gather(torch.arange(len(images))).images


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """train/{ant,bee}/..., val/{ant,bee}/..., some of it nested, with things that do not count in between."""
    root = tmp_path / "tree"
    for number in range(6):
        write(
            root / "train" / ("bee" if number % 2 else "ant") / ("deep/er" if number > 3 else "") / f"{number}.png",
            number,
        )
    for number in range(6, 8):
        write(root / "val" / ("bee" if number % 2 else "ant") / f"{number}.png", number)
    write(root / "train" / ".cache" / "9.png", 9)
    write(root / "train" / "ant" / ".9.png", 9)
    (root / "train" / "ant" / "notes.txt").write_text("no image")
    return root


def packed_as(tree: Path, ending: str, top: str) -> Path:
    path = tree.parent / f"packed{ending}"
    if ending == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in tree.rglob("*"):
                archive.write(file, top + str(file.relative_to(tree)))
    else:
        with tarfile.open(path, {".tar": "w", ".tgz": "w:gz"}.get(ending, f"w:{ending[5:]}")) as archive:
            archive.add(tree, top or ".")
    return path


# Decoding


@pytest.mark.parametrize("fmt", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "PPM"])
def test_lossless_formats_keep_every_pixel(fmt: str) -> None:
    pixels = np.repeat(noise(0, 2, 3), 4, axis=0)
    options = {"WEBP": {"lossless": True}}.get(fmt, {})
    assert torch.equal(decode(encoded(Image.fromarray(pixels), fmt, **options), 512), chw(pixels))


def test_jpeg_is_close() -> None:
    flat = np.full((16, 16, 3), (200, 100, 50), dtype=np.uint8)
    difference = decode(encoded(Image.fromarray(flat), "JPEG", quality=95), 512).int() - chw(flat).int()
    assert difference.abs().max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "P"])
def test_modes_become_rgb(mode: str) -> None:
    image = Image.fromarray(noise(1)).convert(mode)
    expected = np.asarray(image.convert("RGBA"))[..., :3]
    assert torch.equal(decode(encoded(image, "PNG"), 512), chw(expected))


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_truncated_image_is_no_image(fmt: str) -> None:
    data = encoded(Image.fromarray(noise(0, 40, 40)), fmt)
    with pytest.raises((OSError, SyntaxError, ValueError)):
        decode(data[: len(data) // 2], 512)


def test_cmyk_becomes_rgb() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0)).convert("CMYK")
    difference = decode(encoded(red, "JPEG", quality=95), 512).int() - torch.tensor([255, 0, 0])[:, None, None]
    assert difference.abs().max() <= 3


@pytest.mark.filterwarnings("error")
def test_transparent_palette_warns_of_nothing() -> None:
    image = Image.fromarray(noise(1)).convert("P")
    data = encoded(image, "PNG", transparency=bytes([0, 128] + [255] * 254))
    assert decode(data, 512).shape == (3, 6, 6)


def test_16_bit_grey_keeps_its_high_byte() -> None:
    values = np.array([[0, 255, 256], [30000, 65279, 65535]], dtype=np.uint16)
    expected = torch.tensor([[0, 0, 1], [117, 254, 255]], dtype=torch.uint8).expand(3, 2, 3)
    assert torch.equal(decode(encoded(Image.fromarray(values), "PNG"), 512), expected)


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_exif_orientation_is_applied(fmt: str) -> None:
    image = Image.fromarray(noise(2, 4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    expected = np.rot90(noise(2, 4, 6), -1)
    assert torch.equal(decode(encoded(image, fmt, exif=exif), 512), chw(expected))


@pytest.mark.parametrize(("fmt", "orientation"), [("PNG", 1), ("JPEG", 1), ("JPEG", 6)])
def test_large_images_shrink_and_keep_their_aspect(fmt: str, orientation: int) -> None:
    ramp = np.linspace(0, 255, 400)[None, :, None].repeat(200, 0).repeat(3, 2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    small = decode(encoded(Image.fromarray(ramp), fmt, exif=exif), 40)
    assert small.shape == ((3, 20, 40) if orientation == 1 else (3, 40, 20))
    profile = small[0].double().mean(0 if orientation == 1 else 1)
    expected = torch.from_numpy(np.linspace(0, 255, 400)).reshape(40, 10).mean(1)
    assert (profile - expected).abs().max() < 4
    assert decode(encoded(Image.fromarray(ramp), fmt), 4000).shape == (3, 200, 400)


def test_what_counts_as_an_image() -> None:
    assert all(map(is_image, ["a.jpg", "a/b/c.JPEG", "x.y.png", "a.webp", "a.tif"]))
    assert not any(map(is_image, ["a.txt", "jpg", ".a.jpg", ".git/a.png", "__MACOSX/a.png", "a.h5", "a.mpg"]))


def test_pack_pads_at_the_bottom_right() -> None:
    images = [chw(noise(0, 2, 5)), chw(noise(1, 4, 3))]
    canvas, sizes = pack(images)
    assert canvas.shape == (2, 3, 4, 5) and sizes.tolist() == [[2, 5], [4, 3]]
    for row, image, (height, width) in zip(canvas, images, sizes.tolist(), strict=True):
        assert torch.equal(row[:, :height, :width], image)
        assert row.sum() == image.sum()


# Choosing


@pytest.mark.parametrize("count", [1, 7, 20, 59, 60, 100])
def test_stratified_keeps_each_class_s_share(count: int) -> None:
    labels = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)[
        torch.randperm(60, generator=torch.Generator().manual_seed(0))
    ]
    chosen = stratified(labels, count)
    assert len(chosen) == min(count, 60) and torch.equal(chosen, chosen.unique())
    shares = labels[chosen].bincount(minlength=3) - min(count, 60) * torch.tensor([3, 2, 1]) / 6
    assert shares.abs().max() <= 1
    assert torch.equal(chosen, stratified(labels, count))


def test_stratified_strides_over_unlabelled_images() -> None:
    assert stratified(torch.full((12,), -1), 4).tolist() == [1, 4, 7, 10]


# Folders


def test_nested_folder(tree: Path) -> None:
    source = Folder(str(tree), labels="folders")
    train, val = source.train(), source.val()
    assert train.in_memory and train.classes == val.classes == ["ant", "bee"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and val.labels.tolist() == [0, 1]
    sample = train.gather(torch.tensor([5, 0]))
    assert sample.images.dtype == torch.uint8 and sample.index.tolist() == [5, 0] and sample.label.tolist() == [1, 0]
    # In the order of the paths: bee/1, bee/3, bee/deep/er/5.
    assert torch.equal(sample.images, torch.stack([chw(noise(5)), chw(noise(0))]))
    assert torch.equal(everything(val), torch.stack([chw(noise(6)), chw(noise(7))]))
    assert sample.extra == {} and train.bad == []
    assert source.train() is train and source.val() is val


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for number, ending in enumerate(["png", "bmp", "gif", "webp", "jpg", "TIFF"]):
        write(tmp_path / f"{number}.{ending}", number)
    source = Folder(str(tmp_path))
    assert source.train().labels.tolist() == [-1] * 6 and source.train().classes == [] and source.val() is None
    (held_out,) = Folder(str(tmp_path), val_fraction=0.2).val().labels.tolist()
    assert held_out == -1


def test_a_table_gives_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "images"
    for number in range(4):
        write(images / f"{number}.png", number)
    (images / "labels.csv").write_text("file,label\n0.png,bee\n2.png,ant\n")
    monkeypatch.chdir(tmp_path)
    train = Folder(str(images), "labels.csv", val_fraction=0).train()
    assert train.labels.tolist() == [1, -1, 0, -1] and train.classes == ["ant", "bee"]
    # The working directory comes first.
    (tmp_path / "labels.csv").write_text("number,Class,IMAGE\n7,owl,./1.png\n8,,2.png\n")
    assert Folder(str(images), "labels.csv", val_fraction=0).train().labels.tolist() == [-1, 0, -1, -1]
    archive = Archive(str(packed_as(images, ".tar", "top")), "labels.csv", val_fraction=0).train()
    assert archive.labels.tolist() == [-1, 0, -1, -1] and archive.classes == ["owl"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("a,label\n0.png,bee\n", "a column for the image .file, .* and one for its label .*got a, label"),
        ("file,label\n9.png,bee\n./0.png,bee\n8.png,ant\n", "2 of 3 rows of .* no image .*9.png, 8.png; .* 0.png"),
        ("file,label\n0.png,bee\n0.png,ant\n", "gives 0.png two labels, bee and ant"),
        ("file,label\n0.png\n", "expected 2 columns in .*, got 1: 0.png"),
        ("", "a column for the image"),
    ],
)
def test_tables_that_do_not_fit(tmp_path: Path, table: str, message: str) -> None:
    write(tmp_path / "0.png", 0)
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(UserError, match=f"^source.labels: .*{message}"):
        Folder(str(tmp_path), "labels.csv").train()


def test_labels_that_are_no_choice(tmp_path: Path) -> None:
    write(tmp_path / "0.png", 0)
    with pytest.raises(UserError, match="^source.labels: .*'folder'; did you mean 'folders'"):
        Folder(str(tmp_path), "folder")
    with pytest.raises(UserError, match="^source.labels: there is no file labels.csv, neither in .* nor in "):
        Folder(str(tmp_path), "labels.csv")


@pytest.mark.parametrize("memory", [4.0, STREAM])
def test_limit_decodes_no_other_image(tree: Path, memory: float, monkeypatch: pytest.MonkeyPatch) -> None:
    read = set()
    original = folder.read_image
    monkeypatch.setattr(folder, "read_image", lambda path: read.add(path.name) or original(path))
    train = Folder(str(tree), "folders", limit=2, memory_gb=memory).train()
    assert len(train) == 2 and train.labels.tolist() == [0, 1]
    everything(train)
    assert read == {"2.png", "3.png"}


def test_the_constructor_reads_no_image(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = packed_as(tree, ".tar", "")
    monkeypatch.setattr(decoding, "decode", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read"))
    Folder(str(tree))
    Archive(str(archive))


@pytest.mark.parametrize("memory", [4.0, STREAM])
def test_mixed_sizes_share_the_batch_s_smallest_canvas(tmp_path: Path, memory: float) -> None:
    shapes = [(4, 9), (7, 5), (4, 9), (12, 3)]
    for number, shape in enumerate(shapes):
        write(tmp_path / f"{number}.png", number, *shape)
    images = Folder(str(tmp_path), memory_gb=memory).train()
    assert images.in_memory == (memory == 4.0)
    sample = images.gather(torch.tensor([1, 0, 2]))
    assert sample.images.shape == (3, 3, 7, 9) and sample.extra["size"].tolist() == [[7, 5], [4, 9], [4, 9]]
    for row, number in zip(sample.images, [1, 0, 2], strict=True):
        expected = torch.zeros(3, 7, 9, dtype=torch.uint8)
        expected[:, : shapes[number][0], : shapes[number][1]] = chw(noise(number, *shapes[number]))
        assert torch.equal(row, expected)
    alike = images.gather(torch.tensor([0, 2]))
    assert alike.images.shape == (2, 3, 4, 9) and alike.extra == {}


def test_a_larger_image_late_in_the_set_grows_the_canvas(tmp_path: Path) -> None:
    for number in range(130):
        write(tmp_path / f"{number:03}.png", number, *((9, 11) if number == 129 else (5, 4)))
    images = Folder(str(tmp_path), val_fraction=0).train()
    assert images.images.shape == (130, 3, 9, 11)
    assert torch.equal(images.gather(torch.tensor([129])).images[0], chw(noise(129, 9, 11)))
    assert torch.equal(images.gather(torch.tensor([3])).images[0], chw(noise(3, 5, 4)))


def test_threads_keep_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_sources, "WORTH_THREADS", 0)
    monkeypatch.setattr(file_sources, "num_threads", lambda: 4)
    for number in range(200):
        write(tmp_path / f"{number:03}.png", number)
    images = everything(Folder(str(tmp_path), val_fraction=0).train())
    assert all(torch.equal(image, chw(noise(number))) for number, image in enumerate(images))


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_keep_the_order_of_streamed_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads) -> None:
    monkeypatch.setattr(base, "WORTH_THREADS", 0)
    for number in range(7):
        write(tmp_path / f"{number}.png", number)
    (tmp_path / "4.png").write_bytes(b"spoilt")
    images = Folder(str(tmp_path), val_fraction=0, memory_gb=STREAM, max_unreadable=1.0).train()
    asked = [3, 6, 4, 0, 5, 1, 2]
    sample, unreadable = images.fetch(asked, threads)
    alone, also = images.fetch(asked)
    assert sample.index.tolist() == alone.index.tolist() == [3, 6, 5, 0, 5, 1, 2]
    assert torch.equal(sample.images, alone.images) and [file.name for file in unreadable] == ["4.png"]
    assert [file.name for file in also] == ["4.png"]


def test_memory_decides(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"{number}.png", number)
    decoded_gb = 4 * 3 * 36 / 1e9
    assert isinstance(Folder(str(tmp_path), memory_gb=decoded_gb * 1.01).train(), InMemory)
    assert isinstance(Folder(str(tmp_path), memory_gb=decoded_gb * 0.99).train(), Streamed)


# Archives


@pytest.mark.parametrize("memory", [4.0, STREAM])
@pytest.mark.parametrize("top", ["", "tree/"])
@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip"])
def test_archive_gives_what_the_folder_gives(tree: Path, ending: str, top: str, memory: float) -> None:
    path = packed_as(tree, ending, top)
    compressed_tar = ending not in (".tar", ".zip")
    if compressed_tar and memory == STREAM:
        with pytest.raises(UserError, match="source=folder.*plain .tar.*memory_gb"):
            Archive(str(path), memory_gb=memory).train()
        return
    folder, archive = Folder(str(tree)), Archive(str(path), memory_gb=memory)
    for expected, found in ((folder.train(), archive.train()), (folder.val(), archive.val())):
        assert found.in_memory == (memory == 4.0) and found.classes == expected.classes
        assert torch.equal(found.labels, expected.labels) and torch.equal(everything(found), everything(expected))


@pytest.mark.parametrize("ending", ["", ".tar", ".zip"])
def test_streamed_sets_can_be_sent_to_a_fresh_process(tree: Path, ending: str) -> None:
    source = (
        Archive(str(packed_as(tree, ending, "")), memory_gb=STREAM) if ending else Folder(str(tree), memory_gb=STREAM)
    )
    images = source.train()
    assert torch.equal(everything(pickle.loads(pickle.dumps(images))), everything(images))


def test_a_compressed_tar_that_fits_may_stream(tmp_path: Path) -> None:
    for number in range(3):
        path = tmp_path / "set" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (300, 300), (number, 0, 0)).save(path)
    archive = packed_as(tmp_path / "set", ".tar.gz", "")
    images = Archive(str(archive), memory_gb=1e-4).train()
    assert not images.in_memory and everything(images)[:, 0, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("ending", [".tar.gz", ".tar", ".zip"])
def test_damaged_archive(tree: Path, ending: str) -> None:
    path = packed_as(tree, ending, "")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    with pytest.raises(UserError, match="cannot read the archive"):
        Archive(str(path)).train()


def test_cifar10_archive(data_dir: Path) -> None:
    source = Archive(str(data_dir / "cifar10.tar.xz"), limit=200)
    train, val = source.train(), source.val()
    assert train.images.shape == (200, 3, 32, 32) and train.labels.bincount().tolist() == [20] * 10
    assert val.images.shape == (10_000, 3, 32, 32) and val.labels.bincount().tolist() == [1000] * 10
    assert train.classes[0] == "airplane" and train.classes[9] == "truck" and train.bad == val.bad == []
    assert source.statistics() == KNOWN["cifar10"]
    measured = val.images.double().mean(dim=(0, 2, 3)) / 255
    assert torch.allclose(measured, torch.tensor([0.4941, 0.4851, 0.4504]).double(), atol=1e-4)


# Unreadable images and missing places


def spoil(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:60])
    elif how == "text":
        path.write_text("not an image")
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        path.symlink_to("nowhere.png")


@pytest.mark.parametrize("how", ["truncated", "text", "empty", "dangling"])
@pytest.mark.parametrize("memory", [4.0, STREAM])
def test_one_in_a_hundred_may_be_unreadable(tmp_path: Path, how: str, memory: float) -> None:
    for number in range(100):
        write(tmp_path / f"{number:03}.png", number)
    spoil(tmp_path / "099.png", how)
    images = Folder(str(tmp_path), val_fraction=0, memory_gb=memory).train()
    if memory == 4.0:
        assert len(images) == len(images.labels) == 99
        assert torch.equal(images.gather(torch.tensor([98])).images[0], chw(noise(98)))
    else:
        assert len(images) == 100 and images.bad == []
        sample = images.gather(torch.tensor([98, 99]))
        assert sample.index.tolist() == [98, 0]
        assert torch.equal(sample.images, torch.stack([chw(noise(98)), chw(noise(0))]))
        images.gather(torch.tensor([99]))
    assert images.bad == ["099.png"]


@pytest.mark.parametrize("memory", [4.0, STREAM])
def test_more_stop_the_run(tmp_path: Path, memory: float) -> None:
    for number in range(100):
        write(tmp_path / f"{number:03}.png", number)
    for number in (10, 50):
        spoil(tmp_path / f"{number:03}.png", "text")
    with pytest.raises(
        UserError,
        match=r"^source.max_unreadable: 2 of 100 images cannot be read \(2.0%\), and at most 1% .*010.png.*050.png",
    ):
        everything(Folder(str(tmp_path), val_fraction=0, memory_gb=memory).train())


@pytest.mark.parametrize("memory", [4.0, STREAM])
def test_how_many_may_be_unreadable_is_a_key(tmp_path: Path, memory: float) -> None:
    for number in range(10):
        write(tmp_path / f"{number}.png", number)
    spoil(tmp_path / "3.png", "text")

    def bad(**more) -> list[str]:
        images = Folder(str(tmp_path), val_fraction=0, memory_gb=memory, **more).train()
        everything(images)
        return images.bad

    assert bad() == ["3.png"]  # One is above the share, and left out in any case.
    with pytest.raises(UserError, match="1 of 10 images cannot be read .* at most 0%"):
        bad(max_unreadable=0.0)
    spoil(tmp_path / "7.png", "text")
    with pytest.raises(UserError, match="2 of 10 images cannot be read .* at most 1%"):
        bad()
    assert sorted(bad(max_unreadable=0.2)) == ["3.png", "7.png"]


def test_all_unreadable(tmp_path: Path) -> None:
    for number in range(70):
        (tmp_path / f"{number}.png").write_text("x")
    with pytest.raises(UserError, match=r"70 of 70 images cannot be read \(100.0%.*not an image that Pillow knows"):
        Folder(str(tmp_path), val_fraction=0).train()


def test_labels_follow_when_images_drop_out(tmp_path: Path) -> None:
    for number in range(200):
        write(tmp_path / ("a" if number < 100 else "b") / f"{number:03}.png", number)
    spoil(tmp_path / "a" / "020.png", "text")
    train = Folder(str(tmp_path), val_fraction=0).train()
    assert train.labels.tolist() == [0] * 99 + [1] * 100
    assert torch.equal(train.gather(torch.tensor([99])).images[0], chw(noise(100)))


def test_missing_and_empty_places(tmp_path: Path, tree: Path) -> None:
    archive = packed_as(tree, ".tar.gz", "")
    (tmp_path / "empty" / "notes").mkdir(parents=True)
    (tmp_path / "empty" / "notes" / "a.txt").write_text("x")
    (tmp_path / "a.rar").write_text("x")
    (tmp_path / "a.tar").write_text("x" * 2000)
    hollow = packed_as(tmp_path / "empty", ".zip", "")
    for build, pattern in (
        (lambda: Folder(str(tmp_path / "no")), "expected a folder.*found nothing"),
        (lambda: Folder(str(archive)), "source=archive"),
        (lambda: Folder(str(tmp_path / "empty")), "no image in .*empty.*.png.*Pillow"),
        (lambda: Archive(str(tmp_path / "no.tar")), "expected an archive.*found nothing"),
        (lambda: Archive(str(tree)), "source=folder"),
        (lambda: Archive(str(tmp_path / "a.rar")), "ending in .tar, .tar.gz.*.zip"),
        (lambda: Archive(str(tmp_path / "a.tar")), "cannot read the archive"),
        (lambda: Archive(str(hollow)), "no image in the archive"),
    ):
        with pytest.raises(UserError, match=pattern):
            build()


# Statistics, digits, devices, registry


def test_measured_statistics_leave_the_padding_out(tmp_path: Path) -> None:
    shapes = [(4, 9), (7, 5), (12, 3)]
    for number, shape in enumerate(shapes):
        write(tmp_path / f"{number}.png", number, *shape)
    source = Folder(str(tmp_path))
    mean, deviation = source.statistics()
    assert source.statistics() is source.statistics()
    pixels = np.concatenate([noise(i, *shape).reshape(-1, 3) for i, shape in enumerate(shapes)]) / 255.0
    assert np.allclose(mean, pixels.mean(0), atol=1e-12) and np.allclose(deviation, pixels.std(0), atol=1e-12)
    assert Folder(str(tmp_path), memory_gb=STREAM).statistics() == KNOWN["imagenet"]
    assert Folder(str(tmp_path), statistics="stl10").statistics() == KNOWN["stl10"]
    with pytest.raises(UserError, match="unknown set 'cifar11'.*did you mean 'cifar10'"):
        Folder(str(tmp_path), statistics="cifar11")


def test_statistics_of_a_constant_set_can_be_divided_by(tmp_path: Path) -> None:
    Image.new("RGB", (5, 5), (10, 20, 30)).save(tmp_path / "a.png")
    assert Folder(str(tmp_path)).statistics()[1] == (1 / 255,) * 3


def test_recognised_names() -> None:
    assert [recognise(p) for p in ("a/CIFAR-10/", "cifar100.tar.gz", "x/ImageNet-1k", "Tiny-ImageNet-200.zip")] == [
        "cifar10",
        "cifar100",
        "imagenet",
        "tiny_imagenet",
    ]
    assert [recognise(p) for p in ("imagenette96.tar.xz", "cifar10/train", ".", "my_cifar10")] == [None] * 4


def test_every_source_can_be_limited() -> None:
    for name in SOURCES.names():
        schema = SOURCES.schema(name)
        assert {"limit", "sequences"} & schema.keys(), name  # One that makes its images says how many.
        if name != "packed":  # Its labels were settled, and every image read, when it was packed.
            assert {"labels", "max_unreadable"} <= schema.keys() or "path" not in schema, name
    few, every = Digits(8, limit=50), Digits(8)
    assert few.train().labels.bincount(minlength=10).min() >= 4 and len(few.train()) == 50
    assert torch.equal(few.val().images, every.val().images)


@pytest.mark.parametrize("size", [8, 16, 5])
def test_digits(size: int) -> None:
    from sklearn.datasets import load_digits

    source = Digits(size)
    train, val = source.train(), source.val()
    assert len(train) + len(val) == 1797 and len(val) == 359 and source.train() is train
    assert train.images.shape == (1438, 3, size, size) and train.classes == list("0123456789")
    full = torch.from_numpy(load_digits().target).bincount()
    assert (val.labels.bincount() - full * 359 / 1797).abs().max() <= 1
    assert torch.equal(train.images[:, 0], train.images[:, 2])
    if size == 8:
        both = torch.cat([train.images, val.images])[:, 0].flatten(1)
        scaled = torch.from_numpy(load_digits().images * 255 / 16).round().to(torch.uint8).flatten(1)
        assert sorted(both.tolist()) == sorted(scaled.tolist())
        assert both.max() == 255


def test_a_set_that_does_not_fit_on_the_gpu_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    images = InMemory(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), ["a"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (95, 1000))
    assert images.to("cuda") is images
    moved = images.to("meta")
    assert moved.images.device.type == "meta" and images.images.device.type == "cpu" and moved.labels is images.labels


def test_sources_are_registered_with_their_ranges(tree: Path) -> None:
    assert {"archive", "digits", "folder"} <= set(SOURCES.names())
    problems: list[str] = []
    spec = check_part("source", {"name": "folder", "path": str(tree), "limit": 3}, "source", problems)
    assert problems == [] and len(build_part("source", spec).part.train()) == 3
    check_part("source", {"name": "archive", "limit": 0, "val_fraction": 1.0}, "source", problems)
    assert [problem.split(":")[0] for problem in problems] == ["source.path", "source.val_fraction", "source.limit"]
