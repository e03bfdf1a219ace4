"""How fast is ``SegmentationMetrics.update`` beside torchmetrics' ``MulticlassJaccardIndex``?

Both count the same labels (uint8 and int64, 8 x 512 x 512, 21 classes, 255 ignored), by turns, in
one process on one thread; printed are the medians in milliseconds and their ratio::

    python benchmarks/metrics_speed.py --rounds 21
"""

# B images, K classes, H W pixels

import argparse
from functools import partial

import cv2
import numpy as np
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from effseg.deploy.timing import ratio, take_turns
from effseg.metrics import SegmentationMetrics

BATCH, SIZE, CLASSES, IGNORED = 8, 512, 21, 255


def make_masks(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prediction and truth, (B, H, W) uint8.

    ``patches`` is like a real mask: convex pieces, void borders between them, a prediction that is
    a few pixels off. ``noise`` draws every pixel by itself.
    """
    random = np.random.default_rng(0)
    if kind == "noise":
        target = random.integers(0, CLASSES, (BATCH, SIZE, SIZE), dtype=np.uint8)
        preds = random.integers(0, CLASSES, target.shape, dtype=np.uint8)
        target[random.random(target.shape) < 0.05] = IGNORED
        return torch.from_numpy(preds), torch.from_numpy(target)
    target = np.zeros((BATCH, SIZE, SIZE), np.uint8)
    preds = target.copy()
    for truth, prediction in zip(target, preds, strict=True):
        for label in random.integers(1, CLASSES, 3).tolist():
            x, y = (int(v) for v in random.integers(100, SIZE - 100, 2))
            axes = tuple(int(v) for v in random.integers(30, 120, 2))
            cv2.ellipse(truth, (x, y), axes, 0, 0, 360, label, -1)
            cv2.ellipse(truth, (x, y), axes, 0, 0, 360, IGNORED, 5)
            cv2.ellipse(prediction, (x + 4, y + 5), axes, 0, 0, 360, label, -1)
    return torch.from_numpy(preds), torch.from_numpy(target)


def main() -> None:
    """Print one line for every kind of mask and dtype."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=21, help="rounds in which both take turns")
    rounds: int = parser.parse_args().rounds
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    for kind in ("patches", "noise"):
        for dtype in (torch.uint8, torch.int64):
            preds, target = (mask.to(dtype) for mask in make_masks(kind))
            ours = SegmentationMetrics(CLASSES, IGNORED)
            theirs = MulticlassJaccardIndex(CLASSES, ignore_index=IGNORED, validate_args=False)
            steps = {
                "effseg": partial(ours.update, preds, target),
                "torchmetrics": partial(theirs.update, preds, target),
            }
            found = take_turns(steps, rounds, seconds=0.05)
            mine, other = found["effseg"], found["torchmetrics"]
            print(f"{kind:8} {dtype!s:12}", end=" ")
            print(f"effseg {mine.median * 1e3:7.2f} ms", end="   ")
            print(f"torchmetrics {other.median * 1e3:7.2f} ms   ratio {ratio(other, mine):5.1f}")
            ours.reset()
            theirs.reset()
            for step in steps.values():
                step()
            if not torch.equal(ours.compute()["confusion"], theirs.confmat.long()):
                raise SystemExit("the two confusion matrices differ")


if __name__ == "__main__":
    main()
