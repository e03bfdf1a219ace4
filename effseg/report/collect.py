"""What a run directory holds, read for its report; an unfinished run has less."""

# K classes

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from effseg.data.classes import Classes
from effseg.data.files import numbered
from effseg.errors import InputError, flat

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
        """Return the score `key` of each of K classes, nan where it is undefined."""
        values = numbers(self.scores.get(key) or [])
        return [math.nan] * (count - len(values)) + values  # boxes have no background

    def worst_and_median(self, count: int) -> tuple[list[tuple[float, str]], ...]:
        """Return score and id of the `count` worst images, and of `count` in the middle."""
        scored = sorted((s, i) for i, s in self.scores.get("images", []) if s is not None)
        middle = max(count, len(scored) // 2 - count // 2)
        return scored[:count], scored[middle : middle + count]


@dataclass(frozen=True)
class Run:
    """A run directory's content."""

    folder: Path
    name: str
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    """run.json: an entry per start, see `effseg.training.record.add_start`."""
    curves: dict[str, Series]
    """Column of metrics.csv to its values."""
    classes: Classes | None
    """None before the first evaluation."""
    evaluations: list[Evaluation]
    epoch: int | None
    """Epoch of the saved model, from 0; None before it."""
    step: int | None

    @property
    def progress(self) -> str:
        """Number of finished epochs, and of planned ones."""
        epochs = [int(value) + 1 for _, value in self.curves.get("epoch", [])]
        before = min(epochs, default=1) - 1  # of the run whose checkpoint this one started from
        finished = len(self.curves.get("seconds/train", []))
        done = before + finished if finished else max(epochs, default=0)
        planned = self.setting("trainer", "max_epochs")
        return str(done) if planned in (None, -1) else f"{done} of {planned}"

    def setting(self, *keys: str) -> Any:
        """Return an entry of the config, None where it is missing."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def numbers(scores: Iterable[float | None]) -> list[float]:
    """Return scores with nan for None, which JSON has instead."""
    return [math.nan if score is None else float(score) for score in scores]


def read_run(folder: Path) -> Run:
    """Read a run directory; raises InputError if it is none, or a file cannot be read."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected a run directory")
    if not (folder / "config.yaml").is_file() and not (folder / "metrics.csv").is_file():
        raise InputError(f"{folder}: neither config.yaml nor metrics.csv, expected a run directory")
    config = _read(folder / "config.yaml", yaml.safe_load, {})
    scores = _read(folder / "model" / "evaluation.json", json.loads, {})
    names = scores.get("_class_names")
    return Run(
        folder,
        folder.resolve().name,
        config if isinstance(config, dict) else {},
        _read(folder / "run.json", json.loads, []),
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
    """Read runs; those of the same name are named by their path. Raises as `read_run`."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    return [
        replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs
    ]


def _read(path: Path, parse: Callable[[str], Any], default: Any) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read: {flat(error)}") from error


def _curves(folder: Path) -> dict[str, Series]:
    """Read metrics.csv, after those of earlier starts up to the step where the next begins."""
    last = folder / "metrics.csv"
    curves: dict[str, Series] = {}
    for path in (*(file for number, file in numbered(last).items() if number), last):
        rows = list(_rows(path))
        first = min((step for step, _ in rows), default=0)
        if rows:
            curves = {k: [(s, v) for s, v in series if s < first] for k, series in curves.items()}
        for step, values in rows:
            for key, value in values.items():
                curves.setdefault(key, []).append((step, value))
    return curves


def _rows(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    for row in csv.DictReader(_read(path, str.splitlines, [])):
        try:
            yield int(row.pop("step")), {k: float(value) for k, value in row.items() if value}
        except (KeyError, TypeError, ValueError):
            continue  # an incomplete line
