import hashlib
import time

import numpy as np
import pytest
import torch
from PIL import Image

from effseg.data.check import check
from effseg.data.classes import Classes, voc_colour
from effseg.data.sources.drawing import draw_image
from effseg.data.sources.shapes import Shapes, default_folder, drawn_settings, write_shapes
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
        dataset = Shapes(drawn, split)
        assert len(dataset) == count and dataset.classes.names == NAMES
    mask = Image.open(drawn / "SegmentationClass/val_00000.png")
    assert mask.mode == "P"
    palette = np.array(mask.getpalette()).reshape(-1, 3)
    assert palette[255].tolist() == list(voc_colour(255))
    assert (drawn / "ImageSets/Main/val.txt").read_text().splitlines()[0] == "val_00000"


def test_everything_is_readable_and_every_class_occurs(drawn):
    report = check(Shapes(drawn, "train"))
    assert report.problems == [] and report.sizes == {(192, 256): 40}
    assert (report.class_images >= 4).all() and len(report.class_images) == 7
    assert 0.01 < report.ignored_share < 0.08
    assert 0.6 < report.class_shares[0] < 0.9


def test_boxes_fit_the_masks(drawn):
    dataset = Shapes(drawn, "val")
    for index in range(len(dataset)):
        sample = dataset.labels(index)
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
        mask = Shapes(drawn, "val").labels(index)["mask"].int()
        for left, right in ((mask[:, :-1], mask[:, 1:]), (mask[:-1], mask[1:])):
            touching = (left != right) & (left != 255) & (right != 255)
            assert not touching.any()


def test_colour_does_not_tell_the_class():
    """Mean colours of the classes agree: within a class they vary far more than between classes."""
    colours = {label: [] for label in range(1, 7)}
    for index in range(150):
        image = draw_image(np.random.default_rng([1, index]), (96, 128), NAMES[1:])
        for label in np.unique(image.mask):
            if 0 < label < 255:
                colours[label].append(image.image[image.mask == label].mean(0))
    means = np.stack([np.mean(values, 0) for values in colours.values()])
    spread = np.mean([np.std(values, 0) for values in colours.values()])
    assert means.std(0).max() < spread / 3


def test_shapes_cover_each_other_and_are_cut_by_the_edge(drawn):
    dataset = Shapes(drawn, "train")
    boxes = [dataset.labels(index)["boxes"] for index in range(len(dataset))]
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
    images = [name for name in small if "JPEGImages" in name]
    assert len(images) == 4 and all(small[name] == large[name] for name in images)
    hashes = [value for name, value in large.items() if "JPEGImages" in name]
    assert len(set(hashes)) == 7


def test_the_same_set_is_kept_and_another_replaced(tmp_path):
    folder = write_shapes(tmp_path / "a", 2, 1, (64, 96))
    image = folder / "JPEGImages/train_00000.jpg"
    before = image.stat().st_mtime_ns
    write_shapes(folder, 2, 1, (64, 96))
    assert image.stat().st_mtime_ns == before
    write_shapes(folder, 3, 1, (64, 96))
    assert len(Shapes(folder, "train")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("dear")
    with pytest.raises(InputError, match="mine: holds other files"):
        write_shapes(tmp_path / "mine", 2, 1, (64, 96))
    # A file of the stamp's name is not yet a miniature, nor is all in its folder drawn.
    (tmp_path / "mine/shapes.json").write_text('{"shapes": []}')
    assert drawn_settings(tmp_path / "mine") is None
    with pytest.raises(InputError, match="mine: holds other files"):
        write_shapes(tmp_path / "mine", 2, 1, (64, 96))
    drawn = write_shapes(tmp_path / "drawn", 2, 1, (64, 96))
    (drawn / "thesis.txt").write_text("dear")
    with pytest.raises(InputError, match="drawn: holds other files"):
        write_shapes(drawn, 3, 1, (64, 96))
    for folder in ("mine", "drawn"):
        assert (tmp_path / folder / "thesis.txt").read_text() == "dear"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/s: cannot be written: "):
        write_shapes(tmp_path / "file/s", 2, 1, (64, 96))


def test_nothing_half_drawn_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("effseg.data.sources.shapes.draw_image", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_shapes(tmp_path / "a", 2, 1, (64, 96))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [{"train": 0}, {"val": 0}, {"size": (32, 96)}], ids=["train", "val", "size"]
)
def test_bad_settings_are_named(tmp_path, arguments):
    with pytest.raises(InputError, match="expected at least 1 image each and 64 pixels a side"):
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
    assert time.process_time() - start < 2  # some 5 ms a image; 40 ms would still pass


def test_shares_of_the_images_have_masks_or_boxes(tmp_path):
    root = write_shapes(tmp_path / "a", 8, 2, (64, 96))
    halves = Shapes(root, masks=(0, 0.5), boxes=(0.5, 1))
    assert halves.has("segmentation").tolist() == [True] * 4 + [False] * 4
    assert (halves.has("detection") == ~halves.has("segmentation")).all()
    assert halves.labels(3).keys() == {"mask"} and "mask" not in halves.labels(4)
    few = Shapes(root, masks=None, boxes=(0.75, 1))
    assert few.ids == ["train_00006", "train_00007"] and few.tasks == ("detection",)
    with pytest.raises(InputError, match=r"masks \(0\.5, 2\)"):
        Shapes(root, masks=(0.5, 2))


def test_prepare_draws_it(tmp_path):
    source = Shapes(tmp_path / "s", "val", train=2, val=3, size=(64, 80))
    assert not (tmp_path / "s").exists()
    source.prepare()
    source.verify()
    assert len(source) == 3 and source.image(0).shape == (3, 64, 80)


def test_miniatures_of_other_settings_have_folders_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "datasets").mkdir()
    monkeypatch.chdir(tmp_path)
    few, more = (Shapes(train=count, val=1, size=(64, 64)) for count in (1, 2))
    for source in (few, more):
        source.prepare()
    assert [len(source.ids) for source in (few, more)] == [1, 2]
    assert few.image(0).shape == (3, 64, 64), "drawing the second left the first alone"
    assert str(Shapes()._root()) == "datasets/shapes"
