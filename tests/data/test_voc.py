import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from effseg.data.check import check
from effseg.data.voc import VOCSegmentation, find_voc
from effseg.errors import InputError


def ids(dataset):
    return [pair.id for pair in dataset.pairs]


def make_sbd(voc, base: Path, train, val):
    """SBD's original layout with masks of class 5; photos only in SBD's own folder."""
    sbd = base / "benchmark_RELEASE" / "dataset"
    (sbd / "cls").mkdir(parents=True)
    (sbd / "img").mkdir()
    for name in train + val:
        values = {"Segmentation": voc.values(5)}
        savemat(sbd / f"cls/{name}.mat", {"GTcls": values})
        if voc.photo(name).is_file():
            shutil.copy(voc.photo(name), sbd / f"img/{name}.jpg")
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


def test_no_voc_names_the_layout_and_the_places(tmp_path):
    with pytest.raises(InputError, match=r"expected VOCdevkit/VOC2012/.*looked at") as caught:
        find_voc(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "VOC2012") in str(caught.value)


def test_official_splits(voc):
    assert ids(VOCSegmentation(voc.root, "train")) == voc.train
    assert ids(VOCSegmentation(voc.root, "val")) == voc.val
    assert len(VOCSegmentation(voc.root, "trainval")) == 6
    sample = VOCSegmentation(voc.root, "val")[0]
    assert sample["image"].shape == (3, 48, 64) and sample["image"].dtype == torch.uint8
    assert sample["mask"].unique().tolist() == [0, 1, 255]
    with pytest.raises(InputError, match="split 'test': expected one of train, val"):
        VOCSegmentation(voc.root, "test")


def test_boxes_count_from_zero(voc):
    sample = VOCSegmentation(voc.root, "val", boxes=True)[1]
    assert sample["boxes"].tolist() == [[0, 1, 10, 12], [4, 4, 40, 30]]
    assert sample["labels"].tolist() == [7, 11]  # cat, dog; aeroplane is 0
    assert sample["difficult"].tolist() == [False, True]


def test_photo_without_objects_has_empty_boxes(voc):
    voc.annotation("b0").write_text("<annotation></annotation>")
    sample = VOCSegmentation(voc.root, "val", boxes=True)[0]
    assert sample["boxes"].shape == (0, 4) and sample["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "no VOC annotation"),
        ("<annotation><object><name>unicorn</name></object></annotation>", "object 'unicorn'"),
        ("<annotation><object><name>cat</name></object></annotation>", "no VOC annotation"),
    ],
)
def test_bad_annotation_is_named(voc, text, message):
    voc.annotation("b0").write_text(text)
    dataset = VOCSegmentation(voc.root, "val", boxes=True)
    with pytest.raises(InputError, match=rf"b0\.xml: {message}"):
        dataset[0]


def test_missing_annotation_is_named(voc):
    voc.annotation("b1").unlink()
    with pytest.raises(InputError, match=r"b1\.xml: annotation not found \(1 of 2"):
        VOCSegmentation(voc.root, "val", boxes=True)


def test_train_aug_from_a_folder_without_a_list_leaves_val_out(voc):
    dataset = VOCSegmentation(voc.root, "train_aug")
    assert ids(dataset) == voc.train + voc.extra
    assert 2 in dataset[0]["mask"]  # SegmentationClassAug's mask, also for train


@pytest.mark.parametrize("name", ["train_aug", "trainaug"])
def test_train_aug_from_a_list_takes_official_masks_where_others_lack(voc, name):
    voc.write_list(name, ["c0", "a1", "a2"])
    voc.aug_mask("a1").unlink()
    dataset = VOCSegmentation(voc.root, "train_aug")
    assert ids(dataset) == ["c0", "a1", "a2"]
    assert dataset.pairs[1].mask == voc.mask("a1") and 1 in dataset[1]["mask"]
    assert dataset.pairs[2].mask == voc.aug_mask("a2")


