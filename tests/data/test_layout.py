"""Which images are held out and which labels they have, as far as names and tables tell."""

import re

import pytest

from ssl_ib.data.sources.layout import arrange, common_top


def label_names(layout, split) -> dict[str, str | None]:
    names = [*layout.classes, None]
    return {name: names[label] for name, label in zip(split.names, split.labels.tolist(), strict=True)}


def test_arrange_splits_and_first_level_classes() -> None:
    names = ["train/a/1.png", "train/b/x/y/2.png", "train/loose.png", "val/b/3.png", "val/c/4.png", "docs/5.png"]
    layout = arrange(names, labels="folders")
    assert layout.classes == ["a", "b", "c"]
    assert label_names(layout, layout.train) == {
        "train/a/1.png": "a",
        "train/b/x/y/2.png": "b",
        "train/loose.png": None,
    }
    assert label_names(layout, layout.val) == {"val/b/3.png": "b", "val/c/4.png": "c"}


def test_arrange_takes_the_first_held_out_folder_with_classes() -> None:
    train = [f"train/{c}/{i}.png" for c in "ab" for i in range(5)]
    assert arrange([*train, "test/a/9.png"]).val.names == ["test/a/9.png"]
    assert arrange([*train, "val/a/8.png", "test/a/9.png"]).val.names == ["val/a/8.png"]
    assert arrange([*train, "val/8.png", "test/a/9.png"]).val.names == ["test/a/9.png"]
    # The validation images of Tiny ImageNet.
    unlabelled = arrange([*train, "val/images/8.png"], val_fraction=0.2)
    assert len(unlabelled.val.names) == 2 and set(unlabelled.train.names + unlabelled.val.names) == set(train)
    assert unlabelled.notes == ["val/ is left aside: its images belong to none of the classes"]


def test_arrange_a_class_may_be_named_train() -> None:
    layout = arrange(["bus/1.png", "car/2.png", "train/3.png"], val_fraction=0)
    assert layout.classes == ["bus", "car", "train"] and layout.train.labels.tolist() == [0, 1, 2]


def test_arrange_a_lone_train_folder_is_the_split() -> None:
    assert arrange(["train/a/1.png", "train/b/2.png"], val_fraction=0).classes == ["a", "b"]


@pytest.mark.parametrize(("fraction", "held_out"), [(0.0, 0), (0.1, 4), (0.5, 20), (0.99, 39)])
def test_arrange_holds_out_a_stratified_share(fraction: float, held_out: int) -> None:
    names = sorted(f"{c}/{i:02}.png" for c in "abcd" for i in range(10))
    layout = arrange(names, val_fraction=fraction)
    if not held_out:
        assert layout.val is None and layout.train.names == names
        return
    assert len(layout.val.names) == held_out
    assert sorted(layout.train.names + layout.val.names) == names
    assert layout.val.labels.bincount(minlength=4).float().std() <= 0.5


@pytest.mark.parametrize(
    "folders",
    [
        ("train/a", "train/b", "val/a", "val/b"),
        ("train/a", "train/b", "test/a"),
        ("Training/a", "Training/b", "Testing/b"),
        ("train2017/a", "train2017/b", "val2017/b"),
        ("train/images/a", "train/images/b", "val/images/b"),
        ("train/a/images", "train/b/images", "val/images"),
        ("a", "b"),
        ("bus", "car", "train"),
    ],
)
@pytest.mark.parametrize("labels", ["auto", "folders"])
def test_folders_of_classes(folders: tuple[str, ...], labels: str) -> None:
    layout = arrange(sorted(f"{folder}/{i}.png" for folder in folders for i in range(4)), labels=labels)
    assert len(layout.classes) == len([f for f in folders if "/" not in f or f.lower().startswith("train")])
    assert bool((layout.train.labels >= 0).all()) and not any("source.labels" in note for note in layout.notes)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["1.png", "2.png"], "all training images lie in one folder"),
        (["cat/1.png", "cat/2.png"], "all training images lie in one folder"),
        (["train/images/1.png", "val/images/2.png"], "all training images lie in one folder"),
        (["train_images/1.png", "test_images/2.png"], "all training images lie in one folder"),
        (["siteA/2024/1.png", "siteB/2023/2.png"], "siteA, siteB hold no images but further folders"),
        (["2023/1.png", "2024/2.png"], "2023, 2024 are named like dates"),
        (["cat/1.png", "dog/far/below/2.png"], r"different depths \(cat/1.png, dog/far/below/2.png\)"),
        (["cat/1.png", "dog/2.png", "3.png"], r"different depths \(3.png, cat/1.png\)"),
        (["val/1.png", "test/2.png"], "test, val are not named like classes"),
        (["cats/1.png", "unlabeled/2.png"], "cats, unlabeled are not named like classes"),
        (["images/1.png", "masks/a.png"], "not named like classes .*point source.path at images to leave masks out"),
    ],
)
def test_folders_that_are_no_classes(names: list[str], why: str) -> None:
    layout = arrange(sorted(names), common_top(names))
    assert layout.classes == [] and bool((layout.train.labels == -1).all())
    (note,) = layout.notes
    assert re.search(why, note) and "source.labels=" in note


def test_labels_none() -> None:
    names = [f"train/{c}/{i}.png" for c in "ab" for i in range(5)] + ["val/a/1.png"]
    layout = arrange(names, labels="none")
    assert layout.classes == [] and layout.train.names == names[:-1] and layout.val.names == names[-1:]


def test_images_without_labels_are_held_out_evenly() -> None:
    layout = arrange([f"{i:02}.png" for i in range(40)])
    assert layout.val.names == ["05.png", "15.png", "25.png", "35.png"] and len(layout.train.names) == 36
    assert set(layout.val.labels.tolist()) == {-1}


def test_masks_of_images_are_left_out() -> None:
    for images, masks in (("images", "labels"), ("JPEGImages", "SegmentationClass"), ("train_images", "train_masks")):
        names = [f"{images}/1.jpg", f"{images}/2.jpg", f"{masks}/1.png"]
        assert arrange(names, val_fraction=0).train.names == names[:2]
        assert arrange(names, val_fraction=0).notes[1].startswith(f"1 masks of other images are left out ({masks}/)")
        assert arrange(names, val_fraction=0, labels="none").train.names == names
        assert arrange(names, val_fraction=0, labels="folders").train.names == names
    # Not where one of them is no mask of an image.
    names = ["images/1.jpg", "masks/1.png", "masks/3.png"]
    assert arrange(names, val_fraction=0).train.names == names


def test_a_table_stands_in_place_of_the_folders() -> None:
    names = [f"{c}/{i}.png" for c in "ab" for i in range(10)]
    table = {name: f"even {int(name[2]) % 2 == 0}" for name in names[:16]}
    layout = arrange(names, val_fraction=0.25, labels="t.csv", table=table)
    assert layout.classes == ["even False", "even True"]
    assert layout.val.labels.tolist().count(0) == layout.val.labels.tolist().count(1) == 2
    assert (layout.train.labels == -1).sum() == 4 and len(layout.train.names) == 16
    assert set(names[16:]) <= set(layout.train.names)


def test_one_class_is_said_to_be_one() -> None:
    layout = arrange(["1.png", "2.png"], labels="t.csv", table={"1.png": "cat"})
    assert layout.notes == ["one class alone gives no accuracy"]
