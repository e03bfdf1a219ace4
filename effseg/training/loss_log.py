"""Which steps' losses are logged, and the losses by source."""

from collections.abc import Sequence
from typing import Any

import torch

from effseg.data.sample import Batch, TaskName
from effseg.losses import Criterion
from effseg.losses.joint import Labels, Predictions, select


class LossLog:
    """Chooses the steps whose losses are logged: one in `log_every_n_steps`, for each set of tasks.

    Lightning's logging would repeat a loss at later steps that have none of its name, and where
    tasks alternate, an even number of steps would always meet the same one.
    """

    def __init__(self) -> None:
        self._periods: dict[tuple[TaskName, ...], int] = {}

    def due(self, trainer: Any, tasks: Sequence[TaskName], batch_idx: int) -> bool:
        """Return whether this batch's losses are logged; call it for every batch."""
        every, step, key = trainer.log_every_n_steps, trainer.global_step, tuple(tasks)
        if not every:
            return False
        logged, period = self._periods.setdefault(key, step // every), (step + 1) // every
        last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if last and period > logged:
            self._periods[key] = period
            return True
        return False


@torch.no_grad()
def losses_by_source(
    criterion: Criterion, names: Sequence[str], batch: Batch, output: Predictions, labels: Labels
) -> dict[str, torch.Tensor]:
    """Return the losses of this process's images, each as `SOURCE/LOSS`."""
    by_source: dict[str, torch.Tensor] = {}
    for number, name in enumerate(names):
        part = select(output, labels, torch.as_tensor(batch["source"]) == number)
        if part is not None:
            losses = criterion.compare(*part, over_processes=False)
            by_source |= {f"{name}/{k}": value for k, value in losses.items() if k != "loss"}
    return by_source
