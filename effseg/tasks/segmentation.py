"""Train and evaluate a segmentation model."""

# B batch, C channels, H W pixels, K classes.

from collections.abc import Mapping
from typing import Any

import torch

from effseg.data.samples import Batch
from effseg.losses.joint import Criterion
from effseg.losses.segmentation import SegmentationLoss
from effseg.models.network import Network
from effseg.tasks.base import TrainingTask
from effseg.tasks.optim import OptimConfig
from effseg.tasks.scorers import SegmentationScorer

CLASSIFIER = "model.segmentation_head.classifier.weight"


class SegmentationTask(TrainingTask):
    """Model, loss and metrics of semantic segmentation, as a Lightning module.

    Evaluation goes photo by photo at its own size through ``protocol``; mIoU is over the data set,
    never a mean of photos.

    Args:
        model: ``effseg_d0`` … ``effseg_d7``, ``effseg_lite0`` … ``effseg_lite4``.
        classes: K, background included; the command line takes it from the data.
        model_args: constructor arguments of :class:`effseg.EffSeg` that replace the family's
            (``encoder_weights``, ``head_context``, ``bn_momentum``, …).
        init_from: saved model or run directory whose weights to start from; tensors of another
            shape (another class count) start fresh. A detector, or a .pth of effdet, gives its
            encoder and what of BiFPN fits (:func:`effseg.load_effdet_trunk`).
        freeze_encoder: train decoder and head only; a number n freezes what the encoder's maps up
            to level n (stride 2^n) are computed from, which a short run on a CPU gains from.
        loss: weight of each term: ``cross_entropy``, ``dice``, ``lovasz``, ``tversky``, ``focal``.
        class_weights: K weights of the cross-entropy.
        label_smoothing: of the cross-entropy, 0 … 1.
        ohem: share of the hardest pixels that the cross-entropy keeps, 0 … 1; None keeps all.
        optim: optimiser and schedule.
        ema_decay: of the weights' moving average, which is then the model that is scored first and
            saved; 0 trains without.
        protocol: of the evaluation, see :class:`effseg.inference.protocol.Protocol`.
        boundary: measure Boundary IoU too.
        compile: ``torch.compile`` the training forward pass.

    Raises:
        InputError: an unknown model or loss term, a value out of range, or a class count that does
        not fit.
    """

    family = "effseg"

    def __init__(
        self,
        model: str = "effseg_d4",
        classes: int = 21,
        model_args: dict[str, Any] | None = None,
        init_from: str | None = None,
        freeze_encoder: bool | int = False,
        loss: dict[str, float] | None = None,
        class_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
        ohem: float | None = None,
        optim: OptimConfig = OptimConfig(),  # noqa: B008  (frozen)
        ema_decay: float = 0.9998,
        protocol: str = "whole",
        boundary: bool = False,
        compile: bool = False,
    ) -> None:
        """Build the model, the loss and the metrics."""
        self.classes = classes
        self.protocol = protocol
        self.measures_boundary = boundary
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
        self.loss = SegmentationLoss(
            loss or {"cross_entropy": 1.0},
            class_weights=class_weights,
            label_smoothing=label_smoothing,
            ohem=ohem,
        )
        if isinstance(self.model, Network):
            self.criterion = Criterion(self.model, self.loss, compile=compile)

    def batch_loss(
        self, images: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of a batch of crops, of coarse logits where the model gives them."""
        if not isinstance(self.model, Network):  # a subclass may train any
            total, terms = self.loss(self.model(images), batch["mask"])
            return total, terms
        rows = {"segmentation": torch.arange(len(images), device=images.device)}
        losses = self.criterion(images, {"mask": batch["mask"], "rows": rows})
        return losses.pop("loss"), losses

    def make_scorer(self, model: Any, *, main: bool) -> SegmentationScorer:
        """Return the scorer of whole photos."""
        boundary = self.measures_boundary and main
        return SegmentationScorer(model, self.classes, self.protocol, boundary)

    def classes_in(self, state_dict: Mapping[str, torch.Tensor]) -> int | None:
        """Return the rows of the classifier."""
        return len(state_dict[CLASSIFIER]) if CLASSIFIER in state_dict else None
