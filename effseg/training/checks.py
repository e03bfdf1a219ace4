"""Settings of the trainer that would train or score something else than they say."""

from typing import Any

from effseg.errors import InputError


def check_precision(precision: Any) -> None:
    """Refuse a precision that rounds more than the network's operations.

    Lightning casts batches, too: in bfloat16 boxes lie on whole pixels, or every fourth, and the
    weights' average stands still.

    Raises:
        InputError: one of them.
    """
    if str(precision) in ("bf16-true", "16-true", "64-true", "64"):
        raise InputError(
            f"trainer.precision={precision}: would also change the ground truth and the average of "
            "the weights, expected bf16-mixed, 16-mixed or 32-true"
        )


def check_trainer(settings: Any) -> None:
    """Check the `trainer` settings of `fit` and `validate`.

    Raises:
        InputError: a setting that cannot be used.
    """
    for key in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        if settings[key] is not None and settings[key] < 1:
            raise InputError(f"trainer.{key}={settings[key]}: expected at least 1")
    check_precision(settings.precision)
