"""Class lists, and label spaces that unify the class lists of several sources."""

# K classes of the space, background included; M classes of a source, background included.

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from effseg import resources
from effseg.data.class_files import (
    IGNORE_NAMES,
    LABELME_BACKGROUND,
    Colour,
    as_colour,
    entries_of,
    read_class_file,
)
from effseg.data.sample import IGNORE_INDEX
from effseg.errors import InputError

UNMAPPED = -1
Background = Literal["ignore", "keep"]
"""Background of a source that does not annotate all classes of the space: `ignore` (it may be one
of the missing classes), or `keep` (it is background)."""


@dataclass(frozen=True)
class Classes:
    """The class list of a dataset, background first; box label 0 is the class after it."""

    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    """RGB, 0 … 255, one per class."""
    coloured: bool = field(default=True, compare=False)
    """Whether the class list defines colours, by which the palettes of masks may be read."""

    def __len__(self) -> int:
        """Return the number of classes, background included."""
        return len(self.names)

    @classmethod
    @lru_cache(maxsize=16)  # asked for with every mask that is read
    def from_card(cls, name: str) -> "Classes":
        """Read the class list of a shipped dataset card, for example `voc2012`."""
        entries = resources.load_yaml(resources.find("datasets", name))["classes"]
        palette = tuple(as_colour(entry["colour"], name) for entry in entries)
        return cls(tuple(entry["name"] for entry in entries), palette)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], count: int) -> "Classes":
        """Return the classes of a saved model's config, numbered if it has no names."""
        names, palette = config.get("_class_names"), config.get("_palette")
        if names and palette and len(names) == count:
            return cls(tuple(names), tuple((r, g, b) for r, g, b in palette))
        return cls.from_names(["background", *(f"class {i}" for i in range(1, count))])

    def to_config(self) -> dict[str, Any]:
        """Return the entries for a model's config (an underscore keeps them from constructors)."""
        return {"_class_names": list(self.names), "_palette": [list(c) for c in self.palette]}

    @classmethod
    def from_names(cls, names: list[str]) -> "Classes":
        """Give a class list colours by VOC's rule (three bits of the index spread over RGB)."""
        palette = tuple(voc_colour(index) for index in range(len(names)))
        return cls(tuple(names), palette, coloured=False)


def voc_colour(index: int) -> tuple[int, int, int]:
    """Return the RGB colour that the VOC development kit gives to class `index` (0 … 255)."""
    red = green = blue = 0
    for bit in range(8):
        red |= (index >> 0 & 1) << (7 - bit)
        green |= (index >> 1 & 1) << (7 - bit)
        blue |= (index >> 2 & 1) << (7 - bit)
        index >>= 3
    return red, green, blue


def load_classes(classes: Sequence[str] | str | Path) -> Classes:
    """Make a class list.

    Args:
        classes: the names, background first; or the path of a file: one name per line, a JSON list,
            YAML whose key `classes` lists names or `{name, colour: [r, g, b]}`, as in dataset
            cards, or a class list of CVAT (labelmap.txt), labelme (labels.txt) or Roboflow
            (_classes.csv). Without colours, VOC's are used.

    Raises:
        InputError: the file cannot be used, there are fewer than 2 or more than 255 classes, a
            name or a colour comes twice, or the background is not the first.
    """
    if isinstance(classes, str | Path):
        source, entries = str(classes), read_class_file(Path(classes).expanduser())
    else:
        source, entries = "classes", entries_of(list(classes), "classes")
    kept = [entry for entry in entries if entry[0] not in IGNORE_NAMES]  # they are 255
    names = ["background" if name in LABELME_BACKGROUND else name for name, _ in kept]
    colours = [colour for _, colour in kept if colour is not None]
    _check_distinct(names, colours, source)
    lowered = [name.lower() for name in names]
    if lowered[0] != "background" and ("background" in lowered or len(kept) < len(entries)):
        raise InputError(f"{source}: class 0 is {names[0]!r}, expected the background first")
    if not colours:
        return Classes.from_names(names)
    if len(colours) != len(names):
        raise InputError(f"{source}: {len(colours)} colours for {len(names)} classes")
    return Classes(tuple(names), tuple(colours))


def _check_distinct(names: list[str], colours: list[Colour], source: str) -> None:
    if not 2 <= len(names) <= IGNORE_INDEX:
        raise InputError(
            f"{source}: {len(names)} classes, expected 2 to {IGNORE_INDEX}, background first"
        )
    for kind, values in (("class", names), ("the colour", colours)):
        for value, count in Counter[Any](values).items():
            if count > 1:
                raise InputError(f"{source}: {kind} {value!r} comes twice")


@dataclass(frozen=True)
class LabelMap:
    """Maps the labels of one source to those of the space."""

    masks: npt.NDArray[np.uint8]
    """(256,) mask value to mask value; 255 stays."""
    boxes: torch.Tensor
    """(M - 1,) int64: label to label, -1 for a class outside the space."""
    known: torch.Tensor
    """(K - 1,) bool: the box classes that the source annotates."""

    @property
    def identity(self) -> bool:
        """Whether no mask value of a class changes."""
        same = (self.masks == np.arange(256)) | (self.masks == IGNORE_INDEX)
        return bool(same.all()) and self.masks[0] == 0


