"""`effseg fit` and `validate`: Lightning's command line, our run directory and errors."""

import logging
import os
import shutil
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

# Private: the rank before there is a Trainer, which the public rank_zero_only.rank does not know.
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from effseg.data.datamodule import ImageDataModule
from effseg.errors import InputError, flat
from effseg.inference.backends import is_exported
from effseg.models.encoder import without_fetching
from effseg.training.checkpointing import Checkpoints, SafeCheckpointIO
from effseg.training.checks import check_stream, check_trainer
from effseg.training.faults import explained, guard, input_error
from effseg.training.plan import print_plan
from effseg.training.progress import LineProgress, TerminalProgress
from effseg.training.recipes import named_configs
from effseg.training.resume import check_resumed, choose, read_run, run_of
from effseg.training.run_directory import (
    RunDirectory,
    SaveConfig,
    new_run_directory,
    prepare_run,
)
from effseg.training.signals import Signals, Stopped
from effseg.training.start import score_model
from effseg.training.task import TrainingTask


class _Parser(LightningArgumentParser):
    """Raises InputError instead of printing the usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        cause = input_error(ex)
        text = " ".join(str(cause or message).split())
        if "arguments are required" in text:
            text += " (expected --config with a recipe)"
        raise InputError(text) from ex


_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has no SIGKILL


class _CLI(LightningCLI):
    signals: Signals
    run: Path
    run_is_new = False
    checkpoint: Path | None
    keep_best = False

    @property
    def options(self) -> Namespace:
        """The settings of `fit` or `validate`."""
        options: Namespace = self.config[str(self.subcommand)]
        return options

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.class_names", "model.classes", apply_on="instantiate")
        for key in ("palette", "train_sources", "val_sources"):
            parser.link_arguments(f"data.{key}", f"model.{key}", apply_on="instantiate")

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Add what only `fit` has; `add_arguments_to_parser` is not told which parser it is."""
        about = {"fit": "Train by a recipe.", "validate": "Evaluate a checkpoint or a model."}
        kwargs["description"] = about[subcommand]
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            add = parser.add_argument
            add("--resume", default="auto", help="auto, never, or a checkpoint to resume from")
            add("--plan", action="store_true", help="print data, steps, their time; train nothing")
            changed = "resume although settings have changed"
            add("--resume_changed", "--resume-changed", action="store_true", help=changed)
            minutes = "minutes between two checkpoints within an epoch"
            add("--checkpoint_minutes", type=float, default=15.0, help=minutes)
        return parser

    def _parse_ckpt_path(self) -> None:
        """Keep the values of config and command line.

        Lightning would overwrite both with the checkpoint's hyper-parameters, so that `validate
        --ckpt_path … --model.segmentation.protocol X` would not score X.
        """

    def before_instantiate_classes(self) -> None:
        """Check what would otherwise fail only after reading the data."""
        options = self.options
        for key in ("trainer", "model", "data"):
            if not isinstance(options[key], Namespace):
                raise InputError(f"{key}: expected settings by name")
        data, path = options.data, options.ckpt_path
        if not data.train and not data.val:
            raise InputError(f"{self.subcommand}: no data, expected --config with a recipe")
        if self.subcommand == "fit":
            if path and path != "last" and not Path(path).is_file():
                raise InputError(f"--ckpt_path {path}: no such file, expected a checkpoint")
            self._choose_checkpoint(str(path or options.resume))
            return
        if not data.val:
            raise InputError("validate: no source in data.val, expected at least one")
        if path and not Path(path).exists():
            raise InputError(f"--ckpt_path {path}: no such file, expected a checkpoint or a model")
        self.checkpoint = Path(path) if path else None
        if self.checkpoint and not (self.checkpoint.is_dir() or is_exported(path)):
            read_run(self.checkpoint, "--ckpt_path")

    def _choose_checkpoint(self, resume: str) -> None:
        """Choose the checkpoint to resume from and the run directory, None: a new one."""
        options = self.options
        folder = options.trainer.default_root_dir
        self.folder = None if folder is None else Path(folder)
        self.checkpoint = choose(resume, self.folder)
        if self.checkpoint is None:
            return
        self.folder = self.folder or run_of(self.checkpoint)
        settings = yaml.safe_load(self._parser(self.subcommand).dump(options, skip_none=False))
        changed = options.resume_changed
        self.keep_best = check_resumed(self.checkpoint, self.folder, settings, changed)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer, without fetching weights that others replace."""
        # A checkpoint or saved model replaces the encoder's weights; but with those of smp's own
        # encoders come mean and std.
        arguments = self.options.model.model_args or {}
        keeps = self.checkpoint and arguments.get("encoder_name", "tu-").startswith("tu-")
        with without_fetching() if keeps else nullcontext():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Check the data, then make the run directory and the trainer that writes to it."""
        config = self.config_init[str(self.subcommand)].trainer
        terminal = sys.stdout.isatty()
        callbacks = _as_list(config.callbacks)
        callbacks.append(TerminalProgress() if terminal else LineProgress())
        kwargs |= {"callbacks": callbacks, "enable_progress_bar": terminal}
        check_trainer(config)
        if self.subcommand == "fit":
            check_stream(config, self.datamodule)
            self.datamodule.schedule.check_epochs(config.max_epochs)
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")
        if self.subcommand == "validate" or self.options.plan:
            self.save_config_callback = None  # it would replace the run's config.yaml
            kwargs |= {"logger": False, "enable_checkpointing": False}
        else:
            kwargs |= self._in_run_directory(config, callbacks)
        try:
            return super().instantiate_trainer(**kwargs)
        except BaseException as error:
            self._drop_new_run()
            if isinstance(error, ValueError | TypeError | RuntimeError | ImportError):
                raise input_error(error) or InputError(f"trainer: {flat(error)}") from error
            raise

    def _in_run_directory(self, config: Namespace, callbacks: list[Any]) -> dict[str, Any]:
        """Make the run directory; add what writes to it to `callbacks`, return other arguments."""
        first = not _get_rank()
        self.run_is_new = first and (self.folder is None or not self.folder.exists())
        if self.checkpoint is not None and first:
            print(f"resumes from {self.checkpoint}", flush=True)
        try:
            # Other processes write nothing and need no name.
            self.run = self.folder or (new_run_directory() if first else Path("runs"))
            loggers = prepare_run(self.run, writes=first)
        except OSError as error:
            raise InputError(
                f"--trainer.default_root_dir {error.filename}: {error.strerror}, expected a folder "
                "to write to"
            ) from error
        self.save_config_kwargs = {"overwrite": self.checkpoint is None, "save_to_log_dir": False}
        if config.logger is False:
            loggers = []
        elif config.logger not in (None, True):
            loggers += _as_list(config.logger)
        if loggers:
            callbacks.append(LearningRateMonitor("step"))
        minutes, changed = self.options.checkpoint_minutes, self.options.resume_changed
        folder, keep = self.run / "checkpoints", self.keep_best
        callbacks.append(RunDirectory(self.run, keep))
        callbacks.append(Checkpoints(folder, self.signals, minutes, changed, keep))
        plugins = _as_list(config.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(SafeCheckpointIO())
        return {
            "logger": [guard(logger) for logger in loggers],
            "default_root_dir": str(self.run),
            "enable_model_summary": False,
            "plugins": plugins,
        }

    def _drop_new_run(self) -> None:
        """Remove the directory of a run that trained nothing."""
        if self.run_is_new:
            shutil.rmtree(self.run, ignore_errors=True)

    def fit(self, model: TrainingTask, datamodule: ImageDataModule, **kwargs: Any) -> None:
        """Train; a run that ends before its first step leaves no directory."""
        trainer = self.trainer
        if self.options.plan:
            print_plan(model, datamodule, trainer)
            return
        try:
            trainer.fit(model, datamodule=datamodule, ckpt_path=self.checkpoint)
            self.signals.deferred = False
            if trainer.is_global_zero:
                model.show_scores()
                print(f"run directory: {self.run}")
        except BaseException as error:
            self.signals.deferred = False
            self._end_others(error)
            if not trainer.global_step:
                self._drop_new_run()
            environment = getattr(trainer.strategy, "cluster_environment", None)
            launched = isinstance(environment, LightningEnvironment) and trainer.global_rank > 0
            if isinstance(error, Stopped) and launched:
                sys.exit(0)  # the launcher would kill the first process for its child's exit code
            raise

    def _end_others(self, error: BaseException) -> None:
        """End the processes that wait for this one, and keep its error the last line.

        If another process failed first, this one's error is only that the other is gone.
        """
        launcher: Any = self.trainer.strategy.launcher
        started = getattr(launcher, "procs", None) or []
        if not started or isinstance(error, Stopped):
            return
        if not isinstance(error, InputError):
            for _ in range(50):  # wait until the process that failed has printed its error
                codes = [code for process in started if (code := process.poll())]
                if codes:
                    launcher.kill(_KILL)
                    raise SystemExit(codes[0]) from error
                time.sleep(0.1)
        launcher.kill(_KILL)

    def validate(self, model: TrainingTask, datamodule: ImageDataModule, **kwargs: Any) -> None:
        """Evaluate and print the table."""
        path = self.checkpoint
        if path is None and self.options.model.init_from is None:
            raise InputError("validate: expected --ckpt_path FILE (or --model.init_from MODEL)")
        if path is not None and (path.is_dir() or is_exported(path)):
            score_model(model, kwargs.pop("ckpt_path"))
        self.trainer.validate(model, datamodule=datamodule, **kwargs | {"verbose": False})
        if self.trainer.is_global_zero:
            model.show_scores()


def run_lightning(arguments: list[str]) -> tuple[int, Path | None]:
    """Run `fit …` or `validate …`; `--config` also takes the name of a shipped recipe.

    Returns 0, or 128 + the number of the signal that ended it; and, in the first process, the run
    directory of a training that ended by itself.
    """
    _quiet()
    _CLI.signals = signals = Signals()
    signals.install()
    before = sys.argv
    try:
        # The first word stays: DDP starts the other processes with it.
        sys.argv = [before[0], *named_configs(arguments)]
        cli = _CLI(
            TrainingTask,
            ImageDataModule,
            parser_class=_Parser,
            save_config_callback=SaveConfig,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            # An abbreviated key (--data.crop) would silently set another one.
            parser_kwargs={"prog": "effseg", "allow_abbrev": False},
            trainer_defaults={
                # Lightning's sampler repeats images to give every process the same number.
                "use_distributed_sampler": False,
                "gradient_clip_val": 10.0,  # the paper's
                "log_every_n_steps": 10,
                "num_sanity_val_steps": 1,
            },
        )
        return 0, getattr(cli, "run", None) if cli.trainer.is_global_zero else None
    except Stopped as stop:
        return int(stop.code or 0), None
    except Exception as error:
        cause = explained(error)
        if cause is None:
            raise
        raise cause from error
    finally:
        signals.restore()
        sys.argv = before


def _as_list(value: Any) -> list[Any]:
    """Return a setting of the trainer that takes one, several or none as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _quiet() -> None:
    """Silence advice that does not apply here; errors and our warnings stay."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # called by Lightning
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*module.s. in eval mode at the start of training.*",  # the average of the weights
        ".*when using `ckpt_path`, callbacks used to create.*",  # validate needs none of them
        ".*your dataloader is.not resumable.*",  # the stream is resumable, see its sampler
        ".*It is recommended to use .self.log.*sync_dist.*",  # all processes log the same scores
        ".*was called before the ``update`` method.*",  # a sanity check of one batch
        ".*Total length of `list` across ranks is zero.*",  # a run without evaluation
    ):
        warnings.filterwarnings("ignore", message)
