"""Starting from other weights: a saved model, a run directory, or a checkpoint of effdet."""

from collections.abc import Mapping
from typing import Any

from effseg.data.classes import Classes
from effseg.errors import InputError
from effseg.models.faces import EfficientDet
from effseg.models.hub import from_pretrained
from effseg.models.weights import load_effdet, load_effdet_trunk, read_checkpoint, to_effdet

_BY_CLASS = (
    "segmentation_head.classifier.",
    "segmentation_head.context.",
    "detection_head.class_net.predict.",
)
"""Tensors with a row for each class."""


def start_from(model: Any, source: str, classes: Classes) -> None:
    """Load what fits of ``source``; print in one line what starts fresh.

    Where the saved model knows other classes, or the same in another order, what has a row for each
    class starts fresh.

    Args:
        model: the network, loaded in place.
        source: saved model, run directory or hub id; or a .pth of effdet: all of it into a
            detector, its trunk into another network.
        classes: of the network.

    Raises:
        InputError: nothing there, nothing that can be read, or nothing that fits.
    """
    if source.endswith((".pth", ".pt")):
        load = load_effdet if isinstance(model, EfficientDet) else load_effdet_trunk
        fresh = load(model, read_checkpoint(source))
    else:
        fresh = _load_saved(model, from_pretrained(source), classes)
    if len(fresh) == len(model.state_dict()):
        raise InputError(f"init_from={source}: none of its tensors fits {model.name}")
    if fresh:
        names = ", ".join(fresh[:4]) + (", …" if len(fresh) > 4 else "")
        print(f"init_from={source}: {len(fresh)} tensors start fresh: {names}")


def _load_saved(model: Any, saved: Any, classes: Classes) -> list[str]:
    """Load what fits of a saved model; return the names that started fresh.

    BiFPNs over other levels have other nodes under the same numbers: of a detector on P3 and up the
    corresponding nodes are taken, of others the encoder only.
    """
    same_graph = saved.decoder.levels == model.decoder.levels
    if isinstance(saved, EfficientDet) and not same_graph:
        return load_effdet_trunk(model, to_effdet(saved))
    names = saved.config.get("_class_names")
    other_classes = names is not None and list(names) != list(classes.names)
    own = model.state_dict()
    fitting = {
        key: value
        for key, value in saved.state_dict().items()
        if key in own
        and own[key].shape == value.shape
        and (same_graph or key.startswith("encoder."))
        and not (other_classes and key.startswith(_BY_CLASS))
    }
    model.load_state_dict(own | fitting)
    return sorted(set(own) - set(fitting))


def check_checkpoint(
    checkpoint: Mapping[str, Any], classes: Classes, state: Mapping[str, Any], model: str
) -> None:
    """Check that a checkpoint is of these classes and of tensors of these shapes.

    Raises:
        InputError: other classes, or tensors that are missing, unexpected or of another shape.
    """
    names = checkpoint.get("hyper_parameters", {}).get("classes")
    ours = list(classes.names)
    if names is not None and names != ours:
        first = next((i for i, (a, b) in enumerate(zip(names, ours, strict=False)) if a != b), 0)
        raise InputError(
            f"the checkpoint has {len(names)} classes, the data {len(ours)}, and they are not "
            f"the same (class {first} is {names[first]!r} and {ours[first]!r}): expected the "
            "same list (model.init_from starts a new head from other weights)"
        )
    saved = checkpoint["state_dict"]
    wrong = [k for k in state if k not in saved or saved[k].shape != state[k].shape]
    wrong += [k for k in saved if k not in state]
    if wrong:
        raise InputError(
            f"the checkpoint is not of this model ({model}): {len(wrong)} "
            f"tensors are missing, unexpected or of another shape, first {wrong[0]}"
        )
