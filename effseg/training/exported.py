"""Exported files in ``effseg validate``."""

from pathlib import Path

from effseg.errors import InputError
from effseg.inference import backends
from effseg.training.task import TrainingTask


def score_file(task: TrainingTask, path: str | Path) -> None:
    """Have an exported file scored in the network's place.

    Raises:
        InputError: no such file, or one with other classes.
    """
    file = backends.open(path)
    if file.config["_class_names"] != list(task.classes.names):
        raise InputError(f"{path}: its classes are not those of the data, expected the same")
    task.scorers, task.raw_scorers = task.scorers_of(file), None
