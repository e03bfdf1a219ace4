"""The loss of a network: masks, boxes or both, each averaged over the labels that it has."""

# B batch, b images with labels of a task, H W pixels, A anchors, K classes.

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from effseg.data.sample import IGNORE_INDEX, TaskName
from effseg.distributed import is_distributed, sum_over_processes
from effseg.errors import InputError
from effseg.losses.auxiliary import AuxiliaryClassifiers
from effseg.losses.detection import DetectionLoss, Targets, assign
from effseg.losses.segmentation import SegmentationLoss
from effseg.losses.targets import stack_targets
from effseg.models.encoder import check_images
from effseg.models.network import DetectionOutput, Network, as_it_is

TaskWeights = dict[TaskName, float] | Literal["uncertainty"]


class Predictions(NamedTuple):
    """What the losses compare with the labels."""

    masks: torch.Tensor | None
    """Logits (b, K, H/s, W/s) of the padded images that are labelled for it."""
    detections: DetectionOutput | None
    auxiliary: Sequence[torch.Tensor] = ()
    """Logits (b, K, H', W') of `AuxiliaryClassifiers`, of P2's size."""


class Labels(NamedTuple):
    """The targets of each head, for the images that are labelled for its task."""

    rows: dict[TaskName, torch.Tensor]
    """Indices of those images by task; a task without any is absent."""
    masks: torch.Tensor | None
    """(b, H, W) uint8 of the padded images, 255 ignored."""
    targets: Targets | None
    """Targets of every anchor of b images."""
    known: torch.Tensor | None
    """(b, K) bool, the box classes that are annotated. None: all."""
    absent: frozenset[TaskName] = frozenset()
    """Tasks for which the first image stands in, ignored: this process has no label for them."""


