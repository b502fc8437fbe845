"""`ssl-ib-eval` from end to end on a tiny run, and each protocol beside scikit-learn or an answer by hand."""

import json
import shutil

import numpy as np
import pytest
import torch
from harness import finished
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import ssl_ib
from ssl_ib import ConfigError, UserError
from ssl_ib.cli import eval as command
from ssl_ib.config.registry import build_part
from ssl_ib.evals import training, unfinished
from ssl_ib.evals.evaluate import evaluate
from ssl_ib.evals.protocol import Split
from ssl_ib.evals.protocols.lowshot import drawn, rows_of_list

QUICK = ("figures=false", "val_images=120", "train_images=300")


@pytest.fixture
def run(tmp_path):
    """A finished run of two epochs, in a folder of its own."""
    return shutil.copytree(finished(), tmp_path / "run")


def digits():
    source = build_part("source", {"name": "digits", "size": 16, "limit": None}).part
    return source.train(), source.val()


def features_of(run, images):
    return ssl_ib.load(run).embed([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images])


def by_key(lines, key):
    return {json.dumps(line["settings"][key]): line for line in lines}


def silent(*arguments, **more):
    return evaluate(*arguments, say=lambda line: None, **more)


def test_knn_is_sklearns(run):
    (train, val), ks = digits(), (1, 20, 150)
    lines = by_key(silent("knn", run, "k=[1,20,150]", "figures=false"), "k")
    known, asked = features_of(run, train.images), features_of(run, val.images)
    for k in ks:
        vote = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        expected = vote.fit(known, train.labels).score(asked, val.labels)
        assert lines[str(k)]["value"] == pytest.approx(expected)
    line = lines["20"]
    assert line["value"] == json.loads((run / "results.json").read_text())["trained"]["knn/top1"]
    assert line["step"] == 22 and line["images"] == {"train": 1438, "val": 359}
    assert line["chance"] == pytest.approx(37 / 359) and line["settings"]["source"]["name"] == "digits"


def test_logistic_is_sklearns(run):
    (train, val) = digits()
    (line,) = silent("logistic", run, "figures=false", "c=0.5")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, max_iter=1000))
    expected = model.fit(features_of(run, train.images), train.labels).score(features_of(run, val.images), val.labels)
    assert line["value"] == pytest.approx(expected) and line["converged"]


@pytest.mark.parametrize("form", ["mae", "moco_v3", "infomin", "dino", "mrcl", "svib"])
def test_linear_in_every_form(run, form):
    more = ("blocks=1",) if form == "dino" else ()
    more += ("milestones=[6]",) if form == "infomin" else ()
    (line,) = silent("linear", run, *QUICK, f"form={form}", "epochs=8", "warmup_epochs=0", *more)
    assert line["settings"]["form"] == form and not line["diverged"]
    # What eight epochs on few images suffice for; the other forms' rates are for many more steps, or another encoder.
    assert line["value"] > {"mrcl": 0.2, "moco_v3": 0.2}.get(form, -1)


def test_linear_sweep_chooses_by_images_it_was_not_trained_on(run):
    lines = silent("linear", run, *QUICK, "epochs=5", "lr=[1e-6, 1.0]")
    one, two, chosen = lines
    assert chosen["settings"]["lr"] == [1e-6, 1.0] and chosen["chosen_lr"] == 1.0
    assert chosen["value"] == two["value"] > one["value"] and chosen["chosen_by"] == "30 training images kept out"
    (alone,) = silent("linear", run, *QUICK, "epochs=5", "lr=1.0")
    assert alone["settings"]["choose"] == 0  # All images are trained on: another result than the sweep's.


def test_linear_with_augmented_images_and_seeds(run):
    overrides = (*QUICK, "epochs=2", "augment=true", "seeds=[0,1]", "lr=1.0", "batch_size=100")
    first, second, mean = silent("linear", run, *overrides)
    assert mean["settings"]["seed"] == [0, 1] and mean["spread_of"] == "2 seeds"
    assert mean["value"] == pytest.approx((first["value"] + second["value"]) / 2)
    assert mean["spread"] == pytest.approx(abs(first["value"] - second["value"]) / 2**0.5)
    plain = silent("linear", run, *overrides, "augment=false")
    assert [line["value"] for line in plain] != [first["value"], second["value"], mean["value"]]


