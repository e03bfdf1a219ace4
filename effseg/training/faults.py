"""Faults of a run: a loss that is not finite, out of memory, a logger that fails."""

import re
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from torch import nn

from effseg.distributed import of_all_processes, rank_and_world
from effseg.errors import InputError, flat, is_out_of_memory


class LossGuard:
    """Stops a run whose loss is not finite, or skips its step.

    Reading a loss waits for the device. `error` therefore reads the loss of the step before, copied
    by then, and the newest one before anything is saved; `skip` has to read at once, and skips at
    most `limit` steps of a run.
    """

    def __init__(self, mode: Literal["error", "skip"], limit: int) -> None:
        if mode not in ("error", "skip"):
            raise InputError(f"nan={mode!r}: expected error or skip")
        self.mode, self.limit, self.skipped = mode, limit, 0
        self.bad = False
        """Whether a loss of the current step is not finite; only set in mode `skip`."""
        self._finite: torch.Tensor | None = None
        """Whether the newest loss is finite; None: checked."""
        self._copied: torch.cuda.Event | None = None
        """When `_finite` is on the CPU; None: it is where the loss is."""
        self._fault = ""
        self._buffers: list[torch.Tensor] = []

    def start(self, model: nn.Module) -> None:
        """Copy the BatchNorm statistics, which a bad batch would spoil."""
        if self.mode == "skip" and not self.bad:
            self._buffers = [buffer.clone() for buffer in model.buffers()]

    def see(self, loss: torch.Tensor, step: int, ids: list[str]) -> None:
        """Record the loss of a batch; raises as `check`."""
        self.check()
        finite = torch.isfinite(loss.detach())
        fault = f"the loss is not finite at step {step}, with the images {', '.join(ids)}"
        if self.mode == "skip":
            if not bool(finite):
                self.bad, self._fault = True, fault
            return
        if finite.is_cuda:
            # Read on the device, it would wait for all that is queued until then.
            stream = torch.cuda.current_stream(finite.device)
            finite = finite.to("cpu", non_blocking=True)
            self._copied = stream.record_event()
        self._finite, self._fault = finite, fault

    def check(self) -> None:
        """Raise an InputError if the newest loss is not finite."""
        finite, self._finite = self._finite, None
        copied, self._copied = self._copied, None
        if copied is not None:
            copied.synchronize()
        if finite is not None and not bool(finite):
            raise InputError(
                f"{self._fault}; expected a lower model.optim.lr, other data, or model.nan: skip"
            )

    @torch.no_grad()
    def skip(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Drop the gradients and statistics of this step; every process has to call it."""
        fault = "; ".join(of_all_processes([self._fault] if self.bad else []))
        self.bad = False
        self.skipped += 1
        if self.skipped > self.limit:
            raise InputError(f"{fault}; model.nan_limit: {self.limit} steps were skipped already")
        if rank_and_world()[0] == 0:
            count = f"{self.skipped} of at most {self.limit}"
            print(f"warning: {fault}: skipped ({count})", flush=True)
        optimizer.zero_grad()  # also of what the loss learns
        for buffer, before in zip(model.buffers(), self._buffers, strict=True):
            buffer.copy_(before)


def check_finite(module: nn.Module, step: int) -> None:
    """Raise an InputError if a weight or a statistic is not finite."""
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(
                f"{key} is not finite after step {step}, and not saved; expected a lower "
                "model.optim.lr, or other data"
            )


def guard(logger: Logger) -> Logger:
    """Report a logger's failures, once for each method, instead of ending the run."""
    for name in ("log_metrics", "log_hyperparams", "save", "finalize", "after_save_checkpoint"):
        setattr(logger, name, _warn_once(getattr(logger, name), type(logger).__name__))
    return logger


def _warn_once(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    warned = False

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        nonlocal warned
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not warned:
                print(f"warning: {what}: {one_line(error)}", flush=True)
            warned = True
        return None

    return guarded


def one_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def input_error(error: BaseException | None) -> InputError | None:
    """Return the InputError in the chain of causes."""
    while error is not None:
        if isinstance(error, InputError):
            return error
        error = error.__cause__ or error.__context__
    return None


_FAULTS = (
    (r"DataLoader worker .* killed by signal: (Killed|Bus error)", "a process that reads data was "
     "killed, most likely out of memory: expected fewer data.num_workers"),
    (r"(\S+) does not have a deterministic implementation", "trainer.deterministic: {} has no "
     "deterministic form here, expected warn or false"),
    ("parameters that were not used in producing the loss", "trainer.strategy: a stage freezes the "
     "encoder or has no loss of a head, expected ddp_find_unused_parameters_true"),
)  # fmt: skip


def explained(error: Exception) -> InputError | None:
    """Return an InputError that says what to change, if the error is a known one of torch.

    Also for settings that Lightning or jsonargparse refuses, by errors raised in their own code.
    """
    if is_out_of_memory(error):
        return InputError(
            "out of memory: expected a smaller data.batch_size (trainer.accumulate_grad_batches "
            "makes up for it) or data.crop_size, or trainer.precision: bf16-mixed"
        )
    if isinstance(error, RuntimeError):
        for pattern, text in _FAULTS:
            match = re.search(pattern, str(error))
            if match:
                return InputError(text.format(*match.groups()))
    # By the module's name: a folder of the user's may be called lightning, too.
    modules = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    theirs = bool(modules) and modules[-1].partition(".")[0] in ("lightning", "jsonargparse")
    cause = input_error(error) if theirs else None  # what a constructor raises, they wrap
    if cause is not None:
        return cause
    refused = theirs and isinstance(error, ValueError | RuntimeError)
    if refused or isinstance(error, MisconfigurationException):
        return InputError(f"trainer: {flat(error)}")
    return None
