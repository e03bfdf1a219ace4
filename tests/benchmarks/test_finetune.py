"""Few images of new classes: the command makes a row a run, and COCO's categories become groups."""

import json
import random
import sys

import pytest
from PIL import Image

from benchmarks import finetune


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Runs of five steps on the miniature, without weights that would be fetched."""
    shipped = finetune.load_recipe("folder")
    shipped["model"]["model_args"]["encoder_weights"] = None
    shipped["data"]["batch_size"] = 2
    monkeypatch.setattr(finetune, "load_recipe", lambda name: shipped)
    monkeypatch.setattr(finetune, "keep_freed_memory", lambda: True)  # not for the other tests
    setting = finetune.Setting((2, 4), crop=64, steps=5, max_side=96)
    monkeypatch.setitem(finetune.SETTINGS, "shapes", setting)
    monkeypatch.setattr(finetune, "SCORED", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_a_row_a_start_and_the_table(small, monkeypatch, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    command = f"finetune.py train shapes --images 2 --seeds 3 --rows {rows}"
    monkeypatch.setattr(sys, "argv", command.split())
    finetune.main()
    box, plain = map(json.loads, rows.read_text().splitlines())
    assert (box["start"], plain["start"]) == ("box", "ImageNet")
    same = ("data", "images", "scored", "seed", "steps", "protocol")
    assert [box[key] for key in same] == ["shapes", 2, 2, 3, 5, "max96"]
    assert [plain[key] for key in same] == [box[key] for key in same]
    assert 0 <= box["miou"] <= 1 and box["miou"] != plain["miou"]
    assert "start fresh" in capsys.readouterr().out  # the box's trunk, not its classes
    with rows.open("a") as file:  # a longer run is another table
        file.write(json.dumps(plain | {"steps": 10, "miou": 0.0}) + "\n")
    monkeypatch.setattr(sys, "argv", f"finetune.py table --rows {rows}".split())
    finetune.main()
    title, _, head, _, line, *rest = capsys.readouterr().out.splitlines()
    assert title == "shapes, 5 steps" and "from the package" in head
    assert "shapes, 10 steps" in rest
    assert f"{box['miou']:.3f}" in line and f"{plain['miou']:.3f}" in line


def test_categories_become_groups_and_images_without_them_are_left_out(monkeypatch, tmp_path):
    coco = tmp_path / "coco2017"
    (coco / "train2017").mkdir(parents=True)
    (coco / "annotations").mkdir()
    names = ["person", "pizza", "zebra", "bear"]

    def instance(image, category, side):
        square = [0, 0, side, 0, side, side, 0, side]
        return {
            "image_id": image,
            "category_id": category,
            "bbox": [0, 0, side, side],
            "area": side * side,
            "iscrowd": 0,
            "segmentation": [square],
        }

    # A person; a zebra and a person; a bear; a pizza below a hundredth of the image.
    objects = [(1, 1, 20), (2, 3, 20), (2, 1, 30), (3, 4, 20), (4, 2, 3)]
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 40, "width": 40} for i in range(1, 5)
        ],
        "annotations": [{"id": i, **instance(*each)} for i, each in enumerate(objects, 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
    }
    for i in range(1, 5):
        Image.new("RGB", (40, 40)).save(coco / "train2017" / f"{i}.png")
    (coco / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    monkeypatch.setenv("EFFSEG_DATA", str(tmp_path))
    folder = tmp_path / "groups"
    folder.mkdir()
    source = finetune.group_categories("train2017", folder)
    assert source.ids == ["2", "3"]
    assert source.mask_classes.names == ("background", *finetune.GROUPS)
    for index in range(2):
        mask = source.read_labels(index)["mask"]
        assert mask.unique().tolist() == [0, 1]  # wild animal; the person is background
        assert (mask == 1).sum() == 400
        assert source.image(index).shape == (3, 40, 40)
    few = finetune.group_categories("train2017", folder, 1, random.Random(0))
    assert len(few.ids) == 1
