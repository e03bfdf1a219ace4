"""Sources as one dataset: one label space, every sample complete, and train apart from val."""

import shutil

import numpy as np
import pytest
import torch

from effseg import InputError
from effseg.data import COCO, VOC, Folder, LabelSpace, Shapes, Source
from effseg.data.augment import Augmentation
from effseg.data.classes import Classes
from effseg.data.dataset import Dataset
from effseg.data.sample import Sample, collate_eval, collate_train
from effseg.data.sampling import Draw, Schedule, Stage, StreamSampler

MASKS, BOXES = "segmentation", "detection"
VOC21 = Classes.from_card("voc2012")
COCO80 = Classes.from_card("coco2017")


class Made(Source):
    """Images that exist in memory only."""

    def __init__(self, ids, tasks, classes=VOC21, labels=(), values=(0,), card=None):
        self._ids, self._tasks, self._classes = list(ids), tasks, classes
        self.objects, self.values, self.card = labels, values, card

    tasks = property(lambda self: self._tasks)
    classes = property(lambda self: self._classes)
    ids = property(lambda self: self._ids)

    def has(self, task):
        return np.full(len(self._ids), task in self.tasks)

    def image_path(self, index):
        from pathlib import Path

        return Path("/made") / str(id(self)) / self._ids[index]

    def image(self, index):
        return torch.full((3, 40, 60), 10 * index, dtype=torch.uint8)

    def read_labels(self, index):
        actual = Sample()
        if "segmentation" in self.tasks:
            mask = torch.tensor(self.values, dtype=torch.uint8)
            rows = mask.repeat_interleave(40 // len(mask))
            actual["mask"] = rows[:, None].repeat(1, 60)
        if "detection" in self.tasks:
            count = len(self.objects)
            actual["boxes"] = torch.tensor([[5.0, 5, 25, 30]]).repeat(count, 1)
            actual["labels"] = torch.tensor(self.objects, dtype=torch.int64)
            actual["crowd"] = torch.arange(count) == 1
        return actual


def masks(*names, values=(0, 1, 20, 255), **settings):
    return Made(names, ("segmentation",), values=values, **settings)


def boxes(*names, labels=(0, 19), **settings):
    return Made(names, ("detection",), labels=labels, **settings)


def test_all_samples_have_the_same_keys_and_say_what_is_real():
    data = Dataset({"a": masks("m"), "b": [boxes("n"), boxes("o", labels=())]})
    assert len(data) == 3
    samples = [data[i] for i in range(3)]
    assert [s["id"] for s in samples] == ["m", "n", "o"]
    assert [s["source"] for s in samples] == ["a", "b", "b"]
    assert [s["number"] for s in samples] == [0, 1, 1]
    assert [s["real"] for s in samples] == [("segmentation",), ("detection",), ("detection",)]
    assert len({frozenset(s) for s in samples}) == 1
    assert (samples[1]["mask"] == 255).all() and samples[1]["mask"].shape == (40, 60)
    assert samples[0]["boxes"].shape == (0, 4) and not samples[0]["known"].any()
    assert samples[2]["known"].all(), "an image without objects has none, for sure"
    assert samples[1]["area"].tolist() == [500, 500]
    batch = collate_eval(samples)
    assert batch["rows"]["detection"].tolist() == [1, 2] and batch["source"] == ["a", "b", "b"]
    with pytest.raises(IndexError):
        data[3]


def test_training_samples_are_crops_that_know_their_step():
    data = Dataset({"a": masks("m"), "b": boxes("n")}, augment=Augmentation(32))
    draws = [Draw(0, 5, ("detection",), 2), Draw(1, 6, ("detection",), 2)]
    batch = collate_train([data[draw] for draw in draws])
    assert batch["image"].shape == (2, 3, 32, 32) and batch["mask"].shape == (2, 32, 32)
    assert (batch["mask"][1] == 255).all()
    assert batch["tasks"] == ("detection",) and batch["freeze"] == 2
    assert batch["source"].tolist() == [0, 1]
    assert batch["labels"].shape[1] <= 1, "one of the two boxes is a crowd"
    assert data[1]["tasks"] == ("segmentation", "detection")


class Half(Made):
    """The first and last images have masks, those between them boxes; one cannot be read."""

    broken = 0

    def has(self, task):
        ends = np.isin(np.arange(len(self)), (0, len(self) - 1))
        return ends if task == "segmentation" else ~ends

    def image(self, index):
        if index == self.broken:
            raise InputError(f"{index}: broken")
        return super().image(index)

    def read_labels(self, index):
        key = "mask" if self.has("segmentation")[index] else "boxes"
        labels = super().read_labels(index)
        return Sample({k: v for k, v in labels.items() if (k == "mask") == (key == "mask")})


def test_an_unreadable_image_is_replaced_by_one_with_labels_for_the_step():
    source = Half("abcd", ("segmentation", "detection"), labels=(0,))
    data = Dataset({"a": source}, augment=Augmentation(32), skip_unreadable=True)
    for source.broken, task, instead in ((0, MASKS, "d"), (3, MASKS, "a"), (2, BOXES, "b")):
        sample = data[Draw(source.broken, 0, (task,))]
        assert (sample["id"], sample["real"]) == (instead, (task,))
        assert sample["skipped"] == [f"{source.broken}: broken"]
    only = Dataset({"a": Half("a", (MASKS,))}, augment=Augmentation(32), skip_unreadable=True)
    with pytest.raises(InputError, match="0: broken; and 0 images after it"):
        only[Draw(0, 0, (MASKS,))]


def test_labels_are_brought_to_the_space():
    zebra, dog = COCO80.names.index("zebra") - 1, COCO80.names.index("dog") - 1
    source = Made(
        ["a"],
        ("segmentation", "detection"),
        COCO80,
        labels=(zebra, dog, zebra),
        values=(0, zebra + 1, dog + 1, 255),
    )
    sample = Dataset({"coco": source}, LabelSpace.load("voc"))[0]
    assert sample["labels"].tolist() == [VOC21.names.index("dog") - 1]
    assert len(sample["boxes"]) == len(sample["crowd"]) == 1
    assert sample["mask"][::10, 0].tolist() == [0, 0, VOC21.names.index("dog"), 255]
    few = Dataset({"voc": boxes("a")}, LabelSpace.load("coco80"))[0]
    assert int(few["known"].sum()) == 20 and few["known"][dog]
    lacking = Dataset({"voc": masks("a")}, LabelSpace.load("coco80"))[0]
    assert lacking["mask"][0, 0] == 255, "VOC's background may be a zebra"
    kept = Dataset({"voc": masks("a")}, LabelSpace.load("coco80"), background="keep")[0]
    assert kept["mask"][0, 0] == 0


def test_sources_that_disagree_need_a_space():
    with pytest.raises(InputError, match=r"voc \(masks\) has 21 .* coco \(boxes\) 81.*space"):
        Dataset({"voc": masks("a"), "coco": boxes("b", classes=COCO80)})
    with pytest.raises(InputError, match="none of its classes"):
        unicorn = Classes.from_names(["background", "unicorn"])
        Dataset({"voc": masks("a", classes=unicorn)}, LabelSpace.load("voc"))


def test_no_source_or_image_is_named():
    with pytest.raises(InputError, match="no source"):
        Dataset({})
    with pytest.raises(InputError, match="empty: no images"):
        Dataset({"empty": masks()})


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("images", [30, 10]),
        ("equal", [20, 20]),
        (2.0, [40 * 3**0.5 / (3**0.5 + 1), 40 / (3**0.5 + 1)]),
        ({"a": 1.0, "b": 3.0}, [10, 30]),
    ],
)
def test_weights_reach_the_batches(weights, expected):
    first = [boxes(*(f"p{i}" for i in range(20))), boxes(*(f"o{i}" for i in range(10)))]
    data = Dataset({"a": first, "b": boxes(*(f"q{i}" for i in range(10)))})
    schedule = Schedule((Stage(["detection"]),))
    sampler = StreamSampler(data.parts(weights), schedule, steps=10, batch_size=4, seed=0)
    drawn = np.bincount(sampler.indices(0) >= 30, minlength=2)
    assert drawn == pytest.approx(expected, abs=1)


