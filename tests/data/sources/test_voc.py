import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from effseg.data import VOC
from effseg.data.check import check
from effseg.data.sources.voc import find_voc
from effseg.errors import InputError

CAT = "<annotation><object><name>cat</name></object></annotation>"
# The corners in another order than VOC's; an empty flag, and one in words.
BOX = (
    "<object><bndbox><xmax>10</xmax><xmin>3</xmin><ymax>9</ymax><ymin>5</ymin></bndbox>"
    "<difficult/><name> cat </name></object>"
)


def masks(root, split):
    return VOC(root, masks=split, boxes=None)


def boxes(root, split):
    return VOC(root, masks=None, boxes=split)


def annotate(voc, name, box, label="cat"):
    keys = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    edges = "".join(f"<{key}>{value}</{key}>" for key, value in keys)
    text = f"<object><name>{label}</name><bndbox>{edges}</bndbox></object>"
    voc.annotation(name).write_text(f"<annotation>{text}</annotation>")


def make_sbd(voc, base: Path, train, val):
    """SBD's original layout with masks of class 5; images only in SBD's own folder."""
    sbd = base / "benchmark_RELEASE" / "dataset"
    (sbd / "cls").mkdir(parents=True)
    (sbd / "img").mkdir()
    for name in train + val:
        values = {"Segmentation": voc.values(5)}
        savemat(sbd / f"cls/{name}.mat", {"GTcls": values})
        if voc.image(name).is_file():
            shutil.copy(voc.image(name), sbd / f"img/{name}.jpg")
    (sbd / "train.txt").write_text("\n".join(train))
    (sbd / "val.txt").write_text("\n".join(val))
    return sbd


def test_the_root_may_be_any_of_three_folders(voc, monkeypatch):
    for root in (voc.root, voc.root / "VOCdevkit", voc.folder):
        assert find_voc(root).samefile(voc.folder)
    monkeypatch.setenv("EFFSEG_DATA", str(voc.root))
    assert find_voc(None).samefile(voc.folder)
    monkeypatch.delenv("EFFSEG_DATA")
    monkeypatch.chdir(voc.root.parent)
    voc.root.rename("datasets")
    assert find_voc(None) == Path("datasets/VOCdevkit/VOC2012")


def test_a_missing_voc_names_layout_and_folders(tmp_path):
    with pytest.raises(InputError, match=r"expected VOCdevkit/VOC2012/.*looked at") as caught:
        find_voc(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "VOC2012") in str(caught.value)


def test_official_lists(voc):
    assert masks(voc.root, "train").ids == voc.train
    assert masks(voc.root, "val").ids == voc.val
    assert len(masks(voc.root, "trainval")) == 6
    assert boxes(voc.root, "val").ids == [*voc.val, *voc.extra]
    source = masks(voc.root, "val")
    image, labels = source.image(0), source.labels(0)
    assert image.shape == (3, 48, 64) and image.dtype == torch.uint8
    assert labels.keys() == {"mask"}
    assert labels["mask"].unique().tolist() == [0, 1, 255]


def test_unknown_lists_are_named():
    with pytest.raises(InputError, match="masks='test': expected one of train, val"):
        VOC(masks="test")
    with pytest.raises(InputError, match="boxes='seg': expected one of train"):
        VOC(boxes="seg")
    with pytest.raises(InputError, match="both null"):
        VOC(masks=None, boxes=None)


def test_an_image_has_what_the_lists_say(voc):
    source = VOC(voc.root, masks="train_aug", boxes="train")
    assert source.ids == voc.train + voc.extra
    assert source.has("segmentation").all()
    assert source.has("detection").tolist() == [True] * 4 + [False] * 2
    assert {"mask", "boxes"} <= source.labels(0).keys()
    assert source.labels(5).keys() == {"mask"}
    both = VOC(voc.root, masks="train", boxes="val")
    assert both.ids == [*voc.train, *voc.val, *voc.extra]
    assert both.has("segmentation").tolist() == [True] * 4 + [False] * 4
    assert "mask" not in both.labels(4) and "boxes" in both.labels(4)


