"""Few images of new classes: how much starting from the bundled model gains.

    python -m benchmarks.finetune train shapes --seeds 0 1 --steps 240
    EFFSEG_DATA=DATA python -m benchmarks.finetune train coco --seeds 0 1 --steps 240
    python -m benchmarks.finetune table

`train` runs the recipe `folder` on classes that the bundled model has never seen: the six shapes
of the drawn miniature, or five groups of COCO categories outside VOC's twenty (`GROUPS`), in images
of which they cover at least 1 %. It starts once from that model (`init_from: voc`) and once from
the encoder's ImageNet weights, with the same images, steps, crops and seed, and appends a row per
run to docs/benchmarks/finetune.jsonl; `table` prints the tables of docs/finetune.md.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer, seed_everything

from benchmarks.report import DOCS, Columns, table
from benchmarks.short import CLIP, load_recipe
from benchmarks.timing import Row
from effseg.allocator import keep_freed_memory
from effseg.data import COCO, ImageDataModule, Shapes
from effseg.data.sources.source import Source
from effseg.training.progress import LineProgress
from effseg.training.task import TrainingTask

ROWS = DOCS / "finetune.jsonl"
STARTS = {"box": "voc", "ImageNet": None}
EPOCHS = 5  # the first of them is the warm-up
GROUPS = {
    "wild animal": ("elephant", "zebra", "giraffe", "bear"),
    "food": ("pizza", "sandwich", "donut", "cake", "hot dog", "broccoli", "banana", "orange"),
    "bed": ("bed",),
    "kitchen": ("oven", "refrigerator", "microwave", "sink"),
    "bowl": ("bowl",),
}
"""COCO categories of each class; other categories are background."""
SHARE = 0.01
"""Least share of an image that the classes cover."""
SCORED = 50
"""Images of the miniature."""


class Setting(NamedTuple):
    """How to train and score on a dataset."""

    images: tuple[int, ...]
    crop: int
    steps: int
    max_side: int | None = None


SETTINGS = {
    "shapes": Setting((25, 50, 100), crop=128, steps=40),
    # The size at which the bundled model was trained.
    "coco": Setting((25, 50, 70), crop=192, steps=40, max_side=320),
}


def shapes_sources(images: int, seed: int, folder: Path) -> list[Source]:
    """Return `images` training images of the miniature, and its evaluation images."""
    del seed, folder
    most = max(SETTINGS["shapes"].images)
    drawn: dict[str, Any] = {"train": most, "val": SCORED, "boxes": None}
    return [Shapes(masks=(0.0, images / most), **drawn), Shapes(split="val", **drawn)]


def coco_sources(images: int, seed: int, folder: Path) -> list[Source]:
    """Return randomly chosen images of COCO's train2017, and all of its val2017."""
    chosen = random.Random(seed)
    return [
        group_categories("train2017", folder, images, chosen),
        group_categories("val2017", folder),
    ]


