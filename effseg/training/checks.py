"""Settings of the trainer that would train or score something else than they say."""

from collections.abc import Mapping
from typing import Any

from effseg.data.datamodule import ImageDataModule
from effseg.data.sampling import Schedule
from effseg.errors import InputError


def check_precision(precision: Any) -> None:
    """Refuse a precision that rounds more than the network's operations.

    Lightning casts batches, too: in bfloat16 boxes lie on whole pixels, or every fourth, and the
    weights' average stands still.
    """
    if str(precision) in ("bf16-true", "16-true", "64-true", "64"):
        raise InputError(
            f"trainer.precision={precision}: would also change the ground truth and the average of "
            "the weights, expected bf16-mixed, 16-mixed or 32-true"
        )


def check_batch(batch: Any, *needed: str) -> None:
    """Refuse a batch without these keys of `effseg.data.Batch`."""
    if not isinstance(batch, Mapping) or not {*needed} <= batch.keys():
        has = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise InputError(
            f"a batch of {has}: TrainingTask takes those of effseg.data.ImageDataModule; for "
            "another loader write the loop with effseg.losses.Criterion, see docs/training.md"
        )


def check_trainer(settings: Any) -> None:
    """Refuse settings of `trainer` that neither `fit` nor `validate` can use."""
    for key in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        if settings[key] is not None and settings[key] < 1:
            raise InputError(f"trainer.{key}={settings[key]}: expected at least 1")
    check_precision(settings.precision)


def check_stream(trainer: Any, data: ImageDataModule) -> None:
    """Refuse a trainer, or its settings, that would change the training stream of the data."""
    accumulate = trainer.accumulate_grad_batches or 1
    if accumulate > 1 and any(stage.alternate for stage in data.schedule.stages):
        raise InputError(
            f"trainer.accumulate_grad_batches={accumulate}: a step would train all tasks of a "
            "stage with alternate: true, expected 1, or no alternate"
        )
    if trainer.overfit_batches and (data.schedule != Schedule() or len(data.train) > 1):
        # Lightning reads the first images in their order, with a sampler of its own.
        raise InputError(
            f"trainer.overfit_batches={trainer.overfit_batches}: would ignore data.stages and the "
            "weights of the sources, expected trainer.limit_train_batches"
        )
