"""A VOC 2012 of a few generated images, and files with defects."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effseg.data.classes import voc_colour

XML = (
    "<annotation><object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin>"
    "<ymin>2</ymin><xmax>10</xmax><ymax>12</ymax></bndbox></object><object><name>dog</name>"
    "<difficult>1</difficult><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>40</xmax><ymax>30</ymax>"
    "</bndbox></object></annotation>"
)


def save_image(path: Path, size=(48, 64), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def save_mask(path: Path, values, palette=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if palette:
        image.putpalette([part for index in range(256) for part in voc_colour(index)])
    image.save(path)


def truncate(path: Path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


class TinyVOC:
    """a0 … a3 are train, b0 b1 val, c0 c1 have masks in SegmentationClassAug only.

    As in full VOC 2012, the boxes' val holds images that train_aug has masks of.
    """

    train, val, extra = ["a0", "a1", "a2", "a3"], ["b0", "b1"], ["c0", "c1"]

    def __init__(self, root: Path):
        self.root = root
        self.folder = root / "VOCdevkit" / "VOC2012"
        for number, name in enumerate(self.train + self.val + self.extra):
            save_image(self.image(name), seed=number)
            self.annotation(name).parent.mkdir(exist_ok=True)
            self.annotation(name).write_text(XML)
        for name in self.train + self.val:
            save_mask(self.mask(name), self.values(1))
        for name in self.train + self.val + self.extra:
            save_mask(self.aug_mask(name), self.values(2))
        self.write_list("train", self.train)
        self.write_list("val", self.val)
        self.write_list("trainval", self.train + self.val)
        self.write_list("train", self.train, "Main")
        self.write_list("val", self.val + self.extra, "Main")

    @staticmethod
    def values(label):
        mask = np.zeros((48, 64), np.uint8)
        mask[10:30, 10:40] = label
        mask[10, 10:40] = 255
        return mask

    def image(self, name):
        return self.folder / f"JPEGImages/{name}.jpg"

    def mask(self, name):
        return self.folder / f"SegmentationClass/{name}.png"

    def aug_mask(self, name):
        return self.folder / f"SegmentationClassAug/{name}.png"

    def annotation(self, name):
        return self.folder / f"Annotations/{name}.xml"

    def write_list(self, split, ids, kind="Segmentation"):
        path = self.folder / f"ImageSets/{kind}/{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name}\n" for name in ids))


@pytest.fixture
def voc(tmp_path):
    return TinyVOC(tmp_path / "data")


@pytest.fixture
def files():
    """Helpers: files.image(path), files.mask(path, values), files.truncate(path)."""

    class Files:
        image = staticmethod(save_image)
        mask = staticmethod(save_mask)
        truncate = staticmethod(truncate)

    return Files
