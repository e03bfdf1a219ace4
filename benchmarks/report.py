"""Results of a measurement: a table, and a JSON file with machine, versions and command."""

import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import Row
from effseg.benchmark import machine
from effseg.data.files import write_text

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
PACKAGES = ("torchvision", "timm", "segmentation-models-pytorch", "torchmetrics", "effdet")
Columns = Mapping[str, Callable[[Row], Any]]
"""Title to a cell's text from its row; KeyError and None leave the cell empty."""

SPEED: Columns = {
    "": lambda row: row["name"],
    "ms": lambda row: row.get("error") or f"{row['ms']:.2f}",
    "ms, range": lambda row: f"{row['least']:.2f} to {row['most']:.2f}",
    "ours / it": lambda row: f"{row['ratio']:.3f}",
    "a second": lambda row: f"{row['per_second']:.1f}",
    "GMACs": lambda row: f"{row['gmacs']:.2f}",
    "of the ceiling": lambda row: f"{row['roofline']:.2f}",
    "peak MiB": lambda row: f"{row['peak_mib']:.0f}",
}
"""Columns of a comparison of speeds: medians of alternating rounds."""


def table(rows: Sequence[Row], columns: Columns) -> str:
    """Return the rows as a Markdown table, without empty columns."""
    cells = [[title, *(_cell(text, row) for row in rows)] for title, text in columns.items()]
    cells = [column for column in cells if any(column[1:])]
    widths = [max(map(len, column)) for column in cells]
    lines = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in zip(*cells)]  # noqa: B905
    lines.insert(1, ["-" * max(3, width) for width in widths])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: Callable[[Row], Any], row: Row) -> str:
    try:
        value = text(row)
    except KeyError:
        value = None
    return "" if value is None else str(value)


def about(device: str) -> Row:
    """Return the machine, the versions and the command."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    main = sys.modules["__main__"].__spec__
    program = ["-m", main.name] if main is not None else [sys.argv[0]]
    return {
        **machine(device),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *program, *sys.argv[1:]]),
        **versions,
    }


def write_json(path: Path, device: str, **content: Any) -> None:
    """Write the rows with machine, versions and command."""
    write_text(path, json.dumps({"about": about(device), **content}, indent=1) + "\n")
