"""Compare an exported file with its model on drawn images."""

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
PARTNERS = 0.99
"""Least share of boxes with a match: if two candidates overlap by the threshold within rounding,
NMS may keep either."""
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
    """Compare a file with its model, one image at a time and five as a batch.

    Raises:
        InputError: a difference exceeds this module's constants.
    """
    images = drawn_images(exported.fixed_size, len(model.preprocess_cfg["mean"]))
    result = compare(model, exported, images)
    wrong = bool(result.pixels) and min(result.pixels) < AGREEMENT
    wrong |= not (result.logits or 0.0) <= LOGITS[exported.path.suffix]
    wrong |= result.unmatched > (1 - PARTNERS) * result.boxes
    if wrong:
        raise InputError(f"{exported.path.name}: differs from the model on {result}; not written")
    return result


def drawn_images(side: int | None, channels: int = 3) -> list[torch.Tensor]:
    """Return five uint8 images (C, H, W) of several sizes, at most `side`; the last is blank."""
    rng = np.random.default_rng(0)
    longest = side or 416
    sizes = [(longest, longest * 3 // 4), (longest * 2 // 3, longest), (longest, longest)]
    names = ("circle", "square", "triangle", "star", "ring", "cross")
    arrays = [draw_image(rng, size, names).image for size in (*sizes, (longest // 2, longest // 2))]
    picked = [image[..., [c % 3 for c in range(channels)]] for image in arrays]
    images = [torch.from_numpy(image.copy()).movedim(-1, 0) for image in picked]
    return [*images, torch.full_like(images[0], 127)]


@torch.no_grad()
def compare(model: Network, exported: ExportedModel, images: Sequence[torch.Tensor]) -> Parity:
    """Compare on uint8 images (C, H, W), one at a time and as one padded batch.

    The model is in evaluation mode, on the CPU.
    """
    result = Parity(images=len(images))
    normalised = [model.normalise(image).float() for image in images]
    padded = [exported.fixed_size or max(i.shape[-2:]) for i in normalised]
    for group in ([i] for i in range(len(images))):
        _compare_group(model, exported, [normalised[i] for i in group], padded[group[0]], result)
    _compare_group(model, exported, normalised, max(padded), result)
    return result


def _compare_group(
    model: Network,
    exported: ExportedModel,
    images: list[torch.Tensor],
    side: int,
    result: Parity,
) -> None:
    if "segmentation" in model.tasks:
        ((_, batch),) = padded_batches(images, [(side, side)] * len(images))
        sizes = torch.tensor([image.shape[-2:] for image in images])
        expected = model.outputs(batch, ("segmentation",), sizes=sizes).masks
        masks = exported.outputs(batch, ("segmentation",), sizes=sizes).masks
        assert expected is not None and masks is not None
        for (h, w), a, b in zip(sizes.tolist(), expected, masks, strict=True):
            _compare_masks(a[:, :h, :w], b[:, :h, :w], exported.metadata["argmax"], result)
    if "detection" in model.tasks:
        pairs = zip(
            model.detect(images, pad_to=side), exported.detect(images, pad_to=side), strict=True
        )
        for original, exported_boxes in pairs:
            compare_boxes(original, exported_boxes, result)
            compare_boxes(exported_boxes, original, result)


def _compare_masks(a: torch.Tensor, b: torch.Tensor, labels: bool, result: Parity) -> None:
    same = (a > 0) == (b > 0) if len(a) == 1 else a.argmax(0) == b.argmax(0)
    result.pixels.append(float(same.float().mean()))
    if not labels:
        difference = float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))
        result.logits = max(result.logits or 0.0, difference)


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
