"""Starting one network from another one's weights: what fits is loaded, the rest is named."""

from collections.abc import Sequence
from typing import Any

from effseg.errors import InputError
from effseg.models.faces import EfficientDet
from effseg.models.network import Network
from effseg.models.weights import Tensors, fit_effdet_trunk, to_effdet

BY_CLASS = (
    "segmentation_head.classifier.",
    "segmentation_head.context.",
    "detection_head.class_net.predict.",
)
"""Tensors with a row for each class."""


def fit_model(model: Network, saved: Any, classes: Sequence[str]) -> list[str]:
    """Load what fits of a saved model; return the names of the tensors that start fresh.

    Where the saved model knows other classes, or the same in another order, what has a row for each
    class starts fresh. BiFPNs over other levels have other nodes under the same numbers: of a
    detector on P3 and up the corresponding nodes are taken, of others the encoder only. Of another
    encoder nothing is taken, though some of its tensors have the same names and shapes.

    Args:
        model: loaded in place.
        saved: a model of `effseg.from_pretrained`.
        classes: names of the model's classes, background first.
    """
    same_graph = saved.decoder.levels == model.decoder.levels
    if isinstance(saved, EfficientDet) and not same_graph:
        return fit_effdet_trunk(model, to_effdet(saved))
    encoders = [str(m.arguments["encoder_name"]).partition(".")[0] for m in (saved, model)]
    names = saved.config.get("_class_names")
    other_classes = names is not None and list(names) != list(classes)
    return fit_tensors(
        model,
        {
            key: value
            for key, value in saved.state_dict().items()
            if (encoders[0] == encoders[1] if key.startswith("encoder.") else same_graph)
            and not (other_classes and key.startswith(BY_CLASS))
        },
    )


def fit_tensors(model: Network, tensors: Tensors) -> list[str]:
    """Load the tensors that have name and shape of one of the model's; return what has none."""
    own = model.state_dict()
    fitting = {k: v for k, v in tensors.items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(own | fitting)
    return sorted(set(own) - set(fitting))


def say_fresh(source: str, fresh: Sequence[str], model: Network) -> None:
    """Print in one line what starts fresh, if anything does.

    Raises:
        InputError: all of it does.
    """
    if len(fresh) == len(model.state_dict()):
        raise InputError(
            f"{source}: none of its tensors fits {model.name}, expected one of the same encoder or "
            "width (null: no other weights than the encoder's)"
        )
    if fresh:
        names = ", ".join(fresh[:4]) + (", …" if len(fresh) > 4 else "")
        print(f"{source}: {len(fresh)} tensors start fresh: {names}")
