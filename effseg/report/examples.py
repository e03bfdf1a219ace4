"""The images with the worst and the median scores, predicted again and drawn."""

# H W pixels, N boxes

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from effseg.data.classes import Classes
from effseg.data.dataset import Dataset
from effseg.data.sample import IGNORE_INDEX, Sample
from effseg.errors import InputError, needs
from effseg.inference.draw import SCORE, draw_boxes
from effseg.metrics.by_image import match_boxes
from effseg.models.pretrained import from_pretrained
from effseg.report.collect import Evaluation, Run
from effseg.report.pictures import blend, data_uri, pale, picture, small, tinted

COUNT = 12
"""Number of images of each kind."""
MISSED, FALSE, CONFUSED, RIGHT = (0, 114, 178), (213, 94, 0), (240, 228, 66), (0, 158, 115)
"""Colours of the error maps: Okabe and Ito's, which colour-blind people tell apart."""

Values = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Example:
    """An image of the report."""

    id: str
    score: float
    """IoU of its classes, or F1 of its boxes, 0 … 1."""
    pictures: dict[str, str]
    """Caption (image, truth, prediction, errors) to a JPEG as data URI."""


def examples(run: Run, evaluation: Evaluation, device: str) -> tuple[list[Example], list[Example]]:
    """Draw the worst and the median images.

    Raises:
        InputError: the run's data or model are missing.
    """
    with needs("train"):
        from effseg.training.cli import read_data

    data = read_data(str(run.folder / "config.yaml"), None, None)
    data.setup("validate")
    assert data.val_set is not None
    with redirect_stdout(sys.stderr):  # the hub's library prints that it loads weights
        model = from_pretrained(run.folder).eval().to(device)
    draw = _Masks if evaluation.task == "segmentation" else _Boxes
    worst, median = evaluation.worst_and_median(COUNT)
    drawn = {
        sample["id"]: Example(sample["id"], evaluation.score_of(sample["id"]), pictures)
        for sample, pictures in draw(model, run, evaluation).pictures(
            _samples(data.val_set, evaluation.source, [*worst, *median])
        )
    }
    return [drawn[i] for i in worst if i in drawn], [drawn[i] for i in median if i in drawn]


def _samples(dataset: Dataset, source: str, ids: Sequence[str]) -> Iterator[Sample]:
    numbers = {
        image: member.first + number
        for member in dataset.members
        if member.name == source
        for number, image in enumerate(member.source.ids)
    }
    missing = [image for image in ids if image not in numbers]
    if missing:
        raise InputError(f"{source}: no image {missing[0]}, which the run was scored on")
    for image in ids:
        yield dataset[numbers[image]]


class _Masks:
    def __init__(self, model: Any, run: Run, evaluation: Evaluation) -> None:
        from effseg.inference.engine import Engine

        assert run.classes is not None
        self.classes: Classes = run.classes
        self.predictor = Engine(model, str(evaluation.scores["protocol"]))

    def pictures(self, samples: Iterator[Sample]) -> Iterator[tuple[Sample, dict[str, str]]]:
        for sample in samples:
            image, truth = sample["image"], sample["mask"]
            prediction = self.predictor.labels([image])[0].cpu()
            grey = pale(image)
            errors = mask_errors(truth, prediction)
            yield (
                sample,
                {
                    "image": data_uri(picture(image)),
                    "truth": data_uri(tinted(grey, truth, self.classes)),
                    "prediction": data_uri(tinted(grey, prediction, self.classes)),
                    "errors": data_uri(blend(grey, errors, np.any(errors > 0, axis=2))),
                },
            )


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


class _Boxes:
    def __init__(self, model: Any, run: Run, evaluation: Evaluation) -> None:
        from effseg.inference.engine import Engine

        assert run.classes is not None
        self.classes: Classes = run.classes
        self.predictor = Engine(
            model,
            size=int(str(evaluation.scores["protocol"]).removeprefix("size")),
            soft_nms_sigma=run.setting("model", "detection", "soft_nms_sigma"),
        )

    def pictures(self, samples: Iterator[Sample]) -> Iterator[tuple[Sample, dict[str, str]]]:
        for sample in samples:
            result = {k: v.cpu() for k, v in self.predictor.detect([sample["image"]])[0].items()}  # type: ignore[attr-defined]
            annotated = sample["known"][result["labels"]]
            result = {k: v[annotated] for k, v in result.items()}
            shown = small(picture(sample["image"]))
            ratio = shown.width / sample["image"].shape[-1]
            image = torch.from_numpy(np.array(shown)).permute(2, 0, 1)
            truth: Any = {k: sample[k] for k in ("boxes", "labels", "crowd", "difficult")}  # type: ignore[literal-required]
            pairs = match_boxes(result, truth, SCORE)
            truth["boxes"], result["boxes"] = truth["boxes"] * ratio, result["boxes"] * ratio
            yield (
                sample,
                {
                    "image": data_uri(shown),
                    "truth": data_uri(draw_boxes(image, truth, self.classes)),
                    "prediction": data_uri(draw_boxes(image, result, self.classes)),
                    "errors": data_uri(_box_errors(image, truth, result, pairs)),
                },
            )


def _box_errors(
    image: torch.Tensor, truth: Values, result: Values, pairs: Sequence[tuple[Any, Any]]
) -> Image.Image:
    from torchvision.utils import draw_bounding_boxes

    boxes, colours = [], []
    for j, i in pairs:
        boxes.append(truth["boxes"][j] if i is None else result["boxes"][i])
        if i is None:
            colours.append(MISSED)
        elif j is None:
            colours.append(FALSE)
        else:
            colours.append(RIGHT if truth["labels"][j] == result["labels"][i] else CONFUSED)
    drawn = torch.from_numpy(np.array(pale(image))).permute(2, 0, 1).contiguous()
    if boxes:
        drawn = draw_bounding_boxes(drawn, torch.stack(boxes), colors=colours, width=3)
    return picture(drawn)
