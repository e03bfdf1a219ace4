"""Label spaces, joined data sets and mixtures: what is known, what is not, and what is wrong."""

import numpy as np
import pytest
import torch

from effseg import InputError
from effseg.data import files
from effseg.data.dataset import PhotoDataset
from effseg.data.joined import Joined, Mapped
from effseg.data.label_space import LabelSpace
from effseg.data.mixture import Mixture, check_weights
from effseg.data.mixture_datamodule import MixtureDataModule, MixturePart, ShapesMixtureDataModule
from effseg.data.classes import Classes
from effseg.data.sample import Sample
from effseg.data.transforms import train_transform

VOC = Classes.from_card("voc2012")
COCO = Classes.from_card("coco2017")


class Made(PhotoDataset):
    """Photos that exist in memory only."""

    def __init__(self, names, classes, tasks, labels=(), values=(0,), size=(40, 60)):
        super().__init__(classes, None, f"made of {', '.join(names)}")
        self.names, self.tasks, self.labels, self.values = names, tasks, labels, values
        self.size = size

    @property
    def ids(self):
        return self.names

    def __len__(self):
        return len(self.names)

    def read(self, index):
        pixels = torch.full((3, *self.size), 10 * index, dtype=torch.uint8)
        sample = Sample(id=self.names[index], image=pixels)
        if "segmentation" in self.tasks:
            mask = torch.tensor(self.values, dtype=torch.uint8)
            sample["mask"] = mask.repeat_interleave(10)[: self.size[0]][:, None].repeat(1, 60)
        if "detection" in self.tasks:
            count = len(self.labels)
            sample["boxes"] = torch.tensor([[5.0, 5, 25, 30]]).repeat(count, 1)
            sample["labels"] = torch.tensor(self.labels, dtype=torch.int64)
            sample["crowd"] = torch.zeros(count, dtype=torch.bool)
        return sample


def masks(*names, classes=VOC, values=(0, 1, 20, 255)):
    return Made(list(names), classes, ("segmentation",), values=values)


def boxes(*names, classes=VOC, labels=(0, 19)):
    return Made(list(names), classes, ("detection",), labels=labels)


def test_voc_and_coco_agree_on_names():
    space = LabelSpace.load("voc")
    found = space.map(COCO, "coco")
    assert found.known.all()
    plane, couch = COCO.names.index("airplane") - 1, COCO.names.index("couch") - 1
    assert found.boxes[plane] == VOC.names.index("aeroplane") - 1
    assert found.boxes[couch] == VOC.names.index("sofa") - 1
    assert found.boxes[COCO.names.index("zebra") - 1] == -1
    assert (found.boxes >= 0).sum() == 20
    assert found.masks[COCO.names.index("zebra")] == 0, "no VOC class for certain"
    assert found.masks[0] == 0 and found.masks[255] == 255 and found.masks[200] == 255


@pytest.mark.parametrize(("background", "expected"), [("ignore", 255), ("keep", 0)])
def test_background_of_a_data_set_that_lacks_classes(background, expected):
    found = LabelSpace.load("coco80").map(VOC, "voc", background)
    assert found.known.sum() == 20
    assert found.masks[0] == expected
    assert found.masks[VOC.names.index("sofa")] == COCO.names.index("couch")


def test_boxes_outside_the_space_go_and_the_known_classes_stay():
    space = LabelSpace.load("voc")
    zebra, dog = COCO.names.index("zebra") - 1, COCO.names.index("dog") - 1
    sample = Mapped(boxes("a", classes=COCO, labels=(zebra, dog, zebra)), space)[0]
    assert sample["labels"].tolist() == [VOC.names.index("dog") - 1]
    assert len(sample["boxes"]) == len(sample["crowd"]) == 1
    few = Mapped(boxes("a"), LabelSpace.load("coco80"))[0]
    assert int(few["known"].sum()) == 20 and few["known"][COCO.names.index("dog") - 1]


