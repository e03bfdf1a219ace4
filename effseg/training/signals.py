"""Signals during training: it continues until it can save, and ends there."""

import os
import re
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

SAVE = getattr(signal, "SIGUSR1", None)  # absent on Windows


class Stopped(SystemExit):
    """A signal ends the run; the exit code is 128 + its number, as in a shell."""


class Signals:
    """Remembers SIGTERM, SIGINT and SIGUSR1 while a training can save; a second one ends at once.

    Outside training the first two raise `Stopped` at once.
    """

    def __init__(self) -> None:
        self.deferred = False
        """Whether a training checks `received`."""
        self.received = 0
        """Number of the signal that ends the run; 0: none."""
        self.save = False
        """Whether SIGUSR1 came."""
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Install the handlers, also after Lightning has replaced them."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, SAVE):
                if number is not None:
                    self._before.setdefault(number, signal.signal(number, self._handle))

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked worker: its parent ends it
            return
        if number == SAVE:
            self.save = True
        elif self.received and self.deferred:
            os._exit(128 + number)
        else:
            self.received = number
            if not self.deferred:
                raise Stopped(128 + number)
            # print could meet itself here.
            name = signal.Signals(number).name
            os.write(2, f"{name}: saves after this step; once more: ends at once\n".encode())


def requeue() -> bool:
    """Requeue the SLURM job; False: not a SLURM job, or SLURM refuses."""
    array, task = os.getenv("SLURM_ARRAY_JOB_ID"), os.getenv("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.getenv("SLURM_JOB_ID", "")
    if not re.fullmatch(r"[0-9_]+", job):
        return False
    try:
        return subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0
    except OSError as error:
        print(f"scontrol requeue {job}: {error.strerror}")
        return False
