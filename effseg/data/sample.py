"""Samples, batches, and the mask value of ignored pixels."""

# B batch, C channels, H W pixels, N boxes, M ignored regions, K box classes.
# Images are uint8 RGB until the device: normalisation is the model's.

from collections.abc import Sequence
from typing import Literal, TypedDict, get_args

import torch
from torch.nn.utils.rnn import pad_sequence

IGNORE_INDEX = 255
"""Mask value of ignored pixels: VOC's border, padding, unlabelled parts."""

TaskName = Literal["segmentation", "detection"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)

TASK_KEYS: dict[TaskName, str] = {"segmentation": "mask", "detection": "boxes"}
"""The key of a sample that has the labels of a task."""
PER_BOX = ("boxes", "labels", "difficult", "crowd", "area")
"""Keys of a sample with an entry per box."""


class Sample(TypedDict, total=False):
    """One image with its labels: in a source those that the image has, in a dataset all."""

    id: str
    image: torch.Tensor
    """(3, H, W) uint8 RGB, channels last in memory."""
    mask: torch.Tensor
    """(H, W) uint8: 0 is the background, 1 … K the classes, 255 ignored."""
    boxes: torch.Tensor
    """(N, 4) float32, x1 y1 x2 y2 in pixels, x2 and y2 exclusive."""
    labels: torch.Tensor
    """(N,) int64, 0 … K-1: boxes have no background class."""
    crowd: torch.Tensor
    """(N,) bool, boxes around groups: their inside is neither an object nor background."""
    difficult: torch.Tensor
    """(N,) bool, objects that VOC's score leaves out."""
    area: torch.Tensor
    """(N,) float32, pixels of the object (default: of the box), its size in COCO's score."""
    stated_size: tuple[int, int]
    """(H, W) that the label file states, until the source compares it with the image's."""
    known: torch.Tensor
    """(K,) bool, the box classes that are annotated; others may or may not be present."""
    source: str
    """Name of the source."""
    number: int
    """Index of that name in the dataset."""
    real: tuple[TaskName, ...]
    """The tasks that the image has labels for; labels of the others are filled in."""
    tasks: tuple[TaskName, ...]
    """Training: the heads that run in the sample's step."""
    freeze: bool | int
    """Training: what is frozen in that step, see `effseg.data.sampling.Stage`."""
    skipped: list[str]
    """Training: why the images that this one replaces could not be read."""


class Batch(TypedDict, total=False):
    """Samples in one of two forms.

    Training (`collate_train`): tensors with a leading B. Evaluation (`collate_eval`): lists with an
    entry per image, each at its own size, with all keys of a `Sample`. `mask` is present if any
    source of the dataset has masks, boxes likewise.
    """

    id: list[str]
    image: torch.Tensor | list[torch.Tensor]
    """Training: (B, 3, H, W) uint8, channels last in memory."""
    mask: torch.Tensor | list[torch.Tensor]
    """Training: (B, H, W) uint8; 255 everywhere in images without a mask."""
    boxes: torch.Tensor | list[torch.Tensor]
    """Training: (B, N, 4) float32, zeros in the padding."""
    labels: torch.Tensor | list[torch.Tensor]
    """Training: (B, N) int64, -1 in the padding."""
    ignored: torch.Tensor
    """Training: (B, M, 4) float32, the crowds, zeros in the padding; M may be 0."""
    known: torch.Tensor | list[torch.Tensor]
    """Training: (B, K) bool."""
    crowd: list[torch.Tensor]
    difficult: list[torch.Tensor]
    area: list[torch.Tensor]
    rows: dict[TaskName, torch.Tensor]
    """For each task of the dataset: the indices of the images with real labels, int64."""
    source: torch.Tensor | list[str]
    """Training: (B,) int64, the index of the source's name; evaluation: the names."""
    tasks: tuple[TaskName, ...]
    """Training: the heads that run in this step, the same in all processes."""
    freeze: bool | int
    """Training: what is frozen in this step."""
    skipped: list[str]
    """Training: why images that were replaced could not be read."""


def keep_boxes(sample: Sample, kept: torch.Tensor) -> None:
    """Keep the boxes `kept` (indices or (N,) bool) and what else a sample has per box."""
    for key in PER_BOX:
        if key in sample:
            sample[key] = sample[key][kept]  # type: ignore[literal-required]


def pad_boxes(
    boxes: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack each image's boxes (n, 4) and labels (n,) into (B, N, 4) and (B, N).

    Boxes are padded with zeros, labels with -1.
    """
    return pad_sequence(list(boxes), True), pad_sequence(list(labels), True, -1)


def collate_train(samples: Sequence[Sample]) -> Batch:
    """Stack crops of one size; boxes are padded, crowds go to `ignored`.

    ValueError: samples with different keys, or drawn for different steps.
    """
    first = _check_keys(samples)
    step = first["tasks"], first["freeze"]
    if any((sample["tasks"], sample["freeze"]) != step for sample in samples):
        raise ValueError("samples of different steps in one batch")
    images = torch.stack([sample["image"].permute(1, 2, 0) for sample in samples])
    batch: Batch = {
        "id": [sample["id"] for sample in samples],
        "image": images.permute(0, 3, 1, 2),
        "source": torch.tensor([sample["number"] for sample in samples]),
        "tasks": step[0],
        "freeze": step[1],
    }
    if "skipped" in first:
        batch["skipped"] = [reason for sample in samples for reason in sample["skipped"]]
    return batch | collate_labels(samples)  # type: ignore[return-value]


def collate_labels(samples: Sequence[Sample]) -> Batch:
    """Stack masks of one size and pad boxes; crowds go to `ignored`."""
    first = samples[0]
    batch: Batch = {"rows": _rows(samples)}
    if "mask" in first:
        batch["mask"] = torch.stack([sample["mask"] for sample in samples])
    if "boxes" in first:
        pairs = [(s["boxes"][~s["crowd"]], s["labels"][~s["crowd"]]) for s in samples]
        batch["boxes"], batch["labels"] = pad_boxes(*zip(*pairs, strict=True))
        batch["ignored"] = pad_sequence([s["boxes"][s["crowd"]] for s in samples], True)
    if "known" in first:
        batch["known"] = torch.stack([sample["known"] for sample in samples])
    return batch


def collate_eval(samples: Sequence[Sample]) -> Batch:
    """Make lists: evaluation neither pads nor resizes while loading.

    ValueError: samples with different keys.
    """
    first = _check_keys(samples)
    batch: Batch = {"rows": _rows(samples)}
    for key in first.keys() - {"number", "real"}:
        batch[key] = [sample[key] for sample in samples]  # type: ignore[literal-required]
    return batch


def _check_keys(samples: Sequence[Sample]) -> Sample:
    first = samples[0]
    for sample in samples:
        if sample.keys() != first.keys():
            differ = ", ".join(sorted(sample.keys() ^ first.keys()))
            raise ValueError(f"samples {first['id']} and {sample['id']} differ in: {differ}")
    return first


def _rows(samples: Sequence[Sample]) -> dict[TaskName, torch.Tensor]:
    return {
        task: torch.tensor([i for i, s in enumerate(samples) if task in s["real"]]).long()
        for task, key in TASK_KEYS.items()
        if key in samples[0]
    }
