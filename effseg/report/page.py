"""The report: one HTML file without network access or scripts."""

# K classes

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from effseg.data.files import write_text
from effseg.errors import InputError
from effseg.inference.backends import on_device
from effseg.metrics.by_size import LIMITS, SIZES
from effseg.metrics.tables import TITLES
from effseg.report.charts import COLOURS, confusion, curves
from effseg.report.collect import Evaluation, Run, numbers, read_runs
from effseg.report.examples import CONFUSED, FALSE, MISSED, RIGHT, Example, examples
from effseg.report.pictures import render

_PER_CLASS = {
    "segmentation": {"iou": "IoU"},
    "detection": {f"{key}_class": TITLES[key] for key in ("ap", "ap50", "ap50_11")},
}
_CONFUSIONS = 10

Scored = list[tuple[Run, Evaluation]]


def write_report(folders: Sequence[Path], output: Path, device: str | None = None) -> list[str]:
    """Write the report of one run, or of several; differences are from the first.

    Runs may be unfinished. `device` is for predicting the images again; None: CUDA if available.
    Returns a line for each part that is missing: images whose data cannot be read.
    """
    runs = read_runs(folders)
    on_device(torch.empty(0), device)  # a wrong one is no missing part
    missing: list[str] = []
    page = render(
        "template.html",
        title=", ".join(run.name for run in runs),
        runs=[(run, _about(run)) for run in runs],
        colours=COLOURS,
        curves=curves(runs),
        sections=[_section(scored, device, missing) for scored in _comparable(runs)],
        errors={"missed": MISSED, "false": FALSE, "confused": CONFUSED, "right": RIGHT},
        limits=LIMITS,
        config=[
            (run.name, yaml.safe_dump(run.config, sort_keys=False)) for run in runs if run.config
        ],
        missing=missing,
    )
    write_text(output, page)
    return missing


def _about(run: Run) -> list[tuple[str, str]]:
    """Return the run's summary as (heading, text)."""
    last: dict[str, Any] = run.starts[-1] if run.starts else {}
    rows = {"model": str(run.setting("model", "model") or ""), "epochs": run.progress}
    if run.epoch is not None:
        rows["saved model"] = f"after step {run.step}, in epoch {run.epoch + 1}"
    protocols = {e.title: str(e.scores.get("protocol", "")) for e in run.evaluations}
    rows["protocol"] = ", ".join(f"{name} ({title})" for title, name in protocols.items())
    rows["started"] = ", ".join(start["started"] for start in run.starts)
    rows["command"] = last.get("command", "")
    rows["data"] = "\n".join(
        f"{d['use']}: {d['images']} images, {d['source']}" for d in last.get("data", [])
    )
    for key in ("machine", "versions"):
        rows[key] = ", ".join(f"{name} {value}" for name, value in last.get(key, {}).items())
    return [(key, text) for key, text in rows.items() if text]


def _comparable(runs: Sequence[Run]) -> list[Scored]:
    """Group evaluations to compare: of one task, and of one source if a run has several."""
    every = [(run, e) for run in runs for e in run.evaluations]
    counts = Counter((run.name, e.task) for run, e in every)
    several = {task for (_, task), count in counts.items() if count > 1}
    groups: dict[tuple[str, str], Scored] = {}
    for run, e in every:
        groups.setdefault((e.task, e.source if e.task in several else ""), []).append((run, e))
    return list(groups.values())


def _section(scored: Scored, device: str | None, missing: list[str]) -> dict[str, Any]:
    """Return what the template shows of one task on one source, of every run scored on it."""
    task = scored[0][1].task
    sources = ", ".join(dict.fromkeys(e.source for _, e in scored))
    totals = []
    for key, title in TITLES.items():
        if any(key in e.scores for _, e in scored):
            totals.append((title, numbers(e.scores.get(key) for _, e in scored)))
    sizes = []
    for key, title in (("iou_by_size", "IoU"), ("recall_by_size", "recall")):
        if all(key in e.scores for _, e in scored):
            for i, size in enumerate(SIZES):
                sizes.append((f"{size}, {title}", numbers(e.scores[key][i] for _, e in scored)))
    matrices = []
    for number, (run, e) in enumerate(scored):
        if "confusion" in e.scores and run.classes is not None:
            matrix, names = np.array(e.scores["confusion"], np.int64), run.classes.names
            labels = names if task == "segmentation" else ("nothing", *names[1:])
            svg = confusion(matrix, labels, COLOURS[number % len(COLOURS)])
            matrices.append((run.name, svg, _in_words(matrix, names, task)))
    columns, classes = _by_class(scored, task)
    return {
        "title": replace(scored[0][1], source=sources).title,
        "task": task,
        "runs": [run.name for run, _ in scored],
        "totals": totals,
        "columns": columns,
        "classes": classes,
        "sizes": sizes,
        "matrices": matrices,
        "images": [part for run, e in scored for part in _images(run, e, device, missing)],
    }


def _by_class(
    scored: Scored, task: str
) -> tuple[list[str], list[tuple[str, tuple[int, int, int], float, list[float]]]]:
    """Return the columns, and name, colour, share of the ground truth and scores of each class."""
    titles = _PER_CLASS[task]
    present = [key for key in titles if any(key in e.scores for _, e in scored)]
    keys = present if len(scored) == 1 else present[:1]
    columns: list[str] = []
    tables: list[dict[str, float]] = []
    classes: dict[str, tuple[tuple[int, int, int], float]] = {}
    for run, e in scored:
        assert run.classes is not None
        names = run.classes.names
        counts = np.array(e.scores["confusion"], np.float64).sum(1)
        if task == "detection":
            counts[0] = 0
        shares = (counts / max(counts.sum(), 1)).tolist()
        for name, colour, share in zip(names, run.classes.palette, shares, strict=True):
            classes.setdefault(name, (colour, share))
        for key in keys:
            columns.append(titles[key] if len(scored) == 1 else f"{titles[key]}, {run.name}")
            tables.append(dict(zip(names, e.by_class(key, len(names)), strict=True)))
    rows = [
        (name, *classes[name], [table.get(name, math.nan) for table in tables])
        for name in list(classes)[0 if task == "segmentation" else 1 :]
    ]
    return columns, rows


def _in_words(
    matrix: np.ndarray[Any, np.dtype[np.int64]], names: Sequence[str], task: str
) -> list[str]:
    """Describe the largest entries off the diagonal."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS]
    lines = []
    for true, predicted in zip(*np.unravel_index(order, matrix.shape), strict=True):
        count = int(wrong[true, predicted])
        if not count:
            break
        if task == "detection" and true == 0:
            lines.append(f"{names[predicted]} where there is no object: {count:,} detections")
            continue
        missed = task == "detection" and predicted == 0
        error = "missed" if missed else f"predicted as {names[predicted]}"
        share = f"{100 * count / int(matrix[true].sum()):.1f} %"
        unit = "pixels" if task == "segmentation" else "objects"
        lines.append(f"{names[true]} {error}: {share} of its {unit} ({count:,})")
    return lines


def _images(
    run: Run, evaluation: Evaluation, device: str | None, missing: list[str]
) -> list[tuple[str, str, list[Example]]]:
    """Return run, heading and images of each group."""
    try:
        worst, median = examples(run, evaluation, device)
    except InputError as error:
        missing.append(f"{run.name}, images of {evaluation.title}: {error}")
        return []
    kinds = (f"the {len(worst)} worst", worst), (f"{len(median)} in the middle", median)
    return [(run.name, heading, drawn) for heading, drawn in kinds if drawn]
