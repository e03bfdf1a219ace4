"""Pictures of a dataset: images with labels, and crops as training sees them."""

# H W pixels, N boxes

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from effseg.data.classes import Classes
from effseg.data.files import VOID_COLOUR, whole_file, write_text
from effseg.data.sources.source import Source
from effseg.errors import InputError, needs
from effseg.inference.draw import draw_boxes
from effseg.report.pictures import data_uri, render, small, tinted

with needs("report"):
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

_COLUMNS = 4


@dataclass(frozen=True)
class Group:
    """Pictures under one heading, with their classes."""

    title: str
    classes: Classes
    pictures: list[tuple[str, Image.Image]]
    """Id and picture."""

    @property
    def legend(self) -> list[tuple[str, tuple[int, int, int]]]:
        """Name and colour of each class except the background, and of ignored pixels."""
        known = list(zip(self.classes.names, self.classes.palette, strict=True))[1:]
        return [*known, ("ignored", VOID_COLOUR)]


def images_of(name: str, source: Source, count: int) -> Group:
    """Return `count` images of a source, evenly spread, with their labels."""
    masks = source.mask_classes if "segmentation" in source.tasks else source.box_classes
    indices = np.unique(np.linspace(0, len(source) - 1, count).round().astype(int)).tolist()
    pictures = []
    for index in indices if len(source) else []:
        image = source.image(index)
        labels: Any = source.labels(index, (image.shape[1], image.shape[2]))
        drawn = _draw(image, labels, source.mask_classes, source.box_classes)
        pictures.append((source.ids[index], drawn))
    return Group(f"{name}: {source}, {len(source)} images", masks, pictures)


def training_crops(data: Any, count: int) -> Group:
    """Return the first `count` training crops of an `ImageDataModule`, as the losses get them."""
    data.num_workers = 0  # a few crops are not worth worker processes
    data.setup("fit")
    pictures: list[tuple[str, Image.Image]] = []
    for batch in data.train_dataloader():
        rows = {task: set(numbers.tolist()) for task, numbers in batch["rows"].items()}
        for i, (image_id, image) in enumerate(zip(batch["id"], batch["image"], strict=True)):
            labels: dict[str, torch.Tensor] = {}
            if i in rows.get("segmentation", ()):
                labels["mask"] = batch["mask"][i]
            if i in rows.get("detection", ()):
                kept = batch["labels"][i] >= 0
                labels |= {key: batch[key][i][kept] for key in ("boxes", "labels")}
            pictures.append((image_id, _draw(image, labels, data.classes, data.classes)))
        if len(pictures) >= count:
            break
    return Group("crops as training sees them", data.classes, pictures[:count])


def _draw(
    image: torch.Tensor,
    labels: Mapping[str, torch.Tensor],
    mask_classes: Classes,
    box_classes: Classes,
) -> Image.Image:
    picture = to_pil_image(image)
    if "mask" in labels:
        picture = tinted(picture, labels["mask"], mask_classes)
    picture = small(picture)
    if "boxes" not in labels:
        return picture
    ratio = picture.width / image.shape[-1]
    scaled = {"boxes": labels["boxes"] * ratio, "labels": labels["labels"]}
    return draw_boxes(pil_to_tensor(picture), scaled, box_classes)


def write_groups(groups: list[Group], output: Path) -> None:
    """Write the pictures as one PNG or one HTML file, by the suffix of `output`."""
    kind = output.suffix.lower()
    if kind == ".html":
        content = [(group, [(i, data_uri(p)) for i, p in group.pictures]) for group in groups]
        write_text(output, render("show.html", groups=content))
    elif kind == ".png":
        with whole_file(output) as temporary:
            _sheet(groups).savefig(temporary, format="png", dpi=100)
    else:
        raise InputError(f"{output}: expected a name that ends in .html or .png")


def _sheet(groups: list[Group]) -> Figure:
    rows = [max(1, -(-len(group.pictures) // _COLUMNS)) for group in groups]
    legends = [0.3 + 0.22 * -(-len(group.legend) // 8) for group in groups]
    heights = [0.4 + 3.0 * n + legend for n, legend in zip(rows, legends, strict=True)]
    figure = Figure((3.2 * _COLUMNS, sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, group, count in zip(parts, groups, rows, strict=True):
        part.suptitle(group.title, fontsize=11, parse_math=False)
        grid = np.atleast_1d(part.subplots(count, _COLUMNS)).ravel()
        for axes in grid:
            axes.set_axis_off()
        for axes, (image_id, picture) in zip(grid, group.pictures, strict=False):
            axes.imshow(picture)
            axes.set_title(image_id, fontsize=9, parse_math=False)
        patches = [Patch(color=f"#{bytes(c).hex()}", label=name) for name, c in group.legend]
        part.legend(handles=patches, loc="outside lower center", ncols=8, fontsize=8)
    return figure
