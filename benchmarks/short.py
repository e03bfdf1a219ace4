"""Train our networks and peers by one short recipe, and tabulate their scores.

    python -m benchmarks.short segmentation train effseg FPN DeepLabV3Plus --seed 0
    python -m benchmarks.short segmentation train effseg context --seed 0 --steps 400 --crop 320
    python -m benchmarks.short segmentation table

All networks of a task share its recipe (data, crops, steps, optimiser, frozen levels, EMA, seed)
and the same encoder with the same weights; a run takes minutes on a few cores. `train` appends a
row per run to a .jsonl file in docs/benchmarks; given again, it continues an interrupted run.
`score` scores the saved weights of rows again, `table` writes the .md file beside it. EFFSEG_DATA
is the folder of the data.

`effseg` is the recipe's network, `no-auxiliary` the same without the auxiliary losses, which no
other network has: `paper` is ours with the paper's per-pixel head, `context` with `head_context`
alone; `no-context`, `no-pyramid` and `no-refinement` lack one of the three parts. `effdet` has that
library's initialisation, assignment and loss; `same-start` is ours from effdet's initial weights.
With both heads, `segmentation` and `detection` train one head of the same network for as many
steps, with 8 images per step that all have its labels; `joint` has 12.
"""

import argparse
import copy
import json
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer, seed_everything

from benchmarks.peer_tasks import HEADS, PeerTask
from benchmarks.peers import SMP
from benchmarks.report import DOCS, Columns, table
from benchmarks.timing import Row
from effseg import resources
from effseg.allocator import keep_freed_memory
from effseg.data.datamodule import ImageDataModule
from effseg.models.registry import summary
from effseg.training.checkpointing import LAST, Checkpoints, SafeCheckpointIO
from effseg.training.progress import LineProgress
from effseg.training.signals import Signals

CHECKPOINT_MINUTES = 5.0
CLIP = 10.0
"""Gradient norm at which to clip, as on the command line."""


@dataclass(frozen=True)
class Schedule:
    """A recipe, and the networks to train by it."""

    recipe: str
    size: int
    """Side of the image for counting multiply-adds, pixels."""
    file: str
    """Of the rows."""
    networks: Mapping[str, dict[str, Any]]
    """Changes in the recipe's data, by network."""
    scores: Columns
    model: dict[str, Any] = field(default_factory=dict)
    """Changes in the recipe's model."""


def _scores(titles: Mapping[str, str]) -> Columns:
    def text(key: str) -> Any:
        return lambda row: f"{row[key]:.4f}"

    return {title: text(key) for title, key in titles.items()}


def _one_head(task: str, **changes: Any) -> dict[str, Any]:
    return {"stages": [{"tasks": [task], "freeze_encoder": 2}], "batch_size": 8, **changes}


SCHEDULES = {
    "segmentation": Schedule(
        "voc2012_lite0",
        512,
        "voc_short_schedule",
        {name: {} for name in ("effseg", *HEADS, *SMP)},
        _scores({"mIoU": "miou", "without EMA": "miou_raw", "Boundary IoU": "boundary_iou"}),
        {"segmentation": {"boundary": True}, "raw_scores": True},
    ),
    "detection": Schedule(
        "voc_det_lite0",
        320,
        "voc_detection_short",
        {name: {} for name in ("efficientdet", "effdet", "same-start")},
        _scores({"AP50": "ap50", "AP50, 11 points": "ap50_11", "AP50 without EMA": "ap50_raw"}),
        {"raw_scores": True},
    ),
    "joint": Schedule(
        "joint_voc_coco_lite0",
        320,
        "voc_joint_short",
        {
            "joint": {},
            "segmentation": _one_head("segmentation"),
            # The images with masks are among those with boxes: each is sampled once per pass.
            "detection": _one_head("detection", weights={"masks": 0, "boxes": 2264, "coco": 208}),
        },
        _scores(
            {
                "VOC mIoU": "voc_miou",
                "VOC AP50": "voc_ap50",
                "COCO mIoU": "coco_miou",
                "COCO AP50": "coco_ap50",
            }
        ),
    ),
}


