"""What every suite of the benchmark starts from and ends in: settings; rows, a table, a file."""

import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from effseg.data.files import write_text
from effseg.deploy.timing import take_turns
from effseg.errors import InputError


@dataclass(frozen=True)
class Settings:
    """How to measure; None takes what suits the suite."""

    size: int | None = None
    batch: int | None = None
    rounds: int = 9
    compile: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        too_small = self.size is not None and self.size < 32
        if too_small or (self.batch is not None and self.batch < 1) or self.rounds < 1:
            raise InputError(
                f"size={self.size}, batch={self.batch}, rounds={self.rounds}: "
                "expected at least 32, 1 and 1"
            )


Row = dict[str, Any]
"""``name``, ``ms`` (median), ``least``, ``most``, ``ratio`` of the suite's first row to this one,
and what the suite knows besides, see :data:`KNOWN`."""

_PIPE_WIDTH = 160
KNOWN = {
    "per_second": ("a second", "{:.1f}"),
    "params": ("parameters", "{:,}"),
    "gmacs": ("GMACs", "{:.2f}"),
    "roofline": ("of the ceiling", "{:.2f}"),
    "peak_mib": ("peak MiB", "{:.0f}"),
}
"""Key to column title and format."""


def timed(
    steps: Mapping[str, Callable[[], Any]], settings: Settings, items: int, seconds: float = 0.3
) -> list[Row]:
    """Time steps in turns; return a row for each. The first is ours.

    Args:
        steps: what is timed, by name.
        settings: rounds and device.
        items: photos or pairs in a step, for the rate ``per_second``.
        seconds: of a step in a round.
    """
    timings = take_turns(steps, settings.rounds, seconds, settings.device)
    first = next(iter(timings.values()))
    rows = []
    for name, timing in timings.items():
        row: Row = {
            "name": name,
            "ms": 1000 * timing.median,
            "least": 1000 * timing.least,
            "most": 1000 * timing.most,
            "ratio": first.median / timing.median,
            "per_second": items / timing.median,
        }
        rows.append(row)
    return rows


def print_rows(rows: list[Row]) -> None:
    """Print the rows as a table."""
    known = [key for key in KNOWN if any(key in row for row in rows)]
    table = Table(title="milliseconds, median of turns", title_justify="left")
    table.add_column("", no_wrap=True)
    for title in ("ms", "ms, range", "ours / it", *(KNOWN[key][0] for key in known)):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        span = f"{row['least']:.2f} to {row['most']:.2f}"
        cells = [f"{row['ms']:.2f}", span, f"{row['ratio']:.3f}"]
        cells += [KNOWN[key][1].format(row[key]) if key in row else "" for key in known]
        table.add_row(row["name"], *cells)
    # A pipe has no width of its own, and names that are cut say nothing.
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)


def write_rows(rows: list[Row], path: Path, device: str) -> None:
    """Write the rows as JSON, with the machine and the versions.

    Raises:
        InputError: the file cannot be written.
    """
    write_text(path, json.dumps({"about": about(device), "rows": rows}, indent=1) + "\n")


def about(device: str) -> Row:
    """Name the machine, the versions and the command."""
    packages = ("torch", "torchvision", "timm", "segmentation-models-pytorch", "effdet")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["effseg", *sys.argv[1:]]),
        **versions,
    }