@pytest.mark.parametrize("split", ["train_aug", "seg_train", "seg_val"])
def test_boxes_of_the_masks_lists(voc, split):
    expected = {"train_aug": voc.train + voc.extra, "seg_train": voc.train, "seg_val": voc.val}
    assert boxes(voc.root, split).ids == expected[split]


def test_boxes_count_from_zero(voc):
    labels = boxes(voc.root, "val").labels(1)
    assert labels["boxes"].tolist() == [[0, 1, 10, 12], [4, 4, 40, 30]]
    assert labels["labels"].tolist() == [7, 11]  # cat, dog; aeroplane is 0
    assert labels["difficult"].tolist() == [False, True]


def test_image_without_objects_has_empty_boxes(voc):
    voc.annotation("b0").write_text("<annotation></annotation>")
    labels = boxes(voc.root, "val").labels(0)
    assert labels["boxes"].shape == (0, 4) and labels["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((20, 5, 10, 9), "object 1: box .* has no area"),
        ((900, 5, 950, 9), "object 1: .* outside its image of 64x48"),
        (("nan", 5, 30, 9), "object 1: .* finite"),
        (("wide", 5, 30, 9), "object 1: bndbox/xmin 'wide', expected a number"),
    ],
)
def test_invalid_boxes_name_file_and_object(voc, box, words):
    annotate(voc, "b0", box)
    with pytest.raises(InputError, match=rf"b0\.xml: {words}"):
        boxes(voc.root, "val").labels(0)


def test_boxes_over_the_edge_are_clipped(voc):
    annotate(voc, "b0", (-3, 5, 84, 57))
    assert boxes(voc.root, "val").labels(0)["boxes"].tolist() == [[0, 4, 64, 48]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "no VOC annotation"),
        (
            "<annotation><object><name>unicorn</name></object></annotation>",
            "object 1: class 'unicorn'",
        ),
        (CAT, "object 1: bndbox/xmin is missing"),
        (f"<VOC>{CAT}</VOC>", "no VOC annotation: <VOC>, expected <annotation>"),
        (CAT.replace("annotation", "Annotation"), "no VOC annotation: <Annotation>"),
        (
            f"<annotation><objects>{BOX}</objects></annotation>",
            "no VOC annotation: <object>, expected each object as <object> directly in "
            "<annotation>",
        ),
        (
            f"<annotation>{BOX}</annotation>".replace("object", "Object"),
            "no VOC annotation: <Object>",
        ),
        (
            f"<annotation>{BOX}</annotation>".replace("object", "item"),
            "no VOC annotation: <bndbox>",
        ),
        (
            f"<annotation>{BOX}</annotation>".replace("bndbox", "robndbox"),
            "object 1: bndbox/xmin is missing",
        ),
        (
            f"<annotation>{BOX}</annotation>".replace(">9<", ">8,5<"),
            "object 1: bndbox/ymax '8,5', expected a number",
        ),
        (
            f"<annotation>{BOX}</annotation>".replace("<difficult/>", "<difficult>2</difficult>"),
            "object 1: difficult '2', expected 0 or 1",
        ),
        (
            "<annotation><object><name>cat</name><bndbox><xmin>0.1</xmin><ymin>0.2</ymin>"
            "<xmax>0.5</xmax><ymax>0.6</ymax></bndbox></object></annotation>",
            r"object 1: box \(0\.1, 0\.2, 0\.5, 0\.6\), expected pixels from 1",
        ),
    ],
)
def test_bad_annotation_is_named(voc, text, message):
    voc.annotation("b0").write_text(text)
    with pytest.raises(InputError, match=rf"b0\.xml: {message}"):
        boxes(voc.root, "val").labels(0)


