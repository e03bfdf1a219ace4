"""Compare an exported file with its model on generated images."""

# B batch, C channels, H W pixels, K classes, N boxes.

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from effseg.data.sources.drawing import draw_image
from effseg.errors import InputError
from effseg.export.graph import MAX_DETECTIONS
from effseg.inference.backends import ExportedModel
from effseg.models.boxes import Detections
from effseg.models.encoder import padded_batches
from effseg.models.network import Network

AGREEMENT = 0.999
"""Least share of an image's pixels with the same label."""
MATCHED = 0.98
"""Least share of matched boxes: if the IoU of two candidates is the threshold within rounding, NMS
may keep either."""
BOX_DISTANCE = 1e-2
"""Largest difference of a matched box's coordinates, pixels."""
SCORE = 0.05
"""Boxes that score less are not compared: among thousands, rounding changes ranks."""
LOGITS = {".onnx": 1e-3, ".xml": 1e-3, ".pt2": 1e-5}
"""Largest difference of logits, relative to the largest logit."""


@dataclass
class Parity:
    """Result of the comparison."""

    images: int = 0
    pixels: list[float] = field(default_factory=list)
    """Share of pixels with the same label, per image."""
    logits: float | None = None
    """Largest difference, relative to the image's largest logit; None for labels."""
    boxes: int = 0
    """Number of boxes compared."""
    unmatched: int = 0
    """Number of these without a match of their class within `BOX_DISTANCE`."""
    distance: float = 0.0
    """Largest difference of matched coordinates, pixels."""

    def __str__(self) -> str:
        """Return it as one line."""
        parts = []
        if self.pixels:
            mean, least = 100 * float(np.mean(self.pixels)), 100 * min(self.pixels)
            parts.append(f"labels agree on {mean:.3f} % of pixels (least {least:.3f} %)")
        if self.logits is not None:
            parts.append(f"logits within {self.logits:.1e} of the largest")
        if not self.pixels or self.boxes:
            parts.append(
                f"{self.boxes} boxes that score {SCORE} or more, {self.unmatched} without a "
                f"match, coordinates within {self.distance:.1e} px"
            )
        return f"{self.images} images: " + "; ".join(parts)


def check(model: Network, exported: ExportedModel) -> Parity:
    """Compare a file with its model; InputError if a difference exceeds this module's constants."""
    images = drawn_images(exported.fixed_size, len(model.preprocess_cfg["mean"]))
    result = compare(model, exported, images)
    same = (
        min(result.pixels, default=1.0) >= AGREEMENT
        and (result.logits or 0.0) <= LOGITS[exported.path.suffix]
        and result.unmatched <= (1 - MATCHED) * result.boxes
    )
    if not same:  # nan is a difference, too
        raise InputError(f"{exported.path.name}: differs from the model on {result}; not written")
    return result


def drawn_images(side: int | None, channels: int = 3) -> list[torch.Tensor]:
    """Return five uint8 images (C, H, W) of several sizes, at most `side`; the last is blank."""
    rng = np.random.default_rng(0)
    n = side or 416
    names = ("circle", "square", "triangle", "star", "ring", "cross")
    images = []
    for size in ((n, n * 3 // 4), (n * 2 // 3, n), (n, n), (n // 2, n // 2)):
        pixels = draw_image(rng, size, names).image[..., [c % 3 for c in range(channels)]]
        images.append(torch.from_numpy(pixels.copy()).movedim(-1, 0))
    return [*images, torch.full_like(images[0], 127)]


@torch.no_grad()
def compare(model: Network, exported: ExportedModel, images: Sequence[torch.Tensor]) -> Parity:
    """Compare on uint8 images (C, H, W), one at a time and as one padded batch.

    The model is in evaluation mode, on the CPU.
    """
    result = Parity(images=len(images))
    normalised = [model.normalise(image).float() for image in images]
    for batch in (*([image] for image in normalised), normalised):
        _compare_batch(model, exported, batch, result)
    return result


def _compare_batch(
    model: Network, exported: ExportedModel, images: list[torch.Tensor], result: Parity
) -> None:
    side = exported.fixed_size or max(max(image.shape[-2:]) for image in images)
    if "segmentation" in model.tasks:
        ((_, batch),) = padded_batches(images, [(side, side)] * len(images))
        sizes = torch.tensor([image.shape[-2:] for image in images])
        expected = model.outputs(batch, ("segmentation",), sizes=sizes).masks
        masks = exported.outputs(batch, ("segmentation",), sizes=sizes).masks
        assert expected is not None and masks is not None
        for (h, w), a, b in zip(sizes.tolist(), expected, masks, strict=True):
            a, b = a[:, :h, :w], b[:, :h, :w]
            same = (a > 0) == (b > 0) if len(a) == 1 else a.argmax(0) == b.argmax(0)
            result.pixels.append(float(same.float().mean()))
            if not exported.metadata["argmax"]:
                difference = float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))
                result.logits = max(result.logits or 0.0, difference)
    if "detection" in model.tasks:
        boxes = [one.detect(images, pad_to=side) for one in (model, exported)]
        for a_boxes, b_boxes in zip(*boxes, strict=True):
            compare_boxes(a_boxes, b_boxes, result)
            compare_boxes(b_boxes, a_boxes, result)


def compare_boxes(a: Detections, b: Detections, result: Parity) -> None:
    """Match every box of `a` that scores `SCORE` or more with one of `b`."""
    least = SCORE
    if len(b["scores"]) == MAX_DETECTIONS:  # boxes ranked below the last one kept have no match
        least = max(least, float(b["scores"][-1]) + 1e-4)
    for box, label in zip(a["boxes"][a["scores"] >= least], a["labels"], strict=False):
        candidates = b["boxes"][b["labels"] == label]
        distance = float((candidates - box).abs().amax(1).min()) if len(candidates) else torch.inf
        result.boxes += 1
        if distance <= BOX_DISTANCE:
            result.distance = max(result.distance, distance)
        else:
            result.unmatched += 1
