"""What every task does: build a model, train it, average its weights, score it, resume."""

# B batch, C channels, H W pixels, K classes.

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from PIL import Image

from effseg.data.samples import Batch, Classes
from effseg.errors import InputError
from effseg.models.encoder import normalise
from effseg.models.faces import EfficientDet
from effseg.models.hub import from_pretrained
from effseg.models.network import Network
from effseg.models.registry import create_model
from effseg.models.weights import load_effdet_trunk, read_checkpoint, to_effdet
from effseg.tasks.ema import ModelEMA
from effseg.tasks.joint_scorer import JointScorer
from effseg.tasks.optim import OptimConfig, build_optimizer, lr_factor, param_groups
from effseg.tasks.scorers import Scorer
from effseg.tasks.sync_norms import SyncNorms


class TrainingTask(LightningModule):
    """A model, its optimiser, the average of its weights, and its evaluation.

    Photos arrive as uint8 and are normalised on the device by the model's own ``preprocess_cfg``.
    A subclass says which models it takes (``family``), what a batch costs (``batch_loss``), how it
    is scored (``make_scorer``) and how many classes a checkpoint has (``classes_in``).

    Args:
        model: a name of :func:`effseg.list_models`.
        class_arguments: the model's class counts by constructor argument.
        model_args: constructor arguments that replace the family's.
        init_from: saved model or run directory, or a .pth of effdet, whose weights to start from.
        freeze_encoder: train the rest only; a number n freezes what the encoder's maps up to level
            n (stride 2^n) are computed from.
        optim: optimiser and schedule.
        ema_decay: of the weights' moving average; 0 trains without.
        compile: ``torch.compile`` the training forward pass.

    Raises:
        InputError: an unknown model, or a value out of its range.
    """

    family: str

    def __init__(
        self,
        model: str,
        class_arguments: Mapping[str, int],
        *,
        model_args: dict[str, Any] | None,
        init_from: str | None,
        freeze_encoder: bool | int,
        optim: OptimConfig,
        ema_decay: float,
        compile: bool,
    ) -> None:
        """Build the model, its average and what scores them."""
        super().__init__()
        if not 0.0 <= ema_decay < 1.0:
            raise InputError(f"ema_decay={ema_decay}: expected 0 <= ema_decay < 1")
        self.model_name = model
        self.model_args = model_args or {}
        self.class_arguments = dict(class_arguments)
        self.optim = optim
        self.model = self.build_model()
        if init_from is not None:
            self._start_from(init_from)
        if freeze_encoder:
            self.set_frozen(freeze_encoder)
        # The layout in which the libraries' depthwise kernels read whole vectors of channels.
        self.model = self.model.to(memory_format=torch.channels_last)
        self.ema = ModelEMA(self.model, ema_decay) if ema_decay > 0 else None
        self.scorer = self.make_scorer(self.scored_model, main=True)
        self.raw_scorer = None if self.ema is None else self.make_scorer(self.model, main=False)
        self.compiled = compile
        self.scores: dict[str, Any] = {}
        """Of the last evaluation: what the scorer computes."""
        self.scored_step = -1

    def build_model(self) -> Any:
        """Return the model; a subclass may return any with a ``preprocess_cfg``."""
        if not self.model_name.startswith(f"{self.family}_"):
            raise InputError(f"model {self.model_name!r}: expected {self.family}_…")
        arguments: dict[str, Any] = {**self.class_arguments, **self.model_args}
        return create_model(self.model_name, **arguments)

    def batch_loss(
        self, images: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of a batch of normalised crops (B, 3, H, W), and its terms by name."""
        raise NotImplementedError

    def make_scorer(self, model: Any, *, main: bool) -> Scorer | JointScorer:
        """Return what scores ``model``; not ``main``: only what is compared with the main one."""
        raise NotImplementedError

    def load_foreign(self, state_dict: dict[str, torch.Tensor]) -> list[str]:
        """Load an effdet checkpoint, here its trunk; return the names that started fresh."""
        return load_effdet_trunk(self.model, state_dict)

    def load_saved(self, model: Any) -> list[str]:
        """Load what fits of a saved model; return the names that started fresh.

        BiFPNs over other levels have other nodes under the same numbers: of a detector on P3 and up
        the corresponding nodes are taken, of others the encoder only.
        """
        same_graph = model.decoder.levels == self.model.decoder.levels
        if isinstance(model, EfficientDet) and not same_graph:
            return load_effdet_trunk(self.model, to_effdet(model))
        state, own = model.state_dict(), self.model.state_dict()
        fitting = {
            k: v
            for k, v in state.items()
            if k in own and own[k].shape == v.shape and (same_graph or k.startswith("encoder."))
        }
        self.model.load_state_dict(own | fitting)
        return sorted(set(own) - set(fitting))

    def classes_in(self, state_dict: Mapping[str, torch.Tensor]) -> int | None:
        """Return the class count of a checkpoint's model; None where it cannot be told."""
        raise NotImplementedError

    def extra_parameters(self) -> list[torch.nn.Parameter]:
        """Return learned numbers outside the model."""
        return []

    def set_frozen(self, wanted: bool | int) -> None:
        """Freeze all of the encoder, nothing, or its maps up to a level."""
        model: Any = self.model
        levels = len(model.encoder.out_channels) - 1 if wanted is True else int(wanted)
        if levels != model.frozen_levels:
            model.freeze_encoder(levels)

    @property
    def scored_model(self) -> Any:
        """The model that is scored first and saved: the average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def monitor(self) -> str:
        """The logged score that says which epoch is the best; more is better."""
        return f"val/{self.scorer.headline}"

    def _start_from(self, source: str) -> None:
        if source.endswith((".pth", ".pt")):
            fresh = self.load_foreign(read_checkpoint(source))
        else:
            fresh = self.load_saved(from_pretrained(source))
        if len(fresh) == len(self.model.state_dict()):
            raise InputError(f"init_from={source}: none of its tensors fits {self.model_name}")
        if fresh:
            names = ", ".join(fresh[:4]) + (", …" if len(fresh) > 4 else "")
            print(f"init_from={source}: {len(fresh)} tensors start fresh: {names}")

    def forward(self, images: torch.Tensor) -> Any:
        """Run the model on normalised photos (B, 3, H, W)."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch of crops."""
        image = torch.as_tensor(batch["image"])
        if isinstance(self.model, Network):
            images = self.model.normalise(image)
        else:  # a subclass may train any network
            images = normalise(image, self.model.preprocess_cfg)
        images = images.contiguous(memory_format=torch.channels_last)
        total, terms = self.batch_loss(images, batch)
        if len(terms) > 1:
            self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(images))
        return total

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the average: once per optimiser step, however many batches made it."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def setup(self, stage: str) -> None:
        """Have BatchNorms synchronised, where the trainer is to, with their activations."""
        if getattr(self.trainer.strategy, "_layer_sync", None) is not None:
            self.trainer.strategy._layer_sync = SyncNorms()  # type: ignore[attr-defined]

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
        self.scorer.forget()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score whole photos."""
        self.scorer.update(batch)
        if self.raw_scorer is not None:
            self.raw_scorer.update(batch)

    def on_validation_epoch_end(self) -> None:
        """Add up over processes and log; the headline is the average's where there is one."""
        self.scores = self.scorer.compute()
        self.scored_step = -1 if self.trainer.sanity_checking else self.trainer.global_step
        log = {key: self.scores[key] for key in self.scorer.logged if key in self.scores}
        if self.raw_scorer is not None:
            raw = self.raw_scorer.compute()
            for key in self.scorer.headlines:
                log[f"{key}_raw"] = self.scores[f"{key}_raw"] = raw[key]
            self.raw_scorer.forget()
        # Lightning keeps float32; the sums were made in float64.
        values = {f"val/{key}": torch.as_tensor(value).float() for key, value in log.items()}
        self.log_dict(values, prog_bar=True, sync_dist=False, rank_zero_only=False)

    def pictures(self, classes: Classes) -> Iterator[tuple[str, Image.Image]]:
        """Yield id and picture of the first evaluated photos."""
        yield from self.scorer.pictures(classes)

    def show_scores(self, classes: Classes) -> None:
        """Print the table of the last evaluation."""
        if self.scores:
            self.scorer.show(self.scores, classes)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimiser and a schedule that moves at every step."""
        groups = param_groups(self.model, self.optim)
        extra = self.extra_parameters()
        if extra:
            groups.append({"params": extra, "weight_decay": 0.0, "name": "loss"})
        optimizer = build_optimizer(groups, self.optim)
        # With max_steps Lightning would count the batches of an epoch only later.
        self.trainer.fit_loop.setup_data()
        per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        total = int(self.trainer.estimated_stepping_batches)
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
        theirs, ours = self.classes_in(saved), self.classes_in(own)
        if theirs is not None and theirs != ours:
            raise InputError(
                f"the checkpoint has {theirs} classes, the data {ours}: "
                "expected the same count (model.init_from starts a new head from other weights)"
            )
        wrong = [k for k in own if k not in saved or saved[k].shape != own[k].shape]
        wrong += [k for k in saved if k not in own]
        if wrong:
            raise InputError(
                f"the checkpoint is not of this model ({self.model_name}): {len(wrong)} "
                f"tensors are missing, unexpected or of another shape, first {wrong[0]}"
            )
