"""Checkpoints: when and how they are written, so that a resumed run equals an unbroken one."""

# A trainer is Any: Lightning's type has no `datamodule`, and no task's attributes.

import os
import time
import zipfile
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from effseg.data.files import numbered
from effseg.errors import InputError
from effseg.training.signals import SAVE, Signals, Stopped, requeue

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
STRIDE = 8
"""Steps between two collective calls in which processes agree on whether to save."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file, syncs and renames it; keeps the one before as previous.ckpt.

    Lightning's class writes to `$TMPDIR` and copies if that is another file system.
    """

    failure = ""
    """Why the newest checkpoint could not be written."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; on failure keep the one before and report it."""
        path = Path(path)
        part = path.with_name(f"{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and path.exists():
                path.replace(path.with_name(PREVIOUS))
            part.replace(path)
            _sync(path.parent)
            self.failure = ""
        except (OSError, RuntimeError) as error:  # torch hides the first behind the second
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            reason = cause.strerror or cause
            self.failure = f"{path}: not written ({reason}), the one before is kept"
            print(f"warning: {self.failure}", flush=True)
            part.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network drives refuse it; the file is in its place
                os.fsync(handle)
        finally:
            os.close(handle)


def is_intact(path: Path) -> bool:
    """Return whether a checkpoint is a complete archive with correct checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def newest_config(folder: Path) -> Path | None:
    """Return the settings of a run's last start: config.yaml, or the last config-N.yaml."""
    files = numbered(folder / "config.yaml")
    return files[max(files)] if files else None


class Checkpoints(Checkpoint):
    """Writes last.ckpt every epoch, every few minutes and on a signal, best.ckpt by `val/best`.

    A checkpoint is always the state after an optimiser step: partly accumulated gradients and
    unfinished evaluations are never in it. A resumed run first runs an evaluation that was due.

    `minutes` is the interval within an epoch. A resumed run may have another number of processes or
    batches if `changed`, and compares its scores with those before if `keep_best`.
    """

    def __init__(
        self, folder: Path, signals: Signals, minutes: float, changed: bool, keep_best: bool = True
    ) -> None:
        self.folder, self.signals, self.changed = folder, signals, changed
        self.keep_best = keep_best
        self.seconds = 60.0 * minutes
        self.best = float("-inf")
        self.point: dict[str, Any] | None = None
        """Position of the run after the last step."""
        self.due = False
        """Whether an evaluation is due after that step."""
        self._finished = False
        self._max_steps: int | None = None
        self._step = self._clock = 0.0
        self._loaded: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Save the best score."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score."""
        if self.keep_best:
            self.best = state_dict["best"]

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Replace the current position by that of the last step."""
        config = newest_config(self.folder.parent)
        checkpoint["run"] = {
            "config": None if config is None else config.name,
            "finished": self._finished,
            "due": self.due,
            "processes": trainer.world_size,
            "batches": int(trainer.num_training_batches),
        }
        if self.point is not None:
            checkpoint["loops"]["fit_loop"] = self.point["loop"]
            checkpoint["epoch"] = self.point["epoch"]
            checkpoint[type(trainer.datamodule).__qualname__] = self.point["data"]

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Check the checkpoint's number of processes."""
        self._loaded = checkpoint
        self.due = checkpoint.get("run", {}).get("due", False)
        self._check("processes", trainer.world_size)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the checkpoint's epoch length, before Lightning restores its loops."""
        if not self._loaded:
            return
        loop, batches = self._loaded["loops"]["fit_loop"], int(trainer.num_training_batches)
        if self._check("batches", batches):
            # A position within such an epoch is meaningless here: start the next one.
            progress = loop["epoch_loop.batch_progress"]
            progress["is_last_batch"] = True
            progress["current"] = dict.fromkeys(progress["current"], batches)
            progress["current"]["completed"] -= 1
        data = self._loaded.get(type(trainer.datamodule).__qualname__)
        self.point = {"loop": deepcopy(loop), "epoch": self._loaded["epoch"], "data": data}
        if 0 <= trainer.max_steps <= self._loaded["global_step"]:
            # Lightning would not start at all, and the last evaluation may be missing.
            self._max_steps = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps = self._loaded["global_step"] + 1
        self._loaded = {}

    def _check(self, key: str, now: int) -> bool:
        """Return whether a number differs from the checkpoint's; InputError if it must not."""
        before = self._loaded.get("run", {}).get(key, now)
        if before != now and not self.changed:
            what = "batches an epoch" if key == "batches" else key
            raise InputError(
                f"--resume: the run had {before} {what}, this one has {now}; expected the same, "
                "or --resume-changed"
            )
        return bool(before != now)

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Reinstall the handlers, which Lightning has just replaced."""
        self.signals.install()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Install the handlers, start the clock, and run an evaluation that was due."""
        self.signals.install()
        self.signals.deferred = True
        self._clock, self._step = time.monotonic(), trainer.global_step
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps = self._max_steps
        if self.point is not None:
            progress = self.point["loop"]["epoch_loop.batch_progress"]
            read = progress["current"]["ready"]
            if progress["is_last_batch"] or read >= trainer.num_training_batches:
                # Lightning would start the next epoch as if in its middle, without counting it.
                trainer.fit_loop.reset_restart_stage()
        if self.due and trainer.enable_validation:
            evaluate(trainer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the position; save if the interval is over or a signal came."""
        if trainer.global_step == self._step:
            return  # gradients are being accumulated
        self._step = trainer.global_step
        self.point = {
            "loop": trainer.fit_loop.state_dict(),
            "epoch": trainer.current_epoch,
            "data": trainer.datamodule.state_dict(),
        }
        self.due = _evaluation_follows(trainer, batch_idx)
        if trainer.world_size == 1 or trainer.global_step % STRIDE == 0:
            self._serve(trainer)

    def on_validation_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """End on a signal; several processes, whose numbers of images may differ, end after it."""
        if trainer.world_size == 1 and self.signals.received and not trainer.sanity_checking:
            self._serve(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Write best.ckpt if the score is the best so far."""
        if trainer.sanity_checking:
            return
        self.due = False
        score = float(trainer.callback_metrics.get("val/best", float("nan")))
        if score > self.best and self.point is not None:
            self.best = score
            self._save(trainer, BEST)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write last.ckpt, except after the last epoch: `on_train_end` does."""
        last = trainer.max_epochs == trainer.current_epoch + 1
        if not last and trainer.max_steps != trainer.global_step:
            self._save(trainer, LAST)
        self._serve(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Score and save the last weights, also if max_steps or max_time ended the run."""
        if trainer.enable_validation and pl_module.scored_step != self._step:
            self.due = True
            evaluate(trainer)
        self._finished = True
        self._save(trainer, LAST)
        failure = getattr(trainer.strategy.checkpoint_io, "failure", "")
        if failure:
            raise InputError(f"{failure}; expected space for the last checkpoint")

    def _serve(self, trainer: Any) -> None:
        """Save or stop in all processes if the interval is over, or one of them got a signal."""
        late = trainer.is_global_zero and time.monotonic() - self._clock >= self.seconds
        request = int(late)  # 0: none, 1: the interval is over, 2: SIGUSR1, 2 + N: signal N
        if self.signals.save:
            request = 2
        if self.signals.received:
            request = 2 + self.signals.received
        if trainer.world_size > 1:
            requests = torch.tensor(request, device=trainer.strategy.root_device)
            request = int(trainer.strategy.reduce(requests, reduce_op="max"))
        if not request:
            return
        self._save(trainer, LAST)
        if request > 2:
            raise Stopped(128 + request - 2)
        if request == 2:
            self.signals.save = False
            queued = trainer.is_global_zero and requeue()
            if trainer.strategy.broadcast(queued) and SAVE is not None:
                raise Stopped(128 + SAVE)

    def _save(self, trainer: Any, name: str) -> None:
        """Write a checkpoint; InputError if a weight is not finite."""
        if self.point is None:
            return
        trainer.lightning_module.check_finite()
        trainer.save_checkpoint(self.folder / name)
        self._clock = time.monotonic()


def evaluate(trainer: Any) -> None:
    """Run the trainer's evaluation outside an epoch."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True


def _evaluation_follows(trainer: Any, batch_idx: int) -> bool:
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or every is None or every == float("inf"):
        return False
    if epochs is None:
        return bool((trainer.fit_loop.total_batch_idx + 1) % int(every) == 0)
    return (batch_idx + 1) % int(every) == 0 and (trainer.current_epoch + 1) % epochs == 0
