"""Scorers of an evaluation: predictions scored image by image, examples, results."""

# H W pixels, K classes, N boxes

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import nn

from effseg.data.classes import Classes
from effseg.data.sample import IGNORE_INDEX, Batch, TaskName
from effseg.distributed import of_all_processes
from effseg.errors import InputError
from effseg.inference.draw import SCORE, box_comparison, comparison
from effseg.inference.engine import Engine
from effseg.metrics.boundary import BoundaryIoU
from effseg.metrics.by_image import box_confusion, image_f1, image_iou
from effseg.metrics.by_size import SizeIoU
from effseg.metrics.confusion import SegmentationMetrics
from effseg.metrics.detection import COCOAveragePrecision, VOCAveragePrecision
from effseg.metrics.tables import print_detection_scores, print_scores
from effseg.training.config import DetectionConfig, SegmentationConfig

EXAMPLES = 8
Scores = dict[str, Any]


class Scorer(nn.Module):
    """Predicts whole images and scores them: `update`, then `compute`; keeps some as examples."""

    logged: tuple[str, ...]
    """Names of the scores that are logged, the main one first."""
    draw: ClassVar[Callable[..., Image.Image]]
    show: ClassVar[Callable[..., None]]

    def __init__(self, predictor: Engine, classes: Classes) -> None:
        super().__init__()
        self.predictor, self.classes = predictor, classes
        self.images: list[tuple[str, float]] = []
        """Id and score of each image."""
        self.examples: list[tuple[Any, ...]] = []
        """(id, image, ground truth, prediction) on the CPU."""

    def forget(self) -> None:
        """Drop the examples."""
        self.examples = []

    def pictures(self) -> Iterator[tuple[str, Image.Image]]:
        """Yield id and picture (image, ground truth, prediction) of the first images."""
        for image_id, *example in self.examples:
            yield image_id, self.draw(*example, self.classes)


class SegmentationScorer(Scorer):
    """Segments whole images and scores them.

    `boundary` adds Boundary IoU; `details` what reports show: IoU by object size, and `images`
    with id and IoU of each.
    """

    draw = staticmethod(comparison)
    show = staticmethod(print_scores)

    def __init__(
        self, predictor: Engine, classes: Classes, boundary: bool = False, details: bool = True
    ) -> None:
        super().__init__(predictor, classes)
        self.metrics = SegmentationMetrics(len(classes), IGNORE_INDEX)
        self.boundary = BoundaryIoU(len(classes), IGNORE_INDEX) if boundary else None
        self.logged = ("miou", "pixel_accuracy", *(["boundary_iou"] if boundary else []))
        self.by_size = SizeIoU(len(classes), IGNORE_INDEX) if details else None

    def update(self, batch: Batch) -> None:
        """Predict and score a batch of whole images."""
        predictions = self.predictor.labels(list(batch["image"]))
        rows = zip(batch["id"], batch["image"], batch["mask"], predictions, strict=True)
        for image_id, image, mask, prediction in rows:
            self.metrics.update(prediction, mask)
            if self.boundary is not None:
                self.boundary.update(prediction, mask)
            if self.by_size is not None:
                self.by_size.update(prediction, mask)
                self.images.append((image_id, image_iou(prediction, mask, len(self.classes))))
            if len(self.examples) < EXAMPLES:
                self.examples.append((image_id, image.cpu(), mask.cpu(), prediction.cpu()))

    def compute(self) -> Scores:
        """Return the scores over all processes and reset; examples stay."""
        scores: Scores = self.metrics.compute() | {"protocol": self.predictor.protocol.name}
        self.metrics.reset()
        if self.boundary is not None:
            scores["boundary_iou"] = self.boundary.compute()["boundary_iou"]
            self.boundary.reset()
        if self.by_size is not None:
            scores |= self.by_size.compute() | {"images": of_all_processes(self.images)}
            self.by_size.reset()
            self.images = []
        return scores


