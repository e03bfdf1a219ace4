"""One class list for data sets that have different ones."""

# K classes of the space, background included; M classes of a data set, background included.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from effseg import resources
from effseg.data.samples import IGNORE_INDEX, Classes, voc_colour
from effseg.errors import InputError

UNMAPPED = -1
Background = Literal["ignore", "keep"]
"""What a data set's background is where it does not annotate all classes of the space: ``ignore``
(it may be one of the missing classes), or ``keep`` (it is background)."""


@dataclass(frozen=True)
class LabelMap:
    """How the labels of one data set become those of the space."""

    masks: torch.Tensor
    """(256,) uint8: mask value to mask value; 255 stays."""
    boxes: torch.Tensor
    """(M - 1,) int64: label to label, -1 for a class outside the space."""
    known: torch.Tensor
    """(K - 1,) bool: the box classes that the data set annotates."""


@dataclass(frozen=True)
class LabelSpace:
    """A class list, and the names under which data sets have its classes.

    Attributes:
        name: what it was loaded by.
        classes: background first.
        sources: for each class after the background the names that mean it.
        strict: every source must occur in some data set: a space that the user wrote.
    """

    name: str
    classes: Classes
    sources: tuple[frozenset[str], ...]
    strict: bool = False

    @classmethod
    def load(cls, name: str) -> "LabelSpace":
        """Load ``voc``, ``coco80``, the name of a data set's card, or a YAML file.

        The file's key ``classes`` lists entries of ``name``, ``from`` (a name or a list of them in
        any data set; the class's own name without it) and, if wanted, ``colour`` [r, g, b]; the
        background is not listed.

        Raises:
            InputError: no such space, an entry that is none, or a source in two classes.
        """
        if name.endswith((".yaml", ".yml")):
            return cls._from_file(Path(name))
        card = {"voc": "voc2012", "coco80": "coco2017"}.get(name, name)
        classes = Classes.from_card(card)
        synonyms = _synonyms()
        sources = tuple(synonyms.get(c, frozenset({c})) for c in classes.names[1:])
        return cls(name, classes, sources)

    @classmethod
    def _from_file(cls, path: Path) -> "LabelSpace":
        if not path.is_file():
            raise InputError(f"{path}: no such file, expected a YAML file of classes")
        entries = resources.load_yaml(path).get("classes")
        if not isinstance(entries, list) or not entries:
            raise InputError(f"{path}: expected a key classes with a list of {{name, from}}")
        names, colours, sources = ["background"], [(0, 0, 0)], []
        for number, entry in enumerate(entries, start=1):
            if not isinstance(entry, dict) or not entry.keys() <= {"name", "from", "colour"}:
                raise InputError(f"{path}: class {entry!r}, expected {{name, from, colour}}")
            if "name" not in entry:
                raise InputError(f"{path}: class {entry!r} has no name")
            listed: Any = entry.get("from", entry["name"])
            names.append(str(entry["name"]))
            sources.append(frozenset([listed] if isinstance(listed, str) else map(str, listed)))
            colour = entry.get("colour", voc_colour(number))
            if len(colour) != 3:
                raise InputError(f"{path}: colour {colour}, expected [r, g, b]")
            colours.append((int(colour[0]), int(colour[1]), int(colour[2])))
        for i, first in enumerate(sources):
            for j in range(i + 1, len(sources)):
                both = sorted(first & sources[j])
                if both or names[i + 1] == names[j + 1]:
                    what = both[0] if both else names[i + 1]
                    raise InputError(
                        f"{path}: {what!r} in both {names[i + 1]} and {names[j + 1]}, "
                        "expected every name in one class"
                    )
        if len(names) > IGNORE_INDEX:
            raise InputError(f"{path}: {len(names)} classes, expected at most {IGNORE_INDEX}")
        return cls(str(path), Classes(tuple(names), tuple(colours)), tuple(sources), strict=True)

    def map(self, classes: Classes, source: str, background: Background = "ignore") -> LabelMap:
        """Return the map from a data set's classes.

        A class of the space is annotated by a data set that has one of its names. A mask value
        outside the space is background for certain.

        Args:
            classes: of the data set, background first.
            source: what to call the data set in an error.
            background: what its background means where it lacks some classes of the space.

        Raises:
            InputError: the data set has no class of the space.
        """
        target = {name: i for i, names in enumerate(self.sources) for name in names}
        boxes = torch.tensor([target.get(name, UNMAPPED) for name in classes.names[1:]])
        known = torch.zeros(len(self.sources), dtype=torch.bool)
        known[boxes[boxes != UNMAPPED]] = True
        if not known.any():
            raise InputError(f"{source}: none of its classes is in the label space {self.name}")
        masks = torch.full((256,), IGNORE_INDEX, dtype=torch.uint8)
        masks[1 : len(classes)] = (boxes + 1).to(torch.uint8)
        if known.all() or background == "keep":
            masks[0] = 0
        return LabelMap(masks, boxes, known)

    def check_used(self, class_lists: Sequence[Classes]) -> None:
        """Check that every name of a space that the user wrote occurs in some data set.

        Raises:
            InputError: a class in the map that does not exist.
        """
        present = {name for classes in class_lists for name in classes.names[1:]}
        missing = sorted(set().union(*self.sources) - present)
        if self.strict and missing:
            raise InputError(
                f"{self.name}: no data set has a class {missing[0]!r}; expected among "
                f"{', '.join(sorted(present))}"
            )


def _synonyms() -> Mapping[str, frozenset[str]]:
    """Return VOC's and COCO's names of the classes that both have (aeroplane, airplane …)."""
    card = resources.load_yaml(resources.find("datasets", "coco2017"))
    coco = {int(entry["id"]): str(entry["name"]) for entry in card["classes"][1:]}
    pairs = zip(Classes.from_card("voc2012").names[1:], card["voc_ids"], strict=True)
    groups = [frozenset({voc, coco[number]}) for voc, number in pairs]
    return {name: group for group in groups for name in group}