def test_what_is_finished_is_not_computed_again(run, monkeypatch):
    first = silent("knn", run, "k=[5,10]", *QUICK)
    torn = (run / "evals.jsonl").read_text()
    (run / "evals.jsonl").write_text(torn[:-40])  # A kill in the middle of the second line.
    again = silent("knn", run, "k=[15,5,10]", *QUICK)
    assert [line["value"] for line in again][1:] == [line["value"] for line in first]
    assert [line["settings"]["k"] for line in again] == [15, 5, 10] and again[1] == first[0]
    with monkeypatch.context() as patch:
        patch.setattr("ssl_ib.evals.protocol.extract", lambda *a, **k: pytest.fail("encoded again"))
        assert silent("knn", run, "k=[15,10,5]", "encode_batch=7", *QUICK)
        with pytest.raises(pytest.fail.Exception):
            silent("knn", run, "k=[15]", "temperature=0.1", *QUICK)
        with pytest.raises(pytest.fail.Exception):
            silent("knn", run, "k=[15]", *QUICK, overwrite=True)
        about = json.loads((run / "backbone.json").read_text())
        (run / "backbone.json").write_text(json.dumps(about | {"mean": [0.9, 0.9, 0.9]}))
        with pytest.raises(pytest.fail.Exception):  # The same weights on images that are prepared otherwise.
            silent("knn", run, "k=[15]", *QUICK)
        (run / "backbone.json").write_text(json.dumps(about))
    silent("knn", run, "k=[5,10]", *QUICK, overwrite=True)
    lines = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    # Those that this command does not ask for stay as they were.
    assert sorted(line["settings"]["k"] for line in lines) == [5, 10, 15]