class DetectionScorer(Scorer):
    """Detects objects in whole images and scores them.

    By `metric` the scores are AP over IoU 0.50 … 0.95, AP50, AP75 and by size (`coco`), or AP50 as
    area and by 11 points without difficult objects (`voc`). Beside them: `confusion`, see
    `effseg.metrics.by_image.box_confusion`, and `images` with id and F1 of each.
    """

    draw = staticmethod(box_comparison)
    show = staticmethod(print_detection_scores)

    def __init__(self, predictor: Engine, classes: Classes, metric: Literal["coco", "voc"]) -> None:
        super().__init__(predictor, classes)
        self.logged = ("ap", "ap50", "ap75") if metric == "coco" else ("ap50", "ap50_11")
        average = COCOAveragePrecision if metric == "coco" else VOCAveragePrecision
        self.metrics = average(len(classes) - 1)
        self.confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
        self.results: list[tuple[str, Any]] = []
        """(id, detections on the CPU) of the last evaluation's images in this process."""

    def update(self, batch: Batch) -> None:
        """Detect and match a batch of whole images."""
        detections = self.predictor.detect(list(batch["image"]))
        keys = ("boxes", "labels", "crowd", "area", "difficult")
        for i, (image_id, image) in enumerate(zip(batch["id"], batch["image"], strict=True)):
            result: dict[str, Any] = dict(detections[i])
            if "known" in batch:
                # Classes that the data do not annotate can be neither right nor wrong.
                # An exported file's boxes are on the CPU, whatever the batch's device.
                labels = result["labels"]
                annotated = batch["known"][i].to(labels.device)[labels]
                result = {key: value[annotated] for key, value in result.items()}
            truth: dict[str, Any] = {k: batch[k][i] for k in keys if k in batch}  # type: ignore[literal-required]
            self.metrics.update([result], [truth])  # type: ignore[list-item]
            result = {key: value.cpu() for key, value in result.items()}
            truth = {key: value.cpu() for key, value in truth.items()}
            confusion = box_confusion(result, truth, len(self.classes) - 1, SCORE)
            self.confusion += confusion
            self.images.append((image_id, image_f1(confusion)))
            self.results.append((image_id, result))
            if len(self.examples) < EXAMPLES:
                self.examples.append((image_id, image.cpu(), truth, result))

    def compute(self) -> Scores:
        """Return the scores over all processes and reset; examples and results stay."""
        scores: Scores = self.metrics.compute() | {"protocol": self.predictor.box_protocol}
        scores["confusion"] = sum(of_all_processes([self.confusion]))
        scores["images"] = of_all_processes(self.images)
        self.metrics.reset()
        self.confusion, self.images = torch.zeros_like(self.confusion), []
        return scores

    def forget(self) -> None:
        """Drop examples and results."""
        self.examples, self.results = [], []


