"""The protocol segmentation: mIoU by hand, decoders that learn, what a kill leaves, and masks that are wrong."""

import json
import random
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import save_encoder
from PIL import Image

from ssl_ib import ConfigError, UserError
from ssl_ib.cli import eval as command
from ssl_ib.evals import training, unfinished
from ssl_ib.evals.evaluate import evaluate
from ssl_ib.evals.mask_sets import MaskedImages, open_masks
from ssl_ib.evals.protocols import segmentation
from ssl_ib.evals.segmenter import crop, predicted
from ssl_ib.record.backbone import load_backbone

needs_upernet = pytest.mark.skipif(
    find_spec("segmentation_models_pytorch") is None, reason="needs segmentation-models-pytorch"
)
COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]], np.uint8)
PLAIN = ("scale=[1.0,1.0]", "jitter=false", "flip=false", "largest=1.0", "drop_path=0.0", "dropout=0.0", "auxiliary=0")
QUICK = ("crop=32", "width=16", "workers=0", "figures=false", "batch_size=4", *PLAIN)


def mask(number, height=32, width=32):
    """Three classes: a background, a rectangle and a band, elsewhere in each mask."""
    found = np.zeros((height, width), np.uint8)
    found[4 + 2 * number : 16 + 2 * number, 4:16] = 1
    found[:, 20 - number : 28 - number] = 2
    return found


def folder(root, splits=("train", "val"), count=4, **shape):
    """A folder of images whose colours say their classes."""
    for split in splits:
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for number in range(count):
            classes = mask(number, **shape)
            Image.fromarray(COLOURS[classes]).save(root / split / "images" / f"{number}.png")
            Image.fromarray(classes).save(root / split / "labels" / f"{number}.png")
    return root


@pytest.fixture
def images(tmp_path):
    return folder(tmp_path / "images")


def vit(tmp_path):
    more = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return save_encoder(tmp_path / "vit", "vit_tiny_patch16_224", **more)


def resnet(tmp_path):
    return save_encoder(tmp_path / "resnet", "resnet18", channels=[8, 16, 24, 32], stem="cifar")


def silent(*arguments, **more):
    return evaluate("segmentation", *arguments, say=lambda line: None, **more)


def opened(path, **more):
    said = []
    return *open_masks(str(path), more.pop("split", "val"), said.append, **more), said


# --- what is learned, and how it is scored ----------------------------------------------------------------------------


@needs_upernet
@pytest.mark.parametrize("encoder", [vit, resnet])
def test_upernet_learns_four_images(tmp_path, images, encoder):
    how = ("steps=30", "lr=0.01", "warmup=0.2", "layer_decay=1.0")
    (line,) = silent(encoder(tmp_path), f"path={images}", *QUICK, *how, out=tmp_path / "out")
    assert line["value"] > 0.75 and line["metric"] == "mIoU" and line["trained_steps"] == 30
    assert line["value"] == pytest.approx(np.mean(list(line["iou"].values()))) and list(line["iou"]) == ["0", "1", "2"]
    assert line["pixel_accuracy"] > 0.85 and line["averaged_over"] == 3 and 0 <= line["spread"] < 0.2


def test_infomins_decoder_learns_on_a_frozen_encoder(tmp_path, images, monkeypatch):
    trained, where = [], vit(tmp_path)
    fit = segmentation.fit
    monkeypatch.setattr(segmentation, "fit", lambda *given: trained.append(fit(*given)) or trained[-1])
    how = ("form=infomin", "epochs=30", "lr=0.01", "warmup=0.2")
    (line,) = silent(where, f"path={images}", *QUICK, *how, out=tmp_path / "out")
    assert line["settings"]["frozen"] and line["trained_steps"] == 30 and line["value"] > 0.5
    encoder = trained[0].maps.encoder.state_dict()
    assert all(torch.equal(value, encoder[name]) for name, value in load_backbone(where).state_dict().items())


def recorded(val, masks):
    """What is recorded of masks, pairs of the named and the true classes."""
    found = {}

    def record(variant, metric, value, **more):
        found.update(more, value=value)

    job = SimpleNamespace(
        num_classes=len(val.classes), val=val, chance=val.chance, record=record, figure=lambda _: None
    )
    segmentation._score(job, {}, masks, SimpleNamespace(steps=1))
    return found


