"""The recipes of docs/your-own-images.md, each tried with an export in that tool's form."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from effseg.training.recipes import read_data

PAGE = Path(__file__).parent.parent / "docs" / "your-own-images.md"
SIZE = (40, 60)
MASK = np.zeros(SIZE, np.uint8)
MASK[10:20, 10:30], MASK[25:35, 30:50] = 1, 2
NAMES = ("background", "road", "car")


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 255, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def plain(root):
    for i in range(5):
        image(root / f"photos/{i}.jpg")
        save(root / f"labels/{i}_mask.png", MASK)
    (root / "classes.txt").write_text("background\nroad\ncar\n")
    return {"root": str(root), "classes": str(root / "classes.txt")}


def cvat(root):
    (root / "export").mkdir()
    (root / "export/labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:52,209,183::\ncar:250,50,83::\n"
    )
    (root / "export/ImageSets/Segmentation").mkdir(parents=True)
    (root / "export/ImageSets/Segmentation/default.txt").write_text("site/0\n")
    colours = np.array([(0, 0, 0), (52, 209, 183), (250, 50, 83)], np.uint8)
    for i in range(5):
        image(root / f"export/JPEGImages/site/{i}.jpg")
        save(root / f"export/SegmentationClass/site/{i}.png", colours[MASK])
        save(root / f"export/SegmentationObject/site/{i}.png", colours[MASK])


def labelme(root):
    def rectangle(label, x1, y1, x2, y2):
        points = [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]
        return {"label": label, "points": points, "shape_type": "polygon", "flags": {}}

    shapes = [rectangle("road", 10, 10, 29, 19), rectangle("car", 30, 25, 49, 34)]
    for i in range(5):
        image(root / f"data/images/{i}.jpg")
        (root / f"data/images/{i}.json").write_text(
            json.dumps(
                {
                    "version": "5.4.1",
                    "flags": {},
                    "shapes": shapes,
                    "imagePath": f"{i}.jpg",
                    "imageData": None,
                    "imageHeight": SIZE[0],
                    "imageWidth": SIZE[1],
                }
            )
        )
    (root / "data/labels.txt").write_text("__ignore__\n_background_\nroad\ncar\n")


def roboflow(root):
    for split in ("train", "valid"):
        for i in range(3):
            image(root / f"export/{split}/{split}{i}_jpg.rf.0a1b.jpg")
            save(root / f"export/{split}/{split}{i}_jpg.rf.0a1b_mask.png", MASK)
        (root / f"export/{split}/_classes.csv").write_text(
            "Pixel Value, Class\n0, background\n1, road\n2, car\n"
        )
    (root / "export/README.roboflow.txt").write_text("exported")


@pytest.mark.parametrize(
    ("heading", "export"),
    [("Plain PNG masks", plain), ("CVAT", cvat), ("labelme", labelme), ("Roboflow", roboflow)],
)
def test_an_export_is_read_by_its_recipe(tmp_path, monkeypatch, heading, export):
    monkeypatch.chdir(tmp_path)
    after = PAGE.read_text(encoding="utf-8").partition(f"\n**{heading}**")[2]
    block = re.search(r"```yaml\n(.*?)```", after, re.DOTALL)
    assert block is not None
    content = yaml.safe_load(block[1]) | (export(tmp_path) or {})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": content | {"num_workers": 0}}))
    data = read_data("mine.yaml", None, None)
    data.setup("fit")
    assert data.classes.names == NAMES
    assert len(data.train_set) in (3, 4) and len(data.val_set) in (1, 3)
    for part in (data.train_set, data.val_set):
        assert np.array_equal(part.labels(0)["mask"].numpy(), MASK)
