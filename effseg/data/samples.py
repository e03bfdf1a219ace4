"""What a sample is: a photo, its mask, its boxes, and the value that means "ignored"."""

# B batch, H W pixels, N boxes. Photos are uint8 RGB until the device: normalisation is the model's.

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

import torch

from effseg import resources
from effseg.errors import InputError

IGNORE_INDEX = 255
"""Mask value of pixels that count nowhere: VOC's void border, padding, unlabelled parts."""

TaskName = Literal["segmentation", "detection"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)


class Sample(TypedDict, total=False):
    """One photo with its labels. ``id`` and ``image`` are always there."""

    id: str
    image: torch.Tensor
    """(3, H, W) uint8 RGB."""
    mask: torch.Tensor
    """(H, W) uint8: 0 is the background, 1 … K-1 the classes, 255 ignored."""
    boxes: torch.Tensor
    """(N, 4) float32, x1 y1 x2 y2 in pixels."""
    labels: torch.Tensor
    """(N,) int64, 0 … without a background class."""
    difficult: torch.Tensor
    """(N,) bool, objects that VOC's detection score leaves out."""
    crowd: torch.Tensor
    """(N,) bool, COCO's boxes around groups: neither objects nor background."""
    area: torch.Tensor
    """(N,) float32, pixels of the object, which COCO's score sorts into small, medium and large."""
    known: torch.Tensor
    """(K-1,) bool, the box classes that are annotated: others are neither there nor absent."""
    has_mask: torch.Tensor
    """() bool: the mask is real, and not filled in for a batch."""
    has_boxes: torch.Tensor
    """() bool: the boxes are real."""
    source: torch.Tensor
    """() int64, the number of the data set in a mixture."""


def keep_boxes(sample: Sample, kept: torch.Tensor) -> None:
    """Keep the boxes ``kept`` (indices or (N,) bool) in whatever a sample has of each box."""
    for key in ("boxes", "labels", "difficult", "crowd", "area"):
        if key in sample:
            sample[key] = sample[key][kept]


class Batch(TypedDict, total=False):
    """Samples side by side: tensors with a leading B where all sizes agree, otherwise lists."""

    id: list[str]
    image: torch.Tensor | list[torch.Tensor]
    """(B, 3, H, W) uint8 in training, a list of (3, H, W) in evaluation."""
    mask: torch.Tensor | list[torch.Tensor]
    boxes: list[torch.Tensor]
    labels: list[torch.Tensor]
    difficult: list[torch.Tensor]
    crowd: list[torch.Tensor]
    area: list[torch.Tensor]
    known: torch.Tensor | list[torch.Tensor]
    """(B, K-1) in training, as the three below (B,)."""
    has_mask: torch.Tensor | list[torch.Tensor]
    has_boxes: torch.Tensor | list[torch.Tensor]
    source: torch.Tensor | list[torch.Tensor]


def collate_stack(samples: list[Sample]) -> Batch:
    """Stack crops of one size into a training batch; images stay channels last in memory."""
    batch = collate_list(samples)
    rows = torch.stack([image.permute(1, 2, 0) for image in batch["image"]])
    batch["image"] = rows.permute(0, 3, 1, 2)
    for key in ("mask", "known", "has_mask", "has_boxes", "source"):
        if key in batch:
            batch[key] = torch.stack(list(batch[key]))
    return batch


def collate_list(samples: list[Sample]) -> Batch:
    """Keep photos at their own sizes: evaluation neither pads nor resizes on the way."""
    batch: Batch = {
        "id": [sample["id"] for sample in samples],
        "image": [sample["image"] for sample in samples],
    }
    for key in set().union(*samples) - {"id", "image"}:
        if all(key in sample for sample in samples):
            batch[key] = [sample[key] for sample in samples]  # type: ignore[literal-required]
    return batch


@dataclass(frozen=True)
class Classes:
    """The class list of a data set, background first; boxes count from the class after it."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    """RGB, 0 … 255, one a class."""

    def __len__(self) -> int:
        """Return the number of classes, background included."""
        return len(self.names)

    @classmethod
    def from_card(cls, name: str) -> "Classes":
        """Read the class list of a shipped data set card, for example ``voc2012``."""
        card = resources.load_yaml(resources.find("datasets", name))
        try:
            names = tuple(str(entry["name"]) for entry in card["classes"])
            colours = tuple(tuple(int(v) for v in entry["colour"]) for entry in card["classes"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"datasets/{name}.yaml: classes must be a list of {{name, colour: [r, g, b]}}"
            ) from error
        return cls(names, colours)  # type: ignore[arg-type]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], count: int) -> "Classes":
        """Return the classes that :meth:`to_config` put into a saved model's config.

        A model that has none gets VOC's names if it has 21 classes, otherwise numbers.
        """
        names, palette = config.get("_class_names"), config.get("_palette")
        if names and palette and len(names) == count:
            return cls(tuple(names), tuple((r, g, b) for r, g, b in palette))
        if count == 21:
            return cls.from_card("voc2012")
        return cls.from_names(["background", *(f"class {i}" for i in range(1, count))])

    def to_config(self) -> dict[str, Any]:
        """Return the entries for a model's config (an underscore keeps them from constructors)."""
        return {"_class_names": list(self.names), "_palette": [list(c) for c in self.palette]}

    @classmethod
    def from_names(cls, names: list[str]) -> "Classes":
        """Give a class list colours by VOC's rule (three bits of the index spread over RGB)."""
        return cls(tuple(names), tuple(voc_colour(index) for index in range(len(names))))


def voc_colour(index: int) -> tuple[int, int, int]:
    """Return the RGB colour that the VOC development kit gives to class ``index`` (0 … 255)."""
    red = green = blue = 0
    for bit in range(8):
        red |= (index >> 0 & 1) << (7 - bit)
        green |= (index >> 1 & 1) << (7 - bit)
        blue |= (index >> 2 & 1) << (7 - bit)
        index >>= 3
    return red, green, blue
