"""The data module as recipes write it, read by the parser of the command line."""

import yaml
from jsonargparse import ArgumentParser

from effseg.data import ImageDataModule, Shapes, Stage


def test_the_miniature_is_drawn_by_prepare_data(tmp_path):
    drawing = {"train": 8, "val": 3, "size": (64, 80)}
    data = ImageDataModule(
        {
            "masks": Shapes(masks=(0, 0.5), boxes=None, **drawing),
            "boxes": Shapes(masks=None, boxes=(0.5, 1), **drawing),
        },
        {"both": Shapes(split="val", **drawing)},
        root=str(tmp_path / "s"),
        batch_size=4,
        crop_size=64,
        num_workers=0,
        weights="equal",
    )
    data.prepare_data()
    data.setup("fit")
    assert data.num_classes == 7 and len(data.train_set) == 8
    for batch in data.train_dataloader():
        assert {task: len(rows) for task, rows in batch["rows"].items()} == {
            "segmentation": 2,
            "detection": 2,
        }
    (batch,) = data.val_dataloader()
    assert (
        batch["rows"]["segmentation"].tolist() == batch["rows"]["detection"].tolist() == [0, 1, 2]
    )


RECIPE = """
data:
  train:
    voc: {class_path: effseg.data.VOC, init_args: {masks: train_aug, boxes: train_aug}}
    more:
    - {class_path: effseg.data.COCO, init_args: {masks: voc21}}
    - {class_path: effseg.data.Shapes, init_args: {masks: [0, 0.5]}}
  val:
    voc: {class_path: effseg.data.VOC, init_args: {masks: val, boxes: seg_val}}
  space: voc
  weights: 2.0
  stages:
  - {tasks: [detection], epochs: 3}
  - {freeze_encoder: 2}
  augment:
  - {class_path: albumentations.VerticalFlip, init_args: {p: 0.5}}
"""


def test_a_recipe_names_everything_and_the_command_line_overrides_it(tmp_path):
    parser = ArgumentParser()
    parser.add_class_arguments(ImageDataModule, "data")
    parser.add_argument("--config", action="config")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    assert yaml.safe_load(RECIPE)["data"]["weights"] == 2.0
    arguments = ["--data.train.voc.masks", "train", "--data.root", "here", "--data.seed", "3"]
    actual = parser.instantiate(parser.parse_args([f"--config={path}", *arguments]))
    data = actual.data
    assert data.train["voc"].masks == "train" and data.train["voc"].boxes == "train_aug"
    assert data.train["voc"].root == data.train["more"][1].root == "here"
    assert data.train["more"][1].shares["masks"] == (0.0, 0.5)
    assert data.weights == 2.0 and data.seed == 3
    assert data.schedule.stages[0] == Stage(["detection"], 3)
    assert data.schedule.stages[1].freeze_encoder == 2
    data.train.pop("more")
    assert type(data.augment[0]).__name__ in ("VerticalFlip", "dict")
