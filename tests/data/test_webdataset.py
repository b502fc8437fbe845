"""Shards: they give what their folder gives, each image once an epoch, and are whole, or named and counted."""

import functools
import http.server
import io
import json
import shutil
import sys
import tarfile
import threading
from pathlib import Path

import pytest
import torch
import webdataset
from PIL import Image
from ranks import answers_of, join

from ssl_ib import UserError, distributed, random
from ssl_ib.cli import data
from ssl_ib.data import found_shards, remote
from ssl_ib.data.loader import Loader
from ssl_ib.data.shards import INDEX
from ssl_ib.data.sources.folder import Folder
from ssl_ib.data.sources.webdataset import WebDataset

STREAM = 1e-9  # memory_gb that nothing fits in
TRAIN, HELD_OUT = 25, 6


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ssl_ib"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/{ant,bee}/N.png and val/{ant,bee}/N.png, N in red, of two sizes; one training image is damaged."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", TRAIN), ("val", HELD_OUT)):
        for number in range(count):
            path = root / split / ("bee" if number % 2 else "ant") / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (6 + number % 2, 6), (number, 0, 0)).save(path)
    (root / "train" / "ant" / "08.png").write_bytes(b"no picture")
    return root


def sharded(folder: Path, out: Path, *arguments: str) -> str:
    assert data.main(["shard", str(folder), str(out), "--images", "4", *arguments]) == 0
    return str(out)


@pytest.fixture(scope="module")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """7 shards for training (the last of one image) and 2 held out."""
    return sharded(photos, tmp_path_factory.mktemp("shards") / "out")


@pytest.fixture
def mine(shards: str, tmp_path: Path) -> Path:
    """A copy of the shards, to be damaged."""
    return Path(shutil.copytree(shards, tmp_path / "mine"))


def source(path: object, **arguments) -> WebDataset:
    return WebDataset(str(path), **{"memory_gb": STREAM, "max_unreadable": 0.2, **arguments})


def assert_same_batches(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.label, other.label)
        assert torch.equal(one.index, other.index) and one.extra.keys() == other.extra.keys()


# The same as the folder


@pytest.mark.parametrize(("memory", "workers"), [(4.0, 0), (STREAM, 0), (STREAM, 2)])
def test_shards_give_what_their_folder_gives(photos: Path, shards: str, memory: float, workers: int) -> None:
    folder, found = Folder(str(photos), max_unreadable=0.2, memory_gb=memory), source(shards, memory_gb=memory)
    for theirs, ours in ((folder.train(), found.train()), (folder.val(), found.val())):
        assert ours.in_memory == theirs.in_memory and list(ours.names) == list(theirs.names)
        assert ours.labels.tolist() == theirs.labels.tolist() and ours.classes == theirs.classes == ["ant", "bee"]
        # A run that was begun on the folder goes on from the shards.
        assert theirs.fingerprint().items() <= ours.fingerprint().items()
    assert found.statistics() == folder.statistics() and list(found.notes) == list(folder.notes)
    loader = Loader(found.train(), 5, seed=0, workers=workers)
    assert_same_batches(loader.epoch(1, start_step=1), Loader(folder.train(), 5, seed=0).epoch(1, start_step=1))
    assert found.train().bad == ["train/ant/08.png"]


def test_limit_and_labels(shards: str) -> None:
    few = source(shards, limit=4).train()
    assert len(few) == 4 and few.labels.tolist() == [0, 0, 1, 1]
    assert few.gather(torch.arange(4)).images[:, 0, 0, 0].tolist() == [int(Path(name).stem) for name in few.names]
    assert source(shards, labels="none").train().labels.unique().tolist() == [-1]
    with pytest.raises(UserError, match="source.val.*the index in .* says what is held out"):
        source(shards, val="x")


# The order, over ranks, workers and restarts


