"""The images with the worst and the median scores, predicted again and drawn."""

# H W pixels, N boxes

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from effseg.data.classes import Classes
from effseg.data.sample import IGNORE_INDEX, Sample
from effseg.errors import InputError, needs
from effseg.inference.backends import load
from effseg.inference.draw import SCORE, draw_boxes
from effseg.inference.engine import Engine
from effseg.metrics.by_image import match_boxes
from effseg.report.collect import Evaluation, Run
from effseg.report.pictures import blend, data_uri, pale, small, tinted

COUNT = 12
"""Number of images of each kind."""
MISSED, FALSE, CONFUSED, RIGHT = (0, 114, 178), (213, 94, 0), (240, 228, 66), (0, 158, 115)
"""Colours of the error maps: Okabe and Ito's, which colour-blind people tell apart."""


@dataclass(frozen=True)
class Example:
    """An image of the report."""

    id: str
    score: float
    """IoU of its classes, or F1 of its boxes, 0 … 1."""
    pictures: dict[str, str]
    """Caption (image, truth, prediction, errors) to a JPEG as data URI."""


def examples(run: Run, evaluation: Evaluation, device: str | None) -> list[list[Example]]:
    """Draw the worst and the median images; raises InputError without the run's data or model."""
    with needs("train"):
        from effseg.training.recipes import read_data

    data = read_data(str(run.folder / "config.yaml"), None, None)
    data.setup("validate")
    dataset, classes = data.val_set, run.classes
    assert dataset is not None and classes is not None
    with redirect_stdout(sys.stderr):  # the hub's library prints that it loads weights
        model = load(run.folder, device)
    protocol = str(evaluation.scores["protocol"])
    if evaluation.task == "segmentation":
        draw, engine = _mask_pictures, Engine(model, protocol)
    else:
        sigma = run.setting("model", "detection", "soft_nms_sigma")
        size = int(protocol.removeprefix("size"))
        draw, engine = _box_pictures, Engine(model, size=size, soft_nms_sigma=sigma)
    number_of = {
        image: member.first + number
        for member in dataset.members
        if member.name == evaluation.source
        for number, image in enumerate(member.source.ids)
    }
    groups = evaluation.worst_and_median(COUNT)
    for _, image in (scored for group in groups for scored in group):
        if image not in number_of:
            raise InputError(f"{evaluation.source}: no image {image}, which the run was scored on")

    def example(score: float, image: str) -> Example:
        pictures = draw(engine, dataset[number_of[image]], classes)
        return Example(image, score, {k: data_uri(picture) for k, picture in pictures.items()})

    return [[example(*scored) for scored in group] for group in groups]


def _mask_pictures(engine: Engine, sample: Sample, classes: Classes) -> dict[str, Image.Image]:
    image, truth = sample["image"], sample["mask"]
    prediction = engine.labels([image])[0].cpu()
    grey, errors = pale(image), mask_errors(truth, prediction)
    return {
        "image": to_pil_image(image),
        "truth": tinted(grey, truth, classes),
        "prediction": tinted(grey, prediction, classes),
        "errors": blend(grey, errors, np.any(errors > 0, axis=2)),
    }


def mask_errors(truth: torch.Tensor, prediction: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return (H, W, 3) uint8: missed, false and confused pixels in their colours, others black.

    A missed pixel is an object's, predicted as background; a false one the reverse; a confused
    one is predicted as another class. Both are (H, W) uint8; 255 is ignored.
    """
    true, predicted = truth.numpy(), prediction.numpy()
    wrong = (true != predicted) & (true != IGNORE_INDEX)
    errors = np.zeros((*true.shape, 3), np.uint8)
    errors[wrong] = CONFUSED
    errors[wrong & (predicted == 0)] = MISSED
    errors[wrong & (true == 0)] = FALSE
    return errors


def _box_pictures(engine: Engine, sample: Sample, classes: Classes) -> dict[str, Image.Image]:
    result: Any = engine.detect([sample["image"]])[0]
    annotated = sample["known"][result["labels"].cpu()]
    result = {key: value.cpu()[annotated] for key, value in result.items()}
    truth: Any = {k: sample[k] for k in ("boxes", "labels", "crowd", "difficult")}  # type: ignore[literal-required]
    pairs = match_boxes(result, truth, SCORE)
    picture = small(to_pil_image(sample["image"]))
    image, ratio = pil_to_tensor(picture), picture.width / sample["image"].shape[-1]
    truth["boxes"], result["boxes"] = truth["boxes"] * ratio, result["boxes"] * ratio
    boxes, colours = [], []
    for j, i in pairs:
        boxes.append(truth["boxes"][j] if i is None else result["boxes"][i])
        if i is None:
            colours.append(MISSED)
        elif j is None:
            colours.append(FALSE)
        else:
            colours.append(RIGHT if truth["labels"][j] == result["labels"][i] else CONFUSED)
    errors = pil_to_tensor(pale(image))
    if boxes:
        errors = draw_bounding_boxes(errors, torch.stack(boxes), colors=colours, width=3)
    return {
        "image": picture,
        "truth": draw_boxes(image, truth, classes),
        "prediction": draw_boxes(image, result, classes),
        "errors": to_pil_image(errors),
    }
