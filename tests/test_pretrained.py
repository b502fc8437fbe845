"""A loaded encoder sees images as the run's own evaluation saw them."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from harness import checkpoint, finished, trainer
from PIL import Image

import ssl_ib
from ssl_ib import Sample, UserError, pretrained
from ssl_ib.config.registry import VIEWS
from ssl_ib.evals import features
from ssl_ib.pretrained import of_run
from ssl_ib.record import backbone as record
from ssl_ib.record.artifacts import finish

VIT = "backbone: vit_tiny_patch16_224, backbone_args: {patch_size: 8, embed_dim: 24, depth: 1, num_heads: 3}"
STUDENT = (
    f"model={{name: student_teacher, {VIT}, head_hidden: 16, head_dim: 8, prototypes: 4}}",
    "criterion=dino",
    "masker=none",
)
RUNS = {
    "class token": (),
    "mean of the patches": ("model.pool=mean",),
    "resized and cropped": ("source.size=27", "views.crop_ratio=0.7", "views.interpolation=bilinear"),
    "a teacher": STUDENT,
    "no vision transformer": ("model.backbone=resnet10t", "model.backbone_args=null", "masker=none"),
}


def evaluated(run, images):
    """Features of an image set, as the run's evaluation has them."""
    run.model.eval()
    index = torch.arange(len(images))
    return features.extract(run.model.encode, images, index, 8, run.views.center, run.device)[0]


def pictures(count: int = 3) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8)) for i in range(count)]


@pytest.mark.parametrize("kind", RUNS)
def test_features_are_those_of_the_runs_evaluation(kind, tmp_path):
    instance = trainer(*RUNS[kind], out=tmp_path)
    images = instance.run.source.val().images[:9]
    with torch.no_grad():
        expected = instance.run.model.eval().encode(instance.run.views.center(Sample.unlabelled(images)))
    digits = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    in_memory, saved = of_run(instance.run)["backbone"], ssl_ib.load(instance.save())
    description = record.of_run(instance.run)["backbone"]
    record.save_backbone(instance.run.model.backbone, description, tmp_path)
    for encoder in (in_memory, saved, ssl_ib.load(tmp_path)):
        found = encoder.embed(digits, batch_size=4)
        assert found.dtype == torch.float32 and not found.requires_grad
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert encoder.transform(digits[0]).shape == instance.run.views.shapes[0]


def test_files_of_any_size_and_mode(tmp_path):
    """Larger images than the source keeps, upright and turned, in modes that are not RGB."""
    folder = tmp_path / "images"
    for number, image in enumerate(pictures(10)):
        image = image.resize((90, 40 + 9 * number)).convert(("RGB", "L", "P", "RGBA")[number % 4])
        place = folder / ("b", "a")[number % 2] / f"{number}{'.png' if number % 4 else '.jpg'}"
        place.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(place, exif=exif)
    (folder / "notes.txt").write_text("no image")
    source = ("source=folder", f"source.path={folder}", "source.max_side=32", "source.val_fraction=0")
    run = trainer(*source, "views.crop_ratio=0.8", "batch_size=4").run
    encoder = of_run(run)["backbone"]
    found, names = encoder.embed_folder(folder, batch_size=4)
    assert names == sorted(names) and names[0] == "a/1.png" and len(names) == 10
    torch.testing.assert_close(found, evaluated(run, run.source.train()), atol=1e-5, rtol=1e-5)
    # An open image is not changed, and a PNG comes out as its file does.
    with Image.open(folder / names[0]) as image:
        before = image.mode, image.size
        torch.testing.assert_close(encoder.embed([image]), found[:1], atol=1e-5, rtol=1e-5)
        assert (image.mode, image.size) == before


def test_a_folder_of_an_earlier_version(tmp_path):
    """Without a preprocessing of its own it takes that of the run's configuration."""
    shutil.copytree(finished(), tmp_path / "run")
    now, path = ssl_ib.load(tmp_path / "run"), tmp_path / "run" / "backbone.json"
    description = json.loads(path.read_text())
    assert description.pop("preprocessing") == {
        "size": 16,
        "crop_ratio": 1.0,
        "interpolation": "bicubic",
        "max_side": None,
    }
    path.write_text(json.dumps(description))
    image = pictures(1)[0]
    assert torch.equal(ssl_ib.load(tmp_path / "run").transform(image), now.transform(image))
    (tmp_path / "run" / "config.yaml").unlink()
    alone = ssl_ib.load(tmp_path / "run")
    with pytest.raises(UserError, match="does not say how its images are prepared"):
        alone.embed([image])
    assert torch.equal(alone(now.transform(image)[None]), now(now.transform(image)[None]))


def test_a_folder_of_an_earlier_version_pools_as_the_run_did(tmp_path):
    instance = trainer("model.pool=mean")
    description = record.of_run(instance.run)["backbone"]
    for key in ("global_pool", "fc_norm"):
        del description["arguments"][key]
    del description["preprocessing"]
    record.save_backbone(instance.run.model.backbone, description, tmp_path)
    (tmp_path / "config.yaml").write_text(instance.config.yaml())
    views = torch.rand(3, *instance.run.views.shapes[0])
    with torch.no_grad():
        assert torch.equal(ssl_ib.load(tmp_path)(views), instance.run.model.eval().encode(views))


