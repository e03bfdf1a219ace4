"""Train and evaluate a segmentation model."""

# B batch, C channels, H W pixels, K classes.

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from effseg.data.samples import IGNORE_INDEX, Batch
from effseg.errors import InputError
from effseg.inference.predictor import Predictor
from effseg.losses.segmentation import SegmentationLoss
from effseg.metrics.boundary import BoundaryIoU
from effseg.metrics.segmentation import SegmentationMetrics
from effseg.models.base import from_pretrained
from effseg.models.encoder import normalise
from effseg.models.registry import create_model
from effseg.tasks.ema import ModelEMA
from effseg.tasks.optim import OptimConfig, build_optimizer, lr_factor, param_groups


class SegmentationTask(LightningModule):
    """Model, loss and metrics of semantic segmentation, as a Lightning module.

    Photos arrive as uint8 and are normalised on the device by the model's own ``preprocess_cfg``.
    Evaluation goes photo by photo at its own size through ``protocol``; mIoU is over the data set,
    never a mean of photos.

    Args:
        model: a name of :func:`effseg.list_models`.
        classes: K, background included; the command line takes it from the data.
        model_args: constructor arguments of :class:`effseg.EffSeg` that replace the family's
            (``encoder_weights``, ``head_context``, ``bn_momentum``, …).
        init_from: saved model or run directory whose weights to start from; tensors of another
            shape (another class count) start fresh.
        freeze_encoder: train decoder and head only.
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

    def __init__(
        self,
        model: str = "effseg_d4",
        classes: int = 21,
        model_args: dict[str, Any] | None = None,
        init_from: str | None = None,
        freeze_encoder: bool = False,
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
        super().__init__()
        if not 0.0 <= ema_decay < 1.0:
            raise InputError(f"ema_decay={ema_decay}: expected 0 <= ema_decay < 1")
        self.model_name = model
        self.model_args = model_args or {}
        self.classes = classes
        self.optim = optim
        self.model = self.build_model()
        if init_from is not None:
            self._start_from(init_from)
        if freeze_encoder:
            self.model.freeze_encoder()
        # The layout in which the libraries' depthwise kernels read whole vectors of channels.
        self.model = self.model.to(memory_format=torch.channels_last)
        self.ema = ModelEMA(self.model, ema_decay) if ema_decay > 0 else None
        self.loss = SegmentationLoss(
            loss or {"cross_entropy": 1.0},
            class_weights=class_weights,
            label_smoothing=label_smoothing,
            ohem=ohem,
        )
        self.predictor = Predictor(self.scored_model, protocol)
        self.metrics = SegmentationMetrics(classes, IGNORE_INDEX)
        self.boundary = BoundaryIoU(classes, IGNORE_INDEX) if boundary else None
        self.raw_predictor = Predictor(self.model, protocol) if self.ema is not None else None
        self.raw_metrics = SegmentationMetrics(classes, IGNORE_INDEX) if self.ema else None
        if compile:
            self.model.compile()  # in place: the names in checkpoints stay
        self.scores: dict[str, Any] = {}
        """Of the last evaluation: ``SegmentationMetrics.compute()`` and the protocol's name."""
        self.scored_step = -1
        self.examples: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        """(id, photo, truth, prediction) of the first evaluated photos, on the CPU."""

    def build_model(self) -> Any:
        """Return the model; a subclass may return any smp-style model with a ``preprocess_cfg``."""
        if not self.model_name.startswith("effseg_"):
            raise InputError(f"model {self.model_name!r}: expected a segmentation model (effseg_…)")
        return create_model(self.model_name, classes=self.classes, **self.model_args)

    @property
    def scored_model(self) -> Any:
        """The model that is scored first and saved: the average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def _start_from(self, source: str) -> None:
        state = from_pretrained(Path(source)).state_dict()
        own = self.model.state_dict()
        fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
        if not fitting:
            raise InputError(f"init_from={source}: none of its tensors fits {self.model_name}")
        self.model.load_state_dict(own | fitting)
        fresh = sorted(set(own) - set(fitting))
        if fresh:
            names = ", ".join(fresh[:4]) + (", …" if len(fresh) > 4 else "")
            print(f"init_from={source}: {len(fresh)} tensors start fresh: {names}")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised photos (B, 3, H, W) to logits (B, K, H, W)."""
        logits: torch.Tensor = self.model(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch of crops."""
        images = normalise(batch["image"], self.model.preprocess_cfg)  # type: ignore[arg-type]
        images = images.contiguous(memory_format=torch.channels_last)
        logits = self.model(images)
        total, terms = self.loss(logits, batch["mask"])
        if len(terms) > 1:
            self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(images))
        loss: torch.Tensor = total
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the average: once per optimiser step, however many batches made it."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def on_train_start(self) -> None:
        """Say what is trained, and drop what the sanity check scored."""
        self.scores = {}
        params = sum(p.numel() for p in self.model.parameters()) / 1e6
        self.print(
            f"{self.model_name}: {params:.2f} M parameters, {self.trainer.num_training_batches} "
            f"batches an epoch, {self.optim.name} with learning rate {self.optim.lr:g} "
            f"(encoder × {self.optim.encoder_lr_factor:g}), on {self.device}"
        )

    def on_validation_start(self) -> None:
        """Forget the last evaluation's pictures."""
        self.examples = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score whole photos."""
        images, masks = list(batch["image"]), list(batch["mask"])
        predictions = self.predictor.labels(images)
        for i, (prediction, mask) in enumerate(zip(predictions, masks, strict=True)):
            self.metrics.update(prediction, mask)
            if self.boundary is not None:
                self.boundary.update(prediction, mask)
            if len(self.examples) < 8:
                self.examples.append(
                    (batch["id"][i], images[i].cpu(), mask.cpu(), prediction.cpu())
                )
        if self.raw_predictor is not None and self.raw_metrics is not None:
            for raw, mask in zip(self.raw_predictor.labels(images), masks, strict=True):
                self.raw_metrics.update(raw, mask)

    def on_validation_epoch_end(self) -> None:
        """Add up over processes and log; ``val/miou`` is the average's where there is one."""
        self.scores = self.metrics.compute() | {"protocol": self.predictor.protocol.name}
        self.scored_step = -1 if self.trainer.sanity_checking else self.trainer.global_step
        log = {
            "val/miou": self.scores["miou"],
            "val/pixel_accuracy": self.scores["pixel_accuracy"],
        }
        self.metrics.reset()
        if self.raw_metrics is not None:
            log["val/miou_raw"] = self.scores["miou_raw"] = self.raw_metrics.compute()["miou"]
            self.raw_metrics.reset()
        if self.boundary is not None:
            self.scores["boundary_iou"] = self.boundary.compute()["boundary_iou"]
            log["val/boundary_iou"] = self.scores["boundary_iou"]
            self.boundary.reset()
        # Lightning keeps float32; the sums were made in float64.
        values = {key: torch.as_tensor(value).float() for key, value in log.items()}
        self.log_dict(values, prog_bar=True, sync_dist=False, rank_zero_only=False)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimiser and a schedule that moves at every step."""
        optimizer = build_optimizer(param_groups(self.model, self.optim), self.optim)
        total = int(self.trainer.estimated_stepping_batches)
        epochs = self.trainer.max_epochs
        per_epoch = total / epochs if epochs and epochs > 0 else self.trainer.num_training_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lr_factor(self.optim, total, per_epoch)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say it in one line where a checkpoint is of another model.

        Raises:
            InputError: another class count, or tensors that are missing, unexpected or of another
            shape.
        """
        saved, own = checkpoint["state_dict"], self.state_dict()
        key = "model.segmentation_head.classifier.weight"
        if key in saved and key in own and len(saved[key]) != len(own[key]):
            raise InputError(
                f"the checkpoint has {len(saved[key])} classes, the data {len(own[key])}: "
                "expected the same count (model.init_from starts a new head from other weights)"
            )
        wrong = [k for k in own if k not in saved or saved[k].shape != own[k].shape]
        wrong += [k for k in saved if k not in own]
        if wrong:
            raise InputError(
                f"the checkpoint is not of this model ({self.model_name}): {len(wrong)} "
                f"tensors are missing, unexpected or of another shape, first {wrong[0]}"
            )