def test_miou_by_hand():
    counts = torch.tensor([[2, 2, 1, 0], [1, 0, 0, 0]])
    val = MaskedImages("val", [], ["sky", "road", "car", "sea"], counts, np.zeros(1), [])
    assert val.chance == pytest.approx(3 / 6 / 3)
    void = -1
    masks = [([[0, 1, 1], [1, 3, 0]], [[0, 0, 1], [1, void, 2]]), ([[0]], [[0]])]
    found = recorded(val, [(torch.tensor(named), torch.tensor(true).short()) for named, true in masks])
    # Of sky 2 pixels are right, of 4 that are sky or named so; of road 2 of 3; of car 0 of 1. Void counts nowhere.
    assert found["iou"] == pytest.approx({"sky": 2 / 4, "road": 2 / 3, "car": 0.0, "sea": None})
    assert found["value"] == pytest.approx((2 / 4 + 2 / 3) / 3) and found["averaged_over"] == 3
    assert found["pixel_accuracy"] == pytest.approx(4 / 6) and found["spread_of"] == "2 images"


def test_the_spread_is_over_images():
    right, wrong = torch.tensor([[5, 0], [0, 5]]), torch.tensor([[0, 5], [5, 0]])
    both = torch.tensor([True, True])
    assert segmentation.spread_over_images(torch.stack([right] * 4), both) == 0
    assert segmentation.spread_over_images(right[None], both) is None
    many = torch.stack([right, wrong] * 50)
    # With the share s of right images the mIoU is s / (2 - s), whose derivative is 2 / 2.25 at a half.
    assert segmentation.spread_over_images(many, both) == pytest.approx(0.05 * 2 / 2.25, rel=0.1)


def test_masks_have_their_own_size_and_windows_cover_them(tmp_path):
    """A model that names the colour of each pixel, on images that windows of 16 pixels cover in no whole number."""
    val = opened(folder(tmp_path / "wide", height=37, width=50))[1]
    mean, std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)
    subject = SimpleNamespace(description={"mean": [0.5] * 3, "std": [0.25] * 3})
    settings = SimpleNamespace(encode_batch=3, precision="fp32")
    job = SimpleNamespace(subject=subject, settings=settings, device=torch.device("cpu"))
    job.autocast = lambda: torch.autocast("cpu", enabled=False)
    pixels = torch.from_numpy(COLOURS).float()[..., None, None] / 255

    def model(images):
        colours = images * std + mean
        return [torch.stack([-(colours - colour).abs().sum(1) for colour in pixels], 1)]

    for size, least in ((37, 1.0), (64, 0.97), (12, 0.8)):
        recipe = SimpleNamespace(crop=16, size=size, overlap=0.5)
        for named, true in predicted(job, recipe, model, val, workers=0):
            assert named.shape == true.shape == (37, 50)
            assert (named == true).double().mean() >= least


def test_a_crop_and_its_mask_are_of_the_same_place():
    classes = mask(2).astype(np.int16)
    image = Image.fromarray(COLOURS[classes])
    how = {"crop": 24, "size": 32, "scale": (0.5, 2.0), "largest": 0.75, "flip": True, "jitter": False}
    sizes = set()
    for seed in range(20):
        part, true = crop(image, classes, SimpleNamespace(**how), random.Random(seed))
        colours = np.asarray(part).astype(int)[..., None, :] - COLOURS.astype(int)
        assert (np.abs(colours).sum(-1).argmin(-1) == true).mean() > 0.85
        counts = np.bincount(true.ravel())
        assert counts.max() <= 0.75 * counts.sum()
        sizes.add(part.size)
    assert (24, 24) in sizes and len(sizes) > 1


