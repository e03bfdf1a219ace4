"""``effseg fit`` and ``validate``: Lightning's command line, our run directory and errors."""

import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import _get_rank  # the rank before a Trainer knows it
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from effseg import resources
from effseg.data.datamodule import ImageDataModule
from effseg.errors import InputError
from effseg.inference.backends import is_exported
from effseg.training.exported import score_file
from effseg.training.progress import LineProgress
from effseg.training.record import RunRecord
from effseg.training.run_directory import (
    RunDirectory,
    checkpoints,
    new_run_directory,
    prepare_run,
)
from effseg.training.task import TrainingTask

_LINKS = {
    "data.class_names": "model.classes",
    "data.palette": "model.palette",
    "data.train_sources": "model.train_sources",
    "data.val_sources": "model.val_sources",
}


class _Parser(LightningArgumentParser):
    """Raises one line where the library prints its usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        cause = _input_error(ex)
        text = " ".join(str(cause or message).split())
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
        """Let the data say which classes there are, and set what evaluation relies on."""
        for source, target in _LINKS.items():
            parser.link_arguments(source, target, apply_on="instantiate")
        parser.set_defaults(
            {
                # Lightning's own sampler repeats images so that every process has as many.
                "trainer.use_distributed_sampler": False,
                "trainer.gradient_clip_val": 10.0,  # the paper's
                "trainer.log_every_n_steps": 10,
                "trainer.num_sanity_val_steps": 1,
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Leave config and command line as they are.

        Lightning would lay the checkpoint's hyper-parameters over both, so that ``validate
        --ckpt_path … --model.segmentation.protocol X`` would not score X.
        """

    def before_instantiate_classes(self) -> None:
        """Refuse what would fail only after the data are read."""
        data = self._get(self.config, "data")
        if not data.train and not data.val:
            raise InputError(f"{self.subcommand}: no data given, expected --config with a recipe")
        path = self._get(self.config, "ckpt_path")
        if path and not Path(path).is_file():
            raise InputError(f"--ckpt_path {path}: no such file, expected a checkpoint")

    def instantiate_classes(self) -> None:
        """Make data, model and trainer; jsonargparse wraps what a constructor raises."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            cause = _input_error(error)
            if cause is not None:
                raise cause from error
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
        self.datamodule.schedule.check_epochs(config.max_epochs)
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        given, first = config.default_root_dir, not _get_rank()
        self.run_is_new = first and (given is None or not Path(given).exists())
        if given is not None:
            self.run = Path(given)
        else:  # the other processes write nothing, and take no name
            self.run = new_run_directory() if first else Path("runs")
        resumed = self._get(self.config, "ckpt_path") is not None
        loggers = prepare_run(self.run, resumed, writes=first)
        if config.logger is False:
            loggers = []
        elif config.logger not in (None, True):
            more = config.logger if isinstance(config.logger, list) else [config.logger]
            loggers += more
        if loggers:
            callbacks.append(LearningRateMonitor("step"))
        callbacks += [RunRecord(self.run), RunDirectory(self.run), *checkpoints(self.run)]
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
                model.show_scores()
                print(f"run directory: {self.run}")
        except InputError:
            if self.run_is_new and not (self.run / "checkpoints").exists():
                shutil.rmtree(self.run, ignore_errors=True)
            raise

    def validate(self, model: TrainingTask, datamodule: ImageDataModule, **kwargs: Any) -> None:
        """Evaluate and print the table."""
        if kwargs.get("ckpt_path") is None and self._get(self.config, "model").init_from is None:
            raise InputError("validate: expected --ckpt_path FILE (or --model.init_from MODEL)")
        if is_exported(kwargs.get("ckpt_path") or ""):
            score_file(model, kwargs.pop("ckpt_path"))
        self.trainer.validate(model, datamodule=datamodule, **kwargs | {"verbose": False})
        if self.trainer.is_global_zero:
            model.show_scores()


def run_lightning(arguments: list[str]) -> Path | None:
    """Run ``fit …`` or ``validate …``.

    ``--config`` takes a file, or the name of a shipped recipe (``voc2012_d4``).

    Returns:
        The run directory that this process wrote.

    Raises:
        InputError: anything about the input that cannot be used.
    """
    _quiet()
    # The first word stays: DDP starts its other processes by it.
    argv = [sys.argv[0], *_named_configs(arguments)]
    before, sys.argv = sys.argv, argv
    try:
        cli = _CLI(
            TrainingTask,
            ImageDataModule,
            parser_class=_Parser,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            # An abbreviated key (--data.crop) would silently set another one.
            parser_kwargs={"prog": "effseg", "allow_abbrev": False},
        )
        return cli.run if cli.subcommand == "fit" and cli.trainer.is_global_zero else None
    finally:
        sys.argv = before


def read_data(config: str, root: str | None, classes: str | None) -> ImageDataModule:
    """Make the data module of a recipe, with another root or class list if one is given.

    Raises:
        InputError: no such recipe, or data that cannot be made of it.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageDataModule, "data")
    content = resources.load_yaml(config_path(config)).get("data", {})
    content |= {k: v for k, v in {"root": root, "classes": classes}.items() if v is not None}
    try:
        data = parser.instantiate_classes(parser.parse_object({"data": content})).data
    except (ArgumentError, ValueError, TypeError) as error:
        cause = _input_error(error)
        raise cause or InputError(f"{config}: {' '.join(str(error).split())}") from error
    assert isinstance(data, ImageDataModule)
    return data


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
            result.append(f"--config={config_path(value)}")
        else:
            result.append(str(config_path(argument)) if after_flag else argument)
    return result


def config_path(text: str) -> Path:
    """Return a recipe's path: of an existing file, or of a shipped recipe's bare name.

    Raises:
        InputError: a path that does not exist, or a name that no shipped recipe has.
    """
    path = Path(text)
    if path.is_file():
        return path
    if len(path.parts) > 1:
        raise InputError(f"--config {text}: no such file")
    return resources.find("configs", text)


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
        ".*your dataloader is.not resumable.*",  # the stream of images is, see its sampler
        ".*could not find the monitored key.*",  # a run that ends before its first evaluation
        ".*was called before the ``update`` method.*",  # a sanity check of one batch
        ".*Total length of `list` across ranks is zero.*",  # a run without evaluation
    ):
        warnings.filterwarnings("ignore", message)