class Scorers(nn.Module):
    """One scorer for each task of each evaluated source.

    With several sources the scores are named `SOURCE/miou`, `SOURCE/ap50` …, with one `miou`,
    `ap50` …. The mean `best`, weighted by the argument of that name, decides which epoch is the
    best; None: mIoU and AP of all sources, equally. `sources` are the tasks with labels in each
    evaluated source; the model is kept by reference.
    """

    def __init__(
        self,
        model: Any,
        classes: Classes,
        sources: Mapping[str, Sequence[TaskName]],
        segmentation: SegmentationConfig,
        detection: DetectionConfig,
        best: Mapping[str, float] | None,
        details: bool = True,
    ) -> None:
        super().__init__()
        self.sources = list(sources)
        self.by_source: dict[str, dict[str, Scores]] = {}
        """Scores of the last evaluation by source and task."""
        self.scorers = nn.ModuleDict()
        size, sigma = detection.size, detection.soft_nms_sigma
        for source, tasks in sources.items():
            if "segmentation" in tasks and "segmentation" in model.tasks:
                engine = Engine(model, segmentation.protocol, size=size)
                masks = SegmentationScorer(engine, classes, segmentation.boundary, details)
                self.scorers[f"{source}|segmentation"] = masks
            if "detection" in tasks and "detection" in model.tasks:
                engine = Engine(model, size=size, soft_nms_sigma=sigma)
                boxes = DetectionScorer(engine, classes, detection.metric)
                self.scorers[f"{source}|detection"] = boxes
        if not self.scorers:
            raise InputError(
                f"data.val: no labels for {' or '.join(model.tasks)} in {', '.join(self.sources)}, "
                "expected some to score the model by"
            )
        self.main_scores = [f"{prefix}{s.logged[0]}" for *_, prefix, s in self.each()]
        known = [f"{prefix}{name}" for *_, prefix, s in self.each() for name in s.logged]
        self.logged = ("best", *known)
        """Names of the scores that are logged."""
        self.weights = best or dict.fromkeys(self.main_scores, 1.0)
        unknown = [key for key in self.weights if key not in known]
        if unknown:
            raise InputError(f"best: no score {unknown[0]!r}, expected among {', '.join(known)}")
        if best is not None and not sum(best.values()) > 0:
            raise InputError(f"best {dict(best)}: expected a sum above 0")

    def each(self) -> Iterator[tuple[str, TaskName, str, Any]]:
        """Yield source, task, the prefix of the scores' names, and scorer."""
        for key, scorer in self.scorers.items():
            source, task = key.rsplit("|", 1)
            prefix = f"{source}/" if len(self.sources) > 1 else ""
            yield source, task, prefix, scorer  # type: ignore[misc]

    def update(self, batch: Batch) -> None:
        """Score whole images, each with its source's scorers and for its labels."""
        unknown = set(batch["source"]) - set(self.sources)
        if unknown:
            raise InputError(
                f"val_sources: no {', '.join(sorted(unknown))} among {', '.join(self.sources)}, "
                "expected data.val_sources"
            )
        for source, task, _, scorer in self.each():
            labelled = batch["rows"][task].tolist() if task in batch["rows"] else []
            rows = [i for i in labelled if batch["source"][i] == source]
            if rows:
                chosen = {
                    key: [values[i] for i in rows]  # type: ignore[index]
                    for key, values in batch.items()
                    if key != "rows"
                }
                scorer.update(chosen)

    def compute(self) -> Scores:
        """Return the scores of every source over all processes and reset."""
        scores: Scores = {}
        protocols: dict[str, str] = {}
        self.by_source = {source: {} for source in self.sources}
        for source, task, prefix, scorer in self.each():
            computed = self.by_source[source][task] = scorer.compute()
            protocols[task] = computed["protocol"]
            # Both tasks have `confusion` and `images`; these are the masks'.
            scores = {f"{prefix}{k}": v for k, v in computed.items() if k != "protocol"} | scores
        scores["protocol"] = ", ".join(
            f"{task} {name}" if len(protocols) > 1 else name for task, name in protocols.items()
        )
        total = sum(weight * float(scores[key]) for key, weight in self.weights.items())
        weight = sum(self.weights.values())
        scores["best"] = torch.tensor(total / weight if weight else float("nan"))
        return scores

    def forget(self) -> None:
        """Drop examples and results."""
        for *_, scorer in self.each():
            scorer.forget()

    def pictures(self) -> Iterator[tuple[str, Image.Image]]:
        """Yield name and picture of the first images of every source and task."""
        for source, task, _, scorer in self.each():
            for image_id, picture in scorer.pictures():
                yield f"{source}-{task}-{image_id}".replace("/", "_"), picture

    def show(self, scores: Scores) -> None:
        """Print a table for every source and task."""
        for source, task, prefix, scorer in self.each():
            if len(self.scorers) > 1:
                print(f"{source}: {task}")
            subset = {k.removeprefix(prefix): v for k, v in scores.items() if k.startswith(prefix)}
            scorer.show(subset | self.by_source[source][task], scorer.classes)
        if len(self.scorers) > 1:
            print(f"best {float(scores['best']):.4f}")
