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
from effseg.losses.detection import DetectionLoss, Targets
from effseg.losses.joint import Criterion, Labels, TaskWeights
from effseg.losses.segmentation import SegmentationLoss
from effseg.models.network import JointOutput
from effseg.tasks.base import TrainingTask
from effseg.tasks.detection import targets_of
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
        self.loss = Criterion(self.model, masks, boxes, task_weights, compile)

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
        output, labels = self.loss.run(images, targets_of(batch), self.active)
        losses = self.loss.compare(output, labels)
        total = losses.pop("loss")
        terms = {"segmentation": losses["segmentation"]} if "segmentation" in losses else {}
        if "boxes" in losses:
            box_weight = self.loss.detection.box_weight
            terms["detection"] = losses["classes"] + box_weight * losses["boxes"]
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.global_step % every == 0:
            terms |= self._by_part(batch, output, labels)
        if self.loss.log_variance is not None:
            terms |= {f"log_variance_{t}": s for t, s in self.loss.log_variance.items()}
        return total, terms

    @torch.no_grad()
    def _by_part(
        self, batch: Batch, output: JointOutput, labels: Labels
    ) -> dict[str, torch.Tensor]:
        """Return each task's loss by data set, over this process's photos."""
        source = torch.as_tensor(batch["source"])
        found: dict[str, torch.Tensor] = {}
        for number, name in enumerate(self.part_names):
            if output.masks is not None and labels.masks is not None:
                own = source[labels.rows["segmentation"]] == number
                if own.any():
                    loss, _ = self.loss.segmentation(output.masks[own], labels.masks[own], False)
                    found[f"{name}/segmentation"] = loss
            if output.detections is not None and labels.targets is not None:
                own = source[labels.rows["detection"]] == number
                if own.any():
                    logits, codes = (values[own] for values in output.detections)
                    part = Targets(*(values[own] for values in labels.targets))
                    known = None if labels.known is None else labels.known[own]
                    found[f"{name}/detection"], _ = self.loss.detection(
                        logits, codes, part, known, False
                    )
        return found
