"""What a run leaves: its record, figures, an encoder that needs timm alone, and one honest line."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import STEPS, checkpoint, environment, rows, train, trainer
from PIL import Image
from sklearn.datasets import load_digits

from ssl_ib.record import figures
from ssl_ib.record.artifacts import draw_views, shown, summary, write_environment


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_the_commit_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record_of(tmp_path)["git"] is None

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", *identity, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert record_of(tmp_path)["git"] is None  # No commit yet.
    (tmp_path / "code.py").write_text("1\n")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    # What git does not track, such as runs, is no change.
    assert record_of(tmp_path)["git"] == {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": False}
    (tmp_path / "code.py").write_text("2\n")
    assert record_of(tmp_path)["git"]["uncommitted_changes"] is True


def record_of(out: Path) -> dict:
    write_environment(out, torch.device("cpu"))
    return json.loads((out / "environment.json").read_text())


# --- after a run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run's folder, and what it printed."""
    out = tmp_path_factory.mktemp("artifacts") / "run"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("sys.stdout", SimpleNamespace(write=lines.append, flush=lambda: None))
        assert train(out, draw=True) == 0
    return out, "".join(lines)


def test_the_folder(run):
    out, _ = run
    assert {path.name for path in out.iterdir()} == {
        "about.json",
        "backbone.json",
        "report.html",
        "results.json",
        "backbone.safetensors",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "figures",
        "metrics.jsonl",
        "tensorboard",
    }
    about = json.loads((out / "about.json").read_text())
    assert about["images"] == {"train": 1438, "held_out": 359} and sum(about["class_counts"]["train"]) == 1438
    assert about["terms"]["info_nce"] == 1.0 and about["terms"]["mi_nats"] is None and about["nats"]["mi_nats"]["kind"]
    assert about["classes"][3] == "3" and about["peak_memory"] > 2**20
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"last.pt", "previous.pt"}
    for name in ("loss_curves", "knn_curve", "reconstructions"):
        assert picture(out / "figures" / f"{name}.png").std() > 5
    found = json.loads((out / "environment.json").read_text())
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["device"] and found["threads"] == torch.get_num_threads()


def test_the_record(run):
    out, _ = run
    found = rows(out)
    trained = [row for row in found if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 2 * STEPS + 1))
    wanted = {"step", "epoch", "loss", "loss/info_nce", "weighted/info_nce", "lr", "gradient_norm", "images_per_s"}
    assert all(wanted <= row.keys() for row in trained)
    evaluated = [row for row in found if "knn/top1" in row]
    assert [row["step"] for row in evaluated] == [0, STEPS, 2 * STEPS]
    assert all(0 <= row["knn/top1"] <= 1 and 1 <= row["health/rankme"] <= 24 for row in evaluated)
    assert ["linear/top1" in row for row in evaluated] == [False, False, True]


def test_the_last_line(run):
    out, text = run
    *_, comparison, last = text.splitlines()
    number = r"(0\.\d{4})"
    found = re.fullmatch(
        rf"kNN top-1: chance {number}, untrained {number}, raw pixels {number}, trained {number} \| "
        rf"linear trained {number} "
        rf"\| 0 min \d\d s \| {re.escape(str(out))}",
        last,
    )
    chance, untrained, raw, trained, linear = map(float, found.groups())
    results = checkpoint(out)["results"]
    assert results["chance"] == {"knn/top1": pytest.approx(chance, abs=1e-4), "images": 359}
    assert json.loads((out / "results.json").read_text())["chance"] == results["chance"]
    assert (untrained, raw) == tuple(round(results[name]["knn/top1"], 4) for name in ("untrained", "raw_pixels"))
    assert (trained, linear) == tuple(round(rows(out)[-1][name], 4) for name in ("knn/top1", "linear/top1"))
    # Two epochs of a tiny encoder: the pixels themselves do better, and that is said.
    assert trained < raw and "BELOW raw pixels" in comparison


def test_the_encoder_needs_timm_alone(run, tmp_path):
    out, text = run
    lines = text.splitlines()
    start = lines.index("import json, timm")
    program = "\n".join(
        [
            *lines[start : start + 3],
            "import sys, torch",
            "assert 'ssl_ib' not in sys.modules",
            "images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)",
            "print(json.dumps([model.training, model.forward_features(images)[:, 0].tolist(), saved['mean']]))",
        ]
    )
    alone = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    training, features, mean = json.loads(done.stdout)
    assert not training
    instance = trainer()
    instance.restore(checkpoint(out))
    with torch.no_grad(), instance.online.evaluating():
        expected = instance.run.model.encode(torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16))
    torch.testing.assert_close(torch.tensor(features), expected, atol=1e-5, rtol=1e-5)
    assert mean == pytest.approx(instance.run.source.statistics()[0])


