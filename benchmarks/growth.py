"""Cost as a function of size, batch, classes and boxes.

    python -m benchmarks.growth

Every point is the median of five rounds, alternating over the points of a panel, on the CPU.
Writes docs/benchmarks/growth.json and growth.svg.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.report import DOCS, write_json
from benchmarks.suites import make_noise, random_boxes
from effseg.benchmark import alternate
from effseg.data.sample import pad_boxes
from effseg.losses.detection import assign
from effseg.metrics import SegmentationMetrics
from effseg.models.boxes import make_anchors, postprocess
from effseg.models.fold import optimize_for_inference
from effseg.models.registry import create_model

Lines = dict[str, dict[int, Callable[[], Any]]]
"""The lines: name to a step for each value."""


def forward(name: str, size: int = 256, batch: int = 1, **arguments: Any) -> Callable[[], Any]:
    model = optimize_for_inference(create_model(name, **arguments).eval())
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.inference_mode():
            model(images)

    return step


def by_size() -> Lines:
    names = ("effseg_lite0", "effseg_d0", "effseg_d4", "efficientdet_d0")
    return {name: {s: forward(name, s) for s in (128, 256, 512, 768)} for name in names}


def by_batch() -> Lines:
    names = ("effseg_lite0", "effseg_d0", "efficientdet_d0")
    return {name: {b: forward(name, batch=b) for b in (1, 2, 4, 8, 16)} for name in names}


def by_classes() -> Lines:
    counts = (2, 8, 21, 60, 150)
    labels, target = make_noise(8, 512)
    metrics: dict[int, Callable[[], Any]] = {
        k: partial(
            SegmentationMetrics(k).update,
            labels % k,
            torch.where(target == 255, 255, target % k),
        )
        for k in counts
    }
    model = {k: forward("effseg_lite0", 512, classes=k) for k in counts}
    return {"SegmentationMetrics, 8 × 512²": metrics, "effseg_lite0, 512²": model}


def by_boxes() -> Lines:
    counts = (1, 5, 20, 100, 300)
    anchors = make_anchors((512, 512))
    codes = torch.zeros(1, len(anchors), 4)

    def suppress(count: int) -> Callable[[], Any]:
        logits = torch.full((1, len(anchors), 90), -20.0)
        logits[0, :: len(anchors) // count, 0] = 1.0
        return partial(postprocess, logits, codes, anchors, [(512, 512)], score_threshold=0.05)

    return {
        "assignment, batch 16, 512²": {
            n: partial(assign, anchors, *pad_boxes(*random_boxes(16, 512, count=n))) for n in counts
        },
        "post-processing, 512², objects": {n: suppress(n) for n in counts},
    }


PANELS = {
    "side of the image, pixels": by_size,
    "images in a batch, 256²": by_batch,
    "classes": by_classes,
    "boxes an image": by_boxes,
}


def measure(lines: Lines, rounds: int = 5) -> dict[str, dict[int, float]]:
    """Return the milliseconds of every point of a panel."""
    steps = {f"{line}|{x}": run for line, points in lines.items() for x, run in points.items()}
    timings = alternate(steps, rounds, seconds=0.1)
    return {
        line: {x: 1000 * timings[f"{line}|{x}"].median for x in points}
        for line, points in lines.items()
    }


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    import matplotlib.pyplot as plt

    panels: dict[str, Any] = {}
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axis, (title, make) in zip(axes.flat, PANELS.items(), strict=True):
        panels[title] = measure(make())
        for line, points in panels[title].items():
            axis.plot(list(points), list(points.values()), marker="o", label=line)
            print(title, line, {x: round(ms, 2) for x, ms in points.items()}, flush=True)
        axis.set(xscale="log", yscale="log", xlabel=title, ylabel="milliseconds")
        axis.set_xticks(list(points), [str(x) for x in points], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    write_json(DOCS / "growth.json", "cpu", milliseconds=panels)
    figure.savefig(DOCS / "growth.svg")


if __name__ == "__main__":
    main()
