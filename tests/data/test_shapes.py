import hashlib
import time

import numpy as np
import pytest
import torch
from PIL import Image

from effseg.data.check import check
from effseg.data.drawing import draw_photo
from effseg.data.classes import Classes, voc_colour
from effseg.data.shapes import ShapesSegmentation, default_folder, write_shapes
from effseg.errors import InputError

NAMES = Classes.from_card("shapes").names


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("drawn") / "shapes", train=40, val=10)


def test_layout_is_vocs(drawn):
    for split, count in (("train", 40), ("val", 10), ("trainval", 50)):
        dataset = ShapesSegmentation(drawn, split, boxes=True)
        assert len(dataset) == count and dataset.classes.names == NAMES
    mask = Image.open(drawn / "SegmentationClass/val_00000.png")
    assert mask.mode == "P"
    palette = np.array(mask.getpalette()).reshape(-1, 3)
    assert palette[255].tolist() == list(voc_colour(255))
    assert (drawn / "ImageSets/Main/val.txt").read_text().splitlines()[0] == "val_00000"


def test_everything_is_readable_and_every_class_occurs(drawn):
    report = check(ShapesSegmentation(drawn, "train", boxes=True))
    assert report.problems == [] and report.sizes == {(192, 256): 40}
    assert (report.class_photos >= 4).all() and len(report.class_photos) == 7
    assert 0.01 < report.ignored_share < 0.08
    assert 0.6 < report.class_shares[0] < 0.9


def test_boxes_fit_the_masks(drawn):
    dataset = ShapesSegmentation(drawn, "val", boxes=True)
    for index in range(len(dataset)):
        sample = dataset[index]
        boxes = sample["boxes"].int().tolist()
        assert boxes
        outside = sample["mask"].clone()
        for (x1, y1, x2, y2), label in zip(boxes, sample["labels"].tolist(), strict=True):
            part = sample["mask"][y1:y2, x1:x2]
            assert (part == label + 1).any()
            # Nothing but the border lies on the box's edge, so the box is no larger than needed.
            for line in (part[0], part[-1], part[:, 0], part[:, -1]):
                assert ((line == 255) | (line == label + 1)).any()
            outside[y1:y2, x1:x2] = 0
        assert set(outside.unique().tolist()) <= {0, 255}


def test_the_border_is_thin_and_between_all_regions(drawn):
    for index in range(10):
        mask = ShapesSegmentation(drawn, "val")[index]["mask"].int()
        for left, right in ((mask[:, :-1], mask[:, 1:]), (mask[:-1], mask[1:])):
            touching = (left != right) & (left != 255) & (right != 255)
            assert not touching.any()


def test_colour_does_not_tell_the_class():
    """Mean colours of the classes agree: within a class they vary far more than between classes."""
    colours = {label: [] for label in range(1, 7)}
    for index in range(150):
        photo = draw_photo(np.random.default_rng([1, index]), (96, 128), NAMES[1:])
        for label in np.unique(photo.mask):
            if 0 < label < 255:
                colours[label].append(photo.image[photo.mask == label].mean(0))
    means = np.stack([np.mean(values, 0) for values in colours.values()])
    spread = np.mean([np.std(values, 0) for values in colours.values()])
    assert means.std(0).max() < spread / 3


def test_shapes_cover_each_other_and_are_cut_by_the_edge(drawn):
    dataset = ShapesSegmentation(drawn, "train", boxes=True)
    boxes = [dataset[index]["boxes"] for index in range(len(dataset))]
    pairs = [(a, b) for group in boxes for i, a in enumerate(group) for b in group[:i]]
    overlap = [
        (torch.minimum(a[2:], b[2:]) > torch.maximum(a[:2], b[:2])).all().item() for a, b in pairs
    ]
    assert sum(overlap) > 5
    edges = torch.cat(boxes)
    assert ((edges[:, :2] == 0).any(1) | (edges[:, 2] == 256) | (edges[:, 3] == 192)).sum() > 3
    sides = (edges[:, 2:] - edges[:, :2]).max(1).values
    assert sides.max() / sides.median() > 1.5


def test_a_seed_gives_the_same_bytes_and_another_does_not(tmp_path):
    first = write_shapes(tmp_path / "a", 3, 2, (64, 96))
    again = write_shapes(tmp_path / "b", 3, 2, (64, 96))
    other = write_shapes(tmp_path / "c", 3, 2, (64, 96), seed=1)
    assert digests(first) == digests(again)
    same = digests(first).items() & digests(other).items()
    assert not any("JPEGImages" in name for name, _ in same)


def test_a_larger_set_continues_a_smaller_one_and_val_is_not_train(tmp_path):
    small = digests(write_shapes(tmp_path / "a", 2, 2, (64, 96)))
    large = digests(write_shapes(tmp_path / "b", 4, 3, (64, 96)))
    photos = [name for name in small if "JPEGImages" in name]
    assert len(photos) == 4 and all(small[name] == large[name] for name in photos)
    hashes = [value for name, value in large.items() if "JPEGImages" in name]
    assert len(set(hashes)) == 7


def test_the_same_set_is_kept_and_another_replaced(tmp_path):
    folder = write_shapes(tmp_path / "a", 2, 1, (64, 96))
    photo = folder / "JPEGImages/train_00000.jpg"
    before = photo.stat().st_mtime_ns
    write_shapes(folder, 2, 1, (64, 96))
    assert photo.stat().st_mtime_ns == before
    write_shapes(folder, 3, 1, (64, 96))
    assert len(ShapesSegmentation(folder, "train")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("dear")
    with pytest.raises(InputError, match="mine: holds other files"):
        write_shapes(tmp_path / "mine", 2, 1, (64, 96))
    assert (tmp_path / "mine/thesis.txt").read_text() == "dear"


def test_nothing_half_drawn_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("effseg.data.shapes.draw_photo", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_shapes(tmp_path / "a", 2, 1, (64, 96))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [{"train": 0}, {"val": 0}, {"size": (32, 96)}], ids=["train", "val", "size"]
)
def test_bad_settings_are_named(tmp_path, arguments):
    with pytest.raises(InputError, match="expected at least 1 photo each and 64 pixels a side"):
        write_shapes(tmp_path / "a", **arguments)


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_folder() == tmp_path / "cache/effseg/shapes"
    (tmp_path / "datasets").mkdir()
    assert default_folder().absolute() == tmp_path / "datasets/shapes"


def test_drawing_is_fast(tmp_path):
    start = time.process_time()
    write_shapes(tmp_path / "a", 40, 10)
    assert time.process_time() - start < 2  # some 5 ms a photo; 40 ms would still pass
