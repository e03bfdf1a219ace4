"""What a run directory holds, read for its report; a run that is not through has less."""

# K classes

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from effseg.data.classes import Classes
from effseg.errors import InputError

Series = list[tuple[int, float]]
"""(optimiser step, value)."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of the saved model for one task on one source."""

    source: str
    task: str
    scores: Mapping[str, Any]
    """What the scorer computed, see `effseg.training.scorers`; None where it is undefined."""

    @property
    def title(self) -> str:
        """Task and source."""
        return f"{'masks' if self.task == 'segmentation' else 'boxes'} of {self.source}"

    def by_class(self, key: str, count: int) -> list[float]:
        """Return the entry `key` with a value for each of K classes, nan where there is none."""
        values = [math.nan if v is None else float(v) for v in self.scores.get(key) or []]
        values = [math.nan] * (count - len(values)) + values  # boxes have no background
        return values

    def worst_and_median(self, count: int) -> tuple[list[str], list[str]]:
        """Return the ids of the images that score least, and of those in the middle of the rest."""
        scored = sorted((s, i) for i, s in self.scores.get("images", []) if s is not None)
        ids = [image for _, image in scored]
        middle = max(count, len(ids) // 2 - count // 2)
        return ids[:count], ids[middle : middle + count]

    def score_of(self, image: str) -> float:
        """Return an image's score."""
        return next(float(s) for i, s in self.scores["images"] if i == image)


@dataclass(frozen=True)
class Run:
    """A run directory's content."""

    folder: Path
    name: str
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    """run.json: an entry a start, see `effseg.training.record.add_start`."""
    curves: dict[str, Series]
    """Column of metrics.csv to its values."""
    classes: Classes | None
    """None before the first evaluation."""
    evaluations: list[Evaluation] = field(default_factory=list)
    epoch: int | None = None
    """Epoch of the saved model, from 0."""
    step: int | None = None

    @property
    def progress(self) -> str:
        """Epochs done, of those planned."""
        epochs = [int(value) + 1 for _, value in self.curves.get("epoch", [])]
        done = len(self.curves.get("seconds/train", [])) or max(epochs, default=0)
        planned = self.setting("trainer", "max_epochs")
        return str(done) if planned in (None, -1) else f"{done} of {planned}"

    def setting(self, *keys: str) -> Any:
        """Return an entry of the config, None where it is missing."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_run(folder: Path) -> Run:
    """Read a run directory.

    Raises:
        InputError: it is not there, has neither config.yaml nor metrics.csv, or one of its files
            cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected a run directory")
    if not (folder / "config.yaml").is_file() and not (folder / "metrics.csv").is_file():
        raise InputError(f"{folder}: neither config.yaml nor metrics.csv, expected a run directory")
    scores = _json(folder / "model" / "evaluation.json") or {}
    names = scores.get("_class_names")
    return Run(
        folder,
        folder.resolve().name,
        _config(folder / "config.yaml"),
        _json(folder / "run.json") or [],
        _curves(folder),
        Classes.from_config(scores, len(names)) if names else None,
        [
            Evaluation(source, task, values)
            for source, by_task in scores.get("sources", {}).items()
            for task, values in by_task.items()
        ],
        scores.get("epoch"),
        scores.get("step"),
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs, and give those of one name a longer one; raises as `read_run`."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    return [
        Run(**vars(run) | {"name": str(run.folder)}) if names.count(run.name) > 1 else run
        for run in runs
    ]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def _config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def _curves(folder: Path) -> dict[str, Series]:
    """Read metrics.csv and, of a resumed run, the files before it up to where the next begins."""
    earlier = sorted(folder.glob("metrics-*.csv"), key=lambda p: int(p.stem.split("-")[1]))
    curves: dict[str, Series] = {}
    for path in (*earlier, folder / "metrics.csv"):
        rows = list(_rows(path))
        first = min((step for step, _ in rows), default=0)
        if rows:
            curves = {k: [(s, v) for s, v in series if s < first] for k, series in curves.items()}
        for step, values in rows:
            for key, value in values.items():
                curves.setdefault(key, []).append((step, value))
    return curves


def _rows(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            try:
                yield (
                    int(row.pop("step")),
                    {key: float(value) for key, value in row.items() if value},
                )
            except (KeyError, TypeError, ValueError):
                continue  # a line that is half written
