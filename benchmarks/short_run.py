"""What the scripts that train by a short recipe share: one run, the rows, the command line."""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

import effseg
from effseg import resources
from effseg.allocator import keep_freed_memory
from effseg.data.photo_datamodule import PhotoDataModule
from effseg.tasks.base import TrainingTask
from effseg.tasks.report import LineProgress

Row = dict[str, Any]


def load_recipe(name: str) -> dict[str, Any]:
    """Return a shipped recipe."""
    return resources.load_yaml(resources.find("configs", name))


def train_and_score(
    task: TrainingTask,
    data: PhotoDataModule,
    trainer: dict[str, Any],
    weights: Path,
    size: int = 512,
) -> Row:
    """Train, save the weights, evaluate once, and return what every row has."""
    common: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "use_distributed_sampler": False,
    }
    trainer = {k: v for k, v in trainer.items() if k != "check_val_every_n_epoch"}
    runner = Trainer(**trainer, **common, limit_val_batches=0, callbacks=[LineProgress()])
    start = time.monotonic()
    runner.fit(task, data)
    minutes = (time.monotonic() - start) / 60
    weights.parent.mkdir(parents=True, exist_ok=True)
    torch.save(task.state_dict(), weights)
    Trainer(**common).validate(task, datamodule=data, verbose=False)
    task.show_scores(data.classes)
    cost = effseg.summary(task.model, size)
    return {
        "params": cost["params"],
        f"gmacs_{size}": round(cost["macs"] / 1e9, 3),
        "train_minutes": round(minutes, 1),
        "steps": runner.global_step,
        "crop": data.crop_size,
        "optim": vars(task.optim),
        "protocol": task.scores["protocol"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def main(
    description: str,
    networks: Sequence[str],
    train: Callable[[str, int, Path], Row],
    columns: dict[str, Callable[[Row], str]],
    output: Path,
) -> None:
    """Run ``train NAMES …`` (append a row a run) or ``table`` (write the rows as Markdown)."""
    parser = argparse.ArgumentParser(description=description)
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("train")
    run.add_argument("networks", nargs="+", choices=networks)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--weights", type=Path, default=Path("runs/short"), help="folder for weights")
    run.add_argument("--output", type=Path, default=output)
    tabulate = actions.add_parser("table")
    tabulate.add_argument("--output", type=Path, default=output)
    options = parser.parse_args()
    if options.action == "train":
        keep_freed_memory()  # as the command line does
        for network in options.networks:
            print(f"== {network}, seed {options.seed}", flush=True)
            row = train(network, options.seed, options.weights)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            with options.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return
    rows = [json.loads(line) for line in options.output.read_text(encoding="utf-8").splitlines()]
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[text(row) for text in columns.values()] for row in rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    options.output.with_suffix(".md").write_text(table, encoding="utf-8")
