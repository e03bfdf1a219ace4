"""Detections of an evaluation in COCO's results format."""

# N boxes

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from effseg.data.files import write_text


def write_results(
    path: Path,
    results: Sequence[tuple[str, Mapping[str, torch.Tensor]]],
    category_of: Mapping[int, int] | Sequence[int] | None = None,
) -> None:
    """Write a list of image_id, category_id, bbox (x y w h) and score.

    `results` has id, and boxes (N, 4) xyxy, scores (N,), labels (N,), of each image; `category_of`
    maps a label to the category id of a COCO dataset, whose image ids are numbers; None: the label
    + 1, and ids as they are.
    """
    rows = []
    for image_id, result in results:
        values = (result[key].tolist() for key in ("boxes", "scores", "labels"))
        for (x1, y1, x2, y2), score, label in zip(*values, strict=True):
            row = {
                "image_id": image_id if category_of is None else int(image_id),
                "category_id": label + 1 if category_of is None else category_of[label],
                "bbox": [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)],
                "score": round(score, 5),
            }
            rows.append(row)
    write_text(path, json.dumps(rows) + "\n")
