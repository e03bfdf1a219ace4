"""Train one network for masks and boxes, on data sets that need not have both."""

# B batch, C channels, H W pixels, A anchors, K classes.

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from effseg.data.mixture import Mixture
from effseg.data.mixture_datamodule import MixtureDataModule
from effseg.data.samples import TASKS, Batch, TaskName
from effseg.data.schedule import Schedule, Stage
from effseg.errors import InputError
from effseg.losses.detection import DetectionLoss
from effseg.losses.joint import JointLoss, TaskWeights
from effseg.losses.segmentation import SegmentationLoss
from effseg.tasks.base import TrainingTask
from effseg.tasks.detection import detection_targets
from effseg.tasks.joint_scorer import JointScorer
from effseg.tasks.optim import OptimConfig

CLASSIFIER = "model.segmentation_head.classifier.weight"


class JointTask(TrainingTask):
    """Model, losses and scores of both tasks, as a Lightning module.

    A step runs the heads of its tasks, each on the photos that have its labels; a head without any
    costs nothing and gets no gradient. Every data set that is evaluated has its own scores.

    Args:
        model: ``effsegdet_d0`` … ``effsegdet_d7``, ``effsegdet_lite0`` … ``effsegdet_lite4``.
        classes: K of the masks, background included; the boxes have one less. The command line
            takes it from the data.
        model_args: constructor arguments of :class:`effseg.EffSegDet` that replace the family's.
        init_from: saved model or run directory whose weights to start from; a detector, or a .pth
            of effdet, gives its encoder and what of BiFPN fits.
        stages: what is trained when, see :class:`effseg.data.schedule.Stage`; None: both tasks in
            every step.
        task_weights: of the two losses, or ``uncertainty`` to learn them.
        loss: weight of each term of the masks' loss, as of :class:`SegmentationTask`.
        label_smoothing: of the cross-entropy, 0 … 1.
        detection_loss: arguments of :class:`effseg.losses.detection.DetectionLoss`.
        optim: optimiser and schedule.
        ema_decay: of the weights' moving average, which is then the model that is scored first and
            saved; 0 trains without.
        protocol: of the evaluation of masks.
        size: side of the square in which boxes are evaluated, pixels; None takes the model's.
        metric: ``coco`` or ``voc``, of the boxes.
        best: weights of the scores whose mean, ``val/best``, says which epoch is the best, for
            example ``{voc/miou: 1, coco/ap: 1}``; None: mIoU and AP of all parts alike.
        compile: ``torch.compile`` the training forward pass.

    Raises:
        InputError: an unknown model, loss term or score, or a value out of range.
    """

    family = "effsegdet"
    scorer: JointScorer

    def __init__(
        self,
        model: str = "effsegdet_d4",
        classes: int = 21,
        model_args: dict[str, Any] | None = None,
        init_from: str | None = None,
        stages: list[Stage] | None = None,
        task_weights: TaskWeights | None = None,
        loss: dict[str, float] | None = None,
        label_smoothing: float = 0.0,
        detection_loss: dict[str, float] | None = None,
        optim: OptimConfig = OptimConfig(),  # noqa: B008  (frozen)
        ema_decay: float = 0.9998,
        protocol: str = "whole",
        size: int | None = None,
        metric: Literal["coco", "voc"] = "coco",
        best: dict[str, float] | None = None,
        compile: bool = False,
    ) -> None:
        """Build the model, the losses and the schedule."""
        self.classes = classes
        self.protocol, self.size, self.metric, self.best = protocol, size, metric, best
        self.schedule = Schedule.of(stages)
        self.active: tuple[TaskName, ...] = TASKS
        super().__init__(
            model,
            {"seg_classes": classes, "det_classes": classes - 1},
            model_args=model_args,
            init_from=init_from,
            freeze_encoder=False,
            optim=optim,
            ema_decay=ema_decay,
            compile=compile,
        )
        try:
            boxes = DetectionLoss(**detection_loss or {})
        except TypeError as error:
            raise InputError(
                f"detection_loss {detection_loss}: expected alpha, gamma, delta, box_weight"
            ) from error
        masks = SegmentationLoss(loss or {"cross_entropy": 1.0}, label_smoothing=label_smoothing)
        self.loss = JointLoss(masks, boxes, task_weights)

    def setup(self, stage: str) -> None:
        """Tell the data which tasks a step trains; Lightning calls it before it loads them."""
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, MixtureDataModule):
            raise InputError(f"data {type(data).__name__}: expected a MixtureDataModule")
        data.follow(self.schedule)
        assert isinstance(data.val_set, Mixture)
        parts = {name: part.tasks for name, part in data.val_set.parts.items()}
        for scorer in (self.scorer, self.raw_scorer):
            if isinstance(scorer, JointScorer):
                scorer.watch(parts)
        self.part_names = list(data.parts)

    def make_scorer(self, model: Any, *, main: bool) -> JointScorer:
        """Return what scores every part of the data."""
        return JointScorer(model, self.classes, self.protocol, self.size, self.metric, self.best)

    def classes_in(self, state_dict: Mapping[str, torch.Tensor]) -> int | None:
        """Return the rows of the classifier of masks."""
        return len(state_dict[CLASSIFIER]) if CLASSIFIER in state_dict else None

    def extra_parameters(self) -> list[nn.Parameter]:
        """Return the learned weights of the tasks."""
        return list(self.loss.parameters())

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch of crops, of the tasks whose turn it is."""
        stage = self.schedule.stage(self.current_epoch)
        # Here, not at an epoch's start: a run that resumes within an epoch has none.
        self.set_frozen(stage.freeze_encoder)
        self.active = self.schedule.tasks(self.current_epoch, batch_idx)
        return super().training_step(batch, batch_idx)

    def batch_loss(
        self, images: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of a batch of crops, each head on the photos that have its labels."""
        flags: dict[TaskName, Any] = {
            "segmentation": batch["has_mask"],
            "detection": batch["has_boxes"],
        }
        rows = {task: flags[task].nonzero()[:, 0] for task in self.active}
        tasks = tuple(task for task in self.active if len(rows[task]))
        some = {task: rows[task] for task in tasks if len(rows[task]) < len(images)}
        size = (images.shape[-2], images.shape[-1])
        output = self.model(images, tasks, some, self.model.padded_size(size) == size)
        masks = boxes = None
        if "segmentation" in tasks:
            truth = torch.as_tensor(batch["mask"])
            masks = (output.masks, truth[rows["segmentation"]])
        if "detection" in tasks:
            chosen = rows["detection"].tolist()
            anchors = self.model.anchors(size, images.device)
            labelled: Batch = {
                "boxes": [batch["boxes"][i] for i in chosen],
                "labels": [batch["labels"][i] for i in chosen],
                "crowd": [batch["crowd"][i] for i in chosen],
            }
            known = torch.as_tensor(batch["known"])[rows["detection"]]
            targets = detection_targets(anchors, labelled, self.model.cells(size))
            boxes = (*output.detections, targets, known)
        total, terms = self.loss(masks, boxes, self.active)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.global_step % every == 0:
            terms |= self._by_part(batch, rows, masks, boxes)
        if self.loss.log_variance is not None:
            terms |= {f"log_variance_{t}": s for t, s in self.loss.log_variance.items()}
        return total, terms

    @torch.no_grad()
    def _by_part(
        self, batch: Batch, rows: dict[TaskName, torch.Tensor], masks: Any, boxes: Any
    ) -> dict[str, torch.Tensor]:
        """Return each task's loss by data set, over this process's photos."""
        source = torch.as_tensor(batch["source"])
        found: dict[str, torch.Tensor] = {}
        for number, name in enumerate(self.part_names):
            if masks is not None:
                own = source[rows["segmentation"]] == number
                if own.any():
                    loss, _ = self.loss.segmentation(masks[0][own], masks[1][own])
                    found[f"{name}/segmentation"] = loss
            if boxes is not None:
                own = source[rows["detection"]] == number
                if own.any():
                    logits, codes, targets, known = boxes
                    part = type(targets)(targets.labels[own], targets.codes[own])
                    count = (part.labels >= 0).sum().float() + 1.0
                    loss, _ = self.loss.detection(logits[own], codes[own], part, known[own], count)
                    found[f"{name}/detection"] = loss
        return found
