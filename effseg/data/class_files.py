"""Read class lists as annotation tools write them; refuse unknown formats."""

# K classes

import csv
import json
import re
from pathlib import Path
from typing import Any

from effseg import resources
from effseg.errors import InputError

Colour = tuple[int, int, int]
Entry = tuple[str, Colour | None]
"""A class: its name, and its RGB colour where the file gives one."""

IGNORE_NAMES = ("__ignore__",)
"""labelme's name of ignored pixels."""
LABELME_BACKGROUND = ("_background_", "__background__")

_FORMATS = (
    "one name per line, YAML with the key classes, a JSON list of names, CVAT's labelmap.txt, "
    "labelme's labels.txt or Roboflow's _classes.csv"
)
_CVAT = re.compile(r"[^:]*:(\s*\d+\s*,\s*\d+\s*,\s*\d+\s*)?:[^:]*:[^:]*")
# What a line of another format has: brackets, separators, a list's dash, a colour, a comment.
_NO_NAME = re.compile(r"^[\[\]{}<\"']|[\[\]{}<>\"',]$|[:=;\t]|^-\s|,\s*\d|(\d+\s+){2}\d+$|\s#")
_NUMBERED = re.compile(r"\d+[\s,.)]+\S")


def read_class_file(path: Path) -> list[Entry]:
    """Read the names of a file, and their colours where it has some."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a list of class names or a file of them")
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return entries_of(resources.load_yaml(path).get("classes"), str(path))
    text = resources.read_text(path)
    if suffix == ".json" or text.lstrip().startswith(("[", "{")):
        return _from_json(text, path)
    lines = [line.strip() for line in text.splitlines()]
    comments = [line for line in lines if line.startswith("#")]
    lines = [line for line in lines if line and not line.startswith("#")]
    if suffix == ".csv":
        return _from_csv(lines, path)
    if lines and all(_CVAT.fullmatch(line) for line in lines):
        return [_from_cvat(line, path) for line in lines]
    if any("label:color_rgb" in comment for comment in comments):
        wrong = next((line for line in lines if not _CVAT.fullmatch(line)), "")
        raise InputError(f"{path}: line {wrong!r}, expected label:r,g,b:parts:actions as CVAT's")
    numbered = len(lines) > 1 and all(_NUMBERED.match(line) for line in lines)
    for line in lines:
        if numbered or _NO_NAME.search(line):
            raise InputError(f"{path}: line {line!r} is not understood; expected {_FORMATS}")
    return [(line, None) for line in lines]


def entries_of(content: object, source: str, also: tuple[str, ...] = ()) -> list[Entry]:
    """Read a list of names, or of `{name, colour: [r, g, b]}`; `color` is the same.

    An entry may have the keys `also`, too; `source` is named in errors.
    """
    if not isinstance(content, list):
        raise InputError(f"{source}: expected the key classes with a list of names")
    entries: list[Entry] = []
    for entry in content:
        fields = {"name": entry.strip()} if isinstance(entry, str) else entry
        keys = fields.keys() - {*also} if isinstance(fields, dict) else set()
        named = "name" in keys and isinstance(fields["name"], str)  # YAML's no is False
        if not named or not (keys <= {"name", "colour"} or keys <= {"name", "color"}):
            known = ", ".join(("name", *also, "colour"))
            raise InputError(
                f"{source}: class {entry!r}, expected a name or {{{known}}}; in YAML, yes, no and "
                "numbers are names in quotes only"
            )
        colour = fields.get("colour", fields.get("color"))
        entries.append((fields["name"], None if colour is None else as_colour(colour, source)))
    return entries


def as_colour(value: object, source: str) -> Colour:
    """Read `[r, g, b]` from 0 to 255, or `#rrggbb`; InputError names the source."""
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        value = [int(value[i : i + 2], 16) for i in (1, 3, 5)]
    match value:
        case [int(r), int(g), int(b)] if all(0 <= part <= 255 for part in (r, g, b)):
            return r, g, b
    raise InputError(f"{source}: colour {value!r}, expected [r, g, b] from 0 to 255")


def _from_json(text: str, path: Path) -> list[Entry]:
    """Read a list of names, `{classes: […]}`, or CVAT's label constructor (names, colours)."""
    try:
        content: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if isinstance(content, dict):
        content = content.get("classes")
    if isinstance(content, list) and all(isinstance(e, dict) and "name" in e for e in content):
        # CVAT's "Raw" labels have ids, types and attributes, too.
        content = [{k: e[k] for k in ("name", "color", "colour") if k in e} for e in content]
    return entries_of(content, str(path))


def _from_cvat(line: str, path: Path) -> Entry:
    name, colour = line.split(":")[:2]
    numbers = [int(part) for part in colour.split(",")] if colour else []
    return name.strip(), as_colour(numbers, str(path)) if numbers else None


def _from_csv(lines: list[str], path: Path) -> list[Entry]:
    """Read Roboflow's `Pixel Value, Class`: numbers from 0, in any order."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    header = [cell.lower() for cell in rows[0]] if rows else []
    if header != ["pixel value", "class"] or any(len(row) != 2 for row in rows):
        raise InputError(f"{path}: expected the columns 'Pixel Value, Class', as Roboflow's")
    names = {row[0]: row[1] for row in rows[1:]}
    numbers = [str(number) for number in range(len(rows) - 1)]
    if sorted(names) != sorted(numbers):
        listed = ", ".join(row[0] for row in rows[1:])
        raise InputError(f"{path}: pixel values {listed}, expected each from 0 to {len(rows) - 2}")
    return [(names[number], None) for number in numbers]
