"""The run directory: what ``effseg fit`` leaves behind."""

import shutil
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from effseg.errors import InputError
from effseg.inference.draw import save_image
from effseg.training.record import card_of, write_scores
from effseg.training.task import TrainingTask


def new_run_directory(base: Path = Path("runs")) -> Path:
    """Make ``runs/DATE-TIME``, and ``…-1``, ``…-2`` where another run has that name already."""
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


def prepare_run(folder: Path, resumed: bool, writes: bool = True) -> list[Logger]:
    """Make the folder and its loggers: metrics.csv and TensorBoard events, directly inside.

    A resumed run keeps the old rows as ``metrics-N.csv``: the logger starts its file anew. Only
    one process of several ``writes``.

    Raises:
        InputError: the folder holds a run already, and this one does not continue it.
    """
    last = folder / "checkpoints" / "last.ckpt"
    if last.is_file() and not resumed:
        raise InputError(
            f"{folder}: holds a run already; expected --ckpt_path {last} to continue it, "
            "or another --trainer.default_root_dir"
        )
    metrics = folder / "metrics.csv"
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    if writes and metrics.is_file():
        earlier = len(list(folder.glob("metrics-*.csv")))
        metrics.rename(folder / f"metrics-{earlier + 1}.csv")
    return [
        CSVLogger(folder, name="", version=""),
        TensorBoardLogger(folder, name="", version=""),
    ]


def checkpoints(folder: Path) -> list[Callback]:
    """Return the callbacks that write checkpoints/best.ckpt (by ``val/best``) and last.ckpt."""
    common: dict[str, Any] = {
        "dirpath": folder / "checkpoints",
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
    }
    return [
        ModelCheckpoint(filename="best", monitor="val/best", mode="max", **common),
        ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **common),
    ]


class RunDirectory(Callback):
    """Writes model/ (of the best epoch), pictures/ (of the last)."""

    def __init__(self, folder: Path) -> None:
        """Write into ``folder``."""
        self.folder = folder
        self.best = -1.0

    def state_dict(self) -> dict[str, Any]:
        """Keep the best score over a resume."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best score of the run that goes on."""
        self.best = state_dict["best"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write pictures, and the model if it is the best so far."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return  # a sanity check sees a few images only
        assert isinstance(pl_module, TrainingTask)
        pictures = self.folder / "pictures"
        pictures.mkdir(parents=True, exist_ok=True)
        for name, picture in pl_module.pictures():
            save_image(picture, pictures / f"{name}.png")
        score = float(trainer.callback_metrics.get("val/best", float("nan")))
        if score > self.best:
            self.best = score
            self._save_model(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last model of a run without evaluation."""
        if trainer.is_global_zero and not (self.folder / "model").is_dir():
            assert isinstance(pl_module, TrainingTask)
            self._save_model(pl_module)

    def _save_model(self, task: TrainingTask) -> None:
        final, fresh = self.folder / "model", self.folder / "model.part"
        shutil.rmtree(fresh, ignore_errors=True)
        task.scored_model.save_pretrained(fresh, **card_of(self.folder, task))
        if task.scores:
            write_scores(fresh / "evaluation.json", task)
        old = self.folder / "model.old"
        if final.is_dir():
            final.rename(old)
        fresh.rename(final)
        shutil.rmtree(old, ignore_errors=True)
