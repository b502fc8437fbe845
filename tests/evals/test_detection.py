"""Detection: boxes are read, scored and found as they are, and a training that was stopped goes on."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw

from ssl_ib import ConfigError, UserError
from ssl_ib.evals import boxes as boxes_module
from ssl_ib.evals import training, unfinished
from ssl_ib.evals.average_precision import Predicted, average_precision
from ssl_ib.evals.box_sets import open_sets
from ssl_ib.evals.box_training import Course, Views
from ssl_ib.evals.detector import Design, build, groups
from ssl_ib.evals.evaluate import evaluate
from ssl_ib.evals.protocols import detection
from ssl_ib.evals.subject import Subject, origin

pytest.importorskip("faster_coco_eval")

#: (class, left, top, right, bottom) of each image, 64 x 48 pixels.
SQUARES = [
    [("red", 4, 6, 28, 30)],
    [("blue", 34, 16, 60, 42)],
    [("red", 2, 2, 26, 28), ("blue", 36, 20, 60, 44)],
    [("blue", 6, 18, 30, 42)],
]
QUICK = ("size=64", "width=32", "head=2fc", "rois=32", "proposals=50", "rpn_convs=1", "anchors=3.0", "workers=0")
TRAIN = ("batch_size=4", "jitter=[1.0,1.0]", "flip=0.0", "layer_decay=1.0", "drop_path=0.0", "weight_decay=0.0")


def draw(file, squares):
    image = Image.new("RGB", (64, 48), (200, 200, 200))
    for name, *sides in squares:
        left, top, right, bottom = sides
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=name)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def voc(root, more=lambda split, number, squares: squares, size="<size><width>64</width><height>48</height></size>"):
    """The squares as a folder of Pascal VOC, in its splits train and val."""
    for split in ("train", "val"):
        for number, squares in enumerate(SQUARES):
            name = f"{split}_{number}"
            draw(root / "JPEGImages" / f"{name}.png", squares)
            objects = "".join(
                f"<object><name>{one}</name><bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax>"
                f"<ymax>{bottom}</ymax></bndbox></object>"
                for one, left, top, right, bottom in more(split, number, squares)
            )
            file = root / "Annotations" / f"{name}.xml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"<annotation>{size}{objects}</annotation>")
        lists = root / "ImageSets" / "Main" / f"{split}.txt"
        lists.parent.mkdir(parents=True, exist_ok=True)
        lists.write_text("".join(f"{split}_{number}\n" for number in range(len(SQUARES))))
    return root


def coco(root, change=lambda split, data: None, masks=True):
    """The squares in COCO's JSON, under its usual names; the ids of the categories have holes."""
    ids = {"blue": 7, "red": 90}
    for split in ("train", "val"):
        images, annotations = [], []
        for number, squares in enumerate(SQUARES):
            name = f"{split}_{number}.png"
            draw(root / f"{split}2017" / name, squares)
            images.append({"id": 100 - number, "file_name": name, "width": 64, "height": 48})
            for one, left, top, right, bottom in squares:
                shape = [[left, top, right, top, right, bottom, left, bottom]]
                box = {"bbox": [left, top, right - left, bottom - top], **({"segmentation": shape} if masks else {})}
                found = {"id": len(annotations) + 1, "image_id": 100 - number, "category_id": ids[one], "iscrowd": 0}
                annotations.append({**found, **box, "area": 1.0})
        categories = [{"id": i, "name": name} for name, i in ids.items()]
        data = {"images": images, "annotations": annotations, "categories": categories}
        change(split, data)
        file = root / "annotations" / f"instances_{split}2017.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data))
    return root


def opened(root, **more):
    said = []
    return *open_sets(root, (("train",), ("val",)), say=said.append, **more), said


def silent(encoder, root, *arguments, **more):
    return evaluate("detection", encoder, f"path={root}", *QUICK, *arguments, say=lambda line: None, **more)


def test_both_layouts_give_the_same_boxes(tmp_path):
    for one, other in zip(opened(voc(tmp_path / "voc"))[:2], opened(coco(tmp_path / "coco"))[:2], strict=True):
        assert one.classes == other.classes == ["blue", "red"] and one.sizes == other.sizes == [(48, 64)] * 4
        for mine, yours in zip(one.objects, other.objects, strict=True):
            assert torch.equal(mine.boxes, yours.boxes) and torch.equal(mine.labels, yours.labels)
    assert one.objects[2].boxes.tolist() == [[2, 2, 26, 28], [36, 20, 60, 44]]
    assert not one.masks and other.masks and one.fingerprint != other.fingerprint
    mask = other.decoded_masks(2)
    assert mask.shape == (2, 48, 64) and mask[0, 2:28, 2:26].all() and mask[0].sum() == 24 * 26