def test_parts_are_the_images_with_labels(tmp_path, voc):
    data = Dataset({"voc": VOC(voc.root, masks="train", boxes="val"), "more": boxes("d")})
    first, second = (part.images for part in data.parts("images"))
    assert first["segmentation"].tolist() == [0, 1, 2, 3]
    assert first["detection"].tolist() == [4, 5, 6, 7]
    assert second["detection"].tolist() == [8] and "segmentation" not in second


# Train and val must not share images


def naive(voc):
    train = Dataset({"voc": VOC(voc.root, masks="train_aug", boxes="train")})
    return train, Dataset({"voc": VOC(voc.root, masks="val", boxes="val")})


def test_vocs_naive_joint_recipe_is_refused_and_ours_accepted(voc):
    """In full VOC 2012 images of train_aug lie in the boxes' val, as c0 and c1 do here."""
    train, val = naive(voc)
    with pytest.raises(InputError, match=r"train\.voc and val\.voc share 2 of 4 images.*c0") as e:
        train.check_apart(val)
    assert "allow_overlap" in str(e.value) and "\n" not in str(e.value)
    ours = Dataset({"voc": VOC(voc.root, masks="train_aug", boxes="train_aug")})
    ours.check_apart(Dataset({"voc": VOC(voc.root, masks="val", boxes="seg_val")}))
    with pytest.raises(InputError, match="share 2 of 2 images, the first is b0"):
        Dataset({"voc": VOC(voc.root, masks="trainval", boxes=None)}).check_apart(
            Dataset({"voc": VOC(voc.root, masks="val", boxes=None)})
        )


