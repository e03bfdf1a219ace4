"""Scores of one network on several data sets, for both tasks."""

# B batch, H W pixels, K classes.

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

from effseg.data.samples import Batch, Classes, TaskName
from effseg.errors import InputError
from effseg.inference.detector import DetectionPredictor
from effseg.models.faces import EffSegDet
from effseg.tasks.scorers import DetectionScorer, Scorer, Scores, SegmentationScorer


class MaskView(nn.Module):
    """A joint model as a segmentation model: its detection head does not run."""

    def __init__(self, model: EffSegDet) -> None:
        """Look at a model."""
        super().__init__()
        self.model = model
        self.preprocess_cfg = model.preprocess_cfg

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map normalised photos (B, C, H, W) to logits (B, K, H, W)."""
        masks = self.model(x, tasks=("segmentation",)).masks
        assert isinstance(masks, torch.Tensor)
        return masks


class JointScorer(nn.Module):
    """A scorer for every task of every part that is evaluated.

    Scores are named ``PART/miou``, ``PART/ap50`` …; ``best`` is the weighted mean that says which
    epoch is the best.

    Args:
        model: the joint model, kept by reference.
        classes: K of the masks; the boxes have one less.
        protocol: of the masks.
        size: of the boxes' square; None takes the model's.
        metric: of the boxes.
        best: weight of each score in ``best``; None: mIoU and AP of all parts alike.
    """

    headline = "best"

    def __init__(
        self,
        model: Any,
        classes: int,
        protocol: str,
        size: int | None,
        metric: Literal["coco", "voc"],
        best: Mapping[str, float] | None,
    ) -> None:
        """Start without parts."""
        super().__init__()
        # The constructors check the settings before any data are read.
        self.make: dict[TaskName, Callable[[], Scorer]] = {
            "segmentation": lambda: SegmentationScorer(MaskView(model), classes, protocol),
            "detection": lambda: DetectionScorer(
                DetectionPredictor(model, size), classes - 1, metric
            ),
        }
        for make in self.make.values():
            make()
        self.weights = best
        self.parts: list[str] = []
        self.scorers = nn.ModuleDict()
        self.protocols: dict[str, str] = {}

    def watch(self, parts: Mapping[str, Sequence[TaskName]]) -> None:
        """Make the scorers of these parts, in the order of their numbers.

        Raises:
            InputError: ``best`` names a score that no part has.
        """
        self.parts = list(parts)
        device = next((p.device for p in self.scorers.buffers()), None)
        self.scorers = nn.ModuleDict(
            {f"{name}/{task}": self.make[task]() for name, tasks in parts.items() for task in tasks}
        )
        if device is not None:
            self.scorers.to(device)
        known = [key for key in self.logged if key != "best"]
        unknown = [key for key in self.weights or {} if key not in known]
        if unknown:
            raise InputError(f"best: no score {unknown[0]!r}, expected among {', '.join(known)}")
        if self.weights is not None and not sum(self.weights.values()) > 0:
            raise InputError(f"best {dict(self.weights)}: expected a sum above 0")

    def _each(self) -> Iterator[tuple[str, str, Scorer]]:
        for key, scorer in self.scorers.items():
            part, task = key.rsplit("/", 1)
            assert isinstance(scorer, SegmentationScorer | DetectionScorer)
            yield part, task, scorer

    @property
    def logged(self) -> tuple[str, ...]:
        """Names of the scores that are logged where they are computed."""
        found = [f"{part}/{name}" for part, _, scorer in self._each() for name in scorer.logged]
        return ("best", *found)

    @property
    def headlines(self) -> tuple[str, ...]:
        """Names of the scores that the weights without average are compared by."""
        return ("best", *(f"{part}/{scorer.headline}" for part, _, scorer in self._each()))

    def update(self, batch: Batch) -> None:
        """Score whole photos, each by its part and for the labels that it has."""
        flags = {"segmentation": "has_mask", "detection": "has_boxes"}
        for part, task, scorer in self._each():
            number = self.parts.index(part)
            rows = [
                i
                for i, source in enumerate(batch["source"])
                if int(source) == number and bool(batch[flags[task]][i])  # type: ignore[literal-required]
            ]
            if rows:
                chosen: Any = {k: [v[i] for i in rows] for k, v in batch.items()}  # type: ignore[index]
                scorer.update(chosen)

    def compute(self) -> Scores:
        """Return the scores of every part over all processes, and start anew."""
        scores: Scores = {}
        headlines: dict[str, float] = {}
        for part, task, scorer in self._each():
            found = scorer.compute()
            self.protocols[task] = found.pop("protocol")
            scores |= {f"{part}/{key}": value for key, value in found.items()}
            key = f"{part}/{scorer.headline}"
            headlines[key] = float(scores[key])
        scores["protocol"] = ", ".join(f"{task} {name}" for task, name in self.protocols.items())
        weights = self.weights or dict.fromkeys(headlines, 1.0)
        total = sum(weight * float(scores[key]) for key, weight in weights.items())
        scores["best"] = torch.tensor(total / sum(weights.values()) if weights else float("nan"))
        return scores

    def forget(self) -> None:
        """Drop examples and results."""
        for _, _, scorer in self._each():
            scorer.forget()

    def pictures(self, classes: Classes) -> Iterator[tuple[str, Image.Image]]:
        """Yield name and picture of the first photos of every part and task."""
        for part, task, scorer in self._each():
            for photo_id, picture in scorer.pictures(classes):
                yield f"{part}-{task}-{photo_id}", picture

    def show(self, scores: Scores, classes: Classes) -> None:
        """Print a table for every part and task."""
        for part, task, scorer in self._each():
            print(f"{part}: {task}")
            prefix = f"{part}/"
            own = {k.removeprefix(prefix): v for k, v in scores.items() if k.startswith(prefix)}
            own["protocol"] = self.protocols[task]
            scorer.show(own, classes)
        print(f"best {float(scores['best']):.4f}")