def group_categories(
    split: str, folder: Path, images: int | None = None, chosen: random.Random | None = None
) -> Source:
    """Write a split with the groups as categories, without images that have none of them."""
    whole = COCO(split=split)
    content = json.loads(whole.json.read_text(encoding="utf-8"))
    group = {name: number for number, names in enumerate(GROUPS.values(), 1) for name in names}
    numbers = {entry["id"]: group.get(entry["name"]) for entry in content["categories"]}
    content["annotations"] = [
        each | {"category_id": numbers[each["category_id"]]}
        for each in content["annotations"]
        if numbers[each["category_id"]]
    ]
    area: Counter[int] = Counter()
    for each in content["annotations"]:
        area[each["image_id"]] += each["area"]
    kept = [e for e in content["images"] if area[e["id"]] >= SHARE * e["width"] * e["height"]]
    if chosen is not None:
        chosen.shuffle(kept)  # with the same seed smaller sets are subsets of larger ones
    content["images"] = kept[:images]
    ids = {entry["id"] for entry in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    content["categories"] = [{"id": i, "name": n} for i, n in enumerate(GROUPS, 1)]
    path = folder / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    pictures = str((whole.folder / split).resolve())
    return COCO(folder, split, masks="file", boxes=None, images=pictures)


SOURCES = {"shapes": shapes_sources, "coco": coco_sources}


def train(kind: str, images: int, start: str, seed: int, steps: int) -> Row:
    """Train on `images` images, evaluate once, and return the row."""
    recipe, setting = load_recipe("folder"), SETTINGS[kind]
    seed_everything(seed, workers=True)
    with tempfile.TemporaryDirectory() as folder:
        trained, scored = SOURCES[kind](images, seed, Path(folder))
        data = ImageDataModule(
            train={kind: trained},
            val={kind: scored},
            crop_size=setting.crop,
            scale=tuple(recipe["data"]["scale"]),
            max_side=setting.max_side,
            batch_size=recipe["data"]["batch_size"],
            steps=steps // EPOCHS,
            num_workers=0,
        )
        data.prepare_data()
        data.setup("fit")
        return run(data, recipe["model"], setting, start) | {
            "data": kind,
            "images": len(trained),
            "scored": len(scored),
            "start": start,
            "seed": seed,
        }


def run(data: ImageDataModule, model: dict[str, Any], setting: Setting, start: str) -> Row:
    """Train a recipe's model, and return its score and settings."""
    protocol = f"max{setting.max_side}" if setting.max_side else "whole"
    task = TrainingTask(
        **model | {"init_from": STARTS[start], "segmentation": {"protocol": protocol}},
        classes=data.class_names,
        palette=data.palette,
        train_sources=data.train_sources,
        val_sources=data.val_sources,
    )
    common: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "gradient_clip_val": CLIP,
    }
    trainer = Trainer(**common, max_epochs=EPOCHS, limit_val_batches=0, callbacks=[LineProgress()])
    began = time.monotonic()
    trainer.fit(task, data)
    minutes = (time.monotonic() - began) / 60
    Trainer(**common).validate(task, datamodule=data, verbose=False)
    return {
        "miou": round(float(task.scores["miou"]), 4),
        "protocol": task.scores["protocol"],
        "steps": trainer.global_step,
        "batch": data.batch_size,
        "crop": setting.crop,
        "train_minutes": round(minutes, 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def summarise(rows: Sequence[Row]) -> str:
    """Return the table: mIoU of each start by the number of images and the seed."""
    pairs: dict[tuple[int, int], Row] = {}
    for row in sorted(rows, key=lambda row: (row["images"], row["seed"])):
        pairs.setdefault((row["images"], row["seed"]), {})[row["start"]] = f"{row['miou']:.3f}"
    columns: Columns = {
        "images": lambda row: row["images"],
        "seed": lambda row: str(row["seed"]),
        "from the package": lambda row: row["box"],
        "from ImageNet": lambda row: row["ImageNet"],
    }
    listed = [{"images": n, "seed": seed, **scores} for (n, seed), scores in pairs.items()]
    return table(listed, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    training = actions.add_parser("train")
    training.add_argument("data", choices=SETTINGS)
    training.add_argument("--images", type=int, nargs="+", help="default: all three numbers")
    training.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    training.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS)
    training.add_argument("--steps", type=int, help="of a run")
    for action in (training, actions.add_parser("table")):
        action.add_argument("--rows", type=Path, default=ROWS, help="the file of the rows")
    options = parser.parse_args()
    if options.action == "table":
        rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
        for kind, steps in dict.fromkeys((row["data"], row["steps"]) for row in rows):
            together = [row for row in rows if (row["data"], row["steps"]) == (kind, steps)]
            print(f"{kind}, {steps} steps\n\n{summarise(together)}")
        return
    keep_freed_memory()
    setting = SETTINGS[options.data]
    for seed in options.seeds:
        for images in options.images or setting.images:
            for start in options.starts:
                row = train(options.data, images, start, seed, options.steps or setting.steps)
                print(row, flush=True)
                with options.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