class Criterion(nn.Module):
    """The losses of a network on images and their labels.

    `loss` is Σ wᵗ Lᵗ over the tasks that have labels in the batch. Each task's loss is averaged
    over its labels in all processes: valid pixels for masks, positive anchors for boxes. The head
    of a task without labels does not run; under torch.distributed, where all processes have to run
    the same layers, it runs on one image with weight 0.

    With `uncertainty` the total is Σ exp(-sᵗ) Lᵗ + sᵗ / 2, where sᵗ is a learned log-variance per
    task that starts at 0 (Kendall et al. 2018, arXiv 1705.07115, equation 10 for classification);
    pass the criterion's parameters to the optimiser as well. A task without any label in the step
    (all pixels ignored) adds nothing, or its weight would grow without evidence.

    Classification heads (`aux_params`) have no loss here.

    Args:
        model: the network to train, itself and not wrapped; it is not registered as a submodule.
        segmentation: the mask loss; None: cross-entropy. A module of your own is called with
            logits (b, K, H/s, W/s) before their upsampling by an integer s (`upsample` of
            `effseg.models.heads`), masks (b, H, W) of integers, 255 ignored, and whether to count
            over all processes; it returns the loss and a dict of terms, to log if several.
        detection: the box loss; None: the reference's parameters.
        weights: one for each of the network's tasks, not negative and not all 0; or `uncertainty`.
            None: 1.
        compile: `torch.compile` the network's encoder, its BiFPN and each head: what changes from
            batch to batch, which images have which labels, is outside those graphs.
        auxiliary: weight of the mask loss on linear classifiers of P3, P4 and P5, the mean of the
            three, see `effseg.losses.auxiliary`; 0: none. Pass the criterion's parameters to the
            optimiser as well.

    Raises:
        InputError: another module than a network of effseg; weights that are missing, unknown,
            negative or all 0; a mask loss that ignores another value than 255; masks of one class,
            whose cross-entropy is always 0, or of more than 255.

    Examples:
        >>> import effseg
        >>> model = effseg.create_model("effseg_lite0", classes=3)
        >>> criterion = Criterion(model)
        >>> target = {"mask": torch.zeros(64, 64, dtype=torch.uint8)}
        >>> sorted(criterion(torch.zeros(1, 3, 64, 64), [target]))
        ['loss', 'segmentation']
    """

    def __init__(
        self,
        model: Network,
        segmentation: SegmentationLoss | None = None,
        detection: DetectionLoss | None = None,
        weights: TaskWeights | None = None,
        compile: bool = False,
        auxiliary: float = 0.0,
    ) -> None:
        """Check the weights."""
        super().__init__()
        if not hasattr(type(model), "outputs"):  # a wrapper has its own forward pass alone
            raise InputError(
                f"{type(model).__name__}: expected the network itself, of effseg (compile=True "
                "compiles it; DistributedDataParallel wraps what calls the criterion)"
            )
        # Compiled, each part once, however often it is asked for.
        self._compiler: Callable[..., Any] = cache(torch.compile) if compile else as_it_is
        self._model = (model,)  # in a tuple, so that it is not a submodule
        self.segmentation = segmentation or SegmentationLoss()
        ignored = getattr(self.segmentation, "ignore_index", IGNORE_INDEX)  # a user's may lack it
        if ignored != IGNORE_INDEX:
            raise InputError(
                f"ignore_index={ignored}: expected {IGNORE_INDEX}, with which masks are padded"
            )
        if model.seg_classes is not None and not 2 <= model.seg_classes <= IGNORE_INDEX:
            raise InputError(
                f"{model.seg_classes} classes of masks: expected 2 (the background and another) to "
                f"{IGNORE_INDEX}; a binary loss of one logit takes model(images)"
            )
        self.detection = detection or DetectionLoss()
        self.log_variance: nn.ParameterDict | None = None
        if weights == "uncertainty":
            zeros = {task: nn.Parameter(torch.zeros(())) for task in model.tasks}
            self.log_variance, weights = nn.ParameterDict(zeros), None
        weights = weights or dict.fromkeys(model.tasks, 1.0)
        if not isinstance(weights, dict) or weights.keys() != set(model.tasks):
            raise InputError(
                f"task weights {weights}: expected one for each of {', '.join(model.tasks)}, or "
                "uncertainty"
            )
        self.weights = weights
        if any(not w >= 0 for w in self.weights.values()) or sum(self.weights.values()) <= 0:
            raise InputError(f"task weights {weights}: expected none negative, and a sum above 0")
        # After the network: its random initial weights are the same with and without.
        self.auxiliary = AuxiliaryClassifiers(model, auxiliary) if auxiliary else None

    def forward(
        self,
        images: torch.Tensor,
        targets: Mapping[str, Any] | Sequence[Mapping[str, Any]] | torch.Tensor,
        tasks: Sequence[TaskName] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run the network and compute its losses.

        Args:
            images: (B, C, H, W) float, normalised by the model's `preprocess_cfg`.
            targets: a dict per image, as in torchvision: `mask` (H, W) of integers, 255 ignored;
                `boxes` (n, 4) xyxy in pixels and `labels` (n,) from 0, without background;
                `crowd` or `iscrowd` (n,) bool, boxes to ignore; `known` (K,) bool, the box classes
                that are annotated; `image_id` and `area` are not used. The mask or the boxes may
                be absent. Or masks (B, H, W) alone. Or a batch of `effseg.data`.
            tasks: tasks of this step, the same in all processes; None: all of the network's.

        Returns:
            0-dim tensors: `loss`, the total, to call `backward()` on; and its terms, to log:
            `segmentation`; `auxiliary`, which is not in it; `classes` and `boxes`, the terms of
            `detection`. Terms of a task
            without labels in the batch are absent.

        Raises:
            InputError: images that are not one tensor of floats, malformed targets, or no label
                for any task of the step.
        """
        output, labels = self.run(images, targets, tasks)
        return self.compare(output, labels)

    def run(
        self,
        images: torch.Tensor,
        targets: Mapping[str, Any] | Sequence[Mapping[str, Any]] | torch.Tensor,
        tasks: Sequence[TaskName] | None = None,
    ) -> tuple[Predictions, Labels]:
        """Return the network's outputs for the labelled images, and their targets."""
        (model,) = self._model
        tasks = model.tasks if tasks is None else tuple(tasks)
        check_images("images", images, model.mean.shape[0], batched=True)
        if isinstance(targets, torch.Tensor):
            targets = [{"mask": mask} for mask in targets]
        batch: Any = targets
        if not isinstance(targets, Mapping):
            batch = stack_targets(targets, images, model.det_classes)
        elif "rows" not in targets:
            raise InputError(
                f"targets: a dict of {', '.join(targets)}, expected a list with a dict per image, "
                "masks (B, H, W), or a batch of effseg.data"
            )
        no_rows = torch.zeros(0, dtype=torch.long, device=images.device)
        given: dict[TaskName, torch.Tensor] = {t: batch["rows"].get(t, no_rows) for t in tasks}
        rows = {
            task: numbers if len(numbers) else numbers.new_zeros(1)
            for task, numbers in given.items()
            if len(numbers) or is_distributed()
        }
        if not rows:
            raise InputError(f"a batch without a label for {' or '.join(tasks)}")
        partial = {task: numbers for task, numbers in rows.items() if len(numbers) < len(images)}
        options: dict[str, Any] = {"rows": partial, "coarse": True, "compiler": self._compiler}
        extra: list[torch.Tensor] = []
        if self.auxiliary is not None and "segmentation" in rows:
            features = options["features"] = self._compiler(model.encode)(images)
            levels = model.levels_of(tuple(rows))
            maps = self._compiler(model.decoder)(features, levels, self.auxiliary.levels)
            options["maps"] = dict(zip(levels, maps, strict=False))
            extra = maps[len(levels) :]
            if "segmentation" in partial:
                extra = [x[partial["segmentation"]] for x in extra]
            extra = self.auxiliary(extra)
        output = Predictions(*model.outputs(images, tuple(rows), **options), extra)
        size = (images.shape[-2], images.shape[-1])
        masks = known = assigned = None
        if "segmentation" in rows:
            height, width = model.padded_size(size)
            pad = (0, width - size[1], 0, height - size[0])
            if len(given["segmentation"]):
                masks = F.pad(batch["mask"][rows["segmentation"]], pad, value=IGNORE_INDEX)
            else:
                masks = rows["segmentation"].new_full((1, height, width), IGNORE_INDEX)
        if "detection" in rows:
            indices, anchors = rows["detection"], model.anchors(size, images.device)
            if len(given["detection"]):
                parts = (batch[key][indices] for key in ("boxes", "labels", "ignored"))
                assigned = assign(anchors, *parts)
                known = batch["known"][indices] if "known" in batch else None
            else:
                assigned = assign(anchors, anchors.new_zeros(1, 0, 4), indices.new_zeros(1, 0))
                assert output.detections is not None
                known = torch.zeros_like(output.detections.class_logits[:, 0], dtype=torch.bool)
        absent = frozenset(task for task in rows if not len(given[task]))
        return output, Labels(rows, masks, assigned, known, absent)

    def compare(
        self, output: Predictions, labels: Labels, over_processes: bool = True
    ) -> dict[str, torch.Tensor]:
        """Return the losses as `forward` does, from outputs already computed."""
        losses: dict[str, torch.Tensor] = {}
        by_task: dict[TaskName, torch.Tensor] = {}
        if output.masks is not None:
            assert labels.masks is not None
            loss, terms = self.segmentation(output.masks, labels.masks, over_processes)
            by_task["segmentation"] = losses["segmentation"] = loss
            if len(terms) > 1:
                losses |= {f"segmentation/{name}": value for name, value in terms.items()}
            if self.auxiliary is not None:
                sampled = self.auxiliary.sampled(labels.masks)
                values = [
                    self.segmentation(logits, sampled, over_processes)[0]
                    for logits in output.auxiliary
                ]
                losses["auxiliary"] = torch.stack(values).mean()
                by_task["segmentation"] = loss + self.auxiliary.weight * losses["auxiliary"]
        if output.detections is not None:
            assert labels.targets is not None
            loss, terms = self.detection(
                *output.detections, labels.targets, labels.known, over_processes
            )
            by_task["detection"] = loss
            losses |= {"classes": terms["class"], "boxes": terms["box"]}
        weighted = []
        for task, loss in by_task.items():
            if self.log_variance is None:
                weighted.append(self.weights[task] * loss)
            else:
                s = self.log_variance[task]
                weighted.append(
                    (-s).exp() * loss + _any_label(labels, task, over_processes) * s / 2
                )
        return {"loss": torch.stack(weighted).sum(), **losses}


def _any_label(labels: Labels, task: TaskName, over_processes: bool) -> torch.Tensor:
    """Return 1 if a task has a label, in one of the processes if asked, else 0 (float)."""
    if task == "segmentation":
        assert labels.masks is not None
        count = (labels.masks != IGNORE_INDEX).sum().float()
    elif labels.known is not None:
        count = labels.known.sum().float()
    else:  # an image without boxes has labels, too: that there are none
        count = labels.rows[task].new_ones((), dtype=torch.float32)
    return (sum_over_processes(count)[0] if over_processes else count).clamp(max=1)


def select(
    output: Predictions, labels: Labels, chosen: torch.Tensor
) -> tuple[Predictions, Labels] | None:
    """Return outputs and labels of the images selected by `chosen` (B,) bool; None if empty."""
    masks = detections = truth = targets = known = None
    auxiliary: Sequence[torch.Tensor] = ()
    rows: dict[TaskName, torch.Tensor] = {}
    for task, numbers in labels.rows.items():
        kept = chosen[numbers]
        if task in labels.absent or not bool(kept.any()):
            continue
        rows[task] = numbers[kept]
        if task == "segmentation" and output.masks is not None and labels.masks is not None:
            masks, truth = output.masks[kept], labels.masks[kept]
            auxiliary = [logits[kept] for logits in output.auxiliary]
        elif output.detections is not None and labels.targets is not None:
            detections = DetectionOutput(*(values[kept] for values in output.detections))
            targets = Targets(*(values[kept] for values in labels.targets))
            known = None if labels.known is None else labels.known[kept]
    if not rows:
        return None
    return Predictions(masks, detections, auxiliary), Labels(rows, truth, targets, known)
