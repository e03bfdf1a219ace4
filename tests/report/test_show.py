"""Data to look at, through the real command line."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effseg.data import Shapes
from effseg.data.sources.shapes import write_shapes
from effseg.report.show import images_of

JOINT = Path(__file__).parents[1] / "conf" / "tiny_joint.yaml"


def test_html_of_a_recipe_has_every_source_and_the_crops(effseg, shapes_root, tmp_path):
    output = tmp_path / "data.html"
    arguments = ("--config", JOINT, "--root", shapes_root, "--batches", "--images", 2)
    code, out, err = effseg("data", "show", *arguments, "--output", output)
    assert code == 0, err
    assert "8 pictures" in out
    page = output.read_text()
    headings = re.findall(r"<h2>(.*?)[:<]", page)
    assert headings == ["train.masks", "train.boxes", "val.both", "crops as training sees them"]
    assert page.count('<img src="data:image/jpeg;base64,') == 8
    for name in ("val_00000", "val_00002", "circle", "ignored"):
        assert name in page
    assert "http" not in page and "<script" not in page


def test_png_of_a_folder(effseg, tmp_path):
    (tmp_path / "classes.txt").write_text("background\n$road$\n")
    for kind in ("images", "masks"):
        (tmp_path / kind / "train").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (40, 30), (0, 0, 255)).save(tmp_path / f"images/train/$a$_{i}.png")
        mask = Image.new("L", (40, 30), 0)
        mask.paste(1, (0, 0, 20, 30))
        mask.save(tmp_path / f"masks/train/$a$_{i}.png")
    output = tmp_path / "new" / "data.png"
    arguments = ("--root", tmp_path, "--classes", tmp_path / "classes.txt", "--split", "train")
    code, _, err = effseg("data", "show", *arguments, "--output", output)
    assert code == 0, err
    pixels = np.asarray(Image.open(output).convert("RGB")).reshape(-1, 3).tolist()
    tinted = [round(0.35 * 0 + 0.65 * 128), 0, int(0.35 * 255)]
    assert [0, 0, 255] in pixels and tinted in pixels  # background as it is, road in its colour
    assert [path.name for path in output.parent.iterdir()] == ["data.png"]


def test_labels_lie_where_the_source_has_them(shapes_root):
    source = Shapes(shapes_root, "val", masks=(0.0, 1.0), boxes=None, val=3, train=8, size=(64, 96))
    group = images_of("val", source, 50)
    assert [image for image, _ in group.pictures] == list(source.ids)
    mask = source.labels(0, (64, 96))["mask"].numpy()
    drawn = np.asarray(group.pictures[0][1]).astype(int)
    image = source.image(0).permute(1, 2, 0).numpy().astype(int)
    changed = np.abs(drawn - image).sum(2) > 0
    assert not changed[mask == 0].any()
    assert changed[mask > 0].mean() > 0.9


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--output", "data.jpg"), "data.jpg"),
        (("--output", "data.png", "--images", "0"), "--images 0"),
        (("--output", "data.png", "--root", "/no/such"), "/no/such"),
        (("--output", "data.png", "--config", "nothing"), "nothing"),
    ],
)
def test_bad_input_is_one_line(effseg, arguments, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = effseg("data", "show", *arguments)
    assert code == 2
    assert err.count("\n") == 1 and word in err
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_one_line(effseg, shapes_root, tmp_path):
    (tmp_path / "file").write_text("x")
    arguments = ("--root", shapes_root, "--split", "val", "--images", 1)
    code, _, err = effseg("data", "show", *arguments, "--output", tmp_path / "file" / "data.png")
    assert code == 2 and err.count("\n") == 1 and "data.png: cannot be written" in err


def test_a_generated_miniature_of_other_settings_is_not_redrawn(effseg, tmp_path):
    root = write_shapes(tmp_path / "shapes", 2, 1, (64, 80))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    code, _, err = effseg("data", "show", "--root", root, "--output", tmp_path / "data.png")
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
