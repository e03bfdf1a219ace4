"""Existing weights: a training starts or resumes from them, `effseg validate` scores them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from effseg.data.classes import Classes, first_difference
from effseg.data.sample import TASKS
from effseg.errors import InputError, note
from effseg.inference import backends
from effseg.models.encoder import without_fetching
from effseg.models.faces import EfficientDet
from effseg.models.fitting import BY_CLASS, fit_model, fit_tensors, say_fresh
from effseg.models.pretrained import STATE_DICTS, from_pretrained
from effseg.models.weights import fit_effdet, fit_effdet_trunk, read_checkpoint

_UNNAMED = "its classes have no names, taken for the data's in their order"


def build_from(build: Callable[[], Any], source: str, classes: Classes) -> Any:
    """Build a network and load the tensors of `source` that fit; print those that start fresh.

    If the saved model has other classes, or another order, tensors with a row per class start
    fresh. The encoder's ImageNet weights are fetched only if the source has another encoder.

    `source` is what `effseg.from_pretrained` takes; or a .pth or .pth.tar: of effdet, all of it
    into a detector, its trunk into another network; or a state dict of one of our networks.
    """
    with without_fetching():
        model = build()
    fresh, named = _load(model, source, classes)
    if any(key.startswith("encoder.") for key in fresh):
        model = build()
        fresh, named = _load(model, source, classes)
    say_fresh(f"init_from={source}", fresh, model)
    rows = {key for key in model.state_dict() if key.startswith(BY_CLASS)}
    if not named and rows - set(fresh):
        note(f"init_from={source}: {_UNNAMED}")
    return model


def _load(model: Any, source: str, classes: Classes) -> tuple[list[str], bool]:
    """Return the tensors that start fresh, and whether the source names its classes."""
    if not source.endswith(STATE_DICTS):
        saved: Any = from_pretrained(source)
        return fit_model(model, saved, classes.names), bool(saved.config.get("_class_names"))
    tensors = read_checkpoint(source)
    if any(key.startswith("encoder.") for key in tensors):
        return fit_tensors(model, tensors), False
    load = fit_effdet if isinstance(model, EfficientDet) else fit_effdet_trunk
    return load(model, tensors), False


def check_checkpoint(task: Any, checkpoint: Mapping[str, Any], resumes: bool) -> None:
    """Check that a checkpoint is of a task's classes, and of tensors of its names and shapes.

    Unless a training resumes from it, its tensors of the loss are replaced by the task's: a model
    is also scored with other settings of the loss than those that it was trained with.
    """
    hparams = checkpoint.get("hyper_parameters", {})
    if hparams.get("classes") is not None:
        _check_classes(task, "the checkpoint", hparams["classes"])
    saved, state = checkpoint["state_dict"], task.state_dict()
    if not resumes:
        for key in [key for key in saved if key.startswith("criterion.")]:
            del saved[key]
        saved |= {key: value for key, value in state.items() if key.startswith("criterion.")}
    wrong = [k for k in state if k not in saved or saved[k].shape != state[k].shape]
    wrong += [k for k in saved if k not in state]
    if wrong:
        raise InputError(
            f"the checkpoint is not of this model ({task.model_name}): {len(wrong)} tensors are "
            f"missing, unexpected or of another shape, first {wrong[0]}"
        )
    _compare_protocols(task, "checkpoint", hparams.get("segmentation", {}).get("protocol"))


def score_model(task: Any, path: str | Path) -> None:
    """Score a saved model, a run directory's or an exported file instead of a task's network."""
    model = backends.load(path, device="cpu")
    names = model.config.get("_class_names")
    if not names or tuple(names) == Classes.from_config({}, len(names)).names:
        count = len(task.classes)
        counts = max(2, model.seg_classes or 0), 1 + (model.det_classes or 0)
        if any(n != count for n, t in zip(counts, TASKS, strict=True) if t in model.tasks):
            raise InputError(f"{path}: {max(counts)} classes, expected {count} as the data")
        note(f"{path}: {_UNNAMED}")
    else:
        _check_classes(task, str(path), list(names))
    missing = [name for name in task.model.tasks if name not in model.tasks]
    if missing:
        raise InputError(
            f"{path}: no head for {', '.join(missing)}, expected one of {task.model_name}"
        )
    _compare_protocols(task, str(path), model.config.get("_protocol"))
    if not backends.is_exported(path):  # those stay on the CPU
        task.saved_model = model  # the trainer moves it, as only it knows the device
    task.scorers, task.raw_scorers = task.scorers_of(model), None


def _check_classes(task: Any, source: str, names: list[str]) -> None:
    ours = list(task.classes.names)
    if names != ours:
        raise InputError(
            f"{source}: its {len(names)} classes are not those of the data "
            f"({first_difference(names, ours)}), expected the same {len(ours)} (model.init_from "
            "starts a new head from other weights)"
        )


def _compare_protocols(task: Any, source: str, saved: str | None) -> None:
    """Print one line if the saved protocol of the masks differs from the configured one."""
    given = task.segmentation.protocol
    if "segmentation" in task.model.tasks and saved and saved != given:
        note(f"{source}: saved with protocol {saved}, scored by {given} as configured")
