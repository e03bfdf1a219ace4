"""Detection metrics: COCO's AP, and Pascal VOC's at IoU 0.5."""

# N boxes, M objects, K classes. Boxes are x1 y1 x2 y2 in pixels.

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.utilities import rank_zero_warn
from torchvision.ops import box_area, box_iou

from effseg.distributed import of_all_processes
from effseg.errors import InputError
from effseg.metrics.confusion import DatasetMetric

Entry = Mapping[str, torch.Tensor]

_PREDICTION = ("boxes", "scores", "labels")
_TRUTH = ("boxes", "labels")
_OPTIONAL = ("crowd", "iscrowd", "difficult", "area")


class COCOAveragePrecision(DatasetMetric):
    """AP over IoU 0.50 … 0.95 as COCO defines it, computed by faster-coco-eval.

    `update(preds, target)` takes one dict per image. Predictions: `boxes` (N, 4), `scores` (N,)
    and `labels` (N,) 0 … K-1. Truth: `boxes` (M, 4), `labels` (M,) and optionally `crowd` or
    `iscrowd` (M,), `difficult` (M,) and `area` (M,) (of the object in pixels; default: of the box).
    A crowd need not be detected, and detections inside it are ignored; difficult objects, which
    COCO does not have, are treated as crowds. `image_id` is not used.

    `compute()` returns `ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large` and
    `ar100`, each 0 … 1, or nan if there is no object of that size, and `ap_class`, `ap50_class`
    (K,), nan for a class without objects; float64. It warns if there is no object at all.

    Args:
        num_classes: K, without background.

    Raises:
        InputError: `num_classes` is less than 1; in `update`, keys that are missing or unknown,
            shapes that do not match, labels outside 0 … K-1, boxes or scores that are not finite.

    Source: Lin et al., arXiv 1405.0312; https://cocodataset.org/#detection-eval.
    """

    dimensions: ClassVar[dict[str, int]] = {"ap_class": 1, "ap50_class": 1}
    preds: list[torch.Tensor]
    """(N, 6) float64 of an image: box, score, label."""
    truth: list[torch.Tensor]
    """(M, 7) float64 of an image: box, label, iscrowd, area (nan: the box's)."""

    def __init__(self, num_classes: int = 80, **kwargs: Any) -> None:
        """Start without images; `kwargs` are those of `torchmetrics.Metric`."""
        super().__init__(num_classes, **{"sync_on_compute": False} | kwargs)
        self.add_state("preds", [], dist_reduce_fx=None)
        self.add_state("truth", [], dist_reduce_fx=None)

    def update(self, preds: Sequence[Entry], target: Sequence[Entry]) -> None:
        """Add images; see the class."""
        for prediction, truth in _checked(preds, target, self.num_classes):
            crowd = truth["crowd"] | truth["difficult"]
            area = truth.get("area", torch.full(crowd.shape, math.nan))
            scored = (prediction["scores"], prediction["labels"])
            self.preds.append(_rows(prediction["boxes"], *scored))
            self.truth.append(_rows(truth["boxes"], truth["labels"], crowd, area))

    def compute(self) -> dict[str, torch.Tensor]:
        """Return the scores of all images since the last reset."""
        # On the CPU: `to` moves the states of a metric that has images.
        preds, truth = (
            [rows.cpu() for rows in of_all_processes(state)] for state in (self.preds, self.truth)
        )
        result = _coco_summary(preds, truth) if preds else {}
        none = torch.tensor(-1.0)
        keys = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")
        names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar100")
        values = {n: result.get(k, none).double() for n, k in zip(names, keys, strict=True)}
        by_class = torch.full((2, self.num_classes), -1.0, dtype=torch.float64)
        if result:
            # (IoU thresholds, recall points, classes, sizes, counts): all sizes, most detections.
            precision = torch.as_tensor(result["precision"])[..., 0, -1].double()
            labels = result["classes"].reshape(-1).long()
            by_class[:, labels] = torch.stack([precision.mean((0, 1)), precision[0].mean(0)])
        if bool((by_class < 0).all()):
            rank_zero_warn("COCOAveragePrecision: no object in the truth, so every score is nan")
        values |= {"ap_class": by_class[0], "ap50_class": by_class[1]}
        return {name: torch.where(v < 0, torch.nan, v) for name, v in values.items()}


def _rows(boxes: torch.Tensor, *columns: torch.Tensor) -> torch.Tensor:
    """Return boxes (N, 4) and columns (N,) side by side, float64."""
    return torch.cat([x.double() for x in (boxes, *(c[:, None] for c in columns))], 1)


