"""What a detector does beside its network: assigning boxes to anchors, and post-processing."""

# B batch, A anchors, K classes, N boxes.

from typing import Any

import torch

from effseg.deploy.peers import detection_bench
from effseg.deploy.rows import Row, Settings, timed
from effseg.deploy.training import random_boxes
from effseg.losses.detection import assign, pad_boxes
from effseg.models.boxes import level_size, make_anchors, postprocess

NAME = "efficientdet_d0"
CLASSES = 90


def assignment(settings: Settings) -> list[Row]:
    """Time the assignment of 20 boxes a photo against effdet's ``AnchorLabeler``.

    Raises:
        InputError: effdet is not installed.
    """
    size, batch, device = settings.size or 512, settings.batch or 16, settings.device
    bench: Any = detection_bench(NAME, size).to(device)
    boxes, labels = random_boxes(batch, size, CLASSES)
    boxes, labels = [b.to(device) for b in boxes], [x.to(device) for x in labels]
    theirs = [b[:, [1, 0, 3, 2]] for b in boxes], [x + 1 for x in labels]
    anchors = make_anchors((size, size)).to(device)
    steps = {
        "effseg assign": lambda: assign(anchors, *pad_boxes(boxes, labels)),
        "effdet AnchorLabeler": lambda: bench.anchor_labeler.batch_label_anchors(*theirs),
    }
    return timed(steps, settings, batch)


def detections(settings: Settings) -> list[Row]:
    """Time what turns raw outputs into boxes: the best 5,000, decoded, per-class NMS, 100 kept.

    Scores are spread as a trained detector's are: most are near none.

    Raises:
        InputError: effdet is not installed.
    """
    from effdet.bench import (  # type: ignore[import-untyped]
        _batch_detection,
        _post_process,
    )

    size, batch, device = settings.size or 512, settings.batch or 1, settings.device
    bench: Any = detection_bench(NAME, size).to(device)
    generator = torch.Generator().manual_seed(0)
    anchors = make_anchors((size, size)).to(device)
    logits = torch.randn(batch, len(anchors), CLASSES, generator=generator).to(device) * 2 - 6
    codes = torch.randn(batch, len(anchors), 4, generator=generator).to(device) * 0.2
    maps = [_as_maps(values, size) for values in (logits, codes)]
    sizes = [(size, size)] * batch

    def theirs() -> Any:
        found = _post_process(*maps, num_levels=5, num_classes=CLASSES)
        return _batch_detection(batch, found[0], found[1], bench.anchors.boxes, *found[2:])

    def ours() -> Any:
        return postprocess(logits, codes, anchors, sizes)

    with torch.inference_mode():
        return timed({"effseg postprocess": ours, "effdet": theirs}, settings, batch)


def _as_maps(values: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Turn (B, A, V) into effdet's maps (B, 9 V, H, W) of P3 … P7."""
    maps, start = [], 0
    for level in range(3, 8):
        rows, columns = level_size((size, size), level)
        part = values[:, start : start + 9 * rows * columns]
        start += 9 * rows * columns
        maps.append(part.reshape(len(values), rows, columns, -1).permute(0, 3, 1, 2))
    return maps