def test_an_order_by_shards_needs_few_of_them_at_a_time() -> None:
    part = torch.arange(12).repeat_interleave(torch.tensor([5, 1, 9, 30, 2, 8, 11, 4, 4, 20, 3, 3]))
    order = random.shuffled_nearby(3, 1, part, buffer=6)
    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(order, random.shuffled_nearby(3, 1, part, buffer=6))
    assert not torch.equal(order, random.shuffled_nearby(3, 2, part, buffer=6))
    assert not torch.equal(order, random.shuffled_nearby(4, 1, part, buffer=6))
    # Laid end to end in the order in which they come, no image is further than the buffer from its place.
    first = {int(shard): len(part) for shard in part.unique()}
    for place, image in enumerate(order.tolist()):
        first[int(part[image])] = min(first[int(part[image])], place)
    place = torch.empty_like(order)
    place[order] = torch.arange(100)
    for shard in part.unique():
        mine = place[part == shard]
        assert int(mine.max() - mine.min()) <= len(mine) + 2 * 6
    # Within a shard the images are shuffled too.
    assert not torch.equal(place[part == 3], place[part == 3].sort().values)


def numbers(loader: Loader, epoch: int, start: int, stop: int) -> list[list[int]]:
    """The images of some steps, by step, by the number that each has in red."""
    batches = loader.epoch(epoch, start)
    return [batch.images[:, 0, 0, 0].tolist() for batch, _ in zip(batches, range(start, stop), strict=False)]