def test_run_lengths_are_the_same_masks_as_polygons(tmp_path):
    polygons = opened(coco(tmp_path / "polygons"))[0]

    def encode(split, data):
        for one in data["annotations"]:
            left, top, width, height = one["bbox"]
            flat = torch.zeros(64, 48, dtype=torch.uint8)  # COCO's runs go down the columns.
            flat[left : left + width, top : top + height] = 1
            values, runs = flat.flatten().unique_consecutive(return_counts=True)
            one["segmentation"] = {"size": [48, 64], "counts": [0] * int(values[0]) + runs.tolist()}

    runs = opened(coco(tmp_path / "runs", encode))[0]
    assert all(torch.equal(polygons.decoded_masks(row), runs.decoded_masks(row)) for row in range(4))


def test_boxes_that_cannot_be_used_are_counted(tmp_path):
    def change(split, data):
        data["annotations"] = [one for one in data["annotations"] if one["image_id"] != 97]  # The last image has none.
        for bbox, crowd in (([5, 5, 0, 9], 0), ([70, 5, 9, 9], 0), ([50, 5, 30, 9], 0), ([1, 1, 9, 9], 1)):
            one = {"image_id": 100, "category_id": 90, "bbox": bbox, "iscrowd": crowd}
            data["annotations"].append({**one, "id": len(data["annotations"]) + 50})

    train, _, said = opened(coco(tmp_path, change))
    assert train.objects[0].boxes.tolist() == [[4, 6, 28, 30], [50, 5, 64, 14], [1, 1, 10, 10]]
    assert train.objects[0].crowd.tolist() == [False, False, True] and len(train.objects[3]) == 0 and not train.masks
    text = "\n".join(said)
    for expected in (
        "1 box without an area",
        "1 box wholly outside",
        "1 box that reach",
        "1 box around",
        "1 of 4 images",
    ):
        assert f"train: {expected}" in text
    assert "3 of 7 boxes of the split train" in text  # They have no mask.


def remove(*parts):
    return lambda root: root.joinpath(*parts).unlink()


BAD = {
    "no image": (voc, remove("JPEGImages", "val_1.png"), "1 of the 4 images .* have no image in .*: val_1"),
    "no xml": (voc, remove("Annotations", "train_2.xml"), "1 of the 4 images .* have no file in .*: train_2"),
    "no split": (voc, remove("ImageSets", "Main", "val.txt"), "no split val in .*: expected one of train"),
    "empty split": (voc, lambda root: (root / "ImageSets/Main/val.txt").write_text("\n"), "names no image"),
    "twice": (voc, lambda root: (root / "ImageSets/Main/val.txt").write_text("val_0\nval_0\n"), "images twice.*val_0"),
    "in both": (voc, lambda root: (root / "ImageSets/Main/val.txt").write_text("train_1\n"), "1 images .* as well"),
    "no boxes": (voc, lambda root: [f.write_text("<a/>") for f in root.glob("Annotations/val*")], "val has a box"),
    "not xml": (voc, lambda root: (root / "Annotations/val_0.xml").write_text("<a"), "val_0.xml cannot be read"),
    "other size": (
        voc,
        lambda root: draw_larger(root / "JPEGImages/val_3.png"),
        "val_3.png: it has 70 x 50 pixels, and",
    ),
    "no picture": (voc, lambda root: (root / "JPEGImages/val_3.png").write_bytes(b"no"), "1 of 4 .* cannot be read"),
    "no coco": (
        coco,
        remove("annotations", "instances_val2017.json"),
        "instances_val.json: it has annotations/instances_t",
    ),
    "a list in another encoding": (
        voc,
        lambda root: (root / "ImageSets/Main/val.txt").write_bytes(b"val_\xe9\n"),
        "val.txt cannot be read",
    ),
    "two pictures": (
        voc,
        lambda root: draw(root / "JPEGImages/val_1.bmp", []),
        "JPEGImages has both val_1.bmp and val_1.png: which one counts",
    ),
    "lost": (coco, remove("val2017", "val_2.png"), "1 of 4 images of the split val cannot be read.*no such file"),
    "moved": (coco, lambda root: (root / "val2017").rename(root / "elsewhere"), "val_0.png, is in none of"),
}


def draw_larger(file):
    Image.new("RGB", (70, 50)).save(file)


@pytest.mark.parametrize("what", BAD)
def test_bad_folders_are_refused(tmp_path, what):
    layout, spoil, message = BAD[what]
    spoil(layout(tmp_path))
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