@dataclass(frozen=True)
class LabelSpace:
    """A class list, and the names of its classes in the sources.

    Attributes:
        name: the name that it was loaded by.
        classes: background first.
        sources: for each class after the background, its names in the sources.
        strict: for a user's file: every name must occur in some source.
    """

    name: str
    classes: Classes
    sources: tuple[frozenset[str], ...]
    strict: bool = False

    @classmethod
    def of(cls, classes: Classes) -> "LabelSpace":
        """Return the space of sources that agree on their classes."""
        names = tuple(frozenset({name}) for name in classes.names[1:])
        return cls("of the sources", classes, names)

    @classmethod
    def load(cls, name: str) -> "LabelSpace":
        """Load `voc`, `coco80`, the name of a dataset's card, or a YAML file.

        The file's key `classes` lists entries of `name`, `from` (a name or a list of them in
        any source; default: `name`) and optionally `colour` [r, g, b]; the background is not
        listed.

        Raises:
            InputError: no such space, an invalid entry, or one source name in two classes.
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
        source = str(path)
        content: Any = resources.load_yaml(path).get("classes")
        entries = entries_of(content, source, also=("from",))
        names = ["background", *(name for name, _ in entries)]
        colours = [(0, 0, 0), *(c or voc_colour(i) for i, (_, c) in enumerate(entries, start=1))]
        _check_distinct(names, colours, source)
        sources: list[frozenset[str]] = []
        class_of: dict[str, str] = {}
        for name, entry in zip(names[1:], content, strict=True):
            listed: Any = entry.get("from", name) if isinstance(entry, dict) else name
            listed = [listed] if isinstance(listed, str) else listed
            if not (listed and isinstance(listed, list) and {*map(type, listed)} == {str}):
                raise InputError(f"{path}: {name}: from {listed!r}, expected a name or several")
            sources.append(frozenset(listed))
            for label in sorted(sources[-1]):
                if class_of.setdefault(label, name) != name:
                    raise InputError(
                        f"{path}: {label!r} in both {class_of[label]} and {name}, "
                        "expected every name in one class"
                    )
        return cls(source, Classes(tuple(names), tuple(colours)), tuple(sources), strict=True)

    def map(
        self, masks: Classes, boxes: Classes, source: str, background: Background = "ignore"
    ) -> LabelMap:
        """Return the map from a source's classes.

        A source annotates a class of the space if it has one of its names. A mask value outside
        the space is certainly background; `background` says what the source's own is, if it lacks
        classes of the space. Both lists lead with the background. InputError: `source`, so called,
        has no class of the space.
        """
        values, present = self._indices(masks)
        labels, known = self._indices(boxes)
        if not (present.any() or known.any()):
            raise InputError(f"{source}: none of its classes is in the label space {self.name}")
        table = np.full(256, IGNORE_INDEX, np.uint8)
        numbers = values[: IGNORE_INDEX - 1].numpy() + 1  # boxes alone may have more classes
        table[1 : 1 + len(numbers)] = numbers
        if present.all() or background == "keep":
            table[0] = 0
        return LabelMap(table, labels, known)

    def _indices(self, classes: Classes) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each class's index in the space, and which classes of the space occur."""
        if not self.strict and classes.names == self.classes.names:  # a name may come twice
            count = len(self.sources)
            return torch.arange(count), torch.ones(count, dtype=torch.bool)
        target = {name: i for i, names in enumerate(self.sources) for name in names}
        indices = torch.tensor([target.get(name, UNMAPPED) for name in classes.names[1:]])
        known = torch.zeros(len(self.sources), dtype=torch.bool)
        known[indices[indices != UNMAPPED]] = True
        return indices, known

    def annotated(self, classes: Classes) -> set[str]:
        """Return the names of the space's classes that a source with these classes annotates."""
        known = self._indices(classes)[1].tolist()
        return {name for name, yes in zip(self.classes.names[1:], known, strict=True) if yes}

    def check_used(self, class_lists: Sequence[Classes]) -> None:
        """Raise InputError if the space has a name that no source has."""
        present = {name for classes in class_lists for name in classes.names[1:]}
        missing = sorted(set().union(*self.sources) - present)
        if missing:
            raise InputError(
                f"{self.name}: no source has a class {missing[0]!r}; expected among "
                f"{', '.join(sorted(present))}"
            )


def _synonyms() -> Mapping[str, frozenset[str]]:
    """Return VOC's and COCO's names of the classes that both have (aeroplane, airplane …)."""
    coco, voc = coco_categories()
    groups = [frozenset({name, coco[category]}) for category, name in voc.items()]
    return {name: group for group in groups for name in group}


@lru_cache(maxsize=1)
def coco_categories() -> tuple[dict[int, str], dict[int, str]]:
    """Return COCO's category ids with their names, and those of VOC's classes with VOC's names."""
    card = resources.load_yaml(resources.find("datasets", "coco2017"))
    coco = {int(entry["id"]): str(entry["name"]) for entry in card["classes"][1:]}
    voc_names = Classes.from_card("voc2012").names[1:]
    return coco, dict(zip(map(int, card["voc_ids"]), voc_names, strict=True))


def first_difference(names: Sequence[str], others: Sequence[str]) -> str:
    """Say at which number two class lists differ first; None stands where one has ended."""
    pairs = enumerate(zip_longest(names, others))
    number, (name, other) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    return f"class {number} is {name!r} and {other!r}"