def load_recipe(name: str) -> dict[str, Any]:
    """Return a shipped recipe."""
    recipe: dict[str, Any] = resources.load_yaml(resources.find("configs", name))
    return recipe


@dataclass(frozen=True)
class Run:
    """A network by the recipe of a schedule; None: the recipe's steps, crop and model."""

    schedule: Schedule
    network: str
    seed: int = 0
    steps: int | None = None
    crop: int | None = None
    model: str | None = None
    workers: int | None = None
    """Loader processes, which change no batch; None: the data module's choice."""

    @property
    def weights(self) -> str:
        """The name of the file of its weights."""
        parts = [self.schedule.recipe, self.network, str(self.seed)]
        parts += [] if self.steps is None else [str(self.steps)]
        parts += [] if self.crop is None else [f"crop{self.crop}"]
        parts += [] if self.model is None else [self.model]
        return "-".join(parts) + ".pt"

    def recipe(self) -> dict[str, Any]:
        """Return the recipe with the run's changes."""
        recipe = load_recipe(self.schedule.recipe)
        recipe["data"] |= self.schedule.networks[self.network]
        model = recipe["model"]
        for key, value in self.schedule.model.items():
            model[key] = model.get(key, {}) | value if isinstance(value, dict) else value
        if self.network != "effseg":
            model.get("segmentation", {}).pop("auxiliary", None)
        if self.model is not None:
            recipe["model"]["model"] = self.model
        if self.workers is not None:
            recipe["data"]["num_workers"] = self.workers
        recipe["trainer"].pop("check_val_every_n_epoch", None)
        if self.steps is not None:
            recipe["trainer"] |= {"max_steps": self.steps, "max_epochs": -1}
        if self.crop is not None:
            recipe["data"]["crop_size"] = self.crop
        return recipe


def build_data(arguments: Mapping[str, Any]) -> ImageDataModule:
    """Build the data module of a recipe as the command line does: sources are class paths."""
    parser = ArgumentParser()
    parser.add_class_arguments(ImageDataModule, "data")
    config = parser.parse_object({"data": copy.deepcopy(dict(arguments))})
    data: ImageDataModule = parser.instantiate_classes(config).data
    return data


def build_task(network: str, data: ImageDataModule, arguments: Mapping[str, Any]) -> PeerTask:
    """Build the task of a recipe with the arguments that the command line links from the data."""
    return PeerTask(
        network,
        classes=data.class_names,
        palette=data.palette,
        train_sources=data.train_sources,
        val_sources=data.val_sources,
        **arguments,
    )


