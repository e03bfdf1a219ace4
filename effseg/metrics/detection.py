"""Scores of detectors: COCO's AP, and Pascal VOC's at IoU 0.5."""

# N boxes, M objects, K classes. Boxes are x1 y1 x2 y2 in pixels.

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from effseg.errors import InputError

Array = npt.NDArray[Any]


class COCOAveragePrecision(Metric):
    """AP over IoU 0.50 … 0.95 as COCO defines it, on faster-coco-eval.

    ``update(preds, target)`` takes a dict a photo: predictions ``boxes`` (N, 4), ``scores`` (N,)
    and ``labels`` (N,); truth ``boxes`` (M, 4), ``labels`` (M,) and, where there are any, ``crowd``
    (M,) bool and ``area`` (M,) (the object's pixels; the box's without it). ``compute()`` returns
    ``ap``, ``ap50``, ``ap75``, ``ap_small``, ``ap_medium``, ``ap_large`` and ``ar100``, each 0 … 1,
    or nan where no object is of that size, and ``ap_class``, ``ap50_class`` (K,), nan for a class
    without an object.

    Args:
        num_classes: K, without background, of the values by class.

    Source: Lin et al., arXiv 1405.0312; https://cocodataset.org/#detection-eval.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    preds: list[Any]
    truth: list[Any]

    def __init__(self, num_classes: int = 80, **kwargs: Any) -> None:
        """Start without photos; ``kwargs`` are those of ``torchmetrics.Metric``."""
        super().__init__(**{"sync_on_compute": False} | kwargs)
        self.num_classes = num_classes
        self.add_state("preds", [], dist_reduce_fx=None)
        self.add_state("truth", [], dist_reduce_fx=None)
        # Its own thresholds are float32 (0.80000001), and a recall of exactly 0.8 then misses its
        # point; these are pycocotools' to the last bit.
        self.metric = MeanAveragePrecision(
            box_format="xyxy",
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
            backend="faster_coco_eval",
            extended_summary=True,  # the precision by class
            sync_on_compute=False,  # its own way needs as many photos in every process
        )
        self.metric.warn_on_many_detections = False

    def update(
        self,
        preds: Sequence[Mapping[str, torch.Tensor]],
        target: Sequence[Mapping[str, torch.Tensor]],
    ) -> None:
        """Add photos; see the class."""
        _check(preds, target)
        truth = []
        for entry in target:
            row = {"boxes": entry["boxes"], "labels": entry["labels"]}
            if "crowd" in entry:
                row["iscrowd"] = entry["crowd"].long()
            if "area" in entry:
                row["area"] = entry["area"]
            truth.append(row)
        self.preds += [_plain(entry) for entry in preds]
        self.truth += [_plain(entry) for entry in truth]

    def compute(self) -> dict[str, torch.Tensor]:
        """Return the scores of all photos since the last reset."""
        self.metric.reset()
        self.metric.update(_of_all_processes(self.preds), _of_all_processes(self.truth))
        found = self.metric.compute()
        self.metric.reset()
        names = {
            "ap": "map",
            "ap50": "map_50",
            "ap75": "map_75",
            "ap_small": "map_small",
            "ap_medium": "map_medium",
            "ap_large": "map_large",
            "ar100": "mar_100",
        }
        values = {name: found[key].double() for name, key in names.items()}
        by_class = torch.full((2, self.num_classes), -1.0, dtype=torch.float64)
        labels = found["classes"].reshape(-1)
        # (IoU thresholds, recall points, classes, sizes, counts): all sizes, most detections.
        precision = torch.as_tensor(found["precision"])[..., 0, -1].double()
        for i, label in enumerate(labels.tolist()):
            if label < self.num_classes:
                by_class[:, label] = torch.stack(
                    [precision[:, :, i].mean(), precision[0, :, i].mean()]
                )
        values |= {"ap_class": by_class[0], "ap50_class": by_class[1]}
        return {name: torch.where(v < 0, torch.nan, v) for name, v in values.items()}


class VOCAveragePrecision(Metric):
    """AP at IoU 0.5 as the Pascal VOC development kit defines it.

    ``update(preds, target)`` as :class:`COCOAveragePrecision`, the truth with ``difficult`` (M,)
    bool where there is any: a difficult object is neither wanted nor a mistake when found. Of
    several detections of an object the best scored counts, the others are mistakes. ``compute()``
    returns ``ap50`` (area under the monotone curve, VOC 2010 on), ``ap50_11`` (mean of 11 points,
    VOC 2007), and both per class, ``ap50_class`` and ``ap50_11_class`` (K,), float64; a class
    without an object is nan and left out of the mean.

    Args:
        num_classes: K, without background.
        iou_threshold: IoU from which a detection finds an object.

    Source: Everingham et al., IJCV 2010, section 4.2; VOC development kit, ``VOCevaldet.m``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    found: list[torch.Tensor]
    objects: list[torch.Tensor]

    def __init__(self, num_classes: int = 20, iou_threshold: float = 0.5, **kwargs: Any) -> None:
        """Start without photos; ``kwargs`` are those of ``torchmetrics.Metric``."""
        super().__init__(**{"sync_on_compute": False} | kwargs)
        if num_classes < 1:
            raise InputError(f"num_classes={num_classes}: expected at least 1")
        self.num_classes = num_classes
        self.iou_threshold = iou_threshold
        self.add_state("found", [], dist_reduce_fx=None)
        self.add_state("objects", [], dist_reduce_fx=None)

    def update(
        self,
        preds: Sequence[Mapping[str, torch.Tensor]],
        target: Sequence[Mapping[str, torch.Tensor]],
    ) -> None:
        """Add photos; what a detection finds is settled here, photo by photo."""
        _check(preds, target)
        for p, t in zip(preds, target, strict=True):
            score, label, verdict = self._match(p, t)
            rows = np.stack([score, label, verdict], 1)
            difficult = t["difficult"] if "difficult" in t else torch.zeros_like(t["labels"])
            wanted = t["labels"][difficult.bool().logical_not()]
            self.found.append(torch.from_numpy(rows))
            self.objects.append(torch.bincount(wanted, minlength=self.num_classes).cpu())

    def _match(
        self, p: Mapping[str, torch.Tensor], t: Mapping[str, torch.Tensor]
    ) -> tuple[Array, Array, Array]:
        """Return score, label and verdict (1 found, 0 mistake, -1 difficult) of each detection."""
        order = p["scores"].argsort(descending=True, stable=True)
        score = p["scores"][order].double().cpu().numpy()
        label = p["labels"][order].cpu().numpy()
        verdict = np.zeros(len(score))
        if len(t["boxes"]) and len(score):
            iou = box_iou(p["boxes"][order].double(), t["boxes"].double()).cpu().numpy()
            iou[label[:, None] != t["labels"].cpu().numpy()[None]] = -1.0
            difficult = t["difficult"].cpu().numpy() if "difficult" in t else np.zeros(len(iou[0]))
            taken: set[int] = set()
            for i, best in enumerate(iou.argmax(1)):
                if iou[i, best] < self.iou_threshold:
                    continue
                if difficult[best]:
                    verdict[i] = -1
                elif best not in taken:
                    verdict[i] = 1
                    taken.add(int(best))
        return score, label.astype(np.float64), verdict

    def compute(self) -> dict[str, torch.Tensor]:
        """Return the scores of all photos since the last reset."""
        area = np.full(self.num_classes, np.nan)
        points = np.full(self.num_classes, np.nan)
        counts, rows_of_all = _of_all_processes(self.objects), _of_all_processes(self.found)
        if counts:
            found = torch.cat(rows_of_all).numpy()
            objects = torch.stack(counts).sum(0).numpy()
            for k in np.flatnonzero(objects):
                rows = found[(found[:, 1] == k) & (found[:, 2] >= 0)]
                hits = rows[np.argsort(-rows[:, 0], kind="stable"), 2].cumsum()
                recall = hits / objects[k]
                precision = hits / np.arange(1, len(hits) + 1)
                # From each point on, the best precision at that recall or a higher one.
                best = np.maximum.accumulate(precision[::-1])[::-1]
                area[k] = (np.diff(recall, prepend=0.0) * best).sum()
                reached = np.searchsorted(recall, np.linspace(0, 1, 11) - 1e-12)
                points[k] = np.append(best, 0.0)[reached].mean()
        both = {"ap50": torch.from_numpy(area), "ap50_11": torch.from_numpy(points)}
        means = {name: values.nanmean() for name, values in both.items()}
        return means | {f"{name}_class": values for name, values in both.items()}


def _plain(entry: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the entry on the CPU: boxes of a whole data set need no room on the device."""
    return {key: value.detach().cpu() for key, value in entry.items()}


def _of_all_processes(rows: list[Any]) -> list[Any]:
    """Return the rows of all processes; each may have another number of them, or none."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return list(rows)
    shares: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(shares, list(rows))
    return [row for share in shares for row in share]


def _check(
    preds: Sequence[Mapping[str, torch.Tensor]], target: Sequence[Mapping[str, torch.Tensor]]
) -> None:
    if len(preds) != len(target):
        raise InputError(f"{len(preds)} predictions for {len(target)} photos: expected as many")
    for i, (p, t) in enumerate(zip(preds, target, strict=True)):
        for kind, entry, keys in (
            ("prediction", p, ("boxes", "scores", "labels")),
            ("target", t, ("boxes", "labels")),
        ):
            counts = {len(entry[key]) for key in keys if key in entry}
            if any(key not in entry for key in keys) or len(counts) > 1:
                raise InputError(
                    f"{kind} {i}: expected {', '.join(keys)} of one length, "
                    f"found {', '.join(f'{k} {len(v)}' for k, v in entry.items())}"
                )
