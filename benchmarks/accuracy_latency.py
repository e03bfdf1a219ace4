"""mIoU of the short schedule against the latency of the networks.

    python -m benchmarks.accuracy_latency

Scores are those of docs/benchmarks/voc_short_schedule.jsonl (seed 0, VOC subset val); the networks
are timed here in turns, one photo of 512 pixels on the CPU, ours through
``optimize_for_inference``. Writes docs/benchmarks/accuracy_latency.json and .svg.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import nn

import effseg
from effseg.data.files import write_text
from effseg.deploy.inference import make_photo
from effseg.deploy.peers import same_encoder
from effseg.deploy.rows import about
from effseg.deploy.timing import take_turns

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
PEERS = ("FPN", "DeepLabV3Plus", "Unet")


def networks() -> dict[str, nn.Module]:
    ours = effseg.create_model("effseg_lite0", head_context=True).eval()
    plain = effseg.create_model("effseg_lite0").eval()
    found = {"effseg": ours, "no-context": plain}
    found = {key: effseg.optimize_for_inference(model) for key, model in found.items()}
    peers = same_encoder("effseg_lite0", PEERS).values()
    last = torch.channels_last
    return found | {
        key: peer.to(memory_format=last) for key, peer in zip(PEERS, peers, strict=True)
    }


def main() -> None:
    rows = (FOLDER / "voc_short_schedule.jsonl").read_text(encoding="utf-8").splitlines()
    scores = {r["network"]: r["miou"] for r in map(json.loads, rows) if r["seed"] == 0}
    photo = make_photo(512, 1, "cpu")

    def step(model: nn.Module) -> Callable[[], Any]:
        def run() -> None:
            with torch.inference_mode():
                model(photo)

        return run

    timings = take_turns({key: step(model) for key, model in networks().items()}, rounds=11)
    points = {
        key: {"ms": 1000 * timing.median, "miou": scores[key]} for key, timing in timings.items()
    }
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    for key, point in points.items():
        axis.scatter(point["ms"], point["miou"], s=60)
        axis.annotate(key, (point["ms"], point["miou"]), (6, 6), textcoords="offset points")
        print(f"{key:16} {point['ms']:7.1f} ms   mIoU {point['miou']:.4f}")
    axis.set(xlabel="milliseconds, 512², one photo", ylabel="mIoU, VOC subset val (500)")
    axis.set(xlim=(0, None), ylim=(0, None))
    axis.grid(alpha=0.3)
    report = {
        "about": about("cpu") | {"command": "python -m benchmarks.accuracy_latency"},
        "points": points,
    }
    write_text(FOLDER / "accuracy_latency.json", json.dumps(report, indent=1) + "\n")
    figure.savefig(FOLDER / "accuracy_latency.svg")


if __name__ == "__main__":
    main()
