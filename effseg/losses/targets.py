"""Targets as torchvision has them, for people with a training loop of their own."""

# B batch, H W pixels, K classes, n boxes of an image.

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from effseg.data.sample import IGNORE_INDEX, TASK_KEYS, Sample, collate_labels
from effseg.errors import InputError

_KEYS = ("mask", "boxes", "labels", "crowd", "known")


def stack_targets(
    targets: Sequence[Mapping[str, Any]], images: torch.Tensor, num_classes: int | None = None
) -> dict[str, Any]:
    """Collate torchvision-style targets into a batch as `effseg.data` makes them.

    Args:
        targets: see `Criterion.forward`; they are moved to the images' device.
        images: (B, C, H, W).
        num_classes: K of the boxes; None: labels are not checked.

    Raises:
        InputError: a wrong number of targets, an unknown key, a tensor of the wrong shape, or a
            label outside 0 … K-1.
    """
    if len(targets) != len(images):
        raise InputError(f"{len(targets)} targets for {len(images)} images: expected one per image")
    size = (images.shape[-2], images.shape[-1])
    samples = [_sample(f"targets[{i}]", t, size, num_classes) for i, t in enumerate(targets)]
    annotated = [sample["known"] for sample in samples if "known" in sample]
    for sample in samples if annotated else []:
        sample.setdefault("known", torch.ones_like(annotated[0]))
    batch: Any = collate_labels(samples)
    rows = {task: numbers.to(images.device) for task, numbers in batch.pop("rows").items()}
    return {key: value.to(images.device) for key, value in batch.items()} | {"rows": rows}


def _sample(
    name: str, target: Mapping[str, Any], size: tuple[int, int], num_classes: int | None
) -> Sample:
    """Check a target, and fill in what it lacks."""
    # torchvision's names, of which the loss needs no more.
    target = {key: value for key, value in target.items() if key not in ("image_id", "area")}
    if "iscrowd" in target and "crowd" not in target:
        target["crowd"] = target.pop("iscrowd")
    unknown = target.keys() - {*_KEYS}
    if unknown:
        raise InputError(
            f"{name} has {', '.join(sorted(unknown))}: expected {', '.join(_KEYS[:-1])} or "
            f"{_KEYS[-1]}"
        )
    mask = torch.full(size, IGNORE_INDEX)
    if "mask" in target:
        mask = torch.as_tensor(target["mask"]).cpu()
        if tuple(mask.shape) != size or mask.is_floating_point():
            raise InputError(
                f"{name}: mask {tuple(mask.shape)} of {mask.dtype}, expected the image's {size} "
                "and integers"
            )
    boxes = torch.as_tensor(target.get("boxes", torch.zeros(0, 4))).float().cpu()
    boxes = boxes if boxes.numel() else boxes.reshape(0, 4)  # an empty list has one dimension
    labels = torch.as_tensor(target.get("labels", torch.zeros(0))).long().cpu()
    if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != (len(boxes),):
        raise InputError(
            f"{name}: boxes {tuple(boxes.shape)} and labels {tuple(labels.shape)}, expected "
            "(n, 4) and (n,)"
        )
    if not bool(((boxes[:, :2] < boxes[:, 2:]) & boxes[:, 2:].isfinite()).all()):
        raise InputError(f"{name}: a box without area or not finite, expected x1 < x2 and y1 < y2")
    if num_classes and bool(((labels < 0) | (labels >= num_classes)).any()):
        raise InputError(
            f"{name}: labels {labels.tolist()}, expected 0 to {num_classes - 1} (boxes have no "
            "background)"
        )
    crowd = torch.as_tensor(target.get("crowd", torch.zeros(len(boxes)))).bool().cpu()
    if crowd.shape != labels.shape:
        raise InputError(f"{name}: crowd {tuple(crowd.shape)}, expected ({len(boxes)},)")
    sample: Sample = {
        "mask": mask.long(),
        "boxes": boxes,
        "labels": labels,
        "crowd": crowd,
        "real": tuple(task for task, key in TASK_KEYS.items() if key in target),
    }
    if "boxes" in target and "known" in target:
        known = torch.as_tensor(target["known"]).bool().cpu()
        if num_classes and known.shape != (num_classes,):
            raise InputError(f"{name}: known {tuple(known.shape)}, expected ({num_classes},)")
        sample["known"] = known
    return sample
