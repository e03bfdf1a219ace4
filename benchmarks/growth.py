"""How costs grow with size, batch, classes and boxes.

    python -m benchmarks.growth

Every point is the median of five rounds in which the points of a panel take turns, on the CPU.
Writes docs/benchmarks/growth.json and growth.svg.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

import effseg
from effseg.data.files import write_text
from effseg.deploy.inference import make_photo
from effseg.deploy.labels import make_noise
from effseg.deploy.rows import about
from effseg.deploy.timing import take_turns
from effseg.deploy.training import random_boxes
from effseg.losses.detection import assign, pad_boxes
from effseg.metrics import SegmentationMetrics
from effseg.models.boxes import make_anchors, postprocess

OUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "growth"
Steps = dict[str, dict[int, Callable[[], Any]]]
"""What is drawn as a line: name to a step for each value."""


def forward(name: str, size: int = 256, batch: int = 1, **arguments: Any) -> Callable[[], Any]:
    model = effseg.optimize_for_inference(effseg.create_model(name, **arguments).eval())
    photo = make_photo(size, batch, "cpu")

    def step() -> None:
        with torch.inference_mode():
            model(photo)

    return step


def by_size() -> Steps:
    names = ("effseg_lite0", "effseg_d0", "effseg_d4", "efficientdet_d0")
    return {name: {s: forward(name, s) for s in (128, 256, 512, 768)} for name in names}


def by_batch() -> Steps:
    names = ("effseg_lite0", "effseg_d0", "efficientdet_d0")
    return {name: {b: forward(name, batch=b) for b in (1, 2, 4, 8, 16)} for name in names}


def by_classes() -> Steps:
    counts = (2, 8, 21, 60, 150)
    labels, target = make_noise(8, 512)
    metrics = {k: SegmentationMetrics(k) for k in counts}
    steps = {
        k: partial(m.update, labels % k, torch.where(target == 255, 255, target % k))
        for k, m in metrics.items()
    }
    model = {k: forward("effseg_lite0", 512, classes=k) for k in counts}
    return {"SegmentationMetrics, 8 × 512²": steps, "effseg_lite0, 512²": model}


def by_boxes() -> Steps:
    counts = (1, 5, 20, 100, 300)
    anchors = make_anchors((512, 512))
    boxes = {n: pad_boxes(*random_boxes(16, 512, 90, n)) for n in counts}
    logits = torch.full((1, len(anchors), 90), -20.0)
    codes = torch.zeros(1, len(anchors), 4)

    def found(count: int) -> Callable[[], Any]:
        scores = logits.clone()
        scores[0, :: len(anchors) // count, 0] = 1.0
        return partial(postprocess, scores, codes, anchors, [(512, 512)], score_threshold=0.05)

    return {
        "assignment, batch 16, 512²": {n: partial(assign, anchors, *boxes[n]) for n in counts},
        "post-processing, 512², objects": {n: found(n) for n in counts},
    }


PANELS = {
    "side of the photo, pixels": by_size,
    "photos in a batch, 256²": by_batch,
    "classes": by_classes,
    "boxes a photo": by_boxes,
}


def main() -> None:
    panels: dict[str, dict[str, dict[int, float]]] = {}
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axis, (title, make) in zip(axes.flat, PANELS.items(), strict=True):
        steps = make()
        flat = {f"{line}|{x}": run for line, points in steps.items() for x, run in points.items()}
        timings = take_turns(flat, rounds=5, seconds=0.1)
        lines: dict[str, dict[int, float]] = {line: {} for line in steps}
        for key, timing in timings.items():
            line, _, x = key.rpartition("|")
            lines[line][int(x)] = 1000 * timing.median
        for line, points in lines.items():
            axis.plot(list(points), list(points.values()), marker="o", label=line)
            print(title, line, {x: round(ms, 2) for x, ms in points.items()}, flush=True)
        axis.set(xscale="log", yscale="log", xlabel=title, ylabel="milliseconds")
        axis.set_xticks(list(points), [str(x) for x in points], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
        panels[title] = lines
    report = {
        "about": about("cpu") | {"command": "python -m benchmarks.growth"},
        "milliseconds": panels,
    }
    write_text(OUT.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    figure.savefig(OUT.with_suffix(".svg"))


if __name__ == "__main__":
    main()
