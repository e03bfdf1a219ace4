"""The loss of both tasks, each over its own labels."""

# B batch, H W pixels, A anchors, K classes.

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from effseg.data.samples import IGNORE_INDEX, TASKS, TaskName
from effseg.errors import InputError
from effseg.losses.assignment import Targets
from effseg.losses.detection import DetectionLoss, sum_over_processes
from effseg.losses.segmentation import SegmentationLoss

TaskWeights = dict[TaskName, float] | Literal["uncertainty"]


class JointLoss(nn.Module):
    """Σ wᵗ Lᵗ over the tasks that have labels in the batch.

    Each task's loss is a mean over its own labels in the batches of all processes: valid pixels
    for the masks, positive anchors for the boxes. A task without a label in any process adds
    nothing.

    With ``uncertainty`` the total is Σ exp(-sᵗ) Lᵗ + sᵗ / 2 with a learned sᵗ, the logarithm of
    the task's variance, from 0 (Kendall et al. 2018, arXiv 1705.07115, equation 10 for
    classification).

    Args:
        segmentation: the loss of the masks.
        detection: the loss of the boxes.
        weights: of each task, not negative and not all 0; or ``uncertainty``.

    Raises:
        InputError: weights that are missing, unknown, negative, or all 0.
    """

    def __init__(
        self,
        segmentation: SegmentationLoss,
        detection: DetectionLoss,
        weights: TaskWeights | None = None,
    ) -> None:
        """Check the weights; None is 1 for each."""
        super().__init__()
        self.segmentation, self.detection = segmentation, detection
        self.log_variance: nn.ParameterDict | None = None
        if weights == "uncertainty":
            self.log_variance = nn.ParameterDict({t: nn.Parameter(torch.zeros(())) for t in TASKS})
            weights = None
        self.weights: Mapping[str, float] = dict.fromkeys(TASKS, 1.0)
        if weights is not None:
            assert isinstance(weights, dict)
            if weights.keys() != set(TASKS):
                raise InputError(
                    f"task weights {weights}: expected one for each of {', '.join(TASKS)}"
                )
            if any(not w >= 0 for w in weights.values()) or sum(weights.values()) <= 0:
                raise InputError(
                    f"task weights {weights}: expected none negative, and a sum above 0"
                )
            self.weights = {str(task): weight for task, weight in weights.items()}

    def forward(
        self,
        masks: tuple[torch.Tensor, torch.Tensor] | None,
        boxes: tuple[torch.Tensor, torch.Tensor, Targets, torch.Tensor | None] | None,
        tasks: tuple[TaskName, ...] = TASKS,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the total, and each task's own loss, detached.

        Args:
            masks: logits (b, K, H, W) and masks (b, H, W) of the photos that have one; None: none.
            boxes: class logits (b, A, K), box codes (b, A, 4), targets and ``known`` (b, K) of the
                photos that have boxes; None: none.
            tasks: of the step; the same in all processes.
        """
        terms: dict[str, torch.Tensor] = {}
        if "segmentation" in tasks:
            valid = None if masks is None else (masks[1] != IGNORE_INDEX).sum().float()
            share = _share(valid)
            if masks is not None:
                loss = self.segmentation(*masks)[0]
                terms["segmentation"] = loss if share is None else loss * share
        if "detection" in tasks:
            positives = None if boxes is None else (boxes[2].labels >= 0).sum().float()
            total, world = sum_over_processes(positives)
            if boxes is not None:
                logits, codes, targets, known = boxes
                count = (total + 1.0) / world
                terms["detection"] = self.detection(logits, codes, targets, known, count)[0]
        if not terms:
            raise InputError("a batch without a label for any task of the step")
        weighted = []
        for task, loss in terms.items():
            if self.log_variance is None:
                weighted.append(self.weights[task] * loss)
            else:
                s = self.log_variance[task]
                weighted.append((-s).exp() * loss + s / 2)
        total_loss = weighted[0] if len(weighted) == 1 else weighted[0] + weighted[1]
        return total_loss, {task: loss.detach() for task, loss in terms.items()}


def _share(valid: torch.Tensor | None) -> torch.Tensor | None:
    """Return what makes a mean over this process's pixels one over all; None for one process."""
    total, world = sum_over_processes(valid)
    if world == 1 or valid is None:
        return None
    return valid * world / total.clamp(min=1.0)