def test_one_id_under_one_card_is_one_image_wherever_it_lies(voc, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(voc.root, copy)
    train = Dataset({"a": VOC(voc.root, masks="trainval", boxes=None)})
    val = Dataset({"b": VOC(copy, masks="val", boxes=None)})
    with pytest.raises(InputError, match=r"train\.a and val\.b share 2 of 2"):
        train.check_apart(val)


def test_one_file_is_one_image_whatever_it_is_called(tmp_path, files):
    names = ["background", "road"]
    for split in ("train", "val"):
        files.image(tmp_path / f"images/{split}/{split}.png", (20, 30))
        for name in (split, "link"):
            files.mask(tmp_path / f"masks/{split}/{name}.png", np.zeros((20, 30)))
    (tmp_path / "images/val/link.png").symlink_to(tmp_path / "images/train/train.png")
    files.image(tmp_path / "images/train/link.png", (20, 30))
    train = Dataset({"mine": Folder(tmp_path, names, "train")})
    val = Dataset({"mine": Folder(tmp_path, names, "val")})
    with pytest.raises(InputError, match="share 1 of 2 images, the first is link"):
        train.check_apart(val)
    (tmp_path / "images/val/link.png").unlink()
    files.image(tmp_path / "images/val/link.png", (20, 30))
    train.check_apart(Dataset({"mine": Folder(tmp_path, names, "val")}))


def test_own_files_may_number_their_images_from_1_again():
    ids = ("1", "2")
    Dataset({"a": boxes(*ids)}).check_apart(Dataset({"a": boxes(*ids)}))
    with pytest.raises(InputError, match="share 2"):
        Dataset({"a": boxes(*ids, card="coco2017")}).check_apart(
            Dataset({"a": boxes(*ids, card="coco2017")})
        )


def test_missing_files_show_when_the_set_is_made(voc):
    voc.mask("a1").unlink()
    with pytest.raises(InputError, match=r"a1\.png: mask not found"):
        Dataset({"voc": VOC(voc.root, masks="train", boxes=None)})


def test_an_image_is_decoded_once(tmp_path, monkeypatch):
    from effseg.data.sources import source

    shapes = Shapes(tmp_path / "s", train=2, val=2, size=(64, 80))
    shapes.prepare()
    data, opened = Dataset({"s": shapes}), []
    monkeypatch.setattr(source, "image_size", lambda path: pytest.fail("the size is known"))
    real = source.read_image
    monkeypatch.setattr(source, "read_image", lambda path: opened.append(path) or real(path))
    assert {"mask", "boxes"} <= data[0].keys()
    assert len(opened) == 1
    assert COCO().invalid == "drop"
