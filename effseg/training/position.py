"""Where in its epochs a run was when a checkpoint was written."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Position(NamedTuple):
    """The position in a checkpoint: after an optimiser step."""

    epoch: int
    """The epoch of that step, from 0."""
    read: int
    """Its batches that were read."""
    at_end: bool
    """Whether they were all."""
    batches: int | None
    """Batches of an epoch; None: unknown, in a checkpoint that `effseg fit` has not written."""
    step: int
    """Optimiser steps so far, in all epochs."""

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "Position | None":
        """Read the position; None: the checkpoint has none."""
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
        if progress is None:
            return None
        batches, read = checkpoint.get("run", {}).get("batches"), progress["current"]["ready"]
        at_end = bool(progress["is_last_batch"]) or (batches is not None and read >= batches)
        return cls(checkpoint["epoch"], read, at_end, batches, checkpoint["global_step"])

    def steps_done(self, batches: int, accumulate: int) -> int:
        """Return the steps to this position if all epochs had had this number of batches.

        An epoch whose length has changed counts as done: a resumed run starts the next one.
        """
        if self.at_end or self.read >= batches or self.batches not in (None, batches):
            return (self.epoch + 1) * math.ceil(batches / accumulate)
        return self.epoch * math.ceil(batches / accumulate) + self.read // accumulate
