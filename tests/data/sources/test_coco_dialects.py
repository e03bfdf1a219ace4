"""COCO's format as other tools write it: what is read, and what is refused by its number."""

import json

import numpy as np
import pytest

from effseg import InputError
from effseg.data import COCO
from effseg.data.check import check
from tests.data.sources.coco_file import (
    CATEGORIES,
    HEIGHT,
    SQUARE,
    WIDTH,
    image,
    inside,
    instance,
    runs,
    write,
)


def without(key, number=7):
    return {k: v for k, v in instance(number).items() if k != key}


def text_runs():
    from faster_coco_eval.core import mask as coder

    return coder.encode(np.asfortranarray(inside()))["counts"].decode()


@pytest.mark.parametrize(
    "segmentation",
    [
        [SQUARE],
        SQUARE,
        [SQUARE, []],
        [[20, 5, 40, 5], SQUARE],
        [[3, 3], SQUARE, [1, 1, 50, 50]],
        [[str(value) for value in SQUARE]],
        [[[20, 5], [40, 5], [40, 15], [20, 15]]],
        [[20, 5], [40, 5], [40, 15], [20, 15]],
        {"size": [HEIGHT, WIDTH], "counts": runs(inside())},
        {"size": [f"{HEIGHT}", f"{WIDTH}.0"], "counts": [float(n) for n in runs(inside())]},
        {"size": [HEIGHT, WIDTH], "counts": [str(n) for n in runs(inside())]},
        {"size": [HEIGHT, WIDTH], "counts": text_runs()},
    ],
)
def test_a_segmentation_of_any_writer_is_the_same_mask(tmp_path, segmentation):
    labels = write(tmp_path, [instance(7, segmentation=segmentation)]).labels(0)
    assert np.array_equal(labels["mask"].numpy(), 2 * inside())
    assert labels["boxes"].tolist() == [[20, 5, 40, 15]] and labels["labels"].tolist() == [1]


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ([[20, 5, 40, 15]], "no polygon of 3 or more corners"),
        ([[*SQUARE, 3]], "polygon of 9 numbers, expected x and y in turn"),
        ([[20, 5, float("nan"), 5, 40, 15]], "corner that is no number"),
        ([["20", "5", "nan", "5", "40", "15"]], "corner that is no number"),
        ([[20, 5, 1e9, 5, 40, 15]], "far outside"),
        ([[[20, 5, 0], [40, 5, 0], [40, 15, 0]]], "no pairs of x and y"),
        ([["a", "b", "c", "d", "e", "f"]], "neither polygons nor run lengths"),
        ("none", "neither polygons nor run lengths"),
        ({"counts": runs(inside())}, "without a usable size or counts"),
        ({"size": [WIDTH, HEIGHT], "counts": runs(inside())}, r"size \[60, 40\], expected \[40"),
        ({"size": [HEIGHT, WIDTH], "counts": [0, 100]}, "100 pixels, expected 2400"),
        ({"size": [HEIGHT, WIDTH], "counts": [-1, 2401]}, "negative"),
        ({"size": [HEIGHT, WIDTH], "counts": "hello"}, "run lengths that are none"),
    ],
)
def test_an_invalid_segmentation_is_refused_by_its_number(tmp_path, segmentation, words):
    bad = instance(7, segmentation=segmentation)
    source = write(tmp_path, [instance(6, image_id=2), bad])
    with pytest.raises(InputError, match=rf"annotation 7: segmentation cannot be drawn: .*{words}"):
        source.labels(0)
    assert source.labels(1)["mask"].sum() == 400, "other images are as good as before"
    boxes = COCO(tmp_path, "train", masks=None)
    boxes.verify()
    assert len(boxes.labels(0)["boxes"]) == 1, "boxes need no segmentation"