def test_users_space_merges_classes(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(
        "classes:\n- {name: vehicle, from: [car, bus], colour: [1, 2, 3]}\n- {name: dog}\n"
    )
    space = LabelSpace.load(str(path))
    assert space.classes.names == ("background", "vehicle", "dog")
    assert space.classes.palette[1] == (1, 2, 3)
    found = space.map(VOC, "voc")
    assert found.boxes[VOC.names.index("bus") - 1] == found.boxes[VOC.names.index("car") - 1] == 0
    space.check_used([VOC])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "classes:\n- {name: a, from: [car]}\n- {name: b, from: [bus, car]}",
            "'car' in both a and b",
        ),
        ("classes:\n- {name: a, from: car}\n- {name: a, from: bus}", "'a' in both"),
        ("classes:\n- {name: a, of: car}", "expected {name, from, colour}"),
        ("classes:\n- {from: car}", "no name"),
        ("classes: []", "key classes"),
        ("names: [a]", "key classes"),
        ("classes:\n- {name: a, colour: [1, 2]}", "colour"),
    ],
)
def test_bad_spaces_are_named(tmp_path, text, words):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        LabelSpace.load(str(path))


def test_a_class_that_does_not_exist_is_named(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("classes:\n- {name: dog}\n- {name: horse, from: [horse, unicorn]}\n")
    with pytest.raises(InputError, match="'unicorn'"):
        LabelSpace.load(str(path)).check_used([VOC])
    with pytest.raises(InputError, match="nosuch"):
        LabelSpace.load("nosuch")
    with pytest.raises(InputError, match=r"missing\.yaml"):
        LabelSpace.load(str(tmp_path / "missing.yaml"))
    with pytest.raises(InputError, match="none of its classes"):
        LabelSpace.load("voc").map(Classes.from_names(["background", "unicorn"]), "mine")


def joined(*datasets):
    return Joined([Mapped(d, LabelSpace.load("voc")) for d in datasets])


def test_joined_photos_have_the_labels_of_all():
    data = joined(masks("a", "b"), boxes("b", "c"))
    assert data.ids == ["a", "b", "c"]
    assert data.tasks == ("segmentation", "detection")
    assert data.photos_for("segmentation").tolist() == [0, 1]
    assert data.photos_for("detection").tolist() == [1, 2]
    assert "boxes" not in data[0] and "mask" not in data[2]
    assert {"mask", "boxes", "labels", "known"} <= data[1].keys()


def test_one_kind_of_label_twice_or_another_size_is_refused():
    with pytest.raises(InputError, match="same kind of label for photo b"):
        joined(masks("a", "b"), masks("b"))
    other = Made(["a"], VOC, ("detection",), labels=(1,), size=(40, 50))
    with pytest.raises(InputError, match="another size"):
        joined(masks("a"), other)[0]


def test_mixture_fills_in_what_is_not_there():
    mixture = Mixture(
        {"voc": joined(masks("a", "b"), boxes("b", "c")), "more": joined(boxes("d"))},
        train_transform(32),
    )
    assert len(mixture) == 4 and list(mixture.ids) == ["a", "b", "c", "d"]
    samples = [mixture[i] for i in range(4)]
    assert [bool(s["has_mask"]) for s in samples] == [True, True, False, False]
    assert [bool(s["has_boxes"]) for s in samples] == [False, True, True, True]
    assert [int(s["source"]) for s in samples] == [0, 0, 0, 1]
    assert (samples[3]["mask"] == 255).all() and samples[3]["mask"].shape == (32, 32)
    assert samples[0]["boxes"].shape == (0, 4) and not samples[0]["known"].any()
    assert samples[1]["known"].all()
    masks_part, boxes_part = (part.photos for part in mixture.stream("photos"))
    assert masks_part["segmentation"].tolist() == [0, 1]
    assert masks_part["detection"].tolist() == [1, 2]
    assert boxes_part["detection"].tolist() == [3] and "segmentation" not in boxes_part


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("photos", [30, 10]),
        ("equal", [20, 20]),
        (2.0, [40 * 3**0.5 / (3**0.5 + 1), 40 / (3**0.5 + 1)]),
        ({"a": 1.0, "b": 3.0}, [10, 30]),
    ],
)
def test_weights_reach_the_batches(weights, expected):
    names = [f"p{i}" for i in range(30)]
    mixture = Mixture(
        {"a": joined(boxes(*names)), "b": joined(boxes(*(f"q{i}" for i in range(10))))}
    )
    from effseg.data.sampling import StreamSampler
    from effseg.data.schedule import Schedule, Stage

    schedule = Schedule((Stage(["detection"]),))
    sampler = StreamSampler(mixture.stream(weights), schedule, steps=10, batch_size=4, seed=0)
    drawn = np.bincount(sampler.indices(0) >= 30, minlength=2)
    assert drawn == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"a": 0.0, "b": 0.0}, "sum above 0"),
        ({"a": -1.0, "b": 2.0}, "none negative"),
        ({"a": 1.0}, "one for each of a, b"),
        ({"a": 1.0, "c": 1.0}, "one for each of a, b"),
        (0.0, "temperature above 0"),
        ("size", "expected photos"),
    ],
)
def test_bad_weights_are_named(weights, words):
    with pytest.raises(InputError, match=words):
        check_weights(weights, ["a", "b"])


