"""One line per epoch, for logs without a terminal."""

import time

from lightning.pytorch import Callback, LightningModule, Trainer


class LineProgress(Callback):
    """Prints epoch, step, losses, scores and the remaining time after every epoch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember when and at which epoch this process started."""
        self.start, self.first_epoch = time.monotonic(), trainer.current_epoch

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
        left = ""
        if trainer.max_epochs and trainer.max_epochs > 0:
            rest = spent / (done - self.first_epoch) * (trainer.max_epochs - done)
            left = f"  about {rest / 60:.1f} min left"
        print(
            f"epoch {done}/{trainer.max_epochs}  step {trainer.global_step}  {metrics}  "
            f"{spent:.0f} s{left}",
            flush=True,
        )
