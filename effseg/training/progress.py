"""A bar for terminals; one line per epoch for logs."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class TerminalProgress(RichProgressBar):
    """Reads the loss once in `log_every_n_steps`: each reading waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self._period: int | None = None
        self._shown: dict[str, Any] = {}

    def get_metrics(self, trainer: Any, pl_module: LightningModule) -> dict[str, Any]:
        """Return what is shown beside the bar, which Lightning asks for after every step."""
        period = trainer.global_step // max(1, trainer.log_every_n_steps)
        if not trainer.training or trainer.is_last_batch or period != self._period:
            self._shown = super().get_metrics(trainer, pl_module)
        self._period = period
        return self._shown


class LineProgress(Callback):
    """Prints epoch, step, losses, scores and the remaining time after every epoch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember when, at which epoch and at which step this process started."""
        self.start = time.monotonic()
        self.first_epoch, self.first_step = trainer.current_epoch, trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print epoch, step, metrics and the remaining time."""
        if not trainer.is_global_zero:
            return
        done = trainer.current_epoch + 1
        spent = time.monotonic() - self.start
        fresh = getattr(pl_module, "scored_step", None) == trainer.global_step
        prefixes = ("train/", "val/") if fresh else ("train/",)  # callback_metrics keeps old scores
        metrics = "  ".join(
            f"{key} {float(value):.4f}"
            for key, value in sorted(trainer.callback_metrics.items())
            if key.startswith(prefixes)
        )
        # Training ends at whichever limit comes first; without one, Lightning has None or -1.
        limits = (
            ("epoch", done, self.first_epoch, trainer.max_epochs),
            ("step", trainer.global_step, self.first_step, trainer.max_steps),
        )
        counts, rest = [], []
        for name, now, first, limit in limits:
            counts.append(f"{name} {now}")
            if limit and limit > 0:
                counts[-1] += f"/{limit}"
                rest.append(spent / max(1, now - first) * (limit - now))
        left = f"  about {min(rest) / 60:.1f} min left" if rest else ""
        print("  ".join((*counts, metrics, f"{spent:.0f} s{left}")), flush=True)
