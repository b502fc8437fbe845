"""Tables that `datasets` reads: however they are kept they give the same images, each by its row; and refusals."""

import io
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from ssl_ib import UserError
from ssl_ib.data.loader import Loader
from ssl_ib.data.sources import hf
from ssl_ib.data.sources.folder import Folder
from ssl_ib.data.sources.hf import HuggingFace

datasets = pytest.importorskip("datasets")

STREAM = 1e-9  # memory_gb that nothing fits in


def png(red: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (6, 6), (red, 0, 0)).save(data, "PNG")
    return data.getvalue()


def table(count: int, first: int = 0, **columns) -> "datasets.Dataset":
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"]), **columns.pop("kinds", {})}
    rows = {
        "image": [{"bytes": png(first + i), "path": None} for i in range(count)],
        "label": [i % 2 for i in range(count)],
        **columns,
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features({name: kinds[name] for name in rows}))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(root / "cache"))
        both = datasets.DatasetDict({"train": table(20), "test": table(6, 50)})
        both.save_to_disk(str(root / "saved"))
        (root / "parquet").mkdir()
        both["train"].to_parquet(str(root / "parquet" / "train-00000-of-00001.parquet"))
        both["test"].to_parquet(str(root / "parquet" / "test-00000-of-00001.parquet"))
        for split, count, first in (("train", 20, 0), ("test", 6, 50)):
            for i in range(count):
                path = root / "folder" / split / ("bee" if i % 2 else "ant") / f"{first + i:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(first + i))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def reds(images) -> list[int]:
    return images.gather(torch.arange(len(images))).images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("memory", [4.0, STREAM])
@pytest.mark.parametrize("kept", ["saved", "parquet", "folder"])
def test_tables_give_their_images(tables: Path, kept: str, memory: float) -> None:
    found = HuggingFace(str(tables / kept), memory_gb=memory)
    train, val = found.train(), found.val()
    assert train.in_memory == (memory == 4.0) and train.classes == ["ant", "bee"]
    # A folder's files come by class.
    order = sorted(range(20), key=lambda i: i % 2) if kept == "folder" else list(range(20))
    assert reds(train) == order and reds(val) == [50 + i for i in order if i < 6]
    assert train.labels.tolist() == [i % 2 for i in order] and train.names[1] == "train/1"
    folder = Folder(str(tables / "folder"), memory_gb=memory)
    if kept == "folder":
        assert found.statistics() == folder.statistics()
        assert torch.equal(train.labels, folder.train().labels)
        assert train.fingerprint()["sizes"] == folder.train().fingerprint()["sizes"]


def test_workers_and_a_restart_on_another_number_of_ranks(tables: Path) -> None:
    images = HuggingFace(str(tables / "saved"), memory_gb=STREAM).train()

    def steps(ranks: int, workers: int, start: int, stop: int) -> list[list[int]]:
        shares = []
        for rank in range(ranks):
            epoch = Loader(images, 4 // ranks, 3, workers, rank, ranks).epoch(2, start)
            shares.append([batch.images[:, 0, 0, 0].tolist() for batch in islice(epoch, stop - start)])
        return [sum(parts, []) for parts in zip(*shares, strict=True)]

    stopped = steps(2, 1, 0, 3) + steps(1, 0, 3, 5)
    assert stopped == steps(4, 0, 0, 5) and sorted(sum(stopped, [])) == list(range(20))


def test_splits_columns_and_labels(tmp_path: Path) -> None:
    kinds = {"kind": datasets.Value("string"), "level": datasets.Value("int64"), "share": datasets.Value("float32")}
    columns = {"kind": ["owl", "", "cat", "owl"], "level": [2, 0, -1, 0], "share": [0.5] * 4}
    train = table(4, **columns, kinds=kinds)
    hidden = train.map(lambda row: {"label": -1})
    both = datasets.DatasetDict({"train": train, "test": hidden, "valid": train.select([3, 2])})
    both.save_to_disk(str(tmp_path / "set"))
    path = str(tmp_path / "set")
    assert reds(HuggingFace(path).val()) == [3, 2]
    left_aside = HuggingFace(path, val="none", val_fraction=0.5)
    assert len(left_aside.train()) == 2 and len(left_aside.val()) == 2
    assert HuggingFace(path, labels="kind", val="none", val_fraction=0).train().labels.tolist() == [1, -1, 0, 1]
    assert HuggingFace(path, labels="level", val="none", val_fraction=0).train().labels.tolist() == [2, 0, -1, 0]
    assert HuggingFace(path, labels="none", val="none").train().classes == []
    for arguments, message in (
        ({"split": "trian"}, "source.split: there is no split 'trian'; did you mean 'train'"),
        ({"val": "train"}, "source.val: there is no other split 'train'; choices: none, test, valid"),
        ({"image": "img"}, "source.image: there is no column 'img'; did you mean 'image'"),
        ({"image": "label"}, "source.image: the column 'label' holds no images but int64"),
        ({"labels": "lable"}, "source.labels: there is no column 'lable'; did you mean 'label'"),
        ({"labels": "share"}, "source.labels: the column 'share' holds float32, not labels"),
        ({"streaming": True}, "source.streaming: the rows of a stream have no numbers"),
    ):
        with pytest.raises(UserError, match=message):
            HuggingFace(path, **arguments)


def test_unreadable_rows_are_counted(tmp_path: Path) -> None:
    rows = [{"bytes": png(i), "path": None} for i in range(10)]
    rows[3], rows[7] = {"bytes": b"no picture", "path": None}, None
    kinds = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features=kinds).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(UserError, match="2 of 10 images cannot be read .*train/3 .not an image.*; train/7 .the row"):
        HuggingFace(str(tmp_path / "set"), val_fraction=0).train()
    found = HuggingFace(str(tmp_path / "set"), val_fraction=0, max_unreadable=0.2).train()
    assert reds(found) == [0, 1, 2, 4, 5, 6, 8, 9] and found.labels.tolist() == [-1] * 8


def test_what_cannot_be_loaded(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.csv").write_text("a,b\n1,2\n")
    broken = tmp_path / "train.parquet"
    content = (tables / "parquet" / "train-00000-of-00001.parquet").read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    for path, message in (
        ("/no/folder", "expected a folder or a file of tables, or a name on the hub; found nothing at /no/folder"),
        (str(broken), "datasets cannot load .*train.parquet"),
        (str(tmp_path / "texts" / "a.csv"), "expected a .parquet or an .arrow file, or a folder, got"),
        (str(tmp_path / "texts"), r"source.image: there is no column of images; name one of .*a \(int64\)"),
    ):
        with pytest.raises(UserError, match=message):
            HuggingFace(path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets: pip install 'ssl-ib\[stream\]'"):
        HuggingFace("x")


def test_a_name_without_a_network_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    asked = []

    def nobody(request, timeout):
        asked.append(timeout)
        raise OSError("no route")

    monkeypatch.setattr(hf.urllib.request, "urlopen", nobody)
    with pytest.raises(UserError, match="no folder or file cifar10 here, the hub does not answer, and its set of that"):
        HuggingFace("cifar10")
    assert asked == [hf.TIMEOUT]