@pytest.mark.parametrize(
    "protocol, more",
    [
        ("finetune", ("warmup_epochs=0", "workers=0", "lr=0.01", "keep=true")),
        ("linear", ("augment=true", "form=mae", "warmup_epochs=0", "lr=[1.0,100.0]")),
    ],
)
def test_a_training_goes_on_after_a_kill(run, monkeypatch, protocol, more):
    overrides = (*QUICK[:2], "train_images=60", "epochs=2", "batch_size=30", *more)
    whole = silent(protocol, run, *overrides, out=run / "whole")
    kept = unfinished.save

    def killed(path, state):
        kept(path, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "save", killed)
        patch.setattr(training, "SAVE_EVERY", 0.0)
        with pytest.raises(KeyboardInterrupt):
            silent(protocol, run, *overrides, out=run / "parts")
    assert len(list((run / "parts" / "evals").glob(f"{protocol}_*.pt"))) == 1
    parts = silent(protocol, run, *overrides, out=run / "parts")
    assert [line["value"] for line in parts] == [line["value"] for line in whole]
    if protocol == "linear":
        assert len({line["value"] for line in whole}) > 1 and not (run / "parts" / "evals").exists()
        return
    assert [path.name for path in (run / "parts" / "evals").iterdir()] == ["finetuned.pt"]
    one, other = (torch.load(run / name / "evals" / "finetuned.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_finetuning_learns(run):
    plain = ("rand_augment=null", "erasing=0.0", "mixup=0.0", "cutmix=0.0", "crop=[0.9,1.0]", "drop_path=0.0")
    more = ("epochs=6", "warmup_epochs=1", "batch_size=25", "lr=0.05", "layer_decay=1.0", "workers=0")
    (line,) = silent("finetune", run, *QUICK[:2], "train_images=100", *plain, *more)
    assert line["value"] > 0.3


def test_lowshot_draws_of_every_class(run):
    lines = silent("lowshot", run, "shots=2", "seeds=[0,1,2]", "figures=false")
    *each, mean = lines
    assert [line["trained_on"] for line in each] == [20] * 3 and len({line["settings"]["chosen"] for line in each}) == 3
    assert mean["value"] == pytest.approx(np.mean([line["value"] for line in each]))
    assert mean["spread"] == pytest.approx(np.std([line["value"] for line in each], ddof=1))
    (line,) = silent("lowshot", run, "fraction=0.1", "seeds=0", "figures=false")
    assert line["trained_on"] == 144 and line["value"] > 0.3


def test_lowshot_fine_tunes_with_swavs_rates(run):
    (line,) = silent("lowshot", run, *QUICK, "method=finetune", "epochs=1", "milestones=[0.5]", "seeds=0", "workers=0")
    assert (line["settings"]["lr"], line["settings"]["head_lr"]) == (0.02, 5.0)
    assert line["settings"]["optimiser"] == "sgd" and line["trained_on"] == 10  # One of each class at least.


def test_drawn_rows():
    labels = torch.arange(4).repeat_interleave(torch.tensor([50, 30, 19, 1]))
    rows = drawn(labels, 0.1, None, seed=0)
    assert labels[rows].bincount().tolist() == [5, 3, 2, 1] and rows.unique().equal(rows)
    assert not rows.equal(drawn(labels, 0.1, None, seed=1)) and rows.equal(drawn(labels, 0.1, None, seed=0))
    assert labels[drawn(labels, None, 1, seed=0)].tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="shots=2: a class has only 1"):
        drawn(labels, None, 2, seed=0)


def test_lists_name_images_by_the_end_of_their_path(tmp_path):
    images = ssl_ib.InMemory(torch.zeros(3, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 1]), ["a", "b"])
    images.names = ["train/a/1.png", "train/b/1.png", "train/b/2.png"]
    split, file = Split("train", images, torch.tensor([0, 1, 2])), tmp_path / "list.txt"
    file.write_text("2.png\na/1.png\n")
    assert rows_of_list(split, file).tolist() == [0, 2]
    for text, message in (
        ("9.png\n", "1 of the 1 names"),
        ("1.png\n", "the name of 2 images"),
        ("2.png\n", "two classes"),
        ("\n", "two classes"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            rows_of_list(split, file)


# --- mistakes ---------------------------------------------------------------------------------------------------------


class Broken(ssl_ib.Source):
    """Digits with something wrong about them."""

    def __init__(self, wrong: str):
        self.wrong = wrong
        self.sets = digits()

    def train(self):
        train = self.sets[0]
        labels = train.labels.clone()
        if self.wrong == "a class without training images":
            rows = (labels != 3).nonzero()[:, 0]
            return ssl_ib.InMemory(train.images[rows], labels[rows], train.classes)
        if self.wrong == "labels out of range":
            labels[7] = 10
        if self.wrong == "no labels":
            labels[:] = -1
        return ssl_ib.InMemory(train.images, labels, train.classes)

    def val(self):
        if self.wrong == "nothing held out":
            return None
        if self.wrong == "a class that is not held out":
            rows = (self.sets[1].labels != 3).nonzero()[:, 0]
            return ssl_ib.InMemory(self.sets[1].images[rows], self.sets[1].labels[rows], self.sets[1].classes)
        return self.sets[1]


@pytest.fixture(scope="module")
def broken():
    from ssl_ib.config.registry import SOURCES

    ssl_ib.register_source("broken_digits")(Broken)
    yield
    del SOURCES._entries["broken_digits"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("a class without training images", "the class 3 of the held-out images has no training image, so that 37"),
        ("labels out of range", "1 of 1438 labels of the split train are out of range"),
        ("no labels", "no image of the split train has a label"),
        ("nothing held out", "no held-out images"),
    ],
)
def test_images_that_cannot_be_evaluated_on(run, broken, wrong, message):
    with pytest.raises(UserError, match=message):
        silent("knn", run, "source=broken_digits", f"source.wrong={wrong}")
    assert not (run / "evals.jsonl").exists()


def test_a_class_without_held_out_images_is_said(run, broken):
    said = []
    wrong = "source.wrong=a class that is not held out"
    evaluate("knn", run, "source=broken_digits", wrong, *QUICK[:1], say=said.append)
    assert "the class 3 has no held-out image: the accuracy does not count that" in said


def test_an_image_that_cannot_be_read_is_said(run, tmp_path):
    for number in range(8):
        file = tmp_path / "photos" / ("train", "val")[number % 2] / "ab"[number // 4] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (30 * number,) * 3).save(file)
    file.write_bytes(b"no image")
    said = []
    for memory, instead in (("1", "left out"), ("1e-9", "the next ones stand in for them")):
        more = ("source=folder", f"source.path={tmp_path / 'photos'}", f"source.memory_gb={memory}", "k=1", *QUICK[:1])
        evaluate("knn", run, *more, say=said.append)
        assert said[-1] == f"1 images could not be read, {instead}: val/b/7.png"


@pytest.mark.parametrize(
    "words, message",
    [
        (["knn"], "or timm:NAME?"),
        (["nn", "RUN"], "unknown protocol 'nn'; did you mean 'knn'?"),
        (["knn", "RUN", "tempreture=1"], "tempreture: unknown key; did you mean 'temperature'"),
        (["knn", "RUN", "k=0"], "k.0: expected greater than or equal to 1, got 0"),
        (["knn", "RUN", "k=2000"], "k=2000: there are 1438 training images"),
        (["linear", "RUN", "form=mea"], "form: expected 'mae'"),
        (["linear", "RUN", "form=dino"], "blocks=4: RUN has 1 blocks"),
        (["linear", "RUN", "shape=step"], "milestones: the epochs at which shape=step"),
        (["linear", "RUN", "form=[mae]"], "form: expected 'mae'"),
        (["segmentation", "RUN", "path=.", "form=[infomin]"], "form: expected 'upernet'"),
        (["detection", "RUN", "path=.", "form=[infomin]"], "form: expected 'vitdet'"),
        (["linear", "RUN", "seeds=[1,1]"], "seeds: expected values that differ, one at least, got [1, 1]"),
        (["finetune", "RUN", "epochs=5"], "warmup_epochs: expected fewer than epochs=5, got 5"),
        (["lowshot", "RUN", "shots=1", "fraction=0.1"], "expected one of fraction, shots and lists"),
        (["lowshot", "RUN", "fraction=10"], "fraction: expected a share of the training images in (0, 1], got 10"),
        (["knn", "RUN", "source.siez=8"], "source.siez: unknown key; did you mean 'size'?"),
        (["knn", "timm:resnet10t"], "has no images of its own: give source="),
        (["knn", "timm:resnet10t", "source=digits"], "timm:resnet10t has no folder of its own"),
        (["knn", "nowhere"], "there is nothing at 'nowhere'"),
    ],
)
def test_mistakes_are_one_message(run, words, message, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert command.main([word.replace("RUN", run.name) for word in words]) == 2
    shown = capsys.readouterr().err
    assert message.replace("RUN", run.name) in shown and "Traceback" not in shown


def test_several_mistakes_are_told_together(run):
    with pytest.raises(ConfigError) as caught:
        silent("linear", run, "epochs=0", "batchsize=3", "source.size=-1")
    assert len(caught.value.problems) == 3


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(run, capsys):
    before = sorted(run.rglob("*"))
    for protocol in ("knn", "linear", "logistic", "finetune", "lowshot"):
        more = {"finetune": ["workers=0"], "lowshot": ["shots=20"]}.get(protocol, [])  # More than a dry run takes.
        assert command.main([protocol, str(run), "--dry-run", *more]) == 0
        assert f"dry run of {protocol} passed" in capsys.readouterr().out
    assert sorted(run.rglob("*")) == before


def test_a_timm_model_and_a_checkpoint_at_another_size(run, tmp_path, capsys):
    overrides = ["source=digits", *QUICK, "k=5"]
    assert command.main(["knn", "timm:test_vit", *overrides, "size=64", "--out", str(tmp_path / "t")]) == 0
    assert "positions are resampled" in capsys.readouterr().out
    values = [json.loads((tmp_path / "t" / "evals.jsonl").read_text())["value"]]
    assert command.main(["knn", "timm:test_vit", *overrides, "size=64", "--out", str(tmp_path / "u")]) == 0
    values.append(json.loads((tmp_path / "u" / "evals.jsonl").read_text())["value"])
    assert values[0] == values[1]  # Random weights repeat.
    checkpoint = run / "checkpoints" / "last.pt"
    assert command.main(["knn", str(checkpoint), *QUICK, "k=5", "size=32"]) == 0
    assert "images of 32 x 32 pixels, and the encoder was made for 16" in capsys.readouterr().out
    assert json.loads((run / "evals.jsonl").read_text())["settings"]["size"] == 32


def test_pictures_and_the_lists_of_protocols(run, capsys):
    assert command.main(["knn", str(run), "val_images=9", "train_images=100", "k=5"]) == 0
    assert {path.name for path in (run / "figures").glob("knn_*")} == {
        "knn_confusion.png",
        "knn_neighbours.png",
        "knn_map.png",
    }
    capsys.readouterr()
    assert command.main(["--list"]) == 0
    assert "linear" in capsys.readouterr().out
    assert command.main(["--describe", "linear"]) == 0
    shown = capsys.readouterr().out
    assert "lr: float > 0, or a list of them, default (0.2,)" in shown and "choose" in shown
    # What the bases of the settings say too.
    assert "size: pixels of a side" in shown and "encode_batch: images" in shown
