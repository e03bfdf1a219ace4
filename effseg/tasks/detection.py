"""Train and evaluate a detector."""

# B batch, C channels, H W pixels, A anchors, K classes, N boxes.

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from effseg.data.files import write_text
from effseg.data.samples import Batch
from effseg.errors import InputError
from effseg.inference.detector import DetectionPredictor
from effseg.losses.detection import DetectionLoss
from effseg.losses.joint import Criterion
from effseg.models.boxes import OCTAVES
from effseg.models.weights import load_effdet
from effseg.tasks.base import TrainingTask
from effseg.tasks.optim import OptimConfig
from effseg.tasks.scorers import DetectionScorer

PREDICTOR = "model.detection_head.class_net.predict.pointwise.bias"


class DetectionTask(TrainingTask):
    """Model, loss and AP of object detection, as a Lightning module.

    Evaluation scales each photo's longer side to ``size`` and pads it to a square, as the
    reference does.

    Args:
        model: ``efficientdet_d0`` … ``efficientdet_d7x``, ``efficientdet_lite0`` ….
        classes: K, without background; the command line takes it from the data.
        model_args: constructor arguments of :class:`effseg.EfficientDet` that replace the family's.
        init_from: saved model or run directory, or a .pth of effdet, whose weights to start from;
            with another class count the class predictor starts fresh.
        freeze_encoder: train decoder and head only; a number n freezes what the encoder's maps up
            to level n (stride 2^n) are computed from, which a short run on a CPU gains from.
        loss: arguments of :class:`effseg.losses.detection.DetectionLoss` that replace the paper's.
        optim: optimiser and schedule.
        ema_decay: of the weights' moving average, which is then the model that is scored first and
            saved; 0 trains without.
        size: side of the evaluation's square, pixels; None takes the model's.
        metric: ``coco`` (AP over IoU 0.50 … 0.95) or ``voc`` (AP50, difficult objects left out).
        soft_nms_sigma: Gaussian soft-NMS in evaluation; None: plain NMS.
        results: JSON file to which the detections of an evaluation are written, in COCO's results
            format.
        compile: ``torch.compile`` the training forward pass.

    Raises:
        InputError: an unknown model or loss argument, a value out of range, or a class count that
        does not fit.
    """

    family = "efficientdet"

    def __init__(
        self,
        model: str = "efficientdet_d0",
        classes: int = 80,
        model_args: dict[str, Any] | None = None,
        init_from: str | None = None,
        freeze_encoder: bool | int = False,
        loss: dict[str, float] | None = None,
        optim: OptimConfig = OptimConfig(),  # noqa: B008  (frozen)
        ema_decay: float = 0.9998,
        size: int | None = None,
        metric: Literal["coco", "voc"] = "coco",
        soft_nms_sigma: float | None = None,
        results: str | None = None,
        compile: bool = False,
    ) -> None:
        """Build the model, the loss and the metrics."""
        self.classes = classes
        self.size = size
        self.metric = metric
        self.soft_nms_sigma = soft_nms_sigma
        self.results = None if results is None else Path(results)
        super().__init__(
            model,
            {"classes": classes},
            model_args=model_args,
            init_from=init_from,
            freeze_encoder=freeze_encoder,
            optim=optim,
            ema_decay=ema_decay,
            compile=compile,
        )
        try:
            self.loss = DetectionLoss(**loss or {})
        except TypeError as error:
            raise InputError(f"loss {loss}: expected alpha, gamma, delta, box_weight") from error
        self.criterion = Criterion(self.model, detection=self.loss, compile=compile)

    def batch_loss(
        self, images: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of a batch of crops."""
        losses = self.criterion(images, targets_of(batch))
        return losses.pop("loss"), losses

    def make_scorer(self, model: Any, *, main: bool) -> DetectionScorer:
        """Return the scorer of whole photos."""
        sigma = self.soft_nms_sigma if main else None
        predictor = DetectionPredictor(model, self.size, soft_nms_sigma=sigma)
        return DetectionScorer(predictor, self.classes, self.metric)

    def load_foreign(self, state_dict: dict[str, torch.Tensor]) -> list[str]:
        """Take an effdet checkpoint, with a fresh class predictor for another class count."""
        return load_effdet(self.model, state_dict)

    def classes_in(self, state_dict: Mapping[str, torch.Tensor]) -> int | None:
        """Return the rows of the class predictor over the anchors of a cell."""
        shapes = len(self.model.anchor_shapes) * OCTAVES
        return len(state_dict[PREDICTOR]) // shapes if PREDICTOR in state_dict else None

    def on_validation_epoch_end(self) -> None:
        """Score, and write the detections where a file was named."""
        super().on_validation_epoch_end()
        if self.results is None or self.trainer.sanity_checking:
            return
        assert isinstance(self.scorer, DetectionScorer)
        shares: list[Any] = [self.scorer.results]
        if self.trainer.world_size > 1:
            shares = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(shares, self.scorer.results)
        if self.trainer.is_global_zero:
            dataset = self.trainer.datamodule.val_set  # type: ignore[attr-defined]
            found = [entry for share in shares for entry in share]
            write_results(self.results, found, getattr(dataset, "category_of", None))


def targets_of(batch: Batch) -> list[dict[str, torch.Tensor]]:
    """Return a batch's labels image by image, as :class:`effseg.losses.Criterion` takes them."""
    targets: list[dict[str, torch.Tensor]] = []
    for i in range(len(batch["id"])):
        target: dict[str, torch.Tensor] = {}
        if "mask" in batch and bool(batch["has_mask"][i] if "has_mask" in batch else True):
            target["mask"] = batch["mask"][i]
        if "boxes" in batch and bool(batch["has_boxes"][i] if "has_boxes" in batch else True):
            keys = [k for k in ("boxes", "labels", "crowd", "known") if k in batch]
            target |= {key: batch[key][i] for key in keys}  # type: ignore[literal-required]
        targets.append(target)
    return targets


def write_results(
    path: Path,
    found: Sequence[tuple[str, Mapping[str, torch.Tensor]]],
    category_of: Mapping[int, int] | None = None,
) -> None:
    """Write detections as COCO's results: a list of image_id, category_id, bbox (x y w h), score.

    Args:
        path: the file; its folder is made. Written under a temporary name first.
        found: id and detections of each photo.
        category_of: label to category id of a COCO data set, whose image ids are numbers; None: the
            label + 1, and ids as they are.

    Raises:
        InputError: the file cannot be written.
    """
    rows = []
    for photo_id, result in found:
        image_id = photo_id if category_of is None else int(photo_id)
        values = (result[key].tolist() for key in ("boxes", "scores", "labels"))
        for (x1, y1, x2, y2), score, label in zip(*values, strict=True):
            rows.append(
                {
                    "image_id": image_id,
                    "category_id": label + 1 if category_of is None else category_of[label],
                    "bbox": [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)],
                    "score": round(score, 5),
                }
            )
    write_text(path, json.dumps(rows) + "\n")
