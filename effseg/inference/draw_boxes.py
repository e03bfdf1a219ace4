"""Pictures of boxes: over a photo, each with its class and score."""

# H W pixels, N boxes. Photos are (3, H, W) uint8 RGB tensors, boxes x1 y1 x2 y2 in pixels.

from collections.abc import Mapping

import torch
from PIL import Image, ImageDraw

from effseg.data.classes import Classes
from effseg.errors import InputError
from effseg.inference.draw import INK, PAPER, Colour, drawable, font_for, side_by_side

SCORE = 0.3
"""Detections below it are not drawn unless told otherwise: at 0 there are always 100."""


def draw_boxes(
    photo: torch.Tensor,
    found: Mapping[str, torch.Tensor],
    classes: Classes,
    score_threshold: float = SCORE,
) -> Image.Image:
    """Draw boxes over a photo, the best last; each has its class's colour, name and score.

    Args:
        photo: (3, H, W) uint8 RGB.
        found: ``boxes`` (N, 4), ``labels`` (N,) 0 … K-1, and ``scores`` (N,) unless it is the
            truth.
        classes: names and colours, background first.
        score_threshold: what scores less is left out.

    Raises:
        InputError: a photo of another shape or dtype, or a label that no class has.
    """
    if photo.dtype != torch.uint8 or photo.ndim != 3 or len(photo) != 3:
        raise InputError(
            f"photo: {photo.dtype} of shape {tuple(photo.shape)}, expected uint8 (3, H, W)"
        )
    labels = found["labels"].tolist()
    wrong = [label for label in labels if not 0 <= label < len(classes) - 1]
    if wrong:
        raise InputError(f"labels: {wrong[0]}, expected 0 to {len(classes) - 2}")
    picture = Image.fromarray(photo.permute(1, 2, 0).cpu().contiguous().numpy())
    draw = ImageDraw.Draw(picture)
    font = font_for(picture.size, 48)
    width = max(2, round(max(picture.size) / 300))
    scores = found["scores"].tolist() if "scores" in found else [None] * len(labels)
    rows = list(zip(found["boxes"].tolist(), labels, scores, strict=True))
    for box, label, score in reversed(rows):
        if score is not None and score < score_threshold:
            continue
        colour = classes.palette[label + 1]
        draw.rectangle(box, outline=colour, width=width)
        text = drawable(classes.names[label + 1]) + ("" if score is None else f" {score:.2f}")
        left, top, right, bottom = draw.textbbox((0, 0), text, font)
        height = bottom - top + 4
        y = box[1] - height if box[1] >= height else box[1]
        draw.rectangle((box[0], y, box[0] + right - left + 6, y + height), colour)
        draw.text((box[0] + 3 - left, y + 2 - top), text, _readable(colour), font)
    return picture


def box_comparison(
    photo: torch.Tensor,
    truth: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    classes: Classes,
) -> Image.Image:
    """Draw truth and prediction side by side, with captions; raises as :func:`draw_boxes`."""
    return side_by_side(
        {
            "truth": draw_boxes(photo, truth, classes),
            f"prediction (score {SCORE:g} and more)": draw_boxes(photo, found, classes),
        }
    )


def _readable(colour: Colour) -> Colour:
    """Return ink on light colours and paper on dark ones."""
    red, green, blue = colour
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else PAPER
