"""Corruptions and their errors: formulas by hand, the published layouts, and the protocol from end to end."""

import json
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from harness import finished
from PIL import Image

from ssl_ib import UserError
from ssl_ib.evals.corruptions import ALEXNET, NAMES, corrupt, mean_corruption_error
from ssl_ib.evals.evaluate import evaluate
from ssl_ib.evals.features import extract


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(finished(), tmp_path / "run")


def silent(*arguments, **more):
    return evaluate(*arguments, "figures=false", say=lambda line: None, **more)


def photographs(side: int, count: int = 2) -> torch.Tensor:
    """Smooth structure with edges, of any side: uint8 [count, 3, side, side]."""
    axis = torch.linspace(0, 1, side)
    image = torch.stack(
        [axis.expand(side, -1), axis[:, None].expand(-1, side), (axis[:, None] * 4).floor() % 2 + 0 * axis]
    )
    return (40 + 180 * image).to(torch.uint8).expand(count, -1, -1, -1).contiguous()


def test_mce_of_alexnets_own_errors_is_100():
    errors = {name: [value * share for share in (0.6, 0.8, 1.0, 1.2, 1.4)] for name, value in ALEXNET.items()}
    own = {name: [value] * 5 for name, value in ALEXNET.items()}
    assert mean_corruption_error(errors, own) == pytest.approx(100)
    halved = {name: ([v / 2 for v in values] if name == "fog" else values) for name, values in errors.items()}
    assert mean_corruption_error(halved, own) == pytest.approx(100 - 50 / 15)
    with pytest.raises(UserError, match="no errors of fog"):
        mean_corruption_error(errors, {name: values for name, values in own.items() if name != "fog"})


@pytest.mark.parametrize("name", NAMES)
def test_a_corruption_grows_repeats_and_knows_no_batch(name):
    for side in (16, 64):
        images, keys = photographs(side), torch.tensor([5, 9])
        changed = [corrupt(images, name, severity, keys) for severity in (1, 5)]
        assert changed[0].shape == images.shape and changed[0].dtype == torch.uint8
        assert torch.equal(corrupt(images[1:], name, 5, keys[1:]), changed[1][1:])
    far = [(x.float() - images.float()).square().mean().item() for x in changed]
    # The published strengths of these are not ordered: more distorted, not farther away.
    assert 0 < far[0] and (far[0] < far[1] or name in ("glass_blur", "elastic_transform", "snow"))
    random = "noise" in name or name in ("snow", "frost", "fog", "glass_blur", "motion_blur", "elastic_transform")
    assert random != torch.equal(changed[1][0], changed[1][1])


def test_corruptions_by_their_definitions():
    images, keys = photographs(64, 1), torch.tensor([1])
    x = images.float() / 255

    def off(name, expected, severity=3, atol=1.01):
        found = corrupt(images, name, severity, keys).float()
        torch.testing.assert_close(found, 255 * expected.clamp(0, 1), atol=atol, rtol=0)

    mean = x.mean(dim=(2, 3), keepdim=True)
    off("contrast", (x - mean) * 0.2 + mean)
    off("brightness", x / x.amax(1, keepdim=True) * (x.amax(1, keepdim=True) + 0.3).clamp(max=1))
    small = Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((16, 16), Image.BOX).resize((64, 64), Image.BOX)
    off("pixelate", torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255, severity=5)
    grey = torch.full((1, 3, 224, 224), 100, dtype=torch.uint8)
    for severity, sigma in ((1, 0.08), (4, 0.26)):
        noise = corrupt(grey, "gaussian_noise", severity, keys).float()
        if severity == 1:
            assert noise.mean() == pytest.approx(100, abs=0.5) and noise.std() == pytest.approx(255 * sigma, rel=0.02)
    shot = corrupt(grey, "shot_noise", 3, keys).float() / 255
    assert shot.mean() == pytest.approx(100 / 255, abs=0.01) and shot.var() == pytest.approx(100 / 255 / 12, rel=0.05)
    impulse = corrupt(grey, "impulse_noise", 5, keys)
    assert (impulse != 100).double().mean().item() == pytest.approx(0.27, abs=0.01)


