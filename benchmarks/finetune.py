"""Few images of new classes: what starting from the model in the box is worth.

    python -m benchmarks.finetune train --images 25 50 100 --seeds 0 1
    python -m benchmarks.finetune table

`train` runs the recipe `folder` on the drawn miniature, whose six shapes the box has never
seen: once from the box (`init_from: voc`), once from the encoder's ImageNet weights, with the
same steps, crops and seed. It appends a row a run to docs/benchmarks/finetune.jsonl; `table`
prints the table of docs/finetune.md.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from benchmarks.report import DOCS, Columns, table
from benchmarks.short import CLIP, load_recipe
from benchmarks.timing import Row
from effseg.allocator import keep_freed_memory
from effseg.data import ImageDataModule, Shapes
from effseg.training.progress import LineProgress
from effseg.training.task import TrainingTask

ROWS = DOCS / "finetune.jsonl"
STARTS = {"box": "voc", "ImageNet": None}
EPOCHS = 5  # the first of them warms up
SIZES = (25, 50, 100)
VAL = 50  # images that are scored


def train(images: int, start: str, seed: int, steps: int, crop: int) -> Row:
    """Train on so many images, evaluate once, and return the row."""
    recipe = load_recipe("folder")
    seed_everything(seed, workers=True)
    drawn: dict[str, Any] = {"train": max(SIZES), "val": VAL}
    share = (0.0, images / max(SIZES))
    data = ImageDataModule(
        train={"shapes": Shapes(masks=share, boxes=None, **drawn)},
        val={"shapes": Shapes(split="val", boxes=None, **drawn)},
        crop_size=crop,
        scale=tuple(recipe["data"]["scale"]),
        batch_size=recipe["data"]["batch_size"],
        steps=steps // EPOCHS,
        num_workers=0,
    )
    data.prepare_data()
    data.setup("fit")
    task = TrainingTask(
        **recipe["model"] | {"init_from": STARTS[start]},
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
        "images": images,
        "start": start,
        "seed": seed,
        "miou": round(float(task.scores["miou"]), 4),
        "protocol": task.scores["protocol"],
        "steps": trainer.global_step,
        "batch": data.batch_size,
        "crop": crop,
        "train_minutes": round(minutes, 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def summarise(rows: Sequence[Row]) -> str:
    """Return the table: mIoU of each start by the number of images, mean and seeds."""
    groups: list[Row] = []
    for images in sorted({row["images"] for row in rows}):
        group: Row = {"images": images}
        for start in STARTS:
            scores = [r["miou"] for r in rows if (r["images"], r["start"]) == (images, start)]
            if scores:
                group[start] = f"{mean(scores):.3f} ({', '.join(f'{s:.3f}' for s in scores)})"
        groups.append(group)
    columns: Columns = {
        "images": lambda row: row["images"],
        "mIoU from the box (each seed)": lambda row: row["box"],
        "from ImageNet": lambda row: row["ImageNet"],
    }
    return table(groups, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("train")
    run.add_argument("--images", type=int, nargs="+", default=list(SIZES), choices=SIZES)
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    run.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS)
    run.add_argument("--steps", type=int, default=40)
    run.add_argument("--crop", type=int, default=128)
    run.add_argument("--output", type=Path, default=ROWS)
    actions.add_parser("table")
    options = parser.parse_args()
    if options.action == "table":
        rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
        print(summarise(rows), end="")
        return
    keep_freed_memory()
    for seed in options.seeds:
        for images in options.images:
            for start in options.starts:
                row = train(images, start, seed, options.steps, options.crop)
                print(row, flush=True)
                with options.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
