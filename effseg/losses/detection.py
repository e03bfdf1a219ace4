"""The detector's loss: focal for classes, Huber for boxes."""

# B batch, A anchors, K classes.

import torch
import torch.nn.functional as F
from torch import nn

from effseg.errors import InputError
from effseg.losses.assignment import Targets
from effseg.losses.focal import focal_sum


class DetectionLoss(nn.Module):
    """Focal loss + 50 × Huber loss, both over the number of positive anchors + 1.

    Positives are counted over the batches of all processes: a gradient averaged over processes is
    then that of one large batch. The reference (google/automl ``train_lib.py``) counts per process.
    Everything is float32, autocast or not.

    A box code that should be exactly 0 (an edge or a centre in line with the anchor's) counts
    nowhere, as in the reference, which finds the positive anchors by their codes. It happens in
    real crops, whose boxes are cut at the edge.

    Args:
        alpha: weight of the positive entries; negatives have 1 - alpha.
        gamma: exponent of the focal factor (1 - p)^γ.
        delta: where Huber's parabola ends, in units of the box codes.
        box_weight: factor of the box loss.

    Raises:
        InputError: a value out of its range.
    """

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 1.5,
        delta: float = 0.1,
        box_weight: float = 50.0,
    ) -> None:
        """Keep the numbers."""
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise InputError(f"alpha={alpha}: expected 0 to 1")
        for name, value in (("gamma", gamma), ("box_weight", box_weight)):
            if value < 0:
                raise InputError(f"{name}={value}: expected at least 0")
        if delta <= 0:
            raise InputError(f"delta={delta}: expected more than 0")
        self.alpha, self.gamma, self.delta, self.box_weight = alpha, gamma, delta, box_weight

    def forward(
        self,
        class_logits: torch.Tensor,
        box_codes: torch.Tensor,
        targets: Targets,
        known: torch.Tensor | None = None,
        count: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the total, and its terms ``class`` and ``box`` (before ``box_weight``).

        Args:
            class_logits: (B, A, K).
            box_codes: (B, A, 4) as (ty, tx, th, tw).
            targets: see :func:`effseg.losses.assignment.assign`.
            known: (B, K) bool, the classes that a photo's boxes cover; others are neither there nor
                absent, and count nowhere. None: all.
            count: what to divide by; None: positives of all processes + 1, over the processes.
        """
        with torch.autocast(class_logits.device.type, enabled=False):
            positive = targets.labels >= 0
            if count is None:
                total, world = sum_over_processes(positive.sum().float())
                count = (total + 1.0) / world
            classes = focal_sum(class_logits.float(), targets.labels, known, self.alpha, self.gamma)
            classes = classes / count
            errors = F.huber_loss(
                box_codes.float(), targets.codes, reduction="none", delta=self.delta
            )
            boxes = (errors * (targets.codes != 0)).sum() / (4.0 * count)
        return classes + self.box_weight * boxes, {"class": classes, "box": boxes}


def sum_over_processes(count: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """Return the sum of a float count over all processes, and their number; None counts 0.

    Every process has to call it, one without labels too: the others wait for it.
    """
    total = torch.zeros(()) if count is None else count.detach().clone()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return total, 1
    if count is None and torch.cuda.is_available():
        total = total.cuda()
    torch.distributed.all_reduce(total)
    return total, torch.distributed.get_world_size()
