"""Initialise a network from another one's weights: load what fits, report the rest."""

from collections.abc import Sequence
from typing import Any

from effseg.errors import InputError
from effseg.models.faces import EfficientDet
from effseg.models.network import Network
from effseg.models.weights import Tensors, effdet_tensors, fit_effdet_trunk

BY_CLASS = (
    "segmentation_head.classifier.",
    "segmentation_head.context.",
    "segmentation_head.pyramid.classifier.",
    "segmentation_head.refinement.mix.",
    "segmentation_head.refinement.correct.",
    "detection_head.class_net.predict.",
)
"""Tensors with one row or column per class."""


def fit_model(model: Network, saved: Any, classes: Sequence[str]) -> list[str]:
    """Load matching tensors of a saved model; return the names of those that start fresh.

    If the saved model's classes are not `classes` (names, background first), tensors with one row
    per class start fresh. If the BiFPN's levels differ, node indices do not correspond: from a
    detector on P3 and up the corresponding nodes are loaded, from other models only the encoder.
    Nothing is loaded from a different encoder, even if names and shapes agree.
    """
    same_graph = saved.decoder.levels == model.decoder.levels
    if isinstance(saved, EfficientDet) and not same_graph:
        return fit_effdet_trunk(model, effdet_tensors(saved))
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
    """Load the tensors whose name and shape match; return the names of the model's others."""
    state = model.state_dict()
    fitting = {k: v for k, v in tensors.items() if k in state and state[k].shape == v.shape}
    model.load_state_dict(state | fitting)
    return sorted(set(state) - set(fitting))


def say_fresh(source: str, fresh: Sequence[str], model: Network) -> None:
    """Print one line about the tensors that start fresh, if any.

    Raises:
        InputError: all tensors do.
    """
    if len(fresh) == len(model.state_dict()):
        raise InputError(
            f"{source}: none of its tensors fits {model.name}, expected a model with the same "
            "encoder or width (null: only the encoder's weights)"
        )
    if fresh:
        names = ", ".join(fresh[:4]) + (", …" if len(fresh) > 4 else "")
        print(f"{source}: {len(fresh)} tensors start fresh: {names}")
