"""Data in VOC's layout that other tools wrote."""

import shutil

import pytest
import torch
from PIL import Image

from effseg import InputError
from effseg.data import VOC

TURNED = (
    "<annotation><size><width>{}</width><height>{}</height></size><object><name>cat</name>"
    "<attributes><attribute><name>occluded</name><value>False</value></attribute><attribute>"
    "<name>rotation</name><value>{}</value></attribute></attributes><bndbox><xmin>21</xmin>"
    "<ymin>11</ymin><xmax>40</xmax><ymax>20</ymax></bndbox></object></annotation>"
)


@pytest.mark.parametrize("suffix", [".jpeg", ".JPG", ".png"])
def test_images_of_other_formats(voc, suffix):
    for name in voc.train + voc.val + voc.extra:
        with Image.open(voc.image(name)) as image:
            image.save(voc.image(name).with_suffix(".new.png"))
        voc.image(name).unlink()
        voc.image(name).with_suffix(".new.png").rename(voc.image(name).with_suffix(suffix))
    for masks, boxes in (("train", None), ("train_aug", None), (None, "val"), (None, "seg_val")):
        source = VOC(voc.root, masks, boxes)
        source.verify()
        assert source.image(0).shape == (3, 48, 64)
        assert source.image_path(0).suffix == suffix


def test_data_of_boxes_alone_have_no_lists_of_masks(voc):
    """CVAT's and LabelImg's exports; a list may name files with spaces."""
    shutil.rmtree(voc.folder / "ImageSets/Segmentation")
    voc.image("a0").rename(voc.image("my image 1"))
    voc.annotation("a0").rename(voc.annotation("my image 1"))
    voc.write_list("train", ["my image 1", *voc.train[1:]], "Main")
    source = VOC(voc.root, None, "train", classes=["background", "cat", "dog"])
    source.verify()
    assert source.ids[0] == "my image 1" and len(source.labels(0)["boxes"]) == 2
    with pytest.raises(InputError, match=r"Segmentation/train\.txt: no such file"):
        VOC(voc.root, "train", None).verify()


def test_of_several_files_vocs_own_format_is_read(voc):
    for suffix in (".jpeg", ".png"):
        Image.new("RGB", (9, 9)).save(voc.image("a0").with_suffix(suffix))
    assert VOC(voc.root, "train", None).image_path(0) == voc.image("a0")


def test_hidden_files_of_macos_are_no_masks(voc):
    ids = VOC(voc.root, "train_aug", None).ids
    voc.aug_mask("._a0").write_bytes(b"AppleDouble")
    assert VOC(voc.root, "train_aug", None).ids == ids


def test_a_rotated_box_of_cvat_becomes_the_box_around_it(voc):
    """CVAT writes the box before its rotation about the centre, which is (30, 15) here."""
    source = VOC(voc.root, None, "val")
    for degrees, box in ((0, [20, 10, 40, 20]), (90.0, [25, 5, 35, 25]), (180, [20, 10, 40, 20])):
        voc.annotation("b0").write_text(TURNED.format(64, 48, degrees))
        torch.testing.assert_close(source.labels(0)["boxes"], torch.tensor([box]).float())
    voc.annotation("b0").write_text(TURNED.format(64, 48, 30))
    half = (10 * 3**0.5 / 2 + 5 / 2, 10 / 2 + 5 * 3**0.5 / 2)
    expected = torch.tensor([[30 - half[0], 15 - half[1], 30 + half[0], 15 + half[1]]])
    torch.testing.assert_close(source.labels(0)["boxes"], expected)
    for wrong in ("left", "nan"):
        voc.annotation("b0").write_text(TURNED.format(64, 48, wrong))
        with pytest.raises(InputError, match=f"object 1: rotation '{wrong}', expected"):
            source.labels(0)


def test_a_size_without_the_exif_rotation_is_explained(voc):
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(voc.image("b0")) as image:
        image.save(voc.image("b0"), exif=exif)
    voc.annotation("b0").write_text(TURNED.format(64, 48, 0))
    with pytest.raises(
        InputError, match=r"64x48 pixels, expected 48x64 .* its EXIF tag \(the labels"
    ):
        VOC(voc.root, None, "val").labels(0)
