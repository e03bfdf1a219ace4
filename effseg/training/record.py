"""What a run records for its report and model card: how it was trained, and its scores."""

import json
import platform
import re
import shlex
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

from effseg import resources
from effseg.data.datamodule import available_cores
from effseg.data.files import write_text
from effseg.metrics.tables import TITLES, to_json
from effseg.training.faults import one_line
from effseg.training.task import TrainingTask

PACKAGES = (
    *("effseg", "torch", "torchvision", "timm", "segmentation-models-pytorch", "lightning"),
    *("albumentations", "opencv-python-headless", "numpy", "faster-coco-eval"),
)


def add_start(path: Path, trainer: Any) -> None:
    """Add this start to run.json: its time, command, versions, machine and data."""
    device = trainer.strategy.root_device
    start = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["effseg", *sys.argv[1:]]),
        "versions": _versions(),
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": available_cores(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "processes": trainer.world_size,
            "precision": str(trainer.precision),
        },
        "data": [
            {
                "use": use,
                "source": str(source),
                "card": source.card,
                "images": len(source),
                "tasks": list(source.tasks),
            }
            for use, source in trainer.datamodule.sources()
        ],
    }
    write_text(path, json.dumps([*read_starts(path), start], indent=1) + "\n")


def read_starts(path: Path) -> list[dict[str, Any]]:
    """Return a run's starts; a damaged file counts as empty and does not stop the run."""
    try:
        starts = json.loads(path.read_text("utf-8")) if path.is_file() else []
        if isinstance(starts, list) and all(isinstance(start, dict) for start in starts):
            return starts
        problem = "no list of starts"
    except (OSError, ValueError) as error:
        problem = one_line(error)
    print(f"warning: {path}: {problem}, starting a new list", flush=True)
    return []


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.*\S)", text, re.MULTILINE)
    return name[1] if name else platform.processor()


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


def _without_folder(word: str) -> str:
    """Shorten absolute paths in an argument, of any system, to the files' names."""
    key, sign, value = word.partition("=")
    pieces = [value] if sign and "," not in value else []
    if not any(map(_is_absolute, pieces)):  # else in a list or a mapping
        key, sign, pieces = "", "", re.split(r"([\[\]{},='\"]\s*|:\s+)", word)
    names = (PureWindowsPath(p).name if _is_absolute(p) else p for p in pieces)
    return key + sign + "".join(names)


def _is_absolute(path: str) -> bool:
    return PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()


def card_of(run: Path, task: TrainingTask) -> dict[str, Any]:
    """Return the contents of a run's model card, see `generate_model_card`.

    Without paths of this machine: cards are published.
    """
    last = (read_starts(run / "run.json") or [{}])[-1]
    rows = ["| data | labels | protocol | score | value |", "| --- | --- | --- | --- | --- |"]
    for source, by_task in task.scorers.by_source.items():
        for kind, scores in by_task.items():
            labels = "masks" if kind == "segmentation" else "boxes"
            rows += [
                f"| {source} | {labels} | {scores['protocol']} | {TITLES[k]} | {float(v):.4f} |"
                for k, v in scores.items()
                if k in TITLES
            ]
    sources = last.get("data", [])
    data = [f"- {d['use']}: {d['images']} images, {d['source'].split(' at ')[0]}" for d in sources]
    for card in dict.fromkeys(d["card"] for d in sources if d["card"]):
        about = resources.load_yaml(resources.find("datasets", card))
        data.append(f"- {about['title']}, licence: {' '.join(str(about['licence']).split())}")
    command = shlex.join(map(_without_folder, shlex.split(last.get("command", ""))))
    versions = ", ".join(f"{k} {v}" for k, v in last.get("versions", {}).items())
    training = f"{task.model_name}, step {task.global_step}:\n\n```\n{command}\n```\n\n{versions}"
    return {
        "dataset": "\n".join(data) or None,
        "metrics": "\n".join(rows) if task.scores else None,
        "model_card_kwargs": {"training": training},
    }
