import numpy as np
import pytest

from effseg.data.check import check
from effseg.data.folder import FolderSegmentation, load_classes
from effseg.errors import InputError

NAMES = ["background", "road", "car"]


@pytest.fixture
def root(tmp_path, files):
    for split in ("train", "val"):
        for name in ("x", "y"):
            files.photo(tmp_path / f"images/{split}/{name}.jpg", (20, 30))
            files.mask(tmp_path / f"masks/{split}/{name}.png", np.full((20, 30), 2))
    return tmp_path


def test_pairs_by_name(root):
    dataset = FolderSegmentation(root, NAMES, "train")
    assert [pair.id for pair in dataset.pairs] == ["x", "y"]
    assert dataset.classes.names == tuple(NAMES)
    assert dataset[1]["mask"].unique().tolist() == [2]


def test_without_a_split_the_files_lie_directly_in_images(root):
    for kind in ("images", "masks"):
        (root / kind / "train").rename(root / "t")
        for path in list((root / "t").iterdir()):
            path.rename(root / kind / path.name)
        (root / "t").rmdir()
    dataset = FolderSegmentation(root, NAMES)
    assert len(dataset) == 2  # the folder val is no photo


def test_lonely_files_are_named(root, files):
    (root / "masks/val/y.png").unlink()
    with pytest.raises(InputError, match=r"y\.jpg: its mask y\.\* is missing in .*\(1 of 2"):
        FolderSegmentation(root, NAMES, "val")
    files.mask(root / "masks/val/y.png", np.zeros((20, 30)))
    files.mask(root / "masks/val/z.png", np.zeros((20, 30)))
    with pytest.raises(InputError, match=r"z\.png: its photo z\.\* is missing"):
        FolderSegmentation(root, NAMES, "val")


def test_check_lists_lonely_files_too(root, files):
    (root / "masks/val/y.png").unlink()
    files.mask(root / "masks/val/z.png", np.zeros((20, 30)))
    report = check(FolderSegmentation(root, NAMES, "val", check_files=False))
    assert len(report.problems) == 2 and report.photos == 3
    assert "y.png" in report.problems[0] and "z.jpg" in report.problems[1]


def test_bad_folders_are_named(root, files):
    with pytest.raises(InputError, match="images/test: no such folder"):
        FolderSegmentation(root, NAMES, "test")
    files.photo(root / "images/train/x.png", (20, 30))
    with pytest.raises(InputError, match=r"x\.png: a second photo of this name, beside x\.jpg"):
        FolderSegmentation(root, NAMES, "train")
    (root / "masks/val/x.png").rename(root / "masks/val/x.jpg")
    with pytest.raises(InputError, match=r"masks/val/x\.jpg: no mask; expected one of \.png"):
        FolderSegmentation(root, NAMES, "val")
    for path in (root / "images/val").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="images/val: no photos found"):
        FolderSegmentation(root, NAMES, "val")


def test_unknown_value_and_other_size(root, files):
    files.mask(root / "masks/val/x.png", np.full((20, 30), 200))
    files.mask(root / "masks/val/y.png", np.zeros((30, 20)))
    dataset = FolderSegmentation(root, NAMES, "val")
    with pytest.raises(InputError, match=r"x\.png: mask value 200, expected 0 to 2"):
        dataset[0]
    with pytest.raises(InputError, match=r"y\.png: mask of 20x30 pixels, expected 30x20"):
        dataset[1]


def test_class_files(tmp_path):
    text = tmp_path / "classes.txt"
    text.write_text("background\n\ntraffic light\n")
    assert load_classes(text).names == ("background", "traffic light")
    card = tmp_path / "classes.yaml"
    card.write_text("classes: [background, road]")
    assert load_classes(str(card)).palette == ((0, 0, 0), (128, 0, 0))
    card.write_text(
        "classes: [{name: background, colour: [9, 9, 9]}, {name: road, colour: [1, 2, 3]}]"
    )
    assert load_classes(card).palette == ((9, 9, 9), (1, 2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("classes: [background]", "1 classes, expected 2 to 255"),
        ("classes: [background, road, road]", "'road' comes twice"),
        ("classes: [background, 7]", "class 7, expected a name"),
        ("classes: [{name: a, colour: [0, 0, 0]}, b]", "1 colours for 2 classes"),
        ("classes: [{name: a, colour: [0, 0, 300]}, b]", "expected .r, g, b. from 0 to 255"),
        ("names: [a, b]", "expected the key classes"),
        ("classes: [a, b", "not valid YAML"),
    ],
)
def test_bad_class_files(tmp_path, content, message):
    path = tmp_path / "classes.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"classes\.yaml: .*{message}"):
        load_classes(path)


def test_missing_class_file():
    with pytest.raises(InputError, match=r"gone\.txt: no such file"):
        load_classes("gone.txt")
