"""COCO's format: gapped ids, crowds, empty photos, masks, and what is wrong with a file."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effseg import InputError
from effseg.data.coco import COCODetection, COCOSegmentation

SIZE = (40, 60)  # H, W


def square(x, y, side):
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def annotation(number, image, category, x, y, side, **extra):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, side, side],
        "area": side * side,
        "iscrowd": 0,
        "segmentation": square(x, y, side),
    } | extra


def counts(mask):
    """Return COCO's uncompressed run lengths, column by column, zeros first."""
    flat, runs, current = np.asarray(mask).flatten(order="F"), [0], 0
    for value in flat:
        if value != current:
            runs.append(0)
            current = value
        runs[-1] += 1
    return runs


def crowd_mask():
    mask = np.zeros(SIZE, np.uint8)
    mask[30:40, 0:20] = 1
    return mask


ANNOTATIONS = [
    annotation(11, 139, 18, 2, 3, 10),  # dog
    annotation(12, 139, 88, 8, 3, 10),  # teddy bear, over the dog
    annotation(13, 139, 17, 10, 6, 8),  # cat, over both
    annotation(14, 139, 18, 40, 20, 10),
    annotation(15, 139, 18, 45, 25, 10),  # a second dog over the first
    annotation(
        16,
        139,
        1,
        0,
        30,
        0,
        iscrowd=1,
        bbox=[0, 30, 20, 10],
        area=200,
        segmentation={"size": list(SIZE), "counts": counts(crowd_mask())},
    ),
    annotation(17, 7, 90, 50, 30, 20),  # toothbrush, reaches over the edge
]


def write(root, annotations=ANNOTATIONS, **changes):
    """Write three photos (one without objects) and their JSON; return the root."""
    folder = root / "coco2017"
    (folder / "val2017").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images = []
    for number in (139, 7, 500):
        name = f"{number:012d}.jpg"
        Image.new("RGB", SIZE[::-1], (number % 256, 0, 0)).save(folder / "val2017" / name)
        images.append({"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
    categories = [{"id": i, "name": f"c{i}"} for i in (1, 17, 18, 88, 90)]
    content = {"images": images, "annotations": annotations, "categories": categories} | changes
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


def test_ids_with_gaps_crowds_and_photos_without_objects(tmp_path):
    data = COCODetection(write(tmp_path))
    assert [sample["id"] for sample in data] == ["7", "139", "500"]
    edge, busy, empty = data
    # 80 classes without gaps: dog is COCO's 18 and the 17th, teddy bear 88 and the 78th.
    assert busy["labels"].tolist() == [16, 77, 15, 16, 16, 0]
    assert busy["crowd"].tolist() == [False] * 5 + [True]
    assert busy["boxes"][0].tolist() == [2, 3, 12, 13]
    assert busy["area"].tolist() == [100, 100, 64, 100, 100, 200]
    assert edge["boxes"].tolist() == [[50, 30, 60, 40]]  # cut at the photo's edge
    assert edge["labels"].tolist() == [79]
    assert empty["boxes"].shape == (0, 4)
    assert empty["labels"].dtype == torch.int64 and empty["crowd"].dtype == torch.bool
    assert data.classes.names[1 + 16] == "dog"
    assert [data.category_of[label] for label in (16, 77, 79)] == [18, 88, 90]


def test_labels_with_gaps_and_of_the_file(tmp_path):
    root = write(tmp_path)
    gaps = COCODetection(root, labels="coco90")
    assert gaps[1]["labels"].tolist() == [17, 87, 16, 17, 17, 0]
    assert len(gaps.classes) == 91
    assert gaps.classes.names[18] == "dog"
    own = COCODetection(root, labels="file")
    assert own.classes.names == ("background", "c1", "c17", "c18", "c88", "c90")
    assert own[1]["labels"].tolist() == [2, 3, 1, 2, 2, 0]


def test_masks_of_all_classes(tmp_path):
    mask = COCOSegmentation(write(tmp_path), "val2017", masks="coco80")[1]["mask"]
    assert mask.shape == SIZE and mask.dtype == torch.uint8
    assert mask[4, 3] == 17  # dog alone
    assert mask[4, 17] == 78  # teddy bear alone
    assert mask[4, 10] == 255  # dog and teddy bear
    assert mask[10, 15] == 255  # cat over another
    assert mask[13, 17] == 16  # cat alone
    assert mask[27, 47] == 17  # two dogs are dog
    assert mask[35, 5] == 255  # crowd
    assert mask[35, 30] == 0


def test_masks_of_vocs_classes_leave_the_others_to_the_background(tmp_path):
    data = COCOSegmentation(write(tmp_path), "val2017")
    mask = data[1]["mask"]
    assert data.classes.names[12] == "dog" and len(data.classes) == 21
    assert mask[4, 3] == 12
    assert mask[4, 10] == 12  # the teddy bear is no class of VOC's
    assert mask[4, 17] == 0
    assert mask[13, 17] == 8
    assert len(COCOSegmentation(tmp_path, "val2017", min_area=300)) == 1
    with pytest.raises(InputError, match="no photo has 9000 pixels"):
        COCOSegmentation(tmp_path, "val2017", min_area=9000)


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([2, 3, 0, 10], "no area"),
        ([2, 3, -4, 10], "no area"),
        ([70, 3, 5, 5], r"outside its photo of 60x40"),
        ([-9, 3, 5, 5], "outside"),
        ([float("nan"), 3, 5, 5], "finite"),
    ],
)
def test_boxes_that_cannot_be_are_named_or_dropped(tmp_path, box, words):
    bad = annotation(99, 139, 18, 2, 3, 10, bbox=box)
    root = write(tmp_path, [ANNOTATIONS[0], bad])
    with pytest.raises(InputError, match=rf"instances_val2017\.json: annotation 99.*{words}"):
        COCODetection(root)
    data = COCODetection(root, invalid="drop")
    assert data.dropped == 1
    assert len(data[1]["boxes"]) == 1