def test_module_of_several_sets(tmp_path):
    parts = {
        "masks": MixturePart([lambda root: masks("a", "b", "c", "d")], [lambda root: masks("x")]),
        "boxes": MixturePart([lambda root: boxes("e", "f", "g", "h")]),
    }
    module = MixtureDataModule(parts, batch_size=4, crop_size=32, num_workers=0, seed=0)
    module.setup("fit")
    assert module.num_classes == 21
    batches = list(module.train_dataloader())
    assert len(batches) == 2
    for batch in batches:
        assert batch["has_mask"].tolist().count(True) == 2, "half of every batch"
        assert batch["mask"].shape == (4, 32, 32) and batch["known"].shape == (4, 20)
    (evaluated,) = module.val_dataloader()
    assert evaluated["id"] == ["x"] and not evaluated["has_boxes"][0]
    steps = MixtureDataModule(parts, batch_size=4, crop_size=32, num_workers=0, steps=7)
    assert len(steps.train_dataloader()) == 7
    with pytest.raises(InputError, match="steps=0"):
        MixtureDataModule(parts, steps=0)
    with pytest.raises(InputError, match="a part"):
        MixtureDataModule({"a part": MixturePart()})


def test_a_photo_or_part_that_is_missing_is_named():
    with pytest.raises(InputError, match="no data set"):
        module = MixtureDataModule({"empty": MixturePart()}, num_workers=0)
        module.setup("fit")


def test_miniature_has_masks_on_one_half_and_boxes_on_the_other(tmp_path):
    module = ShapesMixtureDataModule(
        str(tmp_path / "s"), train=8, val=3, size=(64, 80), batch_size=4, num_workers=0
    )
    module.prepare_data()
    module.setup("fit")
    masks_ids = set(module.train_set.parts["masks"].ids)
    boxes_ids = set(module.train_set.parts["boxes"].ids)
    assert len(masks_ids) == len(boxes_ids) == 4 and not masks_ids & boxes_ids
    (batch,) = module.val_dataloader()
    assert all(batch["has_mask"]) and all(batch["has_boxes"])


def test_a_photo_with_two_kinds_of_labels_is_decoded_once(tmp_path, monkeypatch):
    module = ShapesMixtureDataModule(str(tmp_path / "s"), train=2, val=2, size=(64, 80))
    module.prepare_data()
    module.setup("fit")
    part = module.val_set.parts["both"]
    assert len(part.datasets) == 2
    opened = []
    real = files._open
    monkeypatch.setattr(files, "_open", lambda path, kind: opened.append(kind) or real(path, kind))
    for number in (1, 2):  # nothing is kept from one sample to the next
        sample = part.read(0)
        assert opened.count("photo") == number
        assert {"image", "mask", "boxes"} <= sample.keys()
    for dataset in part.datasets:
        assert torch.equal(dataset.read(0)["image"], sample["image"])
    assert opened.count("photo") == 4