# --- the closing line -------------------------------------------------------------------------------------------------


def closing(trained: dict, raw: dict, seconds: float = 125.4, **more: dict) -> list[str]:
    untrained = {"knn/top1": 0.5} if raw else {}
    results = {"untrained": untrained, "raw_pixels": raw, "trained": trained, "seconds": seconds}
    return summary(Path("runs/x"), results | more)


def test_closing_lines():
    scores = "kNN top-1: untrained 0.5000, raw pixels 0.7000, trained"
    assert closing({"knn/top1": 0.8}, {"knn/top1": 0.7}) == [f"{scores} 0.8000 | 2 min 05 s | runs/x"]
    warning, last = closing({"knn/top1": 0.6, "linear/top1": 0.9}, {"knn/top1": 0.7})
    assert "BELOW raw pixels" in warning and last == f"{scores} 0.6000 | linear trained 0.9000 | 2 min 05 s | runs/x"
    (line,) = closing({"knn/top1": 0.8}, {"knn/top1": 0.7}, chance={"knn/top1": 0.125, "images": 8})
    assert line.startswith("kNN top-1: chance 0.1250, untrained 0.5000, ")
    assert closing({"health/std": 1.0}, {}) == ["no accuracy without labels of two classes | 2 min 05 s | runs/x"]


def test_reconstructions_are_drawn(tmp_path):
    plain = trainer()
    draw_views(plain.run, plain.online.evaluating, tmp_path / "plain.png")
    rebuilt = trainer(
        "model={name: mrcl, decoder_dim: 16, decoder_depth: 1, decoder_heads: 2, contrastive: {backbone: "
        "vit_tiny_patch16_224, backbone_args: {patch_size: 8, embed_dim: 24, depth: 1, num_heads: 3}, name: siamese}}",
        "criterion={name: mrcl, contrastive: info_nce}",
    )
    draw_views(rebuilt.run, rebuilt.online.evaluating, tmp_path / "rebuilt.png")
    few, more = picture(tmp_path / "plain.png"), picture(tmp_path / "rebuilt.png")
    # A row more for each of the two views, under the view and the view masked.
    assert few.shape[0] * 1.4 < more.shape[0] < few.shape[0] * 1.6 and few.shape[1] == more.shape[1]


def test_what_a_reconstruction_is_said_to_be(tmp_path, monkeypatch):
    """Where visible patches are said to be pasted they are the view's own, and elsewhere they are not."""
    drawn = []
    monkeypatch.setattr(figures, "reconstructions", lambda *given, **named: drawn.append((given, named)))
    vit = "backbone: vit_tiny_patch16_224, backbone_args: {patch_size: 8, embed_dim: 24, depth: 1, num_heads: 3}"
    decoder = "decoder_dim: 16, decoder_depth: 1, decoder_heads: 2"
    plain = ("views={name: plain, size: 16}", "masker={name: random, ratio: 0.5}")
    for options in (
        (f"model={{name: mae, {vit}, {decoder}}}", "criterion=mae", *plain),
        (
            f"model={{name: mrcl, {decoder}, contrastive: {{name: siamese, {vit}}}}}",
            "criterion={name: mrcl, norm_pix: true}",
        ),
    ):
        instance = trainer(*options)
        draw_views(instance.run, instance.online.evaluating, tmp_path / "x.png")
    for ((views, masks, images), named), pasted in zip(drawn, (True, False), strict=True):
        assert ("visible ones are pasted" in named["note"]) == pasted and "mean and contrast" in named["note"]
        assert len(set(named["names"])) == 8
        for view, mask, image in zip(views, masks, images, strict=True):
            visible = figures.hide(torch.ones_like(view), mask[:, 0], named["patch"]) == 1
            same = (view - image[:, 0]).abs()[visible] < 1e-5
            assert same.all() if pasted else same.float().mean() < 0.5


