"""The training task: a network, its losses, the average of its weights, and its scores."""

# B batch, C channels, H W pixels, K classes.

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from effseg.data.datamodule import ImageDataModule
from effseg.data.sample import Batch, TaskName
from effseg.distributed import of_all_processes
from effseg.errors import InputError
from effseg.losses import Criterion, DetectionLoss, SegmentationLoss
from effseg.losses.joint import TaskWeights
from effseg.models.pretrained import describe
from effseg.models.registry import class_counts, create_model
from effseg.training.checks import check_batch, check_precision, check_stream
from effseg.training.config import DetectionConfig, SegmentationConfig, as_classes, as_config
from effseg.training.ema import ModelEMA
from effseg.training.faults import LossGuard, check_finite
from effseg.training.loss_log import LossLog, losses_by_source
from effseg.training.optim import (
    OptimConfig,
    Rates,
    build_optimizer,
    length_and_offset,
    lr_factor,
    param_groups,
)
from effseg.training.position import Position
from effseg.training.results import write_results
from effseg.training.scorers import Scorers
from effseg.training.start import build_from, check_checkpoint
from effseg.training.sync_norms import synchronise_norms


class TrainingTask(LightningModule):
    """A network, its optimiser, the average of its weights, and its evaluation.

    A step runs the heads of the batch's `tasks`, each on the images with its labels; the batch's
    `freeze` says how far the encoder is frozen, since stages belong to the data. Images arrive as
    uint8 and are normalised on the device by the model. Scores are computed for each evaluated
    source. The arguments, except initial weights, are saved in checkpoints as hyper-parameters.

    Args:
        model: a name of `effseg.list_models`.
        model_args: constructor arguments of `effseg.models.network.Network` that replace the
            family's.
        segmentation: settings of the masks.
        detection: settings of the boxes.
        classes: names, background first; box label 0 is the class after it; None: VOC's. The
            command line takes them from the data.
        palette: (R, G, B) of each class, 0 … 255; None: VOC's colours.
        train_sources: names of the training sources, in the order of the batches' source numbers;
            the command line takes them from the data.
        val_sources: of each evaluated source, by name: `tasks` with labels, and `categories`, its
            format's ids of the box labels; the command line takes them from the data.
        init_from: initial weights: `voc` (the bundled model), what `effseg.from_pretrained` takes,
            or a .pth; null: only the encoder's.
        task_weights: weights of the two losses, or `uncertainty` to learn them.
        optim: optimiser and schedule.
        ema_decay: decay of the weights' moving average, which is then scored and saved; 0: no
            average.
        raw_scores: also score the weights that are not averaged, which doubles every evaluation.
        best: weights of the scores whose mean, `val/best`, decides which epoch is the best, for
            example `{voc/miou: 1, coco/ap: 1}`; None: mIoU and AP of all sources, equally.
        compile: `torch.compile` the encoder, the BiFPN and each head for training.
        nan: a loss that is not finite ends the run (`error`), or its step is skipped (`skip`).
        nan_limit: the number of steps that may be skipped.

    Raises:
        InputError: an unknown model, loss term or score, or a value out of range.
    """

    def __init__(
        self,
        model: str = "effseg_d4",
        model_args: dict[str, Any] | None = None,
        segmentation: SegmentationConfig = SegmentationConfig(),  # noqa: B008  (frozen)
        detection: DetectionConfig = DetectionConfig(),  # noqa: B008  (frozen)
        classes: list[str] | None = None,
        palette: list[list[int]] | None = None,
        train_sources: list[str] | None = None,
        val_sources: dict[str, dict[str, list[Any]]] | None = None,
        init_from: str | None = None,
        task_weights: TaskWeights | None = None,
        optim: OptimConfig = OptimConfig(),  # noqa: B008  (frozen)
        ema_decay: float = 0.9998,
        raw_scores: bool = False,
        best: dict[str, float] | None = None,
        compile: bool = False,
        nan: Literal["error", "skip"] = "error",
        nan_limit: int = 10,
    ) -> None:
        super().__init__()
        if not 0.0 <= ema_decay < 1.0:
            raise InputError(f"ema_decay={ema_decay}: expected 0 <= ema_decay < 1")
        # A checkpoint holds plain dicts.
        self.segmentation: SegmentationConfig = as_config(SegmentationConfig, segmentation)
        self.detection: DetectionConfig = as_config(DetectionConfig, detection)
        self.optim: OptimConfig = as_config(OptimConfig, optim)
        self.classes = as_classes(classes, palette)
        self.model_name, self.model_args = model, model_args or {}
        self.train_sources = list(train_sources or [])
        channels = self.model_args.get("in_channels", 3)
        if channels != 3:
            key = f"model_args.in_channels={channels}"
            raise InputError(f"{key}: images are read as RGB, expected 3")
        self.guard, self.skipped = LossGuard(nan, nan_limit), False
        build = self.build_model
        self.model = build_from(build, init_from, self.classes) if init_from else build()
        # A checkpoint holds all weights: rebuilding its task fetches none, nor their mean and std.
        # The bundled model's name stays, because it sets the network's arguments.
        built = {
            k: None if k == "encoder_weights" or (k == "weights" and v != "voc") else v
            for k, v in self.model_args.items()
        }
        built["preprocess_cfg"] = dict(self.model.preprocess_cfg)
        self.save_hyperparameters(
            {
                "model": model,
                "model_args": built,
                "segmentation": asdict(self.segmentation),
                "detection": asdict(self.detection),
                "classes": list(self.classes.names),
                "palette": [list(colour) for colour in self.classes.palette],
                "train_sources": self.train_sources,
                "val_sources": {name: dict(has) for name, has in (val_sources or {}).items()},
                "task_weights": task_weights,
                "optim": asdict(self.optim),
                "ema_decay": ema_decay,
                "raw_scores": raw_scores,
                "best": best,
                "compile": compile,
                "nan": nan,
                "nan_limit": nan_limit,
            }
        )
        describe(self.model, self.classes, self.segmentation.protocol, self.detection.size)
        # In this layout depthwise kernels read whole vectors of channels.
        self.model = self.model.to(memory_format=torch.channels_last)
        self.criterion = self.build_criterion(task_weights, compile)
        self.ema = ModelEMA(self.model, ema_decay) if ema_decay > 0 else None
        self.val_sources = val_sources or {"val": {"tasks": list(self.model.tasks)}}
        self.scorers_of = partial(
            Scorers,
            classes=self.classes,
            sources={name: has["tasks"] for name, has in self.val_sources.items()},
            segmentation=self.segmentation,
            detection=self.detection,
            best=best,
        )
        self.scorers = self.scorers_of(self.scored_model)
        self.raw_scorers: Scorers | None = None
        if raw_scores and self.ema is not None:
            self.raw_scorers = self.scorers_of(self.model, details=False)
        self.scores: dict[str, Any] = {}
        """The scorers' results of the last evaluation."""
        self.scored_step = -1
        self.fits = False
        """Whether a trainer trains it: otherwise it is scored, or only loaded."""
        self.seed = torch.initial_seed() % 2**32
        self.resumed: Position | None = None
        """Where the checkpoint that was loaded into this task had stopped."""
        self.rates: Rates | None = None
        self.loss_log = LossLog()

    def build_model(self) -> Any:
        """Return the network; a subclass may return another one with the same attributes."""
        counts = class_counts(self.model_name, len(self.classes))
        return create_model(self.model_name, **{**counts, **self.model_args})

    def build_criterion(self, task_weights: TaskWeights | None, compile: bool) -> nn.Module:
        """Return what computes the losses of (images, batch, tasks), see Criterion."""
        masks, boxes, count = self.segmentation, self.detection, len(self.classes)
        weights = None if masks.class_weights == "auto" else masks.class_weights  # see `setup`
        if weights is not None and len(weights) != count:
            raise InputError(
                f"segmentation.class_weights: {len(weights)} values, expected one for each of "
                f"{count} classes"
            )
        options: dict[str, Any] = {"label_smoothing": masks.label_smoothing, "ohem": masks.ohem}
        segmentation = SegmentationLoss(masks.loss, class_weights=weights, **options)
        detection = DetectionLoss(boxes.alpha, boxes.gamma, boxes.delta, boxes.box_weight)
        return Criterion(
            self.model, segmentation, detection, task_weights, compile, masks.auxiliary
        )

    @property
    def scored_model(self) -> Any:
        """The model that is scored and saved: the average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def forward(self, images: torch.Tensor) -> Any:
        """Run the network on normalised images (B, C, H, W)."""
        return self.model(images)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed all generators from the run's seed and the position in the run.

        A resumed run then needs no generator states, and loaders, which draw from the generators
        depending on their number of workers, change nothing.
        """
        position = (self.seed, self.current_epoch, batch_idx, self.global_rank)
        seed = np.random.SeedSequence(position).generate_state(1)[0]
        seed_everything(int(seed), verbose=False)
        self.guard.start(self.model)

    def prepare(self, batch: Batch) -> tuple[torch.Tensor, list[TaskName]]:
        """Freeze what the batch says; return its normalised images and the tasks to run."""
        check_batch(batch, "image", "freeze", "tasks")
        depth = len(self.model.encoder.out_channels) - 1
        freeze = depth if batch["freeze"] is True else int(batch["freeze"])
        if freeze != self.model.frozen_levels:
            self.model.freeze_encoder(freeze)
        images = self.model.normalise(batch["image"]).contiguous(memory_format=torch.channels_last)
        tasks = [task for task in batch["tasks"] if task in self.model.tasks]
        if not tasks:
            raise InputError(
                f"a stage with tasks {', '.join(batch['tasks'])}: {self.model_name} has no head "
                "for them"
            )
        return images, tasks

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch of crops."""
        images, tasks = self.prepare(batch)
        writes = self.loss_log.due(self.trainer, tasks, batch_idx)
        losses: dict[str, torch.Tensor]
        if isinstance(self.criterion, Criterion):
            output, labels = self.criterion.run(images, batch, tasks)
            losses = self.criterion.compare(output, labels)
            if writes and len(self.train_sources) > 1:
                names = self.train_sources
                losses |= losses_by_source(self.criterion, names, batch, output, labels)
        else:  # a subclass's
            losses = self.criterion(images, batch, tasks)
        total = losses.pop("loss")
        self.guard.see(total, self.global_step, batch["id"])
        learned = getattr(self.criterion, "log_variance", None) or {}
        losses |= {f"log_variance_{task}": value for task, value in learned.items()}
        values = {f"train/{name}": value.detach() for name, value in losses.items()}
        self.log_dict(values, logger=False)
        self.log("train/loss", total.detach(), prog_bar=True, logger=False)
        if writes:
            numbers = {key: float(value) for key, value in values.items()}
            numbers |= {"train/loss": float(total.detach()), "epoch": self.current_epoch}
            for logger in self.loggers:
                logger.log_metrics(numbers, self.global_step)
        return total

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the average: once per optimiser step, however many batches made it."""
        self.skipped = False
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None and not self.skipped:
            self.ema.update_parameters(self.model)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """In mode `skip`, drop a step whose loss is not finite in any process."""
        if self.guard.mode == "skip":
            decide = self.trainer.strategy.reduce_boolean_decision
            self.skipped = bool(decide(self.guard.bad, all=False))
            if self.skipped:
                self.guard.skip(self.model, optimizer)

    def check_finite(self) -> None:
        """Raise an InputError if loss or weights are not finite, before anything is saved."""
        self.guard.check()
        check_finite(self, self.global_step)

    def setup(self, stage: str) -> None:
        """Tell the data the network's heads, synchronise BatchNorms, count the weights `auto`."""
        trainer: Any = self.trainer
        self.fits = stage == "fit"
        check_precision(trainer.precision)
        synchronise_norms(trainer)
        if stage == "fit" and isinstance(trainer.datamodule, ImageDataModule):
            check_stream(trainer, trainer.datamodule)
            trainer.datamodule.serve(self.model_name, self.model.tasks)
        if stage != "fit" or self.segmentation.class_weights != "auto":
            return
        counted = trainer.datamodule.class_weights() if trainer.is_global_zero else None
        weights = trainer.strategy.broadcast(counted)
        for module in self.criterion.modules():
            if isinstance(module, SegmentationLoss):
                module.class_weights = torch.tensor(weights, device=self.device)
        named = zip(self.classes.names, weights, strict=True)
        self.print("class weights: " + ", ".join(f"{name} {weight:.3g}" for name, weight in named))

    def on_train_start(self) -> None:
        """Print what is trained, drop the sanity check's scores, and apply changed settings."""
        if self.rates is not None:
            self.rates.restore()
        if self.scored_step < 0:
            self.scores = {}
        params = sum(p.numel() for p in self.model.parameters()) / 1e6
        self.print(
            f"{self.model_name}: {params:.2f} M parameters, {self.trainer.num_training_batches} "
            f"batches an epoch, {self.optim.name} with learning rate {self.optim.lr:g} "
            f"(encoder × {self.optim.encoder_lr_factor:g}), on {self.device}"
        )

    def on_validation_start(self) -> None:
        """Drop the examples and results of the last evaluation."""
        self.guard.check()
        self.scorers.forget()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score whole images."""
        check_batch(batch, "image", "source")
        self.scorers.update(batch)
        if self.raw_scorers is not None:
            self.raw_scorers.update(batch)

    def on_validation_epoch_end(self) -> None:
        """Compute the scores over all processes and log them."""
        self.scores = self.scorers.compute()
        self.scored_step = -1 if self.trainer.sanity_checking else self.trainer.global_step
        log = {key: self.scores[key] for key in self.scorers.logged}
        if self.raw_scorers is not None:
            raw = self.raw_scorers.compute()
            for key in ("best", *self.scorers.main_scores):
                log[f"{key}_raw"] = self.scores[f"{key}_raw"] = raw[key]
            self.raw_scorers.forget()
        # Lightning keeps float32; the sums are float64.
        values = {f"val/{key}": torch.as_tensor(value).float() for key, value in log.items()}
        self.log_dict(values, prog_bar=True, sync_dist=False, rank_zero_only=False)
        if self.detection.results is not None and not self.trainer.sanity_checking:
            self._write_results(Path(self.detection.results))

    def _write_results(self, path: Path) -> None:
        """Write the detections of all processes, one file per source with boxes."""
        scorers = {s: one for s, task, _, one in self.scorers.each() if task == "detection"}
        for source, scorer in scorers.items():
            results = of_all_processes(scorer.results)
            if self.trainer.is_global_zero:
                file = path.with_stem(f"{path.stem}-{source}") if len(scorers) > 1 else path
                write_results(file, results, self.val_sources[source].get("categories") or None)

    def show_scores(self) -> None:
        """Print the tables of the last evaluation."""
        if self.scores:
            self.scorers.show(self.scores)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser and a schedule that changes at every step."""
        trainer = self.trainer
        groups = param_groups(self.model, self.optim)
        learned = list(self.criterion.parameters())
        if learned:
            groups.append({"params": learned, "weight_decay": 0.0, "name": "loss"})
        optimizer = build_optimizer(groups, self.optim)
        # With max_steps Lightning counts the batches of an epoch only later.
        trainer.fit_loop.setup_data()
        batches = trainer.num_training_batches
        # Validation and load_from_checkpoint read a position, too, and continue nothing.
        resumed = self.resumed if trainer.ckpt_path else None
        total, offset = length_and_offset(trainer, batches, resumed)
        per_epoch = batches / trainer.accumulate_grad_batches
        factor = lr_factor(self.optim, total, per_epoch, offset)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self.rates = Rates(optimizer, schedule)
        every_step: Any = {"scheduler": schedule, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": every_step}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the seed."""
        checkpoint["seed"] = self.seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this model; restore the seed."""
        check_checkpoint(self, checkpoint, self.fits)
        self.seed = checkpoint.get("seed", self.seed)
        self.resumed = Position.of(checkpoint)