@needs_upernet
def test_it_goes_on_after_a_kill(tmp_path, images, monkeypatch):
    overrides = (f"path={images}", *QUICK, "jitter=true", "flip=true", "scale=[0.5,2.0]", "batch_size=2", "epochs=2")
    overrides += ("dropout=0.5", "drop_path=0.2")
    where = resnet(tmp_path)
    (whole,) = silent(where, *overrides, out=tmp_path / "whole")
    kept = unfinished.save

    def killed(*given):
        kept(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            silent(where, *overrides, out=tmp_path / "parts")
    assert len(list((tmp_path / "parts" / "evals").glob("segmentation_*.pt"))) == 1
    seed_step, steps = training.seed_step, []
    monkeypatch.setattr(training, "seed_step", lambda seed, step: steps.append(step) or seed_step(seed, step))
    (parts,) = silent(where, *overrides, out=tmp_path / "parts")
    assert steps == [2, 3]  # The second epoch alone.
    assert parts["value"] == whole["value"] and parts["iou"] == whole["iou"]
    assert not (tmp_path / "parts" / "evals").exists()
    monkeypatch.setattr(segmentation, "fit", lambda *given: pytest.fail("trained again"))
    assert silent(where, *overrides, out=tmp_path / "parts") == [parts]


# --- folders and masks ------------------------------------------------------------------------------------------------


def test_a_palette_is_numbers_and_values_can_be_void(images):
    train, val, said = opened(images)
    assert train.classes == ["0", "1", "2"] and not said and val.mask(1).tolist() == mask(1).tolist()
    for number in range(4):
        palette = Image.fromarray(mask(number), "P")
        palette.putpalette(list(range(256)) * 3)
        palette.save(images / "val" / "labels" / f"{number}.png")
    assert opened(images)[1].mask(1).tolist() == mask(1).tolist()
    without = opened(images, ignore=[1])[1]
    assert without.classes == ["0", "2"]
    assert without.mask(0).tolist() == np.choose(mask(0), [0, -1, 1]).tolist()
    (images / "names.txt").write_text("sky\nroad\ncar\n")
    assert opened(images, ignore=[1], classes=str(images / "names.txt"))[0].classes == ["sky", "car"]
    assert opened(images)[1].fingerprint == opened(images)[1].fingerprint != without.fingerprint


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_a_mask_that_is_turned_like_its_image(images, ending):
    """Both lie on their side in their files, which say so."""
    exif = Image.Exif()
    exif[0x0112] = 6  # It is to be turned clockwise by a quarter.
    for kind, upright in (("images", COLOURS[mask(1)]), ("labels", mask(1))):
        (images / "val" / kind / "1.png").unlink()
        Image.fromarray(np.rot90(upright).copy()).save(images / "val" / kind / f"1{ending}", exif=exif)
    val = opened(images)[1]
    assert val.mask(1).tolist() == mask(1).tolist() and np.array_equal(val.image(1), COLOURS[mask(1)])


def test_ade20ks_folders_begin_at_one(tmp_path, images):
    for kind, name in (("images", "images"), ("labels", "annotations")):
        for split, word in (("train", "training"), ("val", "validation")):
            (tmp_path / "ade" / name).mkdir(parents=True, exist_ok=True)
            (images / split / kind).rename(tmp_path / "ade" / name / word)
    train, val, _ = opened(tmp_path / "ade", reduce_zero_label=True)
    assert train.classes == ["1", "2"] and len(train) == len(val) == 4
    assert val.mask(0).tolist() == (mask(0).astype(int) - 1).tolist()


def test_what_is_left_out_is_counted(images):
    (images / "train" / "labels" / "0.png").unlink()
    (images / "val" / "images" / "1.png").unlink()
    (images / "val" / "labels" / "2.png").write_bytes(b"no image")
    train, val, said = opened(images)
    assert (len(train), len(val)) == (3, 2)
    assert said[0] == "1 images without a mask of the split train are left out, such as 0.png"
    assert said[1] == "1 masks without an image of the split val are left out, such as 1.png"
    assert said[2].startswith("1 images of the split val are left out, which cannot be read:")
    few = opened(images, limits=(2, 1))
    assert (len(few[0]), len(few[1])) == (2, 1)


def test_classes_of_one_name_are_refused(images):
    """Their IoU are told apart by name."""
    (images / "names.txt").write_text("sky\nroad\nsky\n")
    with pytest.raises(UserError, match="names.txt names sky twice"):
        opened(images, classes=str(images / "names.txt"))


def test_a_class_without_pixels_is_said(images):
    for number in range(4):
        Image.fromarray(mask(number).clip(0, 1)).save(images / "val" / "labels" / f"{number}.png")
    train, val, said = opened(images)
    assert said == ["the class 2 has no pixel in the masks of the split val: mIoU is the mean over the other 2 classes"]
    (images / "train").rename(images / "new")
    (images / "val").rename(images / "train")
    (images / "new").rename(images / "val")
    said = opened(images, classes=3)[2]
    assert said == ["the class 2 has no pixel in the training masks: the IoU can only be 0, and counts"]


def written(image, name="val/labels/1.png"):
    return lambda images: image.save(images / name)


@needs_upernet
@pytest.mark.parametrize(
    "spoil, overrides, message",
    [
        (written(Image.new("RGB", (32, 32))), (), r"1 of 4 masks of the split val .*1.png has colours \(RGB\)"),
        (written(Image.new("L", (32, 30))), (), "1.png has 32 x 30 pixels, and its image 32 x 32 pixels"),
        (written(Image.new("L", (32, 32), 7)), (), "1 of 4 masks of the split val hold the value 7, and the classes"),
        (written(Image.new("L", (32, 32), 7)), ("classes=2",), "4 of 4 masks of the split train hold the value 2"),
        (written(Image.new("L", (32, 32)), "val/labels/1.jpeg"), (), "has both 1.jpeg and 1.png: which one counts"),
        (lambda images: (images / "val" / "masks").mkdir(), (), "val has labels and masks: which one counts"),
        (lambda images: (images / "val").rename(images / "test"), (), "has no split val .*it has test: split=test"),
        (lambda images: [f.unlink() for f in (images / "val/images").iterdir()], (), "no image of the split val has a"),
        (lambda images: (images / "train").rename(images / "trian"), (), "has no split train"),
        (lambda images: None, ("ignore=[1,2]",), "expected two classes at least, got 1 in the training masks"),
        (lambda images: None, ("classes=1",), "expected two classes at least, got 1 in classes=1"),
        (lambda images: None, ("classes=nowhere.txt",), "classes: cannot read nowhere.txt"),
        (lambda images: None, ("classes=40000",), "classes=40000 says 40,000 classes, and there can be 32,767"),
        (
            written(Image.fromarray(np.full((32, 32), 40000, np.uint16)), "train/labels/1.png"),
            (),
            "the training masks say 40,001 classes, and there can be 32,767",
        ),
        (lambda images: None, ("path=nowhere",), "expected a folder of images and masks, found nothing: nowhere"),
        (lambda images: None, ("train_images=1",), "expected two images a batch at least, .* and 1 training images"),
        (lambda images: None, ("crop=20",), "crop: expected a multiple of the patch, 8, such as 24, got 20"),
        (lambda images: None, ("scale=[2.0,1.0]",), "scale: expected 0 < low <= high"),
        (lambda images: None, ("blocks=[0,1,2]",), "blocks: expected 4 numbers from 0 to 2"),
        (lambda images: None, ("form=uper",), "form: expected 'upernet' or 'infomin'"),
    ],
)
def test_mistakes(tmp_path, images, spoil, overrides, message):
    spoil(images)
    with pytest.raises((UserError, ConfigError), match=message):
        silent(vit(tmp_path), f"path={images}", *QUICK, *overrides, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_jpeg_is_no_mask(images):
    for number in range(4):
        (images / "val" / "labels" / f"{number}.png").unlink()
        Image.fromarray(mask(number)).save(images / "val" / "labels" / f"{number}.jpg")
    with pytest.raises(UserError, match="4 of 4 masks of the split val .*0.jpg is a JPEG, which does not keep"):
        opened(images)


def test_the_package_of_the_decoder_may_be_missing(tmp_path, images, monkeypatch):
    monkeypatch.setattr(segmentation, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ssl-ib\[dense\]', or give decoder=layers"):
        silent(vit(tmp_path), f"path={images}", *QUICK, out=tmp_path / "out")


# --- the command ------------------------------------------------------------------------------------------------------


@needs_upernet
def test_the_command_says_what_it_does_and_draws(tmp_path, images, capsys):
    where, out = vit(tmp_path), tmp_path / "out"
    words = ["segmentation", where, f"path={images}", *QUICK, "figures=true", "crop=16", "size=32", "steps=2"]
    assert command.main([*words, "--out", str(out), "--dry-run"]) == 0 and not out.exists()
    shown = capsys.readouterr().out
    assert "4 training images, 4 held out, 3 classes, chance" in shown
    assert "crops of 16 x 16 pixels, and the encoder was made for 32: positions are resampled" in shown
    assert "dry run of segmentation passed" in shown
    assert command.main([*words, "seeds=[0,1]", "--out", str(out)]) == 0
    first, second, mean = [json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines()]
    assert mean["value"] == pytest.approx((first["value"] + second["value"]) / 2) and mean["spread_of"] == "2 seeds"
    with Image.open(out / "figures" / "segmentation_masks.png") as picture:
        assert picture.width > 500
