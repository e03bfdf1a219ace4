"""Settings of a task: how masks and boxes are trained and evaluated."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from effseg.data.classes import Classes
from effseg.errors import InputError


@dataclass(frozen=True)
class SegmentationConfig:
    """How masks are trained and evaluated.

    Attributes:
        loss: weight of each term, see `effseg.losses.SegmentationLoss`.
        class_weights: a weight for each class in the cross-entropy; None: 1; `auto`: median
            frequency divided by the class's, counted in the masks, see
            `effseg.data.counts.balanced_weights`.
        label_smoothing: of the cross-entropy, 0 … 1.
        ohem: share of the hardest pixels that cross-entropy keeps, in (0, 1]; None: all.
        auxiliary: weight of the same loss on P3, P4 and P5, see `effseg.losses.auxiliary`; 0: none.
        protocol: of the evaluation, see `effseg.inference.protocol.Protocol`.
        boundary: measure Boundary IoU too.
    """

    loss: dict[str, float] = field(default_factory=lambda: {"cross_entropy": 1.0})
    class_weights: list[float] | Literal["auto"] | None = None
    label_smoothing: float = 0.0
    ohem: float | None = None
    auxiliary: float = 0.0
    protocol: str = "whole"
    boundary: bool = False


@dataclass(frozen=True)
class DetectionConfig:
    """How boxes are trained and evaluated; the defaults are the reference's.

    Attributes:
        alpha: of the focal loss.
        gamma: of the focal loss.
        delta: where the Huber loss turns linear, in units of the box codes.
        box_weight: of the box loss.
        size: side in pixels of the square that images are scaled into for evaluation; None: the
            model's.
        metric: `coco` (AP over IoU 0.50 … 0.95) or `voc` (AP50, difficult objects left out).
        soft_nms_sigma: Gaussian soft-NMS in evaluation; None: plain NMS.
        results: JSON file to which the detections of an evaluation are written, in COCO's results
            format; with several sources `-SOURCE` is added to its name.
    """

    alpha: float = 0.25
    gamma: float = 1.5
    delta: float = 0.1
    box_weight: float = 50.0
    size: int | None = None
    metric: Literal["coco", "voc"] = "coco"
    soft_nms_sigma: float | None = None
    results: str | None = None


def as_config(kind: Any, value: Any) -> Any:
    """Return settings as their dataclass, keys and choices checked; checkpoints hold dicts."""
    types = get_type_hints(kind)
    if isinstance(value, dict):
        for key in value.keys() - types.keys():
            raise InputError(f"{key}: expected settings among {', '.join(types)}")
        value = kind(**value)
    for key, annotation in types.items():
        given, choices = getattr(value, key), get_args(annotation)
        if get_origin(annotation) is Literal and given not in choices:
            raise InputError(f"{key}={given!r}: expected one of {', '.join(choices)}")
    return value


def as_classes(names: list[str] | None, palette: list[list[int]] | None) -> Classes:
    """Return a class list; names and colours default to VOC's."""
    if names is None:
        return Classes.from_card("voc2012")
    if palette is None:
        return Classes.from_names(names)
    return Classes(tuple(names), tuple((r, g, b) for r, g, b in palette))