@pytest.mark.parametrize("place", ["root", "devkit", "voc"])
def test_train_aug_from_sbd(voc, place):
    shutil.rmtree(voc.folder / "SegmentationClassAug")
    base = {"root": voc.root, "devkit": voc.root / "VOCdevkit", "voc": voc.folder}[place]
    # As in the real SBD, its train list holds a photo of VOC val.
    sbd = make_sbd(voc, base, train=["a0", "b0", "c0"], val=["c1"])
    voc.photo("c1").unlink()
    dataset = VOCSegmentation(voc.root, "train_aug")
    assert ids(dataset) == [*voc.train, "c0", "c1"]
    assert dataset.pairs[0].mask == voc.mask("a0")
    assert 5 in dataset[4]["mask"]
    assert dataset.pairs[4].image == voc.photo("c0")
    assert dataset.pairs[5].image == sbd / "img/c1.jpg"
    assert dataset[5]["image"].shape == (3, 48, 64)


def test_train_aug_without_masks_says_where_they_should_be(voc):
    shutil.rmtree(voc.folder / "SegmentationClassAug")
    with pytest.raises(InputError, match=r"SegmentationClassAug, or SBD's benchmark_RELEASE"):
        VOCSegmentation(voc.root, "train_aug")


@pytest.mark.parametrize("split", ["train", "train_aug"])
def test_a_training_list_with_val_photos_is_refused(voc, split):
    voc.write_list(split, ["a0", "b1", "b0"])
    with pytest.raises(InputError, match=r"b1 is in val too \(2 shared photos\)"):
        VOCSegmentation(voc.root, split)


def test_missing_files_are_named_and_counted(voc):
    voc.mask("a1").unlink()
    voc.mask("a3").unlink()
    with pytest.raises(InputError, match=r"a1\.png: mask not found \(2 of 4 masks missing"):
        VOCSegmentation(voc.root, "train")
    voc.photo("a2").unlink()
    with pytest.raises(InputError, match=r"a2\.jpg: photo not found \(1 of 4 photos missing"):
        VOCSegmentation(voc.root, "train")


def test_empty_list_is_refused(voc):
    voc.write_list("val", [])
    with pytest.raises(InputError, match=r"val\.txt: the list is empty"):
        VOCSegmentation(voc.root, "val")


def test_mask_of_another_size_is_refused(voc, files):
    files.mask(voc.mask("b0"), np.zeros((48, 63)))
    with pytest.raises(InputError, match=r"b0\.png: mask of 63x48 pixels, expected 64x48"):
        VOCSegmentation(voc.root, "val")[0]


def test_check_lists_every_problem(voc, files):
    files.truncate(voc.photo("a0"))
    voc.mask("a1").unlink()
    files.mask(voc.mask("a2"), np.full((48, 64), 200))
    report = check(VOCSegmentation(voc.root, "train", check_files=False))
    assert len(report.problems) == 3
    assert "a0.jpg" in report.problems[0] and "truncated" in report.problems[0]
    assert "a1.png" in report.problems[1] and "missing" in report.problems[1]
    assert "value 200" in report.problems[2]
    assert report.photos == 4 and report.sizes == {(48, 64): 1}


def test_check_counts_pixels(voc):
    report = check(VOCSegmentation(voc.root, "val", boxes=True), progress=True)
    assert report.problems == [] and report.boxes == 4
    labelled = 48 * 64 - 30  # the mask's line of 255
    assert report.class_shares[1] == pytest.approx(19 * 30 / labelled)
    assert report.class_shares.sum() == pytest.approx(1)
    assert report.ignored_share == pytest.approx(30 / (48 * 64))
    assert report.class_photos[:3].tolist() == [2, 2, 0]


@pytest.mark.skipif("EFFSEG_DATA" not in os.environ, reason="EFFSEG_DATA (real photos) is not set")
def test_real_photos():
    train = VOCSegmentation(split="train_aug", boxes=True)
    val = VOCSegmentation(split="val", boxes=True)
    assert not set(ids(train)) & set(ids(val))
    for dataset in (train, val):
        for index in (0, len(dataset) // 2, len(dataset) - 1):
            sample = dataset[index]
            height, width = sample["mask"].shape
            assert sample["image"].shape == (3, height, width)
            assert len(sample["boxes"]) == len(sample["labels"]) > 0
            assert (sample["boxes"][:, 2:] > sample["boxes"][:, :2]).all()
            assert sample["boxes"].min() >= 0 and sample["boxes"][:, 2].max() <= width