def test_views_with_a_centre_of_their_own(monkeypatch):
    class Mirrored(ssl_ib.Crops):
        def center(self, sample):
            return super().center(sample).flip(-1)

    monkeypatch.setitem(VIEWS._entries, "mirrored", lambda: Mirrored([ssl_ib.Augment(16)] * 2))
    instance = trainer("views=mirrored")
    image = pictures(1)[0]
    bare = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    expected = instance.run.views.center(Sample.unlabelled(bare))[0]
    description = record.of_run(instance.run)["backbone"]
    assert description["preprocessing"] is None
    config = instance.config.plain()
    again = pretrained._rebuilt(description, instance.run.model.backbone.state_dict(), config, dict)
    for encoder in (of_run(instance.run)["backbone"], again):
        torch.testing.assert_close(encoder.transform(image), expected)


def test_timm_by_name():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    encoder = ssl_ib.load("timm:test_vit", dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before) and not encoder.training
    images = pictures()
    side = encoder.model.pretrained_cfg["input_size"][1]
    assert encoder.transform(images[0]).shape == (3, side, side)
    found = encoder.embed(images)
    assert found.shape == (3, encoder.model.num_features) and found.dtype == torch.float32
    full = encoder.float().embed(images)
    assert 0 < (found - full).abs().max() < 0.1 * full.abs().max()


def test_timms_crops_are_described_as_timm_makes_them():
    """timm rounds the size before the crop down: 224 / 0.9 = 248.9 is 248."""
    how = ssl_ib.load("timm:vit_tiny_patch16_224").description["preprocessing"]
    assert how["size"] == 224 and round(how["size"] / how["crop_ratio"]) == 248


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("backbone.safetensors", b"junk", "backbone.safetensors' cannot be read"),
        ("backbone.json", b"{", "backbone.json is damaged: "),
        ("backbone.json", b"{}", "backbone.json describes no encoder: expected model, arguments, mean and std"),
        ("backbone.safetensors", None, "expected the weights of timm's 'vit_tiny_patch16_224' .* Missing key"),
    ],
)
def test_a_folder_that_is_damaged(tmp_path, file, content, message):
    """Or whose weights are another architecture's."""
    shutil.copytree(finished(), tmp_path / "run")
    if content is None:
        content = safetensors.torch.save({"conv1.weight": torch.ones(2)})
    (tmp_path / "run" / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        ssl_ib.load(tmp_path / "run")


def test_a_model_that_exports_nothing():
    instance = trainer()
    instance.run.model.export = lambda: None
    assert of_run(instance.run) == {} and record.in_checkpoint(instance.run) == {}


@pytest.mark.parametrize(
    "source, more, message",
    [
        ("absent", {}, "expected the folder of a run, .* and there is nothing at 'absent'"),
        (".", {}, "expected a saved backbone, found no backbone.json and no backbone.safetensors"),
        ("notes.txt", {}, "notes.txt' cannot be read: it is no file of weights"),
        ("other.pt", {}, "other.pt does not describe an encoder"),
        ("timm:resnet1", {}, "timm has no model 'resnet1'; did you mean 'resnet18'"),
        (
            "absent",
            {"pretrained": True},
            "pretrained is for timm's models, .* and 'absent' is none",
        ),
        ("timm:test_vit", {"dtype": "bf16"}, "dtype: expected a floating-point type .* got 'bf16'"),
        ("timm:test_vit", {"device": "gpu"}, "device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
    ],
)
def test_what_cannot_be_loaded(tmp_path, monkeypatch, source, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=message):
        ssl_ib.load(source, **more)


def test_what_cannot_be_embedded(tmp_path):
    encoder = ssl_ib.load(finished())
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for call, message in (
        (lambda: encoder.embed([]), "expected at least one image"),
        (lambda: encoder.embed("images"), "expected a list .* got one str; embed_folder takes a folder"),
        (lambda: encoder.embed([np.zeros((4, 4, 3))]), "expected a PIL image or the path .* got ndarray"),
        (lambda: encoder.embed([broken]), "broken.png cannot be read as an image: not an image that Pillow knows"),
        (lambda: encoder.embed([tmp_path / "absent.png"]), "absent.png cannot be read .*: No such file or directory"),
        (lambda: encoder.embed_folder(tmp_path), "broken.png cannot be read"),
        (
            lambda: encoder.embed_folder(tmp_path / "absent"),
            "cannot read the folder .*absent: No such file or directory",
        ),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_the_description_is_in_every_checkpoint():
    description = checkpoint(finished())["backbones"]["backbone"]
    assert description.pop("prefix") == "model.encoder.backbone."
    assert description == json.loads((finished() / "backbone.json").read_text())


def test_a_model_with_two_encoders(tmp_path):
    instance = trainer("epochs=1", "batch_size=512", out=tmp_path)
    model = instance.run.model
    model.twin = type(model.encoder)("resnet10t", {}, (3, 16, 16), "cls")
    model.exports = lambda: {
        "first": ssl_ib.Export(model.backbone, *model.export()),
        "second": ssl_ib.Export(model.twin.backbone, "resnet10t", model.twin.arguments),
    }
    with torch.no_grad():
        model.twin.backbone.conv1[0].weight.fill_(0.5)
    lines = finish(tmp_path, instance.run, {"untrained": {}, "trained": {}, "seconds": 1.0})
    assert "the encoder first, with timm alone" in lines[0] and "second.json" in lines[1]
    for source in (tmp_path, instance.save()):
        with pytest.raises(UserError, match="holds the encoders first, second: say which, with name="):
            ssl_ib.load(source)
        with pytest.raises(UserError, match="and 'third' is none of them"):
            ssl_ib.load(source, name="third")
        assert (ssl_ib.load(source, name="second").model.conv1[0].weight == 0.5).all()
        assert torch.equal(ssl_ib.load(source, name="first").model.pos_embed, model.backbone.pos_embed)
    assert {*of_run(instance.run)} == {"first", "second"}
