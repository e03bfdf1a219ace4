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

    Args:
        scores: the dict; `protocol`, `miou_raw` and `boundary_iou` are optional.
        classes: names of the rows; None: class indices.
        title: title of the table.
    """
    iou = torch.as_tensor(scores["iou"]).tolist()
    confusion = torch.as_tensor(scores["confusion"])
    recall = (confusion.diag().double() / confusion.sum(1)).tolist()
    share = (confusion.sum(1).double() / confusion.sum()).tolist()
    names = classes.names if classes is not None else [str(i) for i in range(len(iou))]
    rows = zip(names, iou, recall, share, strict=True)
    columns = ("class", "IoU", "recall", "pixels")
    table = as_table(title, columns, ([name, *map(percent, values)] for name, *values in rows))
    _print_with_totals(table, scores, MASK_TITLES, _missing("miou", iou))


def _missing(key: str, values: Sequence[float]) -> dict[str, str]:
    """Return a remark, by the score's key, if its mean is not over all classes."""
    counted = sum(not math.isnan(value) for value in values)
    return {key: f" (over {counted} of {len(values)} classes)"} if counted < len(values) else {}


def _print_with_totals(
    table: Table,
    scores: Mapping[str, Any],
    titles: Mapping[str, str],
    remarks: Mapping[str, str],
) -> None:
    """Print the table, and below it the available scores with their remarks."""
    console = Console()
    console.print(table)
    totals: dict[str, str] = {}
    for key, title in titles.items():
        totals |= {key: title, f"{key}_raw": f"{title} without EMA"}
    parts = [
        f"{text} {float(scores[key]):.4f}{remarks.get(key, '')}"
        for key, text in totals.items()
        if key in scores
    ]
    protocol = f"  (protocol: {scores['protocol']})" if "protocol" in scores else ""
    console.print("  ".join(parts) + protocol, soft_wrap=True, highlight=False)


def print_detection_scores(scores: Mapping[str, Any], classes: Classes) -> None:
    """Print the per-class table and the totals of a detection metric's `compute()`.

    Args:
        scores: the dict; entries whose key ends in `_class`, (K,), are the columns.
        classes: class names, background first.
    """
    columns = {
        title: torch.as_tensor(scores[f"{key}_class"]).tolist()
        for key, title in BOX_TITLES.items()
        if f"{key}_class" in scores
    }
    rows = zip(classes.names[1:], *columns.values(), strict=True)
    cells = ([name, *map(percent, values)] for name, *values in rows)
    table = as_table("per class", ("class", *columns), cells)
    main = next((key for key in BOX_TITLES if f"{key}_class" in scores), "")
    values = torch.as_tensor(scores.get(f"{main}_class", [])).tolist()
    _print_with_totals(table, scores, BOX_TITLES, _missing(main, values))


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