def test_made_on_the_fly(run, monkeypatch):
    few = ("train_images=200", "val_images=60", "severities=[1,5]")
    lines = silent("robustness", run, *few, "corruptions=[gaussian_noise,contrast]")
    clean, noise, contrast, mean = lines
    assert [line["settings"]["corruption"] for line in lines[:3]] == ["none", "gaussian_noise", "contrast"]
    assert len(noise["errors"]) == 2 and noise["value"] == pytest.approx(np.mean(noise["errors"]))
    assert mean["value"] == pytest.approx((noise["value"] + contrast["value"]) / 2)
    (knn,) = silent("knn", run, *few[:2], "k=20")
    assert clean["value"] == pytest.approx(1 - knn["value"])
    counted = Mock(side_effect=extract)
    monkeypatch.setattr("ssl_ib.evals.protocol.extract", counted)
    for overwrite, passes in ((False, 0), (True, 6)):  # Training images; those held out, and corrupted four times.
        again = silent("robustness", run, *few, "corruptions=[gaussian_noise,contrast]", overwrite=overwrite)
        assert [line["value"] for line in again] == [line["value"] for line in lines]
        assert counted.call_count == passes
    *_, own = silent("robustness", run, *few, "corruptions=[gaussian_noise,contrast]", f"baseline={run}")
    assert own["metric"] == "mCE in %" and own["value"] == pytest.approx(100)
    other = shutil.copytree(run, run.parent / "other")
    with pytest.raises(UserError, match="no errors of contrast on these images with these settings"):
        silent("robustness", run, *few[:1], "val_images=50", *few[2:], "corruptions=contrast", f"baseline={other}")


def test_published_layouts(run, tmp_path):
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (255 / 16 * data.images[:20]).astype(np.uint8)[..., None].repeat(3, axis=-1)
    labels = data.target[:20]
    arrays, folders, some = tmp_path / "C", tmp_path / "imagenet_c", tmp_path / "shifted"
    for path in (arrays, folders, some):
        path.mkdir()
    np.save(arrays / "fog.npy", np.concatenate([images] * 5))
    np.save(arrays / "labels.npy", np.concatenate([labels] * 5))
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        for place in [*(folders / "weather" / "fog" / str(s) for s in (1, 2, 3, 4, 5)), some]:
            if place is not some or label < 3:
                (place / str(label)).mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(place / str(label) / f"{number}.png")
    few = ("train_images=200", "val_images=60")
    of_arrays, _ = silent("robustness", run, *few, f"path={arrays}", "corruptions=fog", "classifier=linear", "epochs=9")
    of_folders, _ = silent(
        "robustness", run, *few, f"path={folders}", "corruptions=fog", "classifier=linear", "epochs=9"
    )
    assert of_arrays["errors"] == of_folders["errors"] and len(set(of_arrays["errors"])) == 1
    (line,) = silent("robustness", run, f"path={some}", *few)
    assert line["settings"]["corruption"] == "shifted" and line["spread_of"] == "6 images"
    for file in (some / "0").iterdir():
        Image.new("RGB", (8, 8)).save(file)
        file.rename(file.with_name(f"new_{file.name}"))
    (other,) = silent("robustness", run, f"path={some}", *few)  # Not the result of the former images.
    assert other["settings"]["corrupted"] != line["settings"]["corrupted"]
    for words, message in (
        ((f"path={tmp_path}/nothing",), "there is none"),
        ((f"path={folders}",), "has no gaussian_noise, shot_noise"),
        ((f"path={run}",), "expected a folder for each class"),
        (("corruptions=frogs",), "unknown corruption 'frogs'; did you mean"),
        (("classifier=finetuned",), "run the protocol finetune with keep=true"),
    ):
        with pytest.raises(UserError, match=message):
            silent("robustness", run, *few, *words)


def test_of_the_fine_tuned_model(run):
    few = ("train_images=40", "val_images=40")
    (tuned,) = silent("finetune", run, *few, "epochs=1", "warmup_epochs=0", "workers=0", "keep=true", "batch_size=20")
    clean, *_ = silent("robustness", run, *few, "classifier=finetuned", "corruptions=contrast", "severities=[1]")
    assert clean["value"] == pytest.approx(1 - tuned["value"])
    lines = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    assert len(lines) == 4