@pytest.mark.parametrize("nothing", [None, [], [[]], [[], []], {}])
def test_no_segmentation(tmp_path, nothing):
    source = write(tmp_path, [instance(6, image_id=2), instance(7, segmentation=nothing)])
    for find in (source.verify, lambda: source.labels(0)):
        with pytest.raises(InputError, match=r"annotation 7: segmentation cannot be .* none"):
            find()
    write(tmp_path, [instance(7, segmentation=nothing)])
    alone = COCO(tmp_path, "train")
    assert alone.tasks == ("detection",) and alone.labels(0).keys() & {"mask", "boxes"} == {"boxes"}
    with pytest.raises(InputError, match=r"no annotation has a segmentation.*masks=file"):
        COCO(tmp_path, "train", masks="file").verify()
    # A crowd is a region to leave out, and its box is one.
    write(tmp_path, [instance(6, image_id=2), instance(7, segmentation=nothing, iscrowd=1)])
    assert np.array_equal(COCO(tmp_path, "train").labels(0)["mask"].numpy(), 255 * inside())


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "7"},
        {"image_id": "1"},
        {"image_id": 1.0},
        {"category_id": "2"},
        {"iscrowd": "0"},
        {"iscrowd": False},
        {"iscrowd": None},
        {"area": None},
        {"area": "200.0"},
        {"bbox": ["20", "5", "20", "10"]},
        {"bbox": None},
        {"bbox": []},
    ],
)
def test_numbers_in_other_forms(tmp_path, changes):
    labels = write(tmp_path, [instance(7) | changes]).labels(0)
    assert labels["boxes"].tolist() == [[20, 5, 40, 15]] and labels["labels"].tolist() == [1]
    assert labels["crowd"].tolist() == [False] and labels["area"].tolist() == [200]
    crowd = write(tmp_path, [instance(6), instance(7, iscrowd="1")])
    assert crowd.labels(0)["crowd"].tolist() == [False, True]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (instance(7, iscrowd="maybe"), "annotation 7: iscrowd 'maybe', expected 0 or 1"),
        (instance(7, iscrowd=2), "annotation 7: iscrowd 2"),
        (instance(7, area=-5), "annotation 7: area -5"),
        (instance(7, area=float("nan")), "annotation 7: area nan"),
        (instance(7, area="big"), "annotation 7: area 'big', expected a number"),
        (instance(7, category_id="dent"), "annotation 7: category_id 'dent'"),
        (instance(7, category_id=9), r"annotation 7: category_id 9, expected one of \[1, 2\]"),
        (instance(7, bbox=[1, 2]), r"annotation 7: bbox \[1, 2\], expected x, y, width, height"),
        (instance(7, bbox={"x": 1}), "annotation 7: bbox {'x': 1}"),
        (instance(7, image_id=5), "annotation 7: image_id 5 is not in images"),
        (
            instance(7, bbox=[1, 2, 1e300, 3]),
            "annotation 7: id, category_id, bbox or area is too large",
        ),
        (
            instance(7, category_id=1 << 70),
            "annotation 7: id, category_id, bbox or area is too large",
        ),
        (without("bbox") | {"segmentation": []}, "annotation 7: no bbox"),
        (without("category_id"), "annotation 7: category_id is missing"),
        (without("image_id"), "annotation 7: image_id is missing"),
        (without("id") | {"area": -1}, "annotation without an id, entry 2: area -1"),
        ("7", "annotation without an id, entry 2: '7', expected an object"),
    ],
)
def test_an_annotation_that_cannot_be_read_is_refused_by_its_number(tmp_path, entry, words):
    write(tmp_path, [instance(3, image_id=2), entry])
    for masks in ("auto", None):
        source = COCO(tmp_path, "train", masks=masks)
        with pytest.raises(InputError, match=rf"instances_train\.json: {words}"):
            source.verify()
        with pytest.raises(InputError, match=words):
            source.labels(0)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([image(1), image(1, "b.png")], r"image id 1 comes twice \(1\.png, b\.png\)"),
        ([image(1), image("1", "b.png")], "image id 1 comes twice"),
        ([image(1), image(2, "1.png")], r"image 2: file_name 1\.png is that of image 1 too"),
        ([image(1, height=0)], "image 1: height 0, expected pixels"),
        ([image(1, width=None)], "image 1: width is missing"),
        ([image(1, width="wide")], "image 1: width 'wide'"),
        ([image(1, width=60.5)], "image 1: width 60.5"),
        ([image(1), {"id": 3, "height": 40, "width": 60}], "image 3: file_name None"),
        ([{"file_name": "a.png", "height": 40, "width": 60}], "id is missing"),
    ],
)
def test_duplicate_and_invalid_images_are_refused(tmp_path, images, words):
    source = write(tmp_path, [instance(7)], images)
    with pytest.raises(InputError, match=rf"instances_train\.json: images: {words}"):
        _ = source.ids
    assert any(words[:12] in line for line in check(source).problems)


