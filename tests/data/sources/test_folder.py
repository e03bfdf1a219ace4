import numpy as np
import pytest

from effseg.data import Folder
from effseg.data.check import check
from effseg.errors import InputError

NAMES = ["background", "road", "car"]


@pytest.fixture
def root(tmp_path, files):
    for split in ("train", "val"):
        for name in ("x", "y"):
            files.image(tmp_path / f"images/{split}/{name}.jpg", (20, 30))
            files.mask(tmp_path / f"masks/{split}/{name}.png", np.full((20, 30), 2))
    return tmp_path


def test_pairs_by_name(root):
    dataset = Folder(root, NAMES, "train")
    assert dataset.ids == ["x", "y"]
    assert dataset.classes.names == tuple(NAMES)
    assert dataset.labels(1)["mask"].unique().tolist() == [2]


def test_without_a_split_the_files_lie_directly_in_images(root):
    for kind in ("images", "masks"):
        (root / kind / "train").rename(root / "t")
        for path in list((root / "t").iterdir()):
            path.rename(root / kind / path.name)
        (root / "t").rmdir()
    dataset = Folder(root, NAMES, None)
    assert len(dataset) == 2  # the folder val is no image


def test_unpaired_files_are_named(root, files):
    (root / "masks/val/y.png").unlink()
    with pytest.raises(InputError, match=r"y\.jpg: its mask y\.\* is missing in .*\(1 of 2"):
        Folder(root, NAMES, "val").verify()
    files.mask(root / "masks/val/y.png", np.zeros((20, 30)))
    files.mask(root / "masks/val/z.png", np.zeros((20, 30)))
    with pytest.raises(InputError, match=r"z\.png: its image z\.\* is missing"):
        Folder(root, NAMES, "val").verify()


def test_check_lists_unpaired_files_too(root, files):
    (root / "masks/val/y.png").unlink()
    files.mask(root / "masks/val/z.png", np.zeros((20, 30)))
    report = check(Folder(root, NAMES, "val"))
    assert len(report.problems) == 2 and report.images == 3
    assert "y.png" in report.problems[0] and "z.jpg" in report.problems[1]


def test_bad_folders_are_named(root, files):
    with pytest.raises(InputError, match="images/test: no such folder"):
        Folder(root, NAMES, "test").verify()
    files.image(root / "images/train/x.png", (20, 30))
    with pytest.raises(InputError, match=r"x\.png: a second image of this name, beside x\.jpg"):
        Folder(root, NAMES, "train").verify()
    (root / "masks/val/x.png").rename(root / "masks/val/x.jpg")
    with pytest.raises(InputError, match=r"masks/val/x\.jpg: no mask; expected one of \.png"):
        Folder(root, NAMES, "val").verify()
    for path in (root / "images/val").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="images/val: no images found"):
        Folder(root, NAMES, "val").verify()


def test_unknown_value_and_other_size(root, files):
    files.mask(root / "masks/val/x.png", np.full((20, 30), 200))
    files.mask(root / "masks/val/y.png", np.zeros((30, 20)))
    dataset = Folder(root, NAMES, "val")
    with pytest.raises(InputError, match=r"x\.png: mask value 200, expected 0 to 2"):
        dataset.labels(0)
    with pytest.raises(InputError, match=r"y\.png: 20x30 pixels, expected 30x20"):
        dataset.labels(1)


def test_paths_and_a_suffix_of_the_masks(tmp_path, files):
    for name in ("x", "y"):
        files.image(tmp_path / f"photos/{name}.jpg", (20, 30))
        files.mask(tmp_path / f"labels/val/{name}_mask.png", np.full((20, 30), 1))
    source = Folder(tmp_path, NAMES, "val", "photos", "labels/{split}", "_mask")
    source.verify()
    assert source.ids == ["x", "y"] and source.labels(1)["mask"].unique().tolist() == [1]
    files.mask(tmp_path / "labels/val/z.png", np.zeros((20, 30)))
    with pytest.raises(InputError, match=r"z\.png: expected a name that ends with '_mask'"):
        Folder(tmp_path, NAMES, "val", "photos", "labels/{split}", "_mask").verify()


def test_root_and_classes_may_come_from_the_data_module(root):
    source = Folder(split="val")
    source.complete(str(root), NAMES)
    assert source.classes.names == tuple(NAMES) and len(source) == 2
    custom = Folder(root, ["background", "sky"])
    custom.complete("elsewhere", NAMES)
    assert custom.classes.names == ("background", "sky") and len(custom) == 2
    with pytest.raises(InputError, match="no class list"):
        _ = Folder(root).classes
