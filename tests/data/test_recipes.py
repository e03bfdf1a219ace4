"""The data of every recipe: built as the command line builds it, set up, and one batch read."""

import json

import numpy as np
import pytest
import yaml
from jsonargparse import ArgumentParser

from effseg import resources
from effseg.data import ImageDataModule, Shapes
from effseg.data.dataset import flatten

RECIPES = sorted(resources.folder("configs").glob("*.yaml"))


@pytest.fixture
def root(voc, files):
    """VOC, COCO and a folder of one's own, a few images each."""
    card = resources.load_yaml(resources.find("datasets", "coco2017"))["classes"][1:]
    categories = [{"id": entry["id"], "name": entry["name"]} for entry in card]
    coco = voc.root / "coco2017"
    (coco / "annotations").mkdir(parents=True)
    for first, split in ((0, "train2017"), (50, "val2017")):
        images, annotations = [], []
        for number in range(first, first + 8):
            files.image(coco / split / f"{number}.jpg", (60, 80), number)
            images.append({"id": number, "file_name": f"{number}.jpg", "height": 60, "width": 80})
            corners = [10, 10, 60, 10, 60, 50, 10, 50]
            annotations.append(
                {"id": number, "image_id": number, "category_id": 18, "iscrowd": 0, "area": 2000}
                | {"bbox": [10, 10, 50, 40], "segmentation": [corners]}
            )
        content = {"images": images, "annotations": annotations, "categories": categories}
        (coco / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    for split in ("train", "val"):
        for number in range(4):
            files.image(voc.root / f"images/{split}/{number}.jpg", (60, 80))
            files.mask(voc.root / f"masks/{split}/{number}.png", np.ones((60, 80)))
    (voc.root / "classes.txt").write_text("background\nroad\n")
    return voc.root


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_data_are_built_and_read(path, root, tmp_path):
    data = yaml.safe_load(path.read_text())["data"]
    config = tmp_path / "data.yaml"
    config.write_text(yaml.safe_dump({"data": data}))
    parser = ArgumentParser()
    parser.add_class_arguments(ImageDataModule, "data")
    parser.add_argument("--config", action="config")
    shapes = "Shapes" in config.read_text()
    given = {
        "root": root / "shapes" if shapes else root,
        "batch_size": 2,
        "crop_size": 64,
        "num_workers": 0,
        "seed": 0,
    }
    if "classes" in data:
        given["classes"] = root / "classes.txt"
    arguments = [f"--data.{key}={value}" for key, value in given.items()]
    module = parser.instantiate(parser.parse_args([f"--config={config}", *arguments])).data
    sources = [source for _, source in flatten(module.train | {"val": [*module.val.values()]})]
    for source in sources:
        if isinstance(source, Shapes):
            source.drawing = {"train": 8, "val": 2, "size": (64, 80), "seed": 0}
    module.prepare_data()
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (2, 3, 64, 64)
    assert set(batch["tasks"]) <= set(batch["rows"]) == set(module.train_set.tasks)
    evaluated = [batch for batch in module.val_dataloader()]
    names = {name for batch in evaluated for name in batch["source"]}
    assert names == set(module.val) == set(module.val_sources)


def test_there_are_recipes():
    assert len(RECIPES) >= 17
