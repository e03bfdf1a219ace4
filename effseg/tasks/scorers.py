"""What evaluation keeps: predictions scored photo by photo, examples to look at, the table."""

# H W pixels, K classes, N boxes

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import nn

from effseg.data.samples import IGNORE_INDEX, Batch, Classes
from effseg.inference.detector import DetectionPredictor
from effseg.inference.draw import comparison
from effseg.inference.draw_boxes import box_comparison
from effseg.inference.predictor import Predictor
from effseg.metrics.boundary import BoundaryIoU
from effseg.metrics.detection import COCOAveragePrecision, VOCAveragePrecision
from effseg.metrics.segmentation import SegmentationMetrics
from effseg.tasks.report import print_detection_scores, print_scores

EXAMPLES = 8
Scores = dict[str, Any]


class SegmentationScorer(nn.Module):
    """Segments whole photos by a protocol and counts.

    Args:
        model: the model, kept by reference; it does not become a part of this module.
        classes: K, background included.
        protocol: see :class:`effseg.inference.protocol.Protocol`.
        boundary: measure Boundary IoU too.
    """

    headline = "miou"
    headlines: ClassVar = ("miou",)
    logged: ClassVar = ("miou", "pixel_accuracy", "boundary_iou")

    def __init__(
        self, model: nn.Module, classes: int, protocol: str = "whole", boundary: bool = False
    ) -> None:
        """Start without photos."""
        super().__init__()
        self.predictor = Predictor(model, protocol)
        self.metrics = SegmentationMetrics(classes, IGNORE_INDEX)
        self.boundary = BoundaryIoU(classes, IGNORE_INDEX) if boundary else None
        self.examples: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def update(self, batch: Batch) -> None:
        """Predict and count a batch of whole photos."""
        images, masks = list(batch["image"]), list(batch["mask"])
        predictions = self.predictor.labels(images)
        for i, (prediction, mask) in enumerate(zip(predictions, masks, strict=True)):
            self.metrics.update(prediction, mask)
            if self.boundary is not None:
                self.boundary.update(prediction, mask)
            if len(self.examples) < EXAMPLES:
                example = (batch["id"][i], images[i].cpu(), mask.cpu(), prediction.cpu())
                self.examples.append(example)

    def compute(self) -> Scores:
        """Return the scores over all processes, and start anew (the examples stay)."""
        scores: Scores = self.metrics.compute() | {"protocol": self.predictor.protocol.name}
        self.metrics.reset()
        if self.boundary is not None:
            scores["boundary_iou"] = self.boundary.compute()["boundary_iou"]
            self.boundary.reset()
        return scores

    def forget(self) -> None:
        """Drop the examples."""
        self.examples = []

    def pictures(self, classes: Classes) -> Iterator[tuple[str, Image.Image]]:
        """Yield id and picture (photo, truth, prediction) of the first photos."""
        for photo_id, photo, truth, prediction in self.examples:
            yield photo_id, comparison(photo, truth, prediction, classes)

    def show(self, scores: Scores, classes: Classes) -> None:
        """Print the table."""
        print_scores(scores, classes)


class DetectionScorer(nn.Module):
    """Finds objects in whole photos and scores them.

    Args:
        predictor: the detector and its size.
        classes: K, without background.
        metric: ``coco`` (AP over IoU 0.50 … 0.95, AP50, AP75, by size) or ``voc`` (AP50 as area
            and by 11 points, difficult objects left out).
    """

    def __init__(
        self, predictor: DetectionPredictor, classes: int, metric: Literal["coco", "voc"]
    ) -> None:
        """Start without photos."""
        super().__init__()
        self.predictor = predictor
        self.logged = ("ap", "ap50", "ap75", "ap50_11")
        self.metrics: COCOAveragePrecision | VOCAveragePrecision
        if metric == "coco":
            self.metrics = COCOAveragePrecision(classes)
            self.headline = "ap"
        else:
            self.metrics = VOCAveragePrecision(classes)
            self.headline = "ap50"
        self.headlines = (self.headline,)
        self.classes = classes
        self.examples: list[tuple[str, torch.Tensor, dict[str, torch.Tensor], Any]] = []
        self.results: list[tuple[str, Any]] = []
        """(id, detections on the CPU) of every photo of the last evaluation in this process."""

    def update(self, batch: Batch) -> None:
        """Detect and match a batch of whole photos."""
        images = list(batch["image"])
        found = self.predictor.detect(images)
        for result, known in zip(found, batch.get("known", ()), strict=False):
            # What the data do not annotate can be neither right nor wrong.
            wanted = known[result["labels"]]
            for key, value in result.items():
                result[key] = value[wanted]  # type: ignore[literal-required,index]
        known = ("boxes", "labels", "crowd", "area", "difficult")
        truth: list[dict[str, torch.Tensor]] = [
            {key: batch[key][i] for key in known if key in batch}  # type: ignore[literal-required]
            for i in range(len(images))
        ]
        self.metrics.update(found, truth)  # type: ignore[arg-type]
        for i, (photo_id, result) in enumerate(zip(batch["id"], found, strict=True)):
            on_cpu = _on_cpu(result)
            self.results.append((photo_id, on_cpu))
            if len(self.examples) < EXAMPLES:
                self.examples.append((photo_id, images[i].cpu(), _on_cpu(truth[i]), on_cpu))

    def compute(self) -> Scores:
        """Return the scores over all processes, and start anew (examples and results stay)."""
        scores: Scores = self.metrics.compute() | {"protocol": self.predictor.protocol}
        self.metrics.reset()
        return scores

    def forget(self) -> None:
        """Drop examples and results."""
        self.examples, self.results = [], []

    def pictures(self, classes: Classes) -> Iterator[tuple[str, Image.Image]]:
        """Yield id and picture (truth and prediction over the photo) of the first photos."""
        for photo_id, photo, truth, found in self.examples:
            yield photo_id, box_comparison(photo, truth, found, classes)

    def show(self, scores: Scores, classes: Classes) -> None:
        """Print the table."""
        print_detection_scores(scores, classes)


def _on_cpu(entry: Any) -> dict[str, torch.Tensor]:
    return {key: value.cpu() for key, value in entry.items()}


Scorer = SegmentationScorer | DetectionScorer