def train(run: Run, weights: Path) -> Row:
    """Train a network, save its weights, evaluate it once, and return its row.

    A checkpoint is written every few minutes; a run that was interrupted continues from it.
    """
    recipe = run.recipe()
    seed_everything(run.seed, workers=True)
    data = build_data(recipe["data"])
    task = build_task(run.network, data, recipe["model"])
    common: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "gradient_clip_val": CLIP,
    }
    common |= recipe["trainer"]
    folder, signals = (weights / run.weights).with_suffix(""), Signals()
    trainer = Trainer(
        **common,
        limit_val_batches=0,
        callbacks=[LineProgress(), Checkpoints(folder, signals, CHECKPOINT_MINUTES, changed=False)],
        plugins=[SafeCheckpointIO()],
    )
    start, checkpoint = time.monotonic(), folder / LAST
    unbroken = not checkpoint.is_file()
    try:
        trainer.fit(task, data, ckpt_path=None if unbroken else str(checkpoint))
    finally:
        signals.restore()
    minutes = {"train_minutes": round((time.monotonic() - start) / 60, 1)} if unbroken else {}
    torch.save(task.state_dict(), weights / run.weights)
    scores = evaluate(task, data, common | {"enable_checkpointing": False})
    shutil.rmtree(folder)
    cost = summary(task.model, run.schedule.size)
    boxes = {"box_weight": 50.0 if run.network == "effdet" else task.detection.box_weight}
    return {
        "network": run.network,
        "seed": run.seed,
        "weights": run.weights,
        **scores,
        **(boxes if task.model.tasks == ("detection",) else {}),
        "freeze_encoder": task.model.frozen_levels,
        "protocol": task.scores["protocol"],
        "params": cost["params"],
        f"gmacs_{run.schedule.size}": round(cost["macs"] / 1e9, 3),
        **minutes,
        "steps": trainer.global_step,
        "crop": data.crop_size,
        "batch": data.batch_size,
        "recipe": recipe,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def evaluate(task: PeerTask, data: ImageDataModule, trainer: Mapping[str, Any]) -> Row:
    """Return the scores of a row."""
    Trainer(**trainer).validate(task, datamodule=data, verbose=False)
    task.show_scores()
    scores = {k.replace("/", "_"): v for k, v in task.scores.items() if k != "best"}
    return {
        key: [round(float(v), 4) for v in value] if value.ndim else round(float(value), 4)
        for key, value in scores.items()
        if torch.is_tensor(value) and value.ndim < 2
    }


def score(run: Run, weights: Path) -> Row:
    """Return the scores of weights that `train` saved."""
    recipe = run.recipe()
    data = build_data(recipe["data"])
    task = build_task(run.network, data, recipe["model"])
    task.load_state_dict(torch.load(weights / run.weights, weights_only=True))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return evaluate(task, data, quiet | {"logger": False, "use_distributed_sampler": False})


def columns(schedule: Schedule) -> Columns:
    """Return the columns of a schedule's table."""
    return {
        "network": lambda row: row["network"],
        "model": lambda row: row["recipe"]["model"]["model"],
        **schedule.scores,
        "parameters": lambda row: f"{row['params'] / 1e6:.2f} M",
        f"GMACs at {schedule.size}²": lambda row: f"{row[f'gmacs_{schedule.size}']:.2f}",
        "images a step": lambda row: row["batch"],
        "steps": lambda row: row["steps"],
        "crop": lambda row: row["crop"],
        "train minutes": lambda row: f"{row['train_minutes']:.1f}",
        "encoder frozen up to": lambda row: row["freeze_encoder"],
        "device": lambda row: row["device"],
        "box weight": lambda row: f"{row['box_weight']:g}",
        "seed": lambda row: row["seed"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("schedule", choices=SCHEDULES)
    actions = parser.add_subparsers(dest="action", required=True)
    for name in ("train", "score"):
        action = actions.add_parser(name)
        action.add_argument("networks", nargs="+", metavar="NETWORK")
        action.add_argument("--seed", type=int, default=0)
        action.add_argument("--weights", type=Path, default=Path("runs/short"), help="their folder")
        action.add_argument("--steps", type=int, help="other than the recipe's")
        action.add_argument("--crop", type=int, help="other than the recipe's, pixels")
        action.add_argument("--model", help="with another encoder: effseg_lite2 …")
        action.add_argument("--workers", type=int, help="loader processes")
    actions.add_parser("table")
    options = parser.parse_args()
    schedule = SCHEDULES[options.schedule]
    path = DOCS / f"{schedule.file}.jsonl"
    if options.action == "table":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        path.with_suffix(".md").write_text(table(rows, columns(schedule)), encoding="utf-8")
        return
    unknown = [name for name in options.networks if name not in schedule.networks]
    if unknown:
        parser.error(f"{unknown[0]}: expected among {', '.join(schedule.networks)}")
    keep_freed_memory()  # as the command line does
    for network in options.networks:
        print(f"== {network}, seed {options.seed}", flush=True)
        changes = ("seed", "steps", "crop", "model", "workers")
        run = Run(schedule, network, **{key: getattr(options, key) for key in changes})
        if options.action == "score":
            result = score(run, options.weights)
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for row in rows:
                if row.get("weights") == run.weights:
                    row |= result
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
            continue
        row = train(run, options.weights)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
