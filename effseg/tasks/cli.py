"""``effseg fit`` and ``validate``: Lightning's command line, our run directory and errors."""

import logging
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from effseg import resources
from effseg.data import (  # noqa: F401  (found by class name)
    datamodules,
    detection_datamodules,
    mixture_datamodule,
)
from effseg.data.photo_datamodule import PhotoDataModule
from effseg.errors import InputError
from effseg.tasks import detection, joint, segmentation  # noqa: F401  (found by class name)
from effseg.tasks.base import TrainingTask
from effseg.tasks.report import LineProgress
from effseg.tasks.run_directory import RunDirectory, checkpoints, prepare_run


class _Parser(LightningArgumentParser):
    """Raises one line where the library prints its usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        found = _input_error(ex)
        text = " ".join(str(found or message).split())
        if "arguments are required" in text:
            text += " (expected --config with a recipe)"
        raise InputError(text) from ex


class _CLI(LightningCLI):
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offer the two that exist here."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the data say how many classes there are, and set what evaluation relies on."""
        parser.link_arguments("data.num_classes", "model.init_args.classes", apply_on="instantiate")
        parser.set_defaults(
            {
                # Lightning's own sampler repeats photos so that every process has as many.
                "trainer.use_distributed_sampler": False,
                "trainer.log_every_n_steps": 10,
                "trainer.num_sanity_val_steps": 1,
            }
        )

    def before_instantiate_classes(self) -> None:
        """Refuse what would fail only after the data are read."""
        for key in ("model", "data"):
            if not self._get(self.config, key):
                raise InputError(
                    f"{self.subcommand}: no {key} given, expected --config with a recipe"
                )
        path = self._get(self.config, "ckpt_path")
        if path and not Path(path).is_file():
            raise InputError(f"--ckpt_path {path}: no such file, expected a checkpoint")

    def instantiate_classes(self) -> None:
        """Make data, model and trainer; jsonargparse wraps what a constructor raises."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            found = _input_error(error)
            if found is not None:
                raise found from error
            if isinstance(error, MisconfigurationException):
                raise InputError(str(error).splitlines()[0]) from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Check the data, then make the run directory and the trainer that writes to it."""
        config = self._get(self.config_init, "trainer")
        callbacks = list(config.callbacks or [])
        terminal = sys.stdout.isatty()
        callbacks.append(RichProgressBar() if terminal else LineProgress())
        common = {"callbacks": callbacks, "enable_progress_bar": terminal}
        if self.subcommand == "validate":
            self.save_config_callback = None  # it would replace the run's own config.yaml
            return super().instantiate_trainer(logger=False, enable_checkpointing=False, **common)
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        self.run = Path(config.default_root_dir or Path("runs") / time.strftime("%Y%m%d-%H%M%S"))
        self.run_is_new = not self.run.exists()
        loggers = prepare_run(
            self.run, self._get(self.config, "ckpt_path") is not None, writes=not _get_rank()
        )
        if config.logger is False:
            loggers = []
        elif config.logger not in (None, True):
            more = config.logger if isinstance(config.logger, list) else [config.logger]
            loggers += more
        if loggers:
            callbacks.append(LearningRateMonitor("step"))
        callbacks += [RunDirectory(self.run), *checkpoints(self.run, self.model.monitor)]
        return super().instantiate_trainer(
            logger=loggers, default_root_dir=str(self.run), enable_model_summary=False, **common
        )

    def fit(self, model: TrainingTask, **kwargs: Any) -> None:
        """Train; a run that bad input ends before its first checkpoint leaves no directory."""
        try:
            self.trainer.fit(model, **kwargs)
            if model.scored_step != self.trainer.global_step and self.trainer.val_dataloaders:
                # max_steps or max_time ended the run within an epoch: its last weights are not
                # scored yet.
                self.trainer.validate(model, datamodule=kwargs["datamodule"], verbose=False)
            if self.trainer.is_global_zero:
                model.show_scores(kwargs["datamodule"].classes)
                print(f"run directory: {self.run}")
        except InputError:
            if self.run_is_new and not (self.run / "checkpoints").exists():
                shutil.rmtree(self.run, ignore_errors=True)
            raise

    def validate(self, model: TrainingTask, datamodule: PhotoDataModule, **kwargs: Any) -> None:
        """Evaluate and print the table."""
        if (
            kwargs.get("ckpt_path") is None
            and self._get(self.config, "model").init_args.get("init_from") is None
        ):
            raise InputError("validate: expected --ckpt_path FILE (or --model.init_from MODEL)")
        self.trainer.validate(model, datamodule=datamodule, **kwargs | {"verbose": False})
        if self.trainer.is_global_zero:
            model.show_scores(datamodule.classes)


def run_lightning(arguments: list[str]) -> None:
    """Run ``fit …`` or ``validate …``.

    ``--config`` takes a file, or the name of a shipped recipe (``voc2012_d4``).

    Raises:
        InputError: anything about the input that cannot be used.
    """
    _quiet()
    # The first word stays: DDP starts its other processes by it.
    argv = [sys.argv[0], *_named_configs(arguments)]
    before, sys.argv = sys.argv, argv
    try:
        _CLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=_Parser,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            parser_kwargs={"prog": "effseg"},
        )
    finally:
        sys.argv = before


def _input_error(error: BaseException | None) -> InputError | None:
    """Return the InputError in the chain of causes."""
    while error is not None:
        if isinstance(error, InputError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _named_configs(arguments: list[str]) -> list[str]:
    """Replace the name of a shipped recipe by its path (``--config NAME``, ``--config=NAME``)."""
    result: list[str] = []
    for argument in arguments:
        after_flag = bool(result) and result[-1] in ("--config", "-c")
        flag, equals, value = argument.partition("=")
        if flag == "--config" and equals:
            result.append(f"--config={_config_path(value)}")
        else:
            result.append(str(_config_path(argument)) if after_flag else argument)
    return result


def _config_path(text: str) -> Path:
    path = Path(text)
    if path.is_file():
        return path
    return resources.find("configs", path.name)


def _quiet() -> None:
    """Silence advice that does not apply here; errors and our own warnings stay."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own calls
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*LightningCLI's args parameter.*",
        ".*exists and is not empty.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*Trying to infer the `batch_size`.*",
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*module.s. in eval mode at the start of training.*",  # the average of the weights
        ".*when using `ckpt_path`, callbacks used to create.*",  # validate needs none of them
        ".*your dataloader is.not resumable.*",  # the stream of photos is, see PhotoDataModule
        ".*could not find the monitored key.*",  # a run that ends before its first evaluation
    ):
        warnings.filterwarnings("ignore", message)
