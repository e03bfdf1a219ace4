"""The class lists of COCO's format: COCO's own, with and without gaps, VOC's, and the file's."""

from dataclasses import dataclass
from functools import lru_cache

from effseg import resources
from effseg.data.classes import Classes
from effseg.data.sources.coco_index import CocoIndex
from effseg.errors import InputError

CARD = "coco2017"


@dataclass(frozen=True)
class ClassList:
    """A class list, and the number of each category in it, without the background."""

    kind: str
    classes: Classes
    number_of: dict[int, int]

    @classmethod
    def of(cls, kind: str, index: CocoIndex) -> "ClassList":
        """Make one of `file`, `voc21`, `coco80` and `coco90`.

        Raises:
            InputError: `file`, where two categories that have annotations share a name.
        """
        if kind == "file":
            names = _file_names(index)
            listed = list(dict.fromkeys(names.values()))
            number_of = {category: listed.index(name) for category, name in names.items()}
            return cls(kind, Classes.from_names(["background", *listed]), number_of)
        if kind == "voc21":
            ids = [int(i) for i in resources.load_yaml(resources.find("datasets", CARD))["voc_ids"]]
            return cls(kind, Classes.from_card("voc2012"), {c: i for i, c in enumerate(ids)})
        ids = list(card_ids())
        if kind == "coco80":
            return cls(kind, Classes.from_card(CARD), {c: i for i, c in enumerate(ids)})
        names90 = ["background", *(card_ids().get(i, f"id {i}") for i in range(1, max(ids) + 1))]
        return cls(kind, Classes.from_names(names90), {c: c - 1 for c in ids})


@lru_cache(maxsize=1)
def card_ids() -> dict[int, str]:
    """Return COCO's category ids in order, with their names."""
    card = resources.load_yaml(resources.find("datasets", CARD))
    return {int(entry["id"]): str(entry["name"]) for entry in card["classes"][1:]}


def is_coco(categories: dict[int, str]) -> bool:
    """Return whether ids and names are COCO's, of all categories or of some."""
    return categories.items() <= card_ids().items()


def check_names(index: CocoIndex) -> None:
    """Refuse categories that are not COCO's (InputError)."""
    for number, name in index.categories.items():
        expected = card_ids().get(number)
        if name != expected:
            raise InputError(
                f"{index.path}: category {number} is {name!r}, expected {expected!r} as in COCO "
                '("file" takes the categories as they are)'
            )


def _file_names(index: CocoIndex) -> dict[int, str]:
    """Return the categories that are classes, in the order of their ids.

    A background is not one, nor is the empty head that Roboflow writes above all others.
    """
    names = {c: n for c, n in index.categories.items() if n.lower().strip("_ ") != "background"}
    for category, name in list(names.items()):
        other_parents = {index.parents[c] for c in names if c != category}
        head = index.parents[category] in ("", "none") and other_parents == {name}
        if head and category in index.unused:
            del names[category]
            break
    used: dict[str, int] = {}
    for category, name in names.items():
        if category in index.unused:
            continue
        if name in used:
            raise InputError(
                f"{index.path}: categories {used[name]} and {category} are both named {name!r}, "
                "expected a name of its own for each"
            )
        used[name] = category
    return names
