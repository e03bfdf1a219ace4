"""Saved models and exported files in `effseg validate`."""

from pathlib import Path

from effseg.data.classes import Classes, first_difference
from effseg.data.sample import TASKS
from effseg.errors import InputError, note
from effseg.inference import backends
from effseg.training.start import compare_protocols
from effseg.training.task import TrainingTask


def score_model(task: TrainingTask, path: str | Path) -> None:
    """Score a saved model, a run directory's or an exported file instead of the network.

    Raises:
        InputError: no such model, other classes, or a missing head.
    """
    model = backends.load(path)
    names, ours = model.config.get("_class_names"), list(task.classes.names)
    if not names or tuple(names) == Classes.from_config({}, len(names)).names:
        counts = max(2, model.seg_classes or 0), 1 + (model.det_classes or 0)
        if any(n != len(ours) for n, t in zip(counts, TASKS, strict=True) if t in model.tasks):
            raise InputError(f"{path}: {max(counts)} classes, expected {len(ours)} as the data")
        note(f"{path}: its classes have no names, taken for the data's in their order")
    elif list(names) != ours:
        raise InputError(
            f"{path}: its classes are not those of the data ({first_difference(names, ours)}), "
            "expected the same"
        )
    missing = [name for name in task.model.tasks if name not in model.tasks]
    if missing:
        raise InputError(
            f"{path}: no head for {', '.join(missing)}, expected one of {task.model_name}"
        )
    if "segmentation" in task.model.tasks:
        compare_protocols(str(path), model.config.get("_protocol"), task.segmentation.protocol)
    task.scorers, task.raw_scorers = task.scorers_of(model.to(task.device)), None