@pytest.mark.parametrize(
    "root", ["<annotation>", '<annotation xmlns="http://a.b/c">', '<v:annotation xmlns:v="u:v">']
)
def test_a_namespace_and_another_order_are_read(voc, root):
    size = "<size><depth>3</depth><height>48</height><width>64</width></size>"
    text = f"{root}{size}{BOX}{BOX.replace('<difficult/>', '<difficult>true</difficult>')}"
    end = "</v:annotation>" if root.startswith("<v") else "</annotation>"
    if root.startswith("<v"):
        text = root + text.removeprefix(root).replace("</", "</v:").replace("<", "<v:")
        text = text.replace("<v:/v:", "</v:").replace("<v:v:", "<v:")
    voc.annotation("b0").write_text("\ufeff" + text + end, encoding="utf-8")
    labels = boxes(voc.root, "val").labels(0)
    assert labels["boxes"].tolist() == [[2, 4, 10, 9]] * 2
    assert labels["labels"].tolist() == [7, 7]
    assert labels["difficult"].tolist() == [False, True]


@pytest.mark.parametrize(
    ("width", "height", "words"),
    [
        (48, 64, r"b0\.xml: 48x64 pixels, expected 64x48 as its image .*b0\.jpg"),
        (640, 480, r"b0\.xml: 640x480 pixels, expected 64x48"),
        (64, 0, r"b0\.xml: 64x0 pixels, expected 64x48"),
        ("wide", 48, r"b0\.xml: width 'wide', expected a number"),
        (64, 48, None),
        (0, 0, None),  # written by a tool that did not look
    ],
)
def test_the_size_is_the_images(voc, width, height, words):
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    voc.annotation("b0").write_text(f"<annotation>{size}{BOX}</annotation>")
    source = boxes(voc.root, "val")
    if words is None:
        assert len(source.labels(0)["boxes"]) == 1
        return
    with pytest.raises(InputError, match=words):
        source.labels(0)


def test_check_lists_every_object(voc):
    bad = [
        BOX.replace("cat", "unicorn"),
        BOX,
        BOX.replace(">3<", ">three<"),
    ]
    voc.annotation("b0").write_text(f"<annotation>{''.join(bad)}</annotation>")
    empty = BOX.replace(">3<", ">20<")
    outside = BOX.replace(">3<", ">70<").replace(">10<", ">80<")
    voc.annotation("b1").write_text(f"<annotation>{empty}{BOX}{outside}</annotation>")
    report = check(boxes(voc.root, "val"))
    expected = [
        "b0.xml: object 1: class 'unicorn'",
        "b0.xml: object 3: bndbox/xmin 'three'",
        "b1.xml: object 1: box (19, 4, 10, 9) has no area",
        "b1.xml: object 3: box (69, 4, 80, 9) lies outside",
    ]
    assert [words in line for words, line in zip(expected, report.problems, strict=True)] == [
        True
    ] * 4
    assert report.boxes == 1 + 2 + 2, "b0 has none until it is mended"


def test_custom_classes(voc):
    voc.annotation("b0").write_text(f"<annotation>{BOX.replace('cat', 'helmet')}</annotation>")
    source = VOC(voc.root, None, "val", classes=["background", "head", "helmet"])
    assert source.labels(0)["labels"].tolist() == [1] and source.card is None
    with pytest.raises(InputError, match="class 'cat', expected one of head, helmet"):
        source.labels(1)


def test_missing_annotation_is_named(voc):
    voc.annotation("b1").unlink()
    with pytest.raises(InputError, match=r"b1\.xml: annotation not found \(1 of 4"):
        boxes(voc.root, "val").verify()


def test_train_aug_from_a_folder_without_a_list_leaves_val_out(voc):
    dataset = masks(voc.root, "train_aug")
    assert dataset.ids == voc.train + voc.extra
    assert 2 in dataset.labels(0)["mask"]  # SegmentationClassAug's mask, also for train


@pytest.mark.parametrize("name", ["train_aug", "trainaug"])
def test_train_aug_from_a_list_uses_official_masks_for_missing_ones(voc, name):
    voc.write_list(name, ["c0", "a1", "a2"])
    voc.aug_mask("a1").unlink()
    dataset = masks(voc.root, "train_aug")
    assert dataset.ids == ["c0", "a1", "a2"]
    assert 1 in dataset.labels(1)["mask"]
    assert 2 in dataset.labels(2)["mask"]


