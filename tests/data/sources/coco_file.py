"""A small file in COCO's format: two images of 60 x 40 pixels, objects of 20 x 10 in them."""

import json

import numpy as np
from PIL import Image

from effseg.data import COCO

HEIGHT, WIDTH = 40, 60
SQUARE = [20, 5, 40, 5, 40, 15, 20, 15]
CATEGORIES = [{"id": 1, "name": "scratch"}, {"id": 2, "name": "dent"}]


def image(number, name=None, **changes):
    return {"id": number, "file_name": name or f"{number}.png", "height": 40, "width": 60} | changes


def instance(number, **changes):
    """An object of 20 x 10 pixels at (20, 5)."""
    return {
        "id": number,
        "image_id": 1,
        "category_id": 2,
        "bbox": [20, 5, 20, 10],
        "area": 200,
        "iscrowd": 0,
        "segmentation": [SQUARE],
    } | changes


TWO = [image(1), image(2)]


def write(root, annotations, images=TWO, categories=CATEGORIES, folder="train"):
    for entry in images:
        name = entry.get("file_name")
        if isinstance(name, str) and "\\" not in name:
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = root / "annotations" / "instances_train.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return COCO(root, "train")


def inside():
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:15, 20:40] = 1
    return mask


def runs(mask):
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    return np.diff([0, *edges, len(flat)]).tolist()
