"""Scores as tables in the terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from effseg.data.classes import Classes

MASK_TITLES = {
    "miou": "mIoU",
    "boundary_iou": "Boundary IoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "fwiou": "frequency-weighted IoU",
}
BOX_TITLES = {
    "ap": "AP",
    "ap50": "AP50",
    "ap50_11": "AP50 (11 points)",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
    "ar100": "AR100",
}
TITLES = MASK_TITLES | BOX_TITLES
"""Titles of the scores, in display order."""


def print_scores(
    scores: Mapping[str, Any], classes: Classes | None = None, title: str = "per class"
) -> None:
    """Print the per-class table and the totals of `SegmentationMetrics.compute()`.

    `protocol`, `miou_raw` and `boundary_iou` are optional in `scores`.
    """
    iou, confusion = torch.as_tensor(scores["iou"]), torch.as_tensor(scores["confusion"])
    pixels = confusion.sum(1).double()
    columns = {"IoU": iou, "recall": confusion.diag() / pixels, "pixels": pixels / pixels.sum()}
    names = [str(i) for i in range(len(iou))] if classes is None else classes.names
    _print(title, names, columns, scores, MASK_TITLES, "miou")


def print_detection_scores(scores: Mapping[str, Any], classes: Classes) -> None:
    """Print the per-class table and the totals of a detection metric's `compute()`.

    Entries whose key ends in `_class`, (K,), are the columns.
    """
    keys = [key for key in BOX_TITLES if f"{key}_class" in scores]
    columns = {BOX_TITLES[key]: torch.as_tensor(scores[f"{key}_class"]) for key in keys}
    _print("per class", classes.names[1:], columns, scores, BOX_TITLES, keys[0])


def _print(
    title: str,
    names: Sequence[str],
    columns: Mapping[str, torch.Tensor],
    scores: Mapping[str, Any],
    titles: Mapping[str, str],
    mean: str,
) -> None:
    """Print a table, and below it the scores; the score `mean` is that of the first column."""
    values = [column.tolist() for column in columns.values()]
    rows = zip(names, *values, strict=True)
    cells = ([name, *map(percent, row)] for name, *row in rows)
    console = Console()
    console.print(as_table(title, ("class", *columns), cells))
    counted = sum(not math.isnan(value) for value in values[0])
    parts = []
    for key, text in titles.items():
        if key in scores:
            of = f" (over {counted} of {len(names)} classes)"
            parts.append(f"{text} {float(scores[key]):.4f}")
            parts[-1] += of if key == mean and counted < len(names) else ""
        if f"{key}_raw" in scores:
            parts.append(f"{text} without EMA {float(scores[f'{key}_raw']):.4f}")
    protocol = f"  (protocol: {scores['protocol']})" if "protocol" in scores else ""
    console.print("  ".join(parts) + protocol, soft_wrap=True, highlight=False)


def as_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table; its first column is aligned left, the others right."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def percent(value: float) -> str:
    """Format a fraction as a percentage, nan as a dash."""
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"


def to_json(value: Any) -> Any:
    """Return scores as JSON has them: tensors as lists or numbers, nan as None."""
    if isinstance(value, torch.Tensor):
        return to_json(value.tolist())
    if isinstance(value, Mapping):
        return {key: to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