def test_broken_files_are_named(tmp_path):
    root = write(tmp_path)
    path = root / "coco2017" / "annotations" / "instances_val2017.json"
    whole = path.read_text()

    def expect(words):
        with pytest.raises(InputError, match=words):
            COCODetection(root)

    path.write_text(whole[: len(whole) // 2])
    expect(r"instances_val2017\.json: not valid JSON")
    path.write_text(json.dumps({"images": []}))
    expect(r"categories: KeyError")
    write(tmp_path, [annotation(1, 139, 12, 2, 3, 5)])
    expect(r"annotation 1: category_id 12, expected one of \[1, 2")
    write(tmp_path, [annotation(1, 3, 18, 2, 3, 5)])
    expect("annotation 1: image_id 3 is not in images")
    write(tmp_path, [annotation(1, 139, 18, 2, 3, 5, bbox=[1, 2])])
    expect(r"annotation 1: bbox \[1, 2\]")
    write(tmp_path, images=[])
    expect("image_id 139|images is empty")
    write(tmp_path)
    (root / "coco2017" / "val2017" / f"{7:012d}.jpg").unlink()
    expect(r"000000000007\.jpg: photo not found")
    Image.new("RGB", (9, 9)).save(root / "coco2017" / "val2017" / f"{7:012d}.jpg")
    with pytest.raises(InputError, match=r"000000000007\.jpg: photo of 9x9 pixels, expected 60x40"):
        COCODetection(root)[0]
    with pytest.raises(InputError, match=r"instances_test2017\.json: no such file"):
        COCODetection(root, "test2017")
    with pytest.raises(InputError, match="no COCO here"):
        COCODetection(tmp_path / "empty")
    with pytest.raises(InputError, match=r"labels='coco12'"):
        COCODetection(root, labels="coco12")


def test_a_segmentation_that_cannot_be_drawn_is_named(tmp_path):
    root = write(tmp_path, [annotation(5, 139, 18, 2, 3, 5, segmentation={"counts": None})])
    with pytest.raises(InputError, match="annotation 5: segmentation cannot be drawn"):
        COCOSegmentation(root, "val2017")[1]


@pytest.mark.skipif(
    not (Path(os.environ.get("EFFSEG_DATA", "")) / "coco2017" / "annotations").is_dir(),
    reason="real photos of COCO are not at EFFSEG_DATA",
)
def test_masks_of_real_photos_equal_pycocotools():
    coco = pytest.importorskip("pycocotools.coco")
    data = COCOSegmentation(None, "val2017", masks="coco80")
    oracle = coco.COCO(str(data.json))
    for index in range(0, len(data), 8):
        photo = data.photos[index]
        claims = np.zeros((81, *photo.size), bool)
        crowd = np.zeros(photo.size, bool)
        for entry in oracle.loadAnns(oracle.getAnnIds(photo.id)):
            inside = oracle.annToMask(entry).astype(bool)
            if entry["iscrowd"]:
                crowd |= inside
            else:
                claims[data.value_of[entry["category_id"]]] |= inside
        expected = np.where(claims.sum(0) == 1, claims.argmax(0), 0)
        expected[(claims.sum(0) > 1) | crowd] = 255
        assert np.array_equal(data[index]["mask"].numpy(), expected), photo.file