def test_images_of_other_writers(tmp_path):
    images = [
        image("b-7", "b.png", height="40", width="60.0"),
        image("12", "c.png", height=40.0, width=60.0),
        image("007", "a.png"),
    ]
    source = write(tmp_path, [instance(7, image_id="b-7"), instance(8, image_id=12)], images)
    source.verify()
    assert source.ids == ["12", "007", "b-7"] and source.size(0) == (HEIGHT, WIDTH)
    assert [len(source.labels(i)["boxes"]) for i in range(3)] == [1, 0, 1]
    assert [source.image_path(i).name for i in range(3)] == ["c.png", "a.png", "b.png"]


def test_categories(tmp_path):
    twice = [*CATEGORIES, {"id": 1, "name": "rust"}]
    with pytest.raises(InputError, match=r"category id 1 comes twice \(scratch, rust\)"):
        _ = write(tmp_path, [], categories=twice).ids
    same = [*CATEGORIES, {"id": 5, "name": "dent"}]
    with pytest.raises(InputError, match="categories 2 and 5 are both named 'dent'"):
        _ = write(tmp_path, [instance(7), instance(8, category_id=5)], categories=same).classes
    source = write(tmp_path, [instance(7)], categories=same)
    assert source.classes.names == ("background", "scratch", "dent"), "one of the two is not used"
    # labelme's list begins with the background, Roboflow's with a head above all classes.
    background = [{"id": 0, "name": "_background_"}, *CATEGORIES]
    source = write(tmp_path, [instance(7)], categories=background)
    assert source.classes.names == ("background", "scratch", "dent")
    assert source.labels(0)["labels"].tolist() == [1]
    head = {"id": 0, "name": "damage", "supercategory": "none"}
    below = [entry | {"supercategory": "damage"} for entry in CATEGORIES]
    source = write(tmp_path, [instance(7)], categories=[head, *below])
    assert source.classes.names == ("background", "scratch", "dent")
    assert source.categories == {0: 1, 1: 2}
    used = write(tmp_path, [instance(7), instance(8, category_id=0)], categories=[head, *below])
    assert used.classes.names[1] == "damage", "a head with objects is a class"


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([0.3, 0.1, 0.3, 0.25], "no bbox reaches beyond 1: shares of an image"),
        ([20, 15, 40, 35], "20 of 20 bboxes reach over the edge of their image: two corners"),
    ],
)
def test_boxes_in_another_form_are_refused(tmp_path, box, words):
    source = write(tmp_path, [instance(n, bbox=box) for n in range(20)])
    with pytest.raises(InputError, match=f"{words}, expected x, y, width, height in pixels"):
        source.verify()


@pytest.mark.parametrize(
    ("key", "value"), [("annotations", {"1": instance(1)}), ("annotations", None), ("images", {})]
)
def test_values_that_are_no_lists_are_refused(tmp_path, key, value):
    content = {"images": [image(1)], "annotations": [], "categories": CATEGORIES} | {key: value}
    write(tmp_path, [])
    path = tmp_path / "annotations/instances_train.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"{key} is no list"):
        COCO(tmp_path, "train").verify()
    del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"{key} is empty or missing"):
        COCO(tmp_path, "train").verify()


def test_a_class_under_another_has_boxes_but_no_pixel_unless_the_later_wins(tmp_path, effseg):
    road = [0, 0, 60, 0, 60, 40, 0, 40]
    below = instance(1, category_id=1, segmentation=[road], bbox=[0, 0, 60, 40])
    crowd = instance(3, iscrowd=1, segmentation=[[50, 30, 60, 30, 60, 40, 50, 40]])
    source = write(tmp_path, [below, instance(2), crowd])
    report = check(source)
    assert report.absent == {"pixel": ["dent"], "box": []} and report.problems == []
    out = effseg("data", "check", "--coco", "file", "--root", tmp_path, "--split", "train")[1]
    assert "no pixel of: dent" in out and "no box of" not in out
    mask = COCO(tmp_path, "train", overlaps="later").labels(0)["mask"].numpy()
    expected = 1 + inside()
    expected[30:, 50:] = 255
    assert np.array_equal(mask, expected)
    with pytest.raises(InputError, match="overlaps='first': expected one of ignored, later"):
        COCO(tmp_path, overlaps="first")
