"""Every shipped recipe is read by the command line, says what it trains, and trains it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from effseg import InputError, list_models, resources
from effseg.data.sources.shapes import write_shapes

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
DRAWN = {"train": 8, "val": 4, "size": [64, 80]}
SMALL = {
    "encoder_name": "tu-test_efficientnet",
    "encoder_weights": None,
    "decoder_channels": 8,
    "decoder_layers": 1,
    "head_layers": 1,
    "size": 128,
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_understood(effseg, capsys, path):
    needs = {"folder": ("--data.root=images", "--data.classes=[background, road]")}
    with pytest.raises(SystemExit) as stop:
        effseg("fit", f"--config={path.stem}", *needs.get(path.stem, ()), "--print_config")
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["model"] in list_models()
    assert config["trainer"]["max_epochs"] > 0
    assert path.read_text().startswith("# "), "a recipe says first what it is for"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """VOC, COCO and a folder of one's own, with the miniature's images."""
    root = tmp_path_factory.mktemp("formats")
    voc, coco = root / "VOCdevkit" / "VOC2012", root / "coco2017"
    write_shapes(voc, 8, 4, (64, 80))
    for path in (voc / "Annotations").iterdir():
        text = path.read_text()
        for name, known in (("circle", "cat"), ("square", "dog"), ("triangle", "bird")):
            text = text.replace(name, known)
        for name, known in (("star", "boat"), ("ring", "bus"), ("cross", "car")):
            text = text.replace(name, known)
        path.write_text(text)
    shutil.copytree(voc / "SegmentationClass", voc / "SegmentationClassAug")
    (coco / "annotations").mkdir(parents=True)
    card = resources.load_yaml(resources.find("datasets", "coco2017"))["classes"][1:]
    for split in ("train", "val"):
        names = (voc / f"ImageSets/Main/{split}.txt").read_text().split()
        if split == "train":
            (voc / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(names))
        images, annotations = [], []
        for folder in (coco / f"{split}2017", root / "images" / split, root / "masks" / split):
            folder.mkdir(parents=True)
        for i, name in enumerate(names, start=1 if split == "train" else 50):
            # Other files than VOC's: the two are no copies of each other.
            shutil.copy(voc / f"JPEGImages/{name}.jpg", coco / f"{split}2017/{i}.jpg")
            shutil.copy(voc / f"JPEGImages/{name}.jpg", root / "images" / split)
            mask = np.asarray(Image.open(voc / f"SegmentationClass/{name}.png"))
            Image.fromarray((mask == 1).astype(np.uint8)).save(root / f"masks/{split}/{name}.png")
            images.append({"id": i, "file_name": f"{i}.jpg", "height": 64, "width": 80})
            corners = [10, 10, 60, 10, 60, 50, 10, 50]
            annotations.append(
                {"id": i, "image_id": i, "category_id": 18, "iscrowd": 0, "area": 2000}
                | {"bbox": [10, 10, 50, 40], "segmentation": [corners]}
            )
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": entry["id"], "name": entry["name"]} for entry in card],
        }
        (coco / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    (root / "classes.txt").write_text("background\nroad\n")
    return root


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_trains_with_its_keys(effseg, root, tmp_path, path):
    """Only the network, the crop and the data are small, and it ends after a step."""
    recipe = yaml.safe_load(path.read_text())
    data, model = recipe["data"], recipe["model"]
    model["model_args"] = model.get("model_args", {}) | SMALL
    if not model["model"].startswith("efficientdet"):
        model["model_args"]["head_channels"] = 8
    shapes = False
    for source in (*data["train"].values(), *data["val"].values()):
        if source["class_path"] == "effseg.data.Shapes":
            source["init_args"] |= DRAWN
            shapes = True
    data["root"] = str(root / "shapes" if shapes else root)
    if "classes" in data:
        data["classes"] = str(root / "classes.txt")
    data |= {"batch_size": 4, "crop_size": 64, "num_workers": 0}
    recipe["trainer"] |= {"accelerator": "cpu", "max_steps": 1}
    config, run = tmp_path / path.name, tmp_path / "run"
    config.write_text(yaml.safe_dump(recipe))
    code, out, err = effseg(
        "fit", f"--config={config}", f"--trainer.default_root_dir={run}", "--trainer.logger=false"
    )
    assert code == 0, err
    assert model["model"] in out and (run / "model" / "model.safetensors").is_file()
    heads = {"effseg": ("mIoU",), "efficientdet": ("AP50",), "effsegdet": ("mIoU", "AP50")}
    for name in heads[model["model"].partition("_")[0]]:
        assert f"{name} " in out


def test_a_recipe_that_is_not_there_is_not_called_bad_yaml(tmp_path):
    with pytest.raises(InputError) as caught:
        resources.load_yaml(tmp_path / "gone.yaml")
    assert str(caught.value) == f"{tmp_path / 'gone.yaml'}: no such file"
