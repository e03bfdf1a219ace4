"""Several data sets as one: parts with their weights, and samples that say what they lack."""

# B batch, N boxes, K classes of the space

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from effseg.data.dataset import PhotoDataset, Transform
from effseg.data.joined import Joined, fill
from effseg.data.samples import TASKS, Sample
from effseg.data.sampling import Part
from effseg.errors import InputError

Weights = Literal["photos", "equal"] | float | dict[str, float]
"""How often a part is drawn: by its number of photos n, equally often, by n^(1/T) with a
temperature T (1 is ``photos``, large values approach ``equal``), or by given weights."""


class Mixture(PhotoDataset):
    """The photos of several parts, one after the other.

    Samples carry all labels, real or empty, ``has_mask`` and ``has_boxes`` (bool), ``known`` (K-1,)
    bool (the box classes that are annotated), and ``source``, the number of their part.

    Args:
        parts: name to data set, all of one class list.
        transform: a function from a sample to a sample.

    Raises:
        InputError: no part.
    """

    def __init__(self, parts: Mapping[str, Joined], transform: Transform | None = None) -> None:
        """Put the parts in a row."""
        if not parts:
            raise InputError("the mixture has no data set, expected at least one")
        first = next(iter(parts.values()))
        super().__init__(first.classes, transform, first.source)
        self.parts = dict(parts)
        self.ends = np.cumsum([len(part) for part in parts.values()])
        self.tasks = tuple(t for t in TASKS if any(t in p.tasks for p in parts.values()))

    @property
    def ids(self) -> Sequence[str]:
        """The ids of all photos."""
        return [photo_id for part in self.parts.values() for photo_id in part.ids]

    def __len__(self) -> int:
        """Return the number of photos."""
        return int(self.ends[-1])

    def read(self, index: int) -> Sample:
        """Read a photo and the labels that it has; raises as its part."""
        part = int(np.searchsorted(self.ends, index, side="right"))
        dataset = list(self.parts.values())[part]
        sample = dataset.read(index - int(self.ends[part] - len(dataset)))
        sample["source"] = torch.tensor(part)
        return sample

    def __getitem__(self, index: int) -> Sample:
        """Read, transform and fill; raises as :meth:`read`."""
        return fill(super().__getitem__(index), len(self.classes))

    def stream(self, weights: Weights) -> list[Part]:
        """Return the parts as the sampler draws them.

        Raises:
            InputError: a weight for a part that does not exist, a part without one, a weight that
                is negative, or all of them 0.
        """
        given = check_weights(weights, list(self.parts))
        power = 1.0 if weights == "photos" else 0.0
        if isinstance(weights, int | float):
            power = 1.0 / weights
        found = []
        for number, (name, part) in enumerate(self.parts.items()):
            first = int(self.ends[number]) - len(part)
            photos = {task: first + part.photos_for(task) for task in part.tasks}
            photos = {task: indices for task, indices in photos.items() if len(indices)}
            found.append(Part(photos, given.get(name, 1.0), power))
        return found


def check_weights(weights: Weights, names: Sequence[str]) -> dict[str, float]:
    """Return the weights by name where they are given.

    Raises:
        InputError: as :meth:`Mixture.stream`.
    """
    if isinstance(weights, int | float):
        if not weights > 0:
            raise InputError(f"weights={weights}: expected a temperature above 0")
    elif isinstance(weights, dict):
        if weights.keys() != set(names):
            raise InputError(
                f"weights for {', '.join(weights) or 'nothing'}: expected one for each of "
                f"{', '.join(names)}"
            )
        if any(not w >= 0 for w in weights.values()) or sum(weights.values()) <= 0:
            raise InputError(f"weights {weights}: expected none negative, and a sum above 0")
        return weights
    elif weights not in ("photos", "equal"):
        raise InputError(f"weights={weights!r}: expected photos, equal, a temperature or a dict")
    return {}