def test_the_images_that_figures_show():
    labels = torch.arange(10).repeat(30).sort().values
    found = shown(labels)
    assert len(labels[found].unique()) == 8 and torch.equal(found, shown(labels))
    # A class of which there is little is shown too.
    rare = torch.tensor([0] * 97 + [1, 2, 2])
    assert labels_of(rare) == {0: 3, 1: 1, 2: 2}
    assert labels_of(torch.tensor([-1] * 50 + [4] * 20 + [7] * 20)) == {4: 4, 7: 4}
    # Without labels, from all over the set.
    spread = shown(torch.full((80,), -1))
    assert len(spread) == 8 and (spread.diff() == 10).all()
    assert shown(torch.full((3,), -1)).tolist() == [0, 1, 2]


def labels_of(labels: torch.Tensor) -> dict[int, int]:
    """How many of the images that are shown have each label."""
    values, counts = labels[shown(labels)].unique(return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


# --- folders of images ------------------------------------------------------------------------------------------------


def write_images(folder: Path, number: int, classes: int = 0, corrupt: int = 0) -> Path:
    """Digits as PNGs, in class folders where there are classes; the first `corrupt` are no images."""
    for i, image in enumerate(load_digits().images[:number]):
        path = folder / (f"class_{i % classes}" if classes else "") / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).save(path)
        if i < corrupt:
            path.write_bytes(path.read_bytes()[:40])
    return folder


def from_folder(path: Path) -> tuple[str, ...]:
    return "source=folder", f"source.path={path}", "batch_size=32", "epochs=1", "eval.linear.enabled=false"


def test_images_without_labels(tmp_path, capsys):
    out = tmp_path / "run"
    assert train(out, *from_folder(write_images(tmp_path / "images", 64)), draw=True) == 0
    text = capsys.readouterr().out
    assert "labels     none: all training images lie in one folder" in text
    assert " 58 training images (in memory), 6 held out" in text
    number = r"(\d+\.\d+)"
    closing_line = rf"no accuracy .* \| held-out loss: first {number}, last {number} \| RankMe: untrained {number}, "
    first, last, rank = map(float, re.match(closing_line, text.splitlines()[-1]).groups())
    found = rows(out)
    assert sum("loss" in row for row in found) == 1
    losses = [row["held_out/loss"] for row in found if "held_out/loss" in row]
    assert losses == pytest.approx([first, last], abs=1e-4) and first != last
    assert json.loads((out / "results.json").read_text())["chance"] == {}
    assert found[0]["health/rankme"] == pytest.approx(rank, abs=0.01)
    assert not any("knn/top1" in row for row in found) and all("health/rankme" in found[i] for i in (0, -1))
    assert {path.name for path in (out / "figures").iterdir()} == {
        "loss_curves.png",
        "reconstructions.png",
        "attention.png",
        "information.png",
    }
    assert (out / "backbone.safetensors").exists()


def test_images_of_which_some_have_labels(tmp_path, capsys):
    images = write_images(tmp_path / "images", 100, classes=2)
    for name in ("class_0/0010.png", "class_1/0011.png"):
        (images / name).rename(images / Path(name).name)
    out = tmp_path / "run"
    assert train(out, *from_folder(images), "source.labels=folders") == 0
    assert 0.2 < rows(out)[-1]["knn/top1"] <= 1
    text = capsys.readouterr().out
    assert re.search(r"labels +2 classes: class_0 4\d, class_1 4\d; 2 images without a label\n", text)


@pytest.mark.parametrize("memory", ["4", "1e-9"], ids=["held", "streamed"])
def test_a_few_corrupt_images(tmp_path, capsys, memory):
    out = tmp_path / "run"
    images = write_images(tmp_path / "images", 300, classes=2, corrupt=2)
    assert train(out, *from_folder(images), "source.val_fraction=0", f"source.memory_gb={memory}") == 0
    assert (out / "bad_images.txt").read_text().split() == ["class_0/0000.png", "class_1/0001.png"]
    text = capsys.readouterr().out
    assert text.count("2 images could not be read") == 1 and str(out / "bad_images.txt") in text


@pytest.mark.parametrize("where", ["train", "val"])
def test_many_corrupt_images(tmp_path, capsys, where):
    images = tmp_path / "images"
    for split in ("train", "val"):
        write_images(images / split, 100, classes=2, corrupt=5 * (split == where))
    out = tmp_path / "run"
    assert train(out, *from_folder(images)) == 2
    error = capsys.readouterr().err
    assert "source.max_unreadable: 5 of 100 images cannot be read (5.0%" in error and "Traceback" not in error
    assert not out.exists()
