"""Saved models and exported files in `effseg validate`."""

from pathlib import Path

from effseg.errors import InputError
from effseg.inference import backends
from effseg.training.task import TrainingTask


def score_model(task: TrainingTask, path: str | Path) -> None:
    """Have a saved model, a run directory's or an exported file scored in the network's place.

    Raises:
        InputError: no such model, one with other classes, or without a head that is scored.
    """
    model = backends.load(path)
    names = model.config.get("_class_names")
    if names is not None and list(names) != list(task.classes.names):
        raise InputError(f"{path}: its classes are not those of the data, expected the same")
    missing = [name for name in task.model.tasks if name not in model.tasks]
    if missing:
        raise InputError(
            f"{path}: no head for {', '.join(missing)}, expected one of {task.model_name}"
        )
    task.scorers, task.raw_scorers = task.scorers_of(model.to(task.device)), None