@pytest.mark.parametrize("buffer", [None, 3])
def test_each_image_once_over_ranks_workers_and_a_restart_on_another_number_of_them(
    photos: Path, tmp_path: Path, buffer: int | None
) -> None:
    """2 processes take 2 steps of an epoch, 3 the next, and 1 the rest; one shard, and so fewer than processes."""
    whole = Path(shutil.copytree(photos, tmp_path / "whole"))
    (whole / "train" / "ant" / "08.png").unlink()
    out = sharded(whole, tmp_path / "out", "--images", "100")
    assert len(list(Path(out, "train").iterdir())) == 1
    images = source(out, buffer=buffer).train()
    assert len(images) == 24

    def steps(ranks: int, workers: int, start: int, stop: int) -> list[list[int]]:
        loaders = [Loader(images, 6 // ranks, 5, workers, rank, ranks) for rank in range(ranks)]
        shares = [numbers(loader, 7, start, stop) for loader in loaders]
        return [[image for share in step for image in share] for step in zip(*shares, strict=True)]

    stopped = steps(2, 2, 0, 2) + steps(3, 0, 2, 3) + steps(1, 2, 3, 4)
    assert stopped == steps(1, 0, 0, 4)
    assert sorted(sum(stopped, [])) == [number for number in range(TRAIN) if number != 8]


def visit(rank: int, port: int, folder: str) -> None:
    """What a process of a run does: it visits its share of some steps of an epoch, and saves which images they have."""
    ranks, start, stop = torch.load(Path(folder) / "plan.pt")
    join(rank, ranks, port)
    images = source(Path(folder) / "shards", buffer=3).train()
    loader = Loader(images, 6 // ranks, 5, workers=1, rank=distributed.rank(), world_size=distributed.world_size())
    torch.save(numbers(loader, 7, start, stop), Path(folder) / f"{rank}.pt")
    loader.close()
    distributed.shutdown()


@pytest.mark.slow
def test_each_image_once_in_real_processes(photos: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(photos, tmp_path / "whole"))
    (whole / "train" / "ant" / "08.png").unlink()
    sharded(whole, tmp_path / "shards")
    visited: list[int] = []
    for ranks, start, stop in ((2, 0, 1), (3, 1, 3), (1, 3, 4)):
        torch.save((ranks, start, stop), tmp_path / "plan.pt")
        shares = answers_of(visit, ranks, tmp_path)
        visited += [image for step in zip(*shares, strict=True) for share in step for image in share]
    assert sorted(visited) == [number for number in range(TRAIN) if number != 8]
    one = numbers(Loader(source(tmp_path / "shards", buffer=3).train(), 6, 5), 7, 0, 4)
    assert visited == sum(one, [])


def test_a_run_goes_on_only_with_the_same_order(shards: str) -> None:
    found = [source(shards, buffer=buffer).train().fingerprint()["shards"] for buffer in (None, 3, 4)]
    assert len(set(found)) == 3


# Shards of others


def written(path: Path, samples: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for number, sample in enumerate(samples):
            picture = io.BytesIO()
            Image.new("RGB", (4, 4), (sample.pop("red"), 0, 0)).save(picture, "PNG")
            writer.write({"__key__": f"{number:03}", "png": picture.getvalue(), **sample})
    return path


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Four shards of five samples with texts as labels."""
    for shard in range(4):
        samples = [{"red": 5 * shard + i, "cls": b"owl" if i % 2 else b"cat"} for i in range(5)]
        written(tmp_path / "theirs" / f"set-{shard:03}.tar", samples)
    return tmp_path / "theirs"


def reds(images) -> list[int]:
    return images.gather(torch.arange(len(images))).images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("path", ["{}", "{}/set-*.tar", "{}/set-{{000..003}}.tar"])
def test_shards_by_folder_pattern_and_range(theirs: Path, path: str) -> None:
    found = source(path.format(theirs), val_fraction=0.2)
    assert len(found.train()) == 16 and len(found.val()) == 4 and found.train().classes == ["cat", "owl"]
    assert sorted(reds(found.train()) + reds(found.val())) == list(range(20))
    assert found.train().names[0] == "set-000/000.png"
    labels = [(red % 5) % 2 for red in reds(found.train())]
    assert found.train().labels.tolist() == labels


def test_held_out_shards_and_other_keys(tmp_path: Path) -> None:
    for name, base in (("a", 0), ("b", 10)):
        samples = [{"red": base + i, "json": json.dumps({"category": i - 1}).encode()} for i in range(4)]
        written(tmp_path / f"{name}.tar", samples)
    found = source(tmp_path / "a.tar", val=str(tmp_path / "b.tar"))
    assert reds(found.train()) == [0, 1, 2, 3] and reds(found.val()) == [10, 11, 12, 13]
    assert found.train().labels.tolist() == [-1, 0, 1, 2] and found.train().classes == ["0", "1", "2"]
    none = source(tmp_path / "a.tar", labels="none").train()
    assert none.labels.tolist() == [-1] * 4 and none.classes == []
    with pytest.raises(UserError, match="source.val: .*a.tar is one of the shards of source.path too"):
        source(tmp_path / "a.tar", val=str(tmp_path / "a.tar"))
    with pytest.raises(UserError, match="source.labels: the JSON of the sample 000 of .*a.tar has no field 'colour'"):
        source(tmp_path / "a.tar", labels="json:colour")


def test_the_index_of_found_shards_is_kept_until_a_shard_changes(
    theirs: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = []
    original = found_shards.scan
    monkeypatch.setattr(found_shards, "scan", lambda path, *more: scanned.append(path.name) or original(path, *more))
    source(theirs)
    assert len(scanned) == 4 and not list(cache.rglob("*.safetensors"))
    monkeypatch.setattr(found_shards, "WORTH_KEEPING", 1)
    expected = source(theirs).train()
    assert len(scanned) == 8
    kept = source(theirs).train()
    assert len(scanned) == 8 and reds(kept) == reds(expected) and list(kept.names) == list(expected.names)
    written(theirs / "set-002.tar", [{"red": 99, "cls": b"cat"}])
    assert len(source(theirs, val_fraction=0).train()) == 16 and len(scanned) == 12
    # A damaged index is made again.
    (index,) = cache.rglob("*.safetensors")
    index.write_bytes(index.read_bytes()[:-1])
    assert len(source(theirs, val_fraction=0).train()) == 16 and len(scanned) == 16


# What is wrong


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def test_lost_images_are_counted_where_there_is_an_index(mine: Path, caplog: pytest.LogCaptureFixture) -> None:
    cut(mine / "train" / "000002.tar", 0.4)
    (mine / "train" / "000006.tar").unlink()
    message = "3 of 31 images .9.7%. are lost: .*train/000002.tar was cut short, and with it 2 of its 4 images; "
    message += ".*train/000006.tar is missing, and with it 1 of its 1 images. At most 5% of images may be lost"
    with pytest.raises(UserError, match=f"^source.max_unreadable: {message}$"):
        source(mine, max_unreadable=0.05)
    found = source(mine)
    assert "3 of 31 images (9.7%) are lost" in caplog.text
    assert len(found.train()) == 22 and len(found.val()) == HELD_OUT
    visited = torch.cat([batch.images[:, 0, 0, 0] for batch in Loader(found.train(), 2, 0).epoch(0)])
    assert int(visited.bincount().max()) == 2  # One image stands in for the damaged one.


def test_damaged_shards_are_counted_where_there_is_no_index(theirs: Path, caplog: pytest.LogCaptureFixture) -> None:
    (theirs / "set-001.tar").unlink()
    cut(theirs / "set-003.tar", 0.5)
    message = "2 of 4 shards are damaged: .*set-001.tar is missing; .*set-003.tar after 3 images: it was cut short"
    with pytest.raises(UserError, match=f"^source.max_unreadable: {message}.* At most 1% of shards without an index"):
        source(f"{theirs}/set-{{000..003}}.tar", max_unreadable=0.01)
    found = source(f"{theirs}/set-{{000..003}}.tar", max_unreadable=0.5, val_fraction=0).train()
    assert "2 of 4 shards" in caplog.text and reds(found)[:10] == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"red": 0}, "the shards differ in their keys: the sample 000 of .*set-004.tar has no key 'cls', only png"),
        ({"red": 0, "cls": b"cat", "PNG": b"x"}, "the sample 000 has two files .png in one shard"),
    ],
)
def test_shards_that_differ_in_their_keys(theirs: Path, sample: dict, message: str) -> None:
    written(theirs / "set-004.tar", [sample])
    with pytest.raises(UserError, match=message):
        source(theirs)


def test_other_refusals(tmp_path: Path, theirs: Path, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(theirs / "texts.tar", "w") as tar:
        tar.add(__file__, "000.txt")
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b" + bytes(2000))
    grown = mine / "train" / "000000.tar"
    grown.write_bytes(grown.read_bytes() + bytes(512))
    for build, message in (
        (lambda: source(theirs / "texts.tar"), "source.image: the sample 000 of .*texts.tar has no key of an image"),
        (lambda: source(theirs / "set-000.tar", image="jpg"), "has no key 'jpg' of source.image, only cls, png"),
        (lambda: source(tmp_path / "a.tar.gz"), "no plain .tar .*decompress it"),
        (lambda: source(tmp_path / "none-*.tar"), "expected shards, no file fits .*none"),
        (lambda: source(tmp_path / "none.tar"), "expected shards, found nothing at"),
        (lambda: source(tmp_path), "expected shards, found no .tar in the folder"),
        (lambda: source(f"pipe:touch {tmp_path}/run"), "expected shards, found nothing at pipe:touch"),
        (
            lambda: source(theirs, labels="colour"),
            "source.labels: expected auto, none, cls or json:FIELD, got",
        ),
        (lambda: source(mine), "000000.tar has .* bytes, its index says .*: write the shards anew"),
    ):
        with pytest.raises(UserError, match=message):
            build()
    assert not (tmp_path / "run").exists()  # No command is run, as webdataset does for such a path.
    (mine / INDEX).write_bytes((mine / INDEX).read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{INDEX} is damaged"):
        source(mine)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UserError, match=r"needs the package webdataset: pip install 'ssl-ib\[stream\]'"):
        source(theirs)


# On a server


@pytest.fixture
def server(shards: str, tmp_path: Path):
    """A copy of the shards on a server of this machine: its address, its folder, and the paths that were fetched."""
    folder = Path(shutil.copytree(shards, tmp_path / "served"))
    fetched: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            fetched.append(self.path)
            super().do_GET()

        def log_message(self, *_) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", folder, fetched
        running.shutdown()
        thread.join()


def test_shards_on_a_server_give_what_those_on_the_disk_give(shards: str, server, cache: Path) -> None:
    url, _, fetched = server
    found, expected = source(url, buffer=3), source(shards, buffer=3)
    assert_same_batches(Loader(found.train(), 5, 0).epoch(0), Loader(expected.train(), 5, 0).epoch(0))
    assert sorted(fetched) == [f"/{INDEX}", *(f"/train/{number:06}.tar" for number in range(7))]
    # With the same buffer, and from worker processes; the copies are used again.
    assert_same_batches(Loader(found.train(), 5, 0, 2).epoch(1, 2), Loader(expected.train(), 5, 0).epoch(1, 2))
    again = source(url, buffer=3)
    list(Loader(again.train(), 5, 0).epoch(0))
    assert len(fetched) == 9 and len(list((cache / "shards").glob("*.tar"))) == 7


def test_the_cache_keeps_its_size(server, cache: Path, mine: Path) -> None:
    url, _, fetched = server
    largest = max(path.stat().st_size for path in mine.rglob("*.tar"))
    images = source(url, buffer=1, cache_gb=3 * largest / 1e9).train()
    fetched.clear()
    for epoch in range(2):
        list(Loader(images, 2, 0).epoch(epoch))
        assert sum(path.stat().st_size for path in (cache / "shards").glob("*.tar")) <= 3 * largest
    # Seven shards an epoch, and one more for what stands in for the damaged image.
    assert 8 <= len(fetched) <= 16
    with pytest.raises(UserError, match="source.cache_gb: with source.buffer=10,000 about .* GB of shards are in use"):
        source(url, cache_gb=3 * largest / 1e9).train()


def test_found_shards_on_a_server(server, cache: Path) -> None:
    url, folder, fetched = server
    path = f"{url}/train/{{000000..000006}}.tar"
    images = source(path, val_fraction=0).train()
    assert len(images) == TRAIN and len(fetched) == 7
    assert len(source(path, val_fraction=0).train()) == TRAIN and len(fetched) == 7
    # Another version on the server is seen at the next start.
    shutil.copy(folder / "train" / "000006.tar", folder / "train" / "000001.tar")
    assert len(source(path, val_fraction=0).train()) == TRAIN - 3


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_server_lacks_or_changes(server, cache: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    url, folder, _ = server
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match=f"found no {url}/nothing/{INDEX}"):
        source(f"{url}/nothing")
    images = source(url, buffer=3).train()
    for path in (cache / "shards").glob("*.tar"):
        path.unlink()
    shard = folder / "train" / "000001.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="000001.tar is not the file that its index describes") as refusal:
        list(Loader(images, 5, 0, workers).epoch(0))
    assert "Traceback" not in str(refusal.value)
    shard.unlink()
    with pytest.raises(UserError, match="4 of 31 images .* are lost: .*000001.tar is missing"):
        source(url, max_unreadable=0.01)
    with pytest.raises(UserError, match="cannot read http://127.0.0.1:1/"):
        source("http://127.0.0.1:1/set")


# The command


def refused(capsys, *arguments: str) -> str:
    assert data.main(list(arguments)) == 2
    message = capsys.readouterr().err
    assert message.startswith("ssl-ib-data: ") and "Traceback" not in message
    return message


def test_shard_and_check(photos: Path, mine: Path, tmp_path: Path, capsys) -> None:
    assert data.main(["check", str(mine)]) == 0
    assert "31 images in 9 shards, all as they were written" in capsys.readouterr().out
    assert "--overwrite replaces them" in refused(capsys, "shard", str(photos), str(mine))
    assert "expected a new folder" in refused(capsys, "shard", str(photos), str(photos))
    content = bytearray((mine / "val" / "000001.tar").read_bytes())
    content[700] ^= 1
    (mine / "val" / "000001.tar").write_bytes(content)
    (mine / "train" / "000003.tar").unlink()
    message = refused(capsys, "check", str(mine))
    assert "2 of 9 shards" in message and "train/000003.tar is missing; val/000001.tar has another SHA-256" in message
    # The same folder gives the same shards, byte for byte.
    before = (mine / "train" / "000000.tar").read_bytes()
    sharded(photos, mine, "--overwrite")
    assert (mine / "train" / "000000.tar").read_bytes() == before and data.main(["check", str(mine)]) == 0
    with tarfile.open(mine / "train" / "000000.tar") as tar:
        assert tar.getnames()[:2] == ["000000000.cls", "000000000.png"]
        assert tar.extractfile("000000000.png").read() == (photos / "train" / "ant" / "00.png").read_bytes()


def test_nothing_is_left_of_refused_shards(photos: Path, tmp_path: Path, capsys) -> None:
    broken = Path(shutil.copytree(photos, tmp_path / "broken"))
    for number in range(0, 20, 2):
        (broken / "train" / "ant" / f"{number:02}.png").unlink()
        (broken / "train" / "ant" / f"{number:02}.png").symlink_to("nowhere")
    assert "cannot be read" in refused(capsys, "shard", str(broken), str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["broken"]