def _coco_summary(
    preds: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return faster-coco-eval's summary of the rows of `COCOAveragePrecision`."""
    detections, objects = [], []
    for rows in preds:
        boxes, (scores, labels) = rows[:, :4].float(), rows[:, 4:].unbind(1)
        detections.append({"boxes": boxes, "scores": scores, "labels": labels.long()})
    for rows in truth:
        boxes, (labels, crowd, area) = rows[:, :4].float(), rows[:, 4:].unbind(1)
        entry = {"boxes": boxes, "labels": labels.long(), "iscrowd": crowd.long()}
        objects.append(entry if area.isnan().any() else entry | {"area": area})
    # torchmetrics' default thresholds are float32 (0.80000001), and a recall of exactly 0.8 then
    # misses its point; these equal pycocotools' bit by bit.
    metric = MeanAveragePrecision(
        box_format="xyxy",
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
        backend="faster_coco_eval",
        extended_summary=True,  # adds the precision by class
        sync_on_compute=False,  # its input is gathered from all processes already
    )
    metric.warn_on_many_detections = False
    metric.update(detections, objects)
    summary: dict[str, torch.Tensor] = metric.compute()
    return summary


class VOCAveragePrecision(DatasetMetric):
    """AP at IoU 0.5 as the Pascal VOC development kit defines it.

    `update(preds, target)` as in `COCOAveragePrecision`. Of several detections of an object the one
    with the highest score is a true positive, the others are false positives. A difficult object
    need not be detected, and its detections are ignored. Crowds, which VOC does not have, are
    handled as in COCO: a detection that matches no object and has at least `iou_threshold` of its
    area inside a crowd of its class is ignored.

    `compute()` returns `ap50` (area under the monotone curve, VOC 2010 on), `ap50_11` (mean of 11
    points, VOC 2007), and both per class, `ap50_class` and `ap50_11_class` (K,), float64; a class
    without objects is nan and excluded from the mean. It warns if there is no object at all.

    Args:
        num_classes: K, without background.
        iou_threshold: lowest IoU of a match.

    Raises:
        InputError: as `COCOAveragePrecision`.

    Source: Everingham et al., IJCV 2010, section 4.2; VOC development kit, `VOCevaldet.m`.
    """

    dimensions: ClassVar[dict[str, int]] = {"ap50_class": 1, "ap50_11_class": 1}
    detections: list[torch.Tensor]
    objects: list[torch.Tensor]

    def __init__(self, num_classes: int = 20, iou_threshold: float = 0.5, **kwargs: Any) -> None:
        """Start without images; `kwargs` are those of `torchmetrics.Metric`."""
        super().__init__(num_classes, iou_threshold, **{"sync_on_compute": False} | kwargs)
        self.iou_threshold = iou_threshold
        self.add_state("detections", [], dist_reduce_fx=None)
        self.add_state("objects", [], dist_reduce_fx=None)

    def update(self, preds: Sequence[Entry], target: Sequence[Entry]) -> None:
        """Add images; detections are matched here, image by image."""
        for prediction, truth in _checked(preds, target, self.num_classes):
            counted = ~(truth["crowd"] | truth["difficult"])
            counts = torch.bincount(truth["labels"][counted], minlength=self.num_classes)
            order = prediction["scores"].argsort(descending=True, stable=True)
            ranked = {key: value[order] for key, value in prediction.items()}
            matched = torch.from_numpy(self._match(ranked, truth))
            rows = [ranked["scores"].double(), ranked["labels"].double(), matched]
            self.detections.append(torch.stack(rows, 1))
            self.objects.append(counts)

    def _match(self, ranked: Entry, truth: Entry) -> npt.NDArray[np.float64]:
        """Return for each detection, best first: 1 true positive, 0 false positive, -1 ignored."""
        boxes, objects, crowd = ranked["boxes"].double(), truth["boxes"].double(), truth["crowd"]
        same_class = ranked["labels"][:, None] == truth["labels"]
        overlap = box_iou(boxes, objects).nan_to_num(0.0)  # nan between boxes without an area
        overlap = torch.where(same_class & ~crowd, overlap, -1.0).numpy()
        difficult = truth["difficult"].numpy()
        # Enough of its area inside a crowd of its class
        low = torch.maximum(boxes[:, None, :2], objects[None, :, :2])
        high = torch.minimum(boxes[:, None, 2:], objects[None, :, 2:])
        shared = (high - low).clamp(min=0).prod(2)
        inside = (shared > 0) & (shared >= self.iou_threshold * box_area(boxes)[:, None])
        verdict = np.where((inside & same_class & crowd).any(1).numpy(), -1.0, 0.0)
        matched: set[int] = set()
        for i, best in enumerate(overlap.argmax(1) if len(difficult) else ()):
            if overlap[i, best] < self.iou_threshold:
                continue
            if difficult[best]:
                verdict[i] = -1
            elif best not in matched:
                verdict[i] = 1
                matched.add(int(best))
        return verdict

    def compute(self) -> dict[str, torch.Tensor]:
        """Return the scores of all images since the last reset."""
        area = np.full(self.num_classes, np.nan)
        points = np.full(self.num_classes, np.nan)
        counts, shares = of_all_processes(self.objects), of_all_processes(self.detections)
        none = torch.zeros(self.num_classes, dtype=torch.int64)
        objects = sum((count.cpu() for count in counts), none).numpy()
        if not objects.any():
            rank_zero_warn("VOCAveragePrecision: no object in the truth, so every score is nan")
        detections = torch.cat([torch.empty(0, 3), *(share.cpu() for share in shares)]).numpy()
        for k in np.flatnonzero(objects):
            rows = detections[(detections[:, 1] == k) & (detections[:, 2] >= 0)]
            hits = rows[np.argsort(-rows[:, 0], kind="stable"), 2].cumsum()
            recall = hits / objects[k]
            precision = hits / np.arange(1, len(hits) + 1)
            # The best precision at each recall or a higher one.
            best = np.maximum.accumulate(precision[::-1])[::-1]
            area[k] = (np.diff(recall, prepend=0.0) * best).sum()
            reached = np.searchsorted(recall, np.linspace(0, 1, 11) - 1e-12)
            points[k] = np.append(best, 0.0)[reached].mean()
        scores = {"ap50": torch.from_numpy(area), "ap50_11": torch.from_numpy(points)}
        means = {name: values.nanmean() for name, values in scores.items()}
        return means | {f"{name}_class": values for name, values in scores.items()}


def _checked(
    preds: Sequence[Entry], target: Sequence[Entry], num_classes: int
) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Check all entries and return them on the CPU, the truth with crowd and difficult (M,)."""
    if len(preds) != len(target):
        raise InputError(f"{len(preds)} predictions for {len(target)} targets: expected as many")
    pairs = []
    for i, entries in enumerate(zip(preds, target, strict=True)):
        prediction = _check(f"prediction {i}", entries[0], num_classes, _PREDICTION, ())
        truth = _check(f"target {i}", entries[1], num_classes, _TRUTH, _OPTIONAL)
        if "crowd" in truth and "iscrowd" in truth:
            raise InputError(f"target {i}: has both crowd and iscrowd, expected one of them")
        none = torch.zeros(len(truth["labels"]), dtype=torch.bool)
        truth["crowd"] = truth.pop("iscrowd", truth.get("crowd", none)).bool()
        truth["difficult"] = truth.get("difficult", none).bool()
        pairs.append((prediction, truth))
    return pairs


def _check(
    name: str, entry: Entry, num_classes: int, needed: Sequence[str], optional: Sequence[str]
) -> dict[str, torch.Tensor]:
    entry = {key: value for key, value in entry.items() if key != "image_id"}  # torchvision's
    for key in entry:
        if key not in (*needed, *optional):
            keys = ", ".join((*needed, *optional))
            raise InputError(f"{name}: unknown key {key!r}, expected {keys}")
    values = {key: torch.as_tensor(value).detach().cpu() for key, value in entry.items()}
    for key, value in values.items():
        shape = "(N, 4)" if key == "boxes" else "(N,)"
        fits = value.ndim == 1 or (key == "boxes" and value.ndim == 2)
        if not fits or (key == "boxes" and value.numel() != 4 * len(value)):
            raise InputError(f"{name}: {key} of shape {tuple(value.shape)}, expected {shape}")
    if not {*needed} <= values.keys() or len({len(value) for value in values.values()}) > 1:
        given = ", ".join(f"{key} {len(value)}" for key, value in values.items())
        raise InputError(f"{name}: expected {', '.join(needed)} of equal length, not {given}")
    boxes, labels = values["boxes"], values["labels"]
    for key in ("boxes", "scores", "area"):
        if key in values and not bool(values[key].isfinite().all()):
            raise InputError(f"{name}: {key} contains nan or infinity, expected finite numbers")
    invalid = labels[(labels < 0) | (labels >= num_classes)]
    if len(invalid):
        raise InputError(f"{name}: label {invalid[0]}, expected 0 to {num_classes - 1}")
    return values | {"boxes": boxes.reshape(-1, 4).float(), "labels": labels.long()}