def test_a_class_that_is_held_out_alone_is_refused(tmp_path):
    def rename(split, number, squares):
        return [("green", *square[1:]) if split == "val" and number == 0 else square for square in squares]

    with pytest.raises(UserError, match="1 held-out boxes are of 1 classes that have no training box .green."):
        opened(voc(tmp_path, rename))


def change_first(key, value):
    return lambda split, data: data["annotations"][0].update({key: value})


@pytest.mark.parametrize("key, value", [("category_id", 8), ("image_id", 3), ("bbox", [1, 2, 3]), ("bbox", None)])
def test_annotations_that_belong_to_nothing_are_refused(tmp_path, key, value):
    with pytest.raises(UserError, match=f"the {key} of 1 annotations is not"):
        opened(coco(tmp_path, change_first(key, value)))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("annotations", None, "no file of COCO's for detection: expected lists of images"),
        ("annotations", [[1]], "no file of COCO's for detection"),
        ("annotations", [{"image_id": [1], "category_id": 7}], "no file of COCO's for detection"),
        ("images", [{"id": 1, "file_name": 5}], "no file of COCO's for detection"),
        ("images", [{"id": 1, "file_name": "a.png", "height": "tall", "width": 3}], "instances_val2017.json cannot be"),
    ],
)
def test_files_that_are_not_cocos_are_refused(tmp_path, key, value, message):
    with pytest.raises(UserError, match=message):
        opened(coco(tmp_path, lambda split, data: data.update({key: value} if split == "val" else {})))


@pytest.mark.parametrize("shape", [{"counts": [9], "size": [48]}, {"counts": [9], "size": None}, [[1, 2, 3, 4]], 5])
def test_a_shape_that_is_no_mask_is_none(tmp_path, shape):
    train, _, said = opened(coco(tmp_path, change_first("segmentation", shape)))
    assert not train.masks and "1 of 5 boxes of the split train" in said[0]


@pytest.mark.parametrize(
    "splits, more, message",
    [
        ((("train",), ("",)), {}, r"val: expected the name of a split in .*, got \[''\]"),
        (((), ("val",)), {}, "train: expected the name of a split"),
        ((("train",), ("/val.json",)), {}, "val: expected the name of a split"),
        ((("train", "more"), ("val",)), {}, "4 images are in several of the splits .* such as .*train_0.png"),
        ((("train",), ("val",)), {"folders": ("pictures",)}, "images: only for COCO's layout"),
    ],
)
def test_splits_that_are_not_there_or_overlap_are_refused(tmp_path, splits, more, message):
    lists = voc(tmp_path) / "ImageSets" / "Main"
    (lists / "more.txt").write_text((lists / "train.txt").read_text())
    with pytest.raises(UserError, match=message):
        open_sets(tmp_path, splits, **more)


def test_an_image_that_lies_on_its_side_is_measured_upright(tmp_path):
    """Also where Pillow turns the size of an open file itself, as it does of a TIFF."""
    exif = Image.Exif()
    exif[0x0112] = 6  # It is to be turned clockwise by a quarter.
    for number, ending in enumerate((".tif", ".jpg", ".png")):
        file = voc(tmp_path, size="") / "JPEGImages" / f"train_{number}.png"
        with Image.open(file) as image:
            image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"turned{ending}", exif=exif)
        file.unlink()
        (tmp_path / f"turned{ending}").rename(file.with_suffix(ending))
        train, _, said = opened(tmp_path)
        assert train.sizes == [(48, 64)] * 4 == [tuple(train.image(row).shape[1:]) for row in range(4)] and not said
        file.with_suffix(ending).unlink()


def test_masks_that_are_wanted_must_be_there(tmp_path):
    with pytest.raises(UserError, match="masks=true: 5 of 5 boxes of the split train, 5 of 5"):
        opened(coco(tmp_path, masks=False), masks=True)


