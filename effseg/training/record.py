"""What a run records for its report and model card: how it was trained, and its scores."""

import json
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from effseg import resources
from effseg.data.datamodule import available_cores
from effseg.data.files import write_text
from effseg.data.sources.source import Source
from effseg.metrics.tables import TITLES, to_json
from effseg.training.faults import one_line
from effseg.training.task import TrainingTask

PACKAGES = (
    *("effseg", "torch", "torchvision", "timm", "segmentation-models-pytorch", "lightning"),
    *("albumentations", "opencv-python-headless", "numpy", "faster-coco-eval"),
)


class RunRecord(Callback):
    """Writes run.json, a list of a run's starts, and logs the seconds of every epoch."""

    def __init__(self, folder: Path) -> None:
        """Write into `folder`."""
        self.path = folder / "run.json"
        self.began = self.evaluation_began = time.monotonic()
        self.evaluated = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add this start to run.json."""
        if not trainer.is_global_zero:
            return
        starts = read_starts(self.path)
        data: Any = getattr(trainer, "datamodule", None)
        starts.append(
            {
                "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                "command": shlex.join(["effseg", *sys.argv[1:]]),
                "versions": versions(),
                "machine": machine() | _trainer(trainer),
                "data": describe_data(data.sources()) if hasattr(data, "sources") else [],
            }
        )
        write_text(self.path, json.dumps(starts, indent=1) + "\n")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.began, self.evaluated = time.monotonic(), 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the evaluation."""
        self.evaluation_began = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the seconds of the evaluation."""
        self.evaluated = time.monotonic() - self.evaluation_began

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the seconds of the epoch, and of the evaluation within it."""
        seconds = {"seconds/train": time.monotonic() - self.began - self.evaluated}
        if self.evaluated:
            seconds["seconds/evaluation"] = self.evaluated
        for logger in trainer.loggers:
            epoch = {"epoch": float(trainer.current_epoch)}
            logger.log_metrics(seconds | epoch, trainer.global_step)


def read_starts(path: Path) -> list[dict[str, Any]]:
    """Return a run's starts; a damaged file counts as empty and does not stop the run."""
    try:
        starts = json.loads(path.read_text("utf-8")) if path.is_file() else []
        if isinstance(starts, list) and all(isinstance(start, dict) for start in starts):
            return starts
        problem = "no list of starts"
    except (OSError, ValueError) as error:
        problem = one_line(error)
    print(f"warning: {path}: {problem}, begun anew", flush=True)
    return []


def write_scores(path: Path, task: TrainingTask) -> None:
    """Write the last evaluation: scores by source and task, with epoch, step and classes."""
    content = {
        "epoch": task.current_epoch,
        "step": task.global_step,
        **task.classes.to_config(),
        "best": task.scores.get("best"),
        "sources": task.scorers.by_source,
    }
    write_text(path, json.dumps(to_json(content)) + "\n")


def card_of(run: Path, task: TrainingTask) -> dict[str, Any]:
    """Return the contents of a run's model card, see `generate_model_card`.

    Without paths of this machine: cards are published.
    """
    starts = read_starts(run / "run.json")
    last: dict[str, Any] = starts[-1] if starts else {}
    rows = ["| data | labels | protocol | score | value |", "| --- | --- | --- | --- | --- |"]
    for source, by_task in task.scorers.by_source.items():
        for kind, scores in by_task.items():
            values = {k: float(v) for k, v in scores.items() if k in TITLES}
            rows += [
                f"| {source} | {'masks' if kind == 'segmentation' else 'boxes'} | "
                f"{scores['protocol']} | {TITLES[key]} | {value:.4f} |"
                for key, value in values.items()
            ]
    data = [
        f"- {d['use']}: {d['images']} images, {d['source'].split(' at ')[0]}"
        for d in last.get("data", [])
    ]
    cards = dict.fromkeys(d["card"] for d in last.get("data", []) if d["card"])
    for card in cards:
        about = resources.load_yaml(resources.find("datasets", card))
        data.append(f"- {about['title']}, licence: {' '.join(str(about['licence']).split())}")
    command = re.sub(r"(?<![^\s='\"])/(?:[^/\s='\"]+/)+", "", last.get("command", ""))
    versions = ", ".join(f"{k} {v}" for k, v in last.get("versions", {}).items())
    training = f"{task.model_name}, step {task.global_step}:\n\n```\n{command}\n```\n\n{versions}"
    return {
        "dataset": "\n".join(data) or None,
        "metrics": "\n".join(rows) if task.scores else None,
        "model_card_kwargs": {"training": training},
    }


def describe_data(sources: Iterable[tuple[str, Source]]) -> list[dict[str, Any]]:
    """Return each source's use, description, card, number of images and labels."""
    return [
        {
            "use": use,
            "source": str(source),
            "card": source.card,
            "images": len(source),
            "tasks": list(source.tasks),
        }
        for use, source in sources
    ]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results."""
    result = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            continue
    return result


def machine() -> dict[str, Any]:
    """Return system, processor, cores and threads of this machine."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _trainer(trainer: Trainer) -> dict[str, Any]:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"device": name, "processes": trainer.world_size, "precision": str(trainer.precision)}
