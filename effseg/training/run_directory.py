"""The run directory: what `effseg fit` leaves behind."""

import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from effseg.data.files import numbered, write_text
from effseg.errors import InputError
from effseg.inference.draw import save_image
from effseg.training.faults import one_line
from effseg.training.record import add_start, card_of, write_scores
from effseg.training.task import TrainingTask


def new_run_directory(base: Path = Path("runs")) -> Path:
    """Create `runs/DATE-TIME`, or `…-1`, `…-2` if that name is taken."""
    base.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y%m%d-%H%M%S")
    number = 0
    while True:
        folder = base / (f"{name}-{number}" if number else name)
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def prepare_run(folder: Path, writes: bool = True) -> list[Logger]:
    """Create the folder and its loggers: metrics.csv and TensorBoard events in it.

    A resumed run keeps the old rows as `metrics-N.csv`, as the logger overwrites its file. Only
    one process `writes`.
    """
    metrics = folder / "metrics.csv"
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    if writes and metrics.is_file():
        metrics.rename(folder / f"metrics-{max(numbered(metrics)) + 1}.csv")
    return [logger(folder, name="", version="") for logger in (CSVLogger, TensorBoardLogger)]


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml, which repeats the run; a resumed run keeps it and adds its changes.

    Arguments of `fit` that affect no weight are left out.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write config.yaml, or config-N.yaml where a resumed run has others than before."""
        config = self.config.clone()
        for key in ("ckpt_path", "plan", "resume", "resume_changed", "checkpoint_minutes"):
            config.pop(key, None)
        text = self.parser.dump(config, skip_none=False, skip_validation=True)
        path = Path(trainer.default_root_dir) / self.config_filename
        written = numbered(path)
        if not self.overwrite and written:
            last = max(written)
            if written[last].read_text(encoding="utf-8") == text:
                return
            path = path.with_stem(f"{path.stem}-{last + 1}")
        write_text(path, text)


class RunDirectory(Callback):
    """Writes run.json (at each start), model/ (of the best epoch) and pictures/ (of the last).

    Also logs the seconds of every epoch.
    """

    def __init__(self, folder: Path, keep_best: bool = True) -> None:
        self.folder, self.keep_best = folder, keep_best
        self.best = -1.0
        """Score of model/: a model that could not be written is tried again."""
        self.failure = ""
        self.began = self.evaluation_began = time.monotonic()
        self.evaluated = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Save the best score."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, if model/ of that score is here."""
        if self.keep_best:
            self.best = state_dict["best"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add this start to run.json."""
        if trainer.is_global_zero:
            add_start(self.folder / "run.json", trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.began, self.evaluated = time.monotonic(), 0.0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the seconds of the epoch, and of the evaluations within it."""
        seconds = {"seconds/train": time.monotonic() - self.began - self.evaluated}
        if self.evaluated:
            seconds["seconds/evaluation"] = self.evaluated
        for logger in trainer.loggers:
            epoch = {"epoch": float(trainer.current_epoch)}
            logger.log_metrics(seconds | epoch, trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the evaluation."""
        self.evaluation_began = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write pictures, and the model if it is the best so far."""
        self.evaluated += time.monotonic() - self.evaluation_began
        if trainer.sanity_checking or not trainer.is_global_zero:
            return  # a sanity check sees only a few images
        assert isinstance(pl_module, TrainingTask)
        try:
            pictures = self.folder / "pictures"
            for name, picture in pl_module.scorers.pictures():
                save_image(picture, pictures / f"{name}.png")
        except Exception as error:
            print(f"warning: pictures: {one_line(error)}", flush=True)
        score = float(trainer.callback_metrics.get("val/best", float("nan")))
        if score > self.best and self._save_model(pl_module):
            self.best = score

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last model of a run without evaluation; InputError if none could be written."""
        if trainer.is_global_zero and not (self.folder / "model").is_dir():
            assert isinstance(pl_module, TrainingTask)
            self._save_model(pl_module)
        if self.failure:
            raise InputError(f"{self.failure}; expected space for the model")

    def _save_model(self, task: TrainingTask) -> bool:
        """Write the model; on failure keep the one before and report it."""
        final, fresh = self.folder / "model", self.folder / "model.part"
        old = self.folder / "model.old"
        self._put_back(final, old)  # by a run that was killed while writing
        shutil.rmtree(fresh, ignore_errors=True)
        if final.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        try:
            task.scored_model.save_pretrained(fresh, **card_of(self.folder, task))
            if task.scores:
                write_scores(fresh / "evaluation.json", task)
            if final.is_dir():
                final.rename(old)
            fresh.rename(final)
            shutil.rmtree(old, ignore_errors=True)
            self.failure = ""
        except Exception as error:  # safetensors raises its own errors
            self.failure = f"{final}: not written ({one_line(error)}), the one before is kept"
            print(f"warning: {self.failure}", flush=True)
            self._put_back(final, old)
            shutil.rmtree(fresh, ignore_errors=True)
        return not self.failure

    @staticmethod
    def _put_back(final: Path, old: Path) -> None:
        """Restore the model before where the new one did not take its place."""
        with suppress(OSError):
            if old.is_dir() and not final.exists():
                old.rename(final)