def test_average_precision_is_pycocotools(tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    truth = opened(coco(tmp_path))[1]
    crowd = replace(truth.objects[0], crowd=torch.tensor([True]))
    truth = replace(truth, objects=[crowd, *truth.objects[1:]])
    torch.manual_seed(0)
    found = []
    for row, one in enumerate(truth.objects):
        boxes = (one.boxes.repeat(3, 1) + 3 * torch.randn(3 * len(one), 4)).clamp(0, 48)
        # Some masks are those of another image.
        masks = truth.encoded_masks(row) * 2 + (truth.encoded_masks(row - 1) * 2)[: len(one)]
        found.append(Predicted(boxes, torch.rand(len(boxes)), torch.randint(2, (len(boxes),)), masks))
    mine = [average_precision(truth, found, kind) for kind in ("bbox", "segm")]
    boxes_module.coco_tools.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(boxes_module, "find_spec", lambda name: None if name == "faster_coco_eval" else name)
        theirs = [average_precision(truth, found, kind) for kind in ("bbox", "segm")]
        assert boxes_module.coco_tools().name.startswith("pycocotools")
        patch.setattr(boxes_module, "find_spec", lambda name: None)
        boxes_module.coco_tools.cache_clear()
        with pytest.raises(UserError, match="pip install 'ssl-ib.dense.'"):
            silent("timm:test_vit", tmp_path, dry=True)
    boxes_module.coco_tools.cache_clear()
    for one, other in zip(mine, theirs, strict=True):
        assert 0 < one.ap < 1 and one.by_class == pytest.approx(other.by_class)
        assert (one.ap, one.ap50, one.ap75) == pytest.approx((other.ap, other.ap50, other.ap75))


def test_average_precision_by_hand(tmp_path):
    truth = opened(voc(tmp_path))[1]
    none = Predicted(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert average_precision(truth, [none] * 4).ap == 0
    exact = [Predicted(one.boxes, torch.ones(len(one)), one.labels) for one in truth.objects]
    assert average_precision(truth, exact).ap == 1
    # One of the two red squares is found, at rank 1: the precision is 1 at 51 of the 101 recalls.
    scores = average_precision(truth, [none, *exact[1:]])
    assert scores.by_class == pytest.approx({"blue": 1.0, "red": 51 / 101}) and scores.ap50 == scores.ap
    # It is difficult: nothing is missed.
    difficult = replace(truth.objects[0], difficult=torch.tensor([True]))
    assert average_precision(replace(truth, objects=[difficult, *truth.objects[1:]]), [none, *exact[1:]]).ap == 1


LEARN = ("lr=3e-3", "epochs=36", "milestones=[0.8]", "warmup_steps=2")


def test_faster_rcnn_learns_a_few_images(tmp_path):
    norms = ("norm=batch", "precise_bn=1")
    lines = silent("timm:test_resnet", voc(tmp_path), *TRAIN, *LEARN, *norms, out=tmp_path / "out")
    assert [line["metric"] for line in lines] == ["AP", "AP50", "AP75"] and lines[1]["value"] > 0.9
    assert lines[0]["by_class"].keys() == {"blue", "red"} and lines[0]["scored_by"].startswith("faster-coco-eval")
    drawn = {file.name for file in (tmp_path / "out" / "figures").iterdir()}
    assert drawn == {"detection_boxes.png", "detection_precision.png"} and not (tmp_path / "out" / "evals").exists()


def test_mask_rcnn_learns_a_few_images(tmp_path):
    lines = silent("timm:test_vit", coco(tmp_path), *TRAIN, *LEARN, "keep=true", out=tmp_path / "out")
    found = {line["metric"]: line["value"] for line in lines}
    assert found.keys() == {"AP", "AP50", "AP75", "mask_AP", "mask_AP50", "mask_AP75"}
    assert found["AP50"] > 0.9 and found["mask_AP50"] > 0.9
    kept = torch.load(tmp_path / "out" / "evals" / "detector.pt", weights_only=True)
    assert kept["classes"] == ["blue", "red"] and kept["settings"]["epochs"] == 36
    assert (tmp_path / "out" / "figures" / "detection_mask_precision.png").exists()


def test_a_killed_training_goes_on(tmp_path, monkeypatch):
    voc(tmp_path)
    more = ("batch_size=2", "epochs=2", "lr=1e-3", "warmup_steps=1", "figures=false", "jitter=[0.6,1.6]", "keep=true")
    more += ("norm=batch", "precise_bn=2")
    whole = silent("timm:test_resnet", tmp_path, *more, out=tmp_path / "whole")
    kept = unfinished.save

    def killed(path, state):
        kept(path, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY", 0.0)
        patch.setattr(unfinished, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            silent("timm:test_resnet", tmp_path, *more, out=tmp_path / "parts")
    (saved,) = (tmp_path / "parts" / "evals").glob("detection_*.pt")
    assert torch.load(saved, weights_only=True)["epoch"] == 1
    # And again, when it is trained and not yet scored.
    with monkeypatch.context() as patch:
        patch.setattr(detection, "find", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            silent("timm:test_resnet", tmp_path, *more, out=tmp_path / "parts")
    assert torch.load(saved, weights_only=True)["epoch"] == 2
    parts = silent("timm:test_resnet", tmp_path, *more, out=tmp_path / "parts")
    assert [line["value"] for line in parts] == [line["value"] for line in whole] and not saved.exists()
    one, other = (
        torch.load(tmp_path / name / "evals" / "detector.pt", weights_only=True)["model"] for name in ("whole", "parts")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    # What is finished is not trained again, and another seed joins it.
    both = silent("timm:test_resnet", tmp_path, *more, "seeds=[0,1]", out=tmp_path / "parts")
    assert len(both) == 9 and both[:3] == parts
    assert both[6]["settings"]["seed"] == [0, 1] and both[6]["spread_of"] == "2 seeds"


def test_a_resnet_without_a_pyramid(tmp_path):
    said = []
    more = ("form=infomin", "neck=c4", "size=[48,96]", "epochs=1", "micro_batch=2", "masks=true", "figures=false")
    root = coco(tmp_path, lambda split, data: data["annotations"].pop())  # The last image has no box.
    arguments = (f"path={root}", *QUICK, *more, "encode_batch=3")
    lines = evaluate("detection", "timm:test_resnet", *arguments, out=tmp_path / "out", say=said.append)
    assert len(lines) == 6 and all(0 <= line["value"] <= 1 for line in lines)
    settings = lines[0]["settings"]
    assert settings["norm"] == "batch" and settings["lr"] == 0.02 and settings["size"] == [48, 96]
    assert any("batch norms are over 2 images" in line for line in said)
    with pytest.raises(UserError, match="neck=c4: only a ResNet"):
        silent("timm:test_vit", tmp_path, "neck=c4", dry=True)


def test_a_dry_run_writes_nothing(tmp_path):
    root = coco(tmp_path / "images")
    lines = silent("timm:test_vit", root, "precision=bf16", "freeze=all", out=tmp_path / "out", dry=True)
    assert {line["metric"] for line in lines} >= {"AP", "AP50", "AP75"} and not (tmp_path / "out").exists()


def test_settings_that_do_not_fit_are_refused(tmp_path):
    voc(tmp_path)
    for arguments, message in (
        (("jitter=[2.0,1.0]",), "jitter: expected low <= high"),
        (("size=[96,48]",), "size: expected the short side first"),
        (("freeze=99",), "freeze: timm:test_vit has"),
        (("annotations=[a.json]",), "annotations: expected two"),
    ):
        with pytest.raises(UserError, match=message):
            silent("timm:test_vit", tmp_path, *arguments, dry=True)
    with pytest.raises(ConfigError, match="path: required"):
        evaluate("detection", "timm:test_vit", dry=True)


def test_frozen_parts_do_not_move():
    with torch.random.fork_rng():
        subject = Subject("timm:test_resnet", origin("timm:test_resnet"))
        for norm, freeze in (("frozen", 2), ("batch", 2), ("batch", "all")):
            model = build(subject, Design(width=8, head="2fc", norm=norm, freeze=freeze), 64, 2, masks=False).train()
            before = {name: value.clone() for name, value in model.backbone.maps.state_dict().items()}
            target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
            parameters = [p for group in groups(model, 0.1, 0.7) for p in group["params"] if p.requires_grad]
            sum(model([torch.rand(3, 64, 64)], [target]).values()).backward()
            torch.optim.SGD(parameters, lr=1.0).step()
            after = model.backbone.maps.state_dict()
            moved = {name for name in before if not torch.equal(before[name], after[name])}
            still = ("encoder.conv1", "encoder.bn1", "encoder.layer1") if freeze == 2 else ("encoder",)
            assert not [name for name in moved if name.startswith(still)]
            assert freeze == "all" or any(name.startswith("encoder.layer2") for name in moved)
            assert any("running_mean" in name for name in moved) == (norm == "batch" and freeze == 2)


def test_boxes_follow_their_image(tmp_path):
    """Where the augmentation puts a square, its box and its mask are."""
    train = opened(coco(tmp_path))[0]
    subject = Subject("timm:test_vit", origin("timm:test_vit"))
    course = Course(epochs=1, batch_size=1, size=64, jitter=(0.5, 2.0))
    views = Views(SimpleNamespace(subject=subject), course, train, seed=0)
    shapes = set()
    for epoch in range(12):
        image, target = views[epoch, 0]
        shapes.add(tuple(image.shape))
        red = image[0] - image[1] > 2.5  # Grey is neither; values are normalised.
        if red.any():
            rows, columns = red.any(dim=1).nonzero()[:, 0], red.any(dim=0).nonzero()[:, 0]
            expected = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert target["boxes"][0].tolist() == pytest.approx([float(x) for x in expected], abs=1.5)
            assert (target["masks"][0].bool() != red).float().mean() < 0.04
    assert len(shapes) > 3 and max(max(shape) for shape in shapes) == 64