@pytest.mark.parametrize("place", ["root", "devkit", "voc"])
def test_train_aug_from_sbd(voc, place):
    shutil.rmtree(voc.folder / "SegmentationClassAug")
    base = {"root": voc.root, "devkit": voc.root / "VOCdevkit", "voc": voc.folder}[place]
    # As in the real SBD, its train list holds a image of VOC val.
    sbd = make_sbd(voc, base, train=["a0", "b0", "c0"], val=["c1"])
    voc.image("c1").unlink()
    dataset = masks(voc.root, "train_aug")
    assert dataset.ids == [*voc.train, "c0", "c1"]
    assert 1 in dataset.labels(0)["mask"]  # the official one
    assert 5 in dataset.labels(4)["mask"]
    assert dataset.image_path(4) == voc.image("c0")
    assert dataset.image_path(5) == sbd / "img/c1.jpg"
    assert dataset.image(5).shape == (3, 48, 64)


def test_train_aug_without_masks_says_where_they_should_be(voc):
    shutil.rmtree(voc.folder / "SegmentationClassAug")
    with pytest.raises(InputError, match=r"SegmentationClassAug, or SBD's benchmark_RELEASE"):
        masks(voc.root, "train_aug").verify()


def test_a_train_aug_with_images_of_val_is_refused(voc):
    voc.write_list("train_aug", ["a0", "b1", "b0"])
    with pytest.raises(InputError, match=r"train_aug\.txt: b0 is in val too \(2 shared images\)"):
        _ = masks(voc.root, "train_aug").ids


def test_missing_files_are_named_and_counted(voc):
    voc.mask("a1").unlink()
    voc.mask("a3").unlink()
    with pytest.raises(InputError, match=r"a1\.png: mask not found \(2 of 4 masks missing"):
        masks(voc.root, "train").verify()
    voc.image("a2").unlink()
    with pytest.raises(InputError, match=r"a2\.jpg: image not found \(1 of 4 images missing"):
        masks(voc.root, "train").verify()


def test_empty_list_is_refused(voc):
    voc.write_list("val", [])
    with pytest.raises(InputError, match=r"val\.txt: the list is empty"):
        masks(voc.root, "val").verify()


def test_mask_of_another_size_is_refused(voc, files):
    files.mask(voc.mask("b0"), np.zeros((48, 63)))
    with pytest.raises(InputError, match=r"b0\.png: 63x48 pixels, expected 64x48"):
        masks(voc.root, "val").labels(0)


def test_check_lists_every_problem(voc, files):
    files.truncate(voc.image("a0"))
    voc.mask("a1").unlink()
    files.mask(voc.mask("a2"), np.full((48, 64), 200))
    report = check(masks(voc.root, "train"))
    assert len(report.problems) == 3
    assert "a0.jpg" in report.problems[0] and "truncated" in report.problems[0]
    assert "a1.png" in report.problems[1] and "missing" in report.problems[1]
    assert "value 200" in report.problems[2]
    assert report.images == 4 and report.sizes == {(48, 64): 1}


def test_check_counts_pixels(voc):
    report = check(VOC(voc.root, "val", "seg_val"), progress=True)
    assert report.problems == [] and report.boxes == 4
    labelled = 48 * 64 - 30  # the mask's line of 255
    assert report.class_shares[1] == pytest.approx(19 * 30 / labelled)
    assert report.class_shares.sum() == pytest.approx(1)
    assert report.ignored_share == pytest.approx(30 / (48 * 64))
    assert report.class_images[:3].tolist() == [2, 2, 0]


@pytest.mark.skipif("EFFSEG_DATA" not in os.environ, reason="EFFSEG_DATA (real images) is not set")
def test_real_images():
    train = VOC(masks="train_aug", boxes="train_aug")
    val = VOC(masks="val", boxes="seg_val")
    assert not set(train.ids) & set(val.ids)
    for source in (train, val):
        source.verify()
        for index in (0, len(source) // 2, len(source) - 1):
            labels, height, width = source.labels(index), *source.image(index).shape[1:]
            assert labels["mask"].shape == (height, width)
            assert len(labels["boxes"]) == len(labels["labels"]) > 0
            assert (labels["boxes"][:, 2:] > labels["boxes"][:, :2]).all()
            assert labels["boxes"].min() >= 0 and labels["boxes"][:, 2].max() <= width
