"""VOC's detection data, and boxes that cannot be."""

import shutil

import pytest
import torch

from effseg import InputError
from effseg.data.boxes import VOCDetection, find_invalid, valid_boxes


def test_photos_and_boxes_of_the_miniature(shapes_root):
    data = VOCDetection(shapes_root, "val", card="shapes")
    assert len(data) > 0
    for sample in data:
        height, width = sample["image"].shape[1:]
        boxes = sample["boxes"]
        assert len(boxes) == len(sample["labels"]) == len(sample["difficult"])
        assert valid_boxes(boxes, (height, width)).all()
        assert int(sample["labels"].max()) < len(data.classes) - 1


def test_first_impossible_box_and_why():
    boxes = torch.tensor([[1.0, 1, 5, 5], [5, 1, 5, 9], [30, 1, 40, 5], [1, 1, 2, float("nan")]])
    assert find_invalid(boxes[:1], (20, 20)) is None
    number, reason = find_invalid(boxes, (20, 20))
    assert number == 1 and "no area" in reason
    assert "outside" in find_invalid(boxes[2:], (20, 20))[1]
    assert "finite" in find_invalid(boxes[3:], (20, 20))[1]
    assert valid_boxes(boxes, (20, 20)).tolist() == [True, False, False, False]


def annotate(folder, name, box):
    edges = "".join(
        f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    text = f"<annotation><object><name>circle</name><bndbox>{edges}</bndbox></object></annotation>"
    (folder / "Annotations" / f"{name}.xml").write_text(text)


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((20, 5, 10, 9), "no area"),
        ((900, 5, 950, 9), "outside its photo"),
        (("nan", 5, 30, 9), "finite"),
        (("wide", 5, 30, 9), "no VOC annotation"),
    ],
)
def test_impossible_boxes_name_file_and_object(tmp_path, shapes_root, box, words):
    root = tmp_path / "voc"
    shutil.copytree(shapes_root, root)
    data = VOCDetection(root, "val", card="shapes")
    annotate(root, data.ids[0], box)
    with pytest.raises(InputError, match=rf"{data.ids[0]}\.xml.*{words}"):
        data[0]


def test_boxes_over_the_edge_are_cut(tmp_path, shapes_root):
    root = tmp_path / "voc"
    shutil.copytree(shapes_root, root)
    data = VOCDetection(root, "val", card="shapes")
    height, width = data[0]["image"].shape[1:]
    annotate(root, data.ids[0], (-3, 5, width + 20, height + 9))
    assert data[0]["boxes"].tolist() == [[0, 4, width, height]]


def test_missing_files_and_unknown_splits(tmp_path, shapes_root):
    with pytest.raises(InputError, match="split 'test'"):
        VOCDetection(shapes_root, "test")
    root = tmp_path / "voc"
    shutil.copytree(shapes_root, root)
    data = VOCDetection(root, "val", card="shapes")
    data.annotations[1].unlink()
    with pytest.raises(InputError, match=rf"{data.ids[1]}\.xml: annotation not found"):
        VOCDetection(root, "val", card="shapes")
