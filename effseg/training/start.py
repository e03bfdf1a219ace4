"""Starting from other weights: the model in the box, a saved model, a run, or a checkpoint."""

from typing import Any

from effseg.data.classes import Classes
from effseg.models.faces import EfficientDet
from effseg.models.fitting import fit_model, fit_tensors, say_fresh
from effseg.models.pretrained import from_pretrained
from effseg.models.weights import fit_effdet, fit_effdet_trunk, read_checkpoint


def start_from(model: Any, source: str, classes: Classes) -> None:
    """Load what fits of ``source``; print in one line what starts fresh.

    Where the saved model knows other classes, or the same in another order, what has a row for each
    class starts fresh.

    Args:
        model: the network, loaded in place.
        source: what :func:`effseg.from_pretrained` takes; or a .pth: of effdet, all of it into a
            detector, its trunk into another network; or a state dict of one of our networks.
        classes: of the network.

    Raises:
        InputError: nothing there, nothing that can be read, or nothing that fits.
    """
    if source.endswith((".pth", ".pt")):
        tensors = read_checkpoint(source)
        if any(key.startswith("encoder.") for key in tensors):
            fresh = fit_tensors(model, tensors)
        else:
            load = fit_effdet if isinstance(model, EfficientDet) else fit_effdet_trunk
            fresh = load(model, tensors)
    else:
        fresh = fit_model(model, from_pretrained(source), classes.names)
    say_fresh(f"init_from={source}", fresh, model)
