"""Damaged images and archives: read as far as they go within the bounds that are set, or refused."""

import gzip
import io
import tarfile
import zipfile
from functools import cache

import numpy as np
from fuzz.cases import damage, empty_folder, fuzzed, holds, hows
from harness import TINY
from hypothesis import strategies as st
from PIL import Image

from ssl_ib.cli.train import main
from ssl_ib.data.decode import is_image

#: Images that are not touched.
GOOD = 8
#: Half of the images may be unreadable; held in memory, or streamed where that takes more than these.
BOUNDS = ("source.max_unreadable=0.5", "source.memory_gb=1e-7")


@cache
def pictures() -> dict[str, bytes]:
    """A small picture in every format that Pillow writes and reads, by the ending of its name."""
    Image.init()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 17, 3), dtype=np.uint8)
    whole, found = Image.fromarray(pixels), {}
    for ending, name in sorted(Image.registered_extensions().items()):
        for mode in ("RGB", "P", "L", "1"):
            file = io.BytesIO()
            try:
                whole.convert(mode).save(file, name)
            except (KeyError, OSError, ValueError):
                continue
            if is_image(f"a{ending}") and name not in {kept for kept, _ in found.values()}:
                found[ending] = name, file.getvalue()
            break
    more = {}
    for name, arguments in {".png": {}, ".tif": {"compression": "tiff_lzw"}, ".webp": {"lossless": True}}.items():
        file = io.BytesIO()
        frames = [whole.convert("RGBA"), whole.rotate(90).convert("RGBA")]
        frames[0].save(file, Image.registered_extensions()[name], save_all=True, append_images=frames[1:], **arguments)
        more[f"several{name}"] = file.getvalue()
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    whole.save(file, "JPEG", progressive=True, exif=exif)
    return {f"a{ending}": data for ending, (_, data) in found.items()} | more | {"turned.jpg": file.getvalue()}


names = st.deferred(lambda: st.sampled_from(sorted(pictures())))


@fuzzed(35, chosen=st.lists(names, min_size=1, max_size=3), how=hows, bounds=st.integers(0, 2))
def test_images(chosen, how, bounds):
    with empty_folder() as folder:
        (folder / "images").mkdir()
        for number in range(GOOD):
            (folder / "images" / f"good_{number}.png").write_bytes(pictures()["several.png"])
        for number, name in enumerate(chosen):
            other = pictures()[how.choice(sorted(pictures()))]
            (folder / "images" / f"{number}_{name}").write_bytes(damage(pictures()[name], how, other))
        given = ["source=folder", "source.path=images", *BOUNDS[:bounds]]
        holds("images", main, TINY, *given, "batch_size=4", "--dry-run", folder=folder)


@cache
def archives() -> dict[str, bytes]:
    """An archive of each kind, of twelve pictures in two folders."""
    members = {f"{'ab'[n % 2]}/{n}.png": pictures()["several.png"] for n in range(12)}
    found = {}
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for name, data in members.items():
                # Long and foreign names have headers of their own.
                member = tarfile.TarInfo(name if form == tarfile.USTAR_FORMAT else f"{name[:-4]}{'ü' * 60}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        found[f"{form}.tar"] = file.getvalue()
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as packed:
            for name, data in members.items():
                packed.writestr(name, data)
        found[f"{method}.zip"] = file.getvalue()
    return found


@fuzzed(35, kind=st.deferred(lambda: st.sampled_from(sorted(archives()))), how=hows, bounds=st.integers(0, 2))
def test_archives(kind, how, bounds):
    data = damage(archives()[kind], how, archives()[how.choice(sorted(archives()))])
    # Damaged within, and packed without a mistake; or damaged from without.
    packed = kind.endswith(".tar") and how.random() < 0.4
    if packed:
        whole = how.random() < 0.5
        data = gzip.compress(data, 1) if whole else damage(gzip.compress(archives()[kind], 1), how)
    with empty_folder() as folder:
        (folder / f"images.{'tar.gz' if packed else kind[-3:]}").write_bytes(data)
        path = f"source.path=images.{'tar.gz' if packed else kind[-3:]}"
        holds(
            "archives", main, TINY, "source=archive", path, *BOUNDS[:bounds], "batch_size=4", "--dry-run", folder=folder
        )


def test_there_is_a_picture_of_each_common_format():
    assert {name[-4:] for name in pictures()} >= {".jpg", ".png", ".gif", ".bmp", ".tif", "webp"}
    assert len(pictures()) > 20
