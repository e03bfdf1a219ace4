"""COCO's annotation file: where it lies, and what it says."""

# H W pixels, N boxes

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import box_convert

from effseg import resources
from effseg.errors import InputError


@dataclass
class CocoPhoto:
    """A photo of an annotation file."""

    id: int
    file: str
    size: tuple[int, int]
    """(H, W)."""
    annotations: list[dict[str, Any]] = field(default_factory=list)

    def boxes(self) -> torch.Tensor:
        """Return the boxes (N, 4) float32 as x1 y1 x2 y2 (the file has x, y, width, height)."""
        rows = [annotation["bbox"] for annotation in self.annotations]
        boxes = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
        converted: torch.Tensor = box_convert(boxes, "xywh", "xyxy")
        return converted


def find_coco(root: str | Path | None = None) -> Path:
    """Find the folder that holds ``annotations/instances_SPLIT.json`` and the photos' folders.

    Args:
        root: that folder, or one that holds it as ``coco2017`` or ``coco``; None as
            :func:`effseg.data.voc.find_voc`.

    Raises:
        InputError: no such folder; the message names the layout and the places looked at.
    """
    base = resources.data_root(root)
    places = (base / "coco2017", base / "coco", base)
    for place in places:
        if (place / "annotations").is_dir():
            return place
    raise InputError(
        f"{base}: no COCO here; expected annotations/instances_SPLIT.json beside the folders of "
        f"photos; looked at {', '.join(str(place) for place in places)} "
        "(set the root, or the variable EFFSEG_DATA)"
    )


def read_annotations(path: Path) -> tuple[list[CocoPhoto], dict[int, str]]:
    """Read an annotation file.

    Returns:
        The photos in the order of their ids, each with its annotations, and the categories' names.

    Raises:
        InputError: the file is missing, cut off, or not in COCO's instance format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file, expected COCO's annotations") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not valid JSON (cut off?): {error}") from error
    key = "images"
    try:
        photos = {
            int(entry["id"]): CocoPhoto(
                int(entry["id"]), str(entry["file_name"]), (entry["height"], entry["width"])
            )
            for entry in content["images"]
        }
        key = "categories"
        categories = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
        key = "annotations"
        for annotation in content["annotations"]:
            if len(annotation["bbox"]) != 4:
                raise InputError(
                    f"{path}: annotation {annotation.get('id')}: bbox {annotation['bbox']}, "
                    "expected x, y, width, height"
                )
            annotation["category_id"] = int(annotation["category_id"])
            if annotation["image_id"] not in photos:
                raise InputError(
                    f"{path}: annotation {annotation.get('id')}: image_id "
                    f"{annotation['image_id']} is not in images"
                )
            photos[annotation["image_id"]].annotations.append(annotation)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: {key}: {type(error).__name__} {error}, expected COCO's instance format"
        ) from error
    if not photos:
        raise InputError(f"{path}: images is empty, expected at least one photo")
    return [photos[i] for i in sorted(photos)], categories
