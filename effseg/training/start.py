"""Start from existing weights: the bundled model, a saved model, a run, or a checkpoint."""

from collections.abc import Callable
from typing import Any

from effseg.data.classes import Classes
from effseg.errors import note
from effseg.models.encoder import without_fetching
from effseg.models.faces import EfficientDet
from effseg.models.fitting import BY_CLASS, fit_model, fit_tensors, say_fresh
from effseg.models.pretrained import from_pretrained
from effseg.models.weights import fit_effdet, fit_effdet_trunk, read_checkpoint


def build_from(build: Callable[[], Any], source: str, classes: Classes) -> Any:
    """Build a network and load the tensors of `source` that fit; print those that start fresh.

    If the saved model has other classes, or another order, tensors with a row per class start
    fresh. The encoder's ImageNet weights are fetched only if the source has another encoder.

    Args:
        build: builds the network.
        source: what `effseg.from_pretrained` takes; or a .pth: of effdet, all of it into a
            detector, its trunk into another network; or a state dict of one of our networks.
        classes: of the network.

    Raises:
        InputError: no such source, an unreadable one, or no tensor fits.
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
        note(f"init_from={source}: its classes have no names, taken for the data's in their order")
    return model


def _load(model: Any, source: str, classes: Classes) -> tuple[list[str], bool]:
    """Return the tensors that start fresh, and whether the source names its classes."""
    if not source.endswith((".pth", ".pt")):
        saved: Any = from_pretrained(source)
        return fit_model(model, saved, classes.names), bool(saved.config.get("_class_names"))
    tensors = read_checkpoint(source)
    if any(key.startswith("encoder.") for key in tensors):
        return fit_tensors(model, tensors), False
    load = fit_effdet if isinstance(model, EfficientDet) else fit_effdet_trunk
    return load(model, tensors), False


def compare_protocols(source: str, saved: str | None, given: str) -> None:
    """Print one line if the protocol saved with a model differs from the one it is scored by."""
    if saved and saved != given:
        note(f"{source}: saved with protocol {saved}, scored by {given} as configured")
