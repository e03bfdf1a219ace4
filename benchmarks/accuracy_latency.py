"""mIoU after the short schedule against latency.

    python -m benchmarks.accuracy_latency

Scores are those of docs/benchmarks/voc_short_schedule.jsonl (VOC subset val), means over the seeds
of the recipe's own steps and crop; the networks are timed here in alternating rounds, one image of
512 pixels on the CPU, ours optimised. Writes docs/benchmarks/accuracy_latency.json and .svg.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.peer_tasks import HEADS, PARTS
from benchmarks.peers import SMP, encoder_of, smp_peer
from benchmarks.report import DOCS, write_json
from benchmarks.short import SCHEDULES, Run
from effseg.benchmark import alternate
from effseg.models.fold import optimize_for_inference
from effseg.models.registry import create_model

MODEL = "effseg_lite0"
ROWS = DOCS / f"{SCHEDULES['segmentation'].file}.jsonl"


def network(name: str) -> nn.Module:
    """Return a network of the short schedule, ready to run."""
    if name not in SMP:
        arguments: dict[str, Any] = dict.fromkeys(PARTS, True) | HEADS.get(name, {})
        model: nn.Module = create_model(MODEL, **arguments).eval()
        return optimize_for_inference(model)
    return smp_peer(name, encoder_of(MODEL)).eval().to(memory_format=torch.channels_last)


def measure(rows: Path, size: int = 512, rounds: int = 11) -> dict[str, dict[str, float]]:
    """Return milliseconds and mIoU of every network with a row of the recipe as it is.

    Except of `no-auxiliary`, which is the recipe's network.
    """
    scores: dict[str, list[float]] = {}
    for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines()):
        run = Run(SCHEDULES["segmentation"], row["network"], row["seed"])
        # The names of the weights of other steps and crops say so.
        if row.get("weights") == run.weights and row["network"] != "no-auxiliary":
            scores.setdefault(row["network"], []).append(row["miou"])
    images = torch.randn(1, 3, size, size).contiguous(memory_format=torch.channels_last)

    def step(model: nn.Module) -> Callable[[], Any]:
        def run() -> None:
            with torch.inference_mode():
                model(images)

        return run

    timings = alternate({name: step(network(name)) for name in scores}, rounds)
    return {
        k: {"ms": 1000 * t.median, "miou": statistics.mean(scores[k])} for k, t in timings.items()
    }


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    import matplotlib.pyplot as plt

    points = measure(ROWS)
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    for key, point in points.items():
        axis.scatter(point["ms"], point["miou"], s=60)
        axis.annotate(key, (point["ms"], point["miou"]), (6, 6), textcoords="offset points")
        print(f"{key:16} {point['ms']:7.1f} ms   mIoU {point['miou']:.4f}")
    axis.set(xlabel="milliseconds, 512², one image", ylabel="mIoU, VOC subset val (500)")
    axis.set(xlim=(0, None), ylim=(0, None))
    axis.grid(alpha=0.3)
    write_json(DOCS / "accuracy_latency.json", "cpu", points=points)
    figure.savefig(DOCS / "accuracy_latency.svg")


if __name__ == "__main__":
    main()
