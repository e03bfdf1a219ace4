"""The prediction of one image, and its conversions for other tools."""

# C channels, H W pixels of the image, K classes, N boxes

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from effseg.data.classes import Classes
from effseg.data.sample import IGNORE_INDEX
from effseg.errors import InputError
from effseg.inference.draw import draw_boxes, overlay, palette_image, save_image


@dataclass
class Result:
    """The mask and boxes of one image, on the CPU; None without the head.

    Attributes:
        image: (C, H, W) uint8 RGB, upright.
        classes: names and colours, background first: mask label 0 is the background, box label 0
            the class after it.
        protocol: of the mask, or of the boxes without a mask.
        mask: (H, W) uint8, 0 … K-1.
        probabilities: (K, H, W) float32, 0 … 1, if requested; (1, H, W) for a binary model.
        boxes: (N, 4) float32, x1 y1 x2 y2 in pixels of the image, best first.
        scores: (N,) float32, 0 … 1.
        labels: (N,) int64, 0 … K-2.
        path: the image's file.
        frame: number in a video, from 0.
        speed: milliseconds: `read`, `predict` (a batch's time divided by its images).
    """

    image: torch.Tensor
    classes: Classes
    protocol: str
    mask: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    path: Path | None = None
    frame: int | None = None
    speed: dict[str, float] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Name of each box's class, (N,)."""
        labels = [] if self.labels is None else self.labels.tolist()
        return [self.classes.names[label + 1] for label in labels]

    def plot(self, alpha: float = 0.5, legend: bool = True) -> Image.Image:
        """Draw mask and boxes over the image, with a legend of the mask below.

        Args:
            alpha: share of the class colour, 0 (image) … 1 (colour).
            legend: add a legend; without it the picture has the image's size.

        Raises:
            InputError: alpha out of range, or an image without three channels.
        """
        boxes = self._detections
        if self.mask is None:
            return draw_boxes(self.image, boxes, self.classes, 0.0)
        return overlay(self.image, self.mask, self.classes, alpha, boxes or None, legend)

    def save(self, path: str | Path = "predictions") -> Path:
        """Write a file: `.png` the mask with its palette, or `.jpg` what `plot` draws.

        Without a mask, the picture in both cases. A path without suffix is a folder, in which the
        picture gets the image's name. Missing folders are created.

        Returns:
            The file.

        Raises:
            InputError: another suffix, or a path that cannot be written.
        """
        path = Path(path)
        if not path.suffix:
            frame = "" if self.frame is None else f"_{self.frame:06d}"
            path = path / f"{self.path.stem if self.path else 'image'}{frame}.jpg"
        plain = self.mask is not None and path.suffix.lower() == ".png"
        picture = palette_image(self.mask, self.classes) if plain else self.plot()  # type: ignore[arg-type]
        save_image(picture, path)
        return path

    def to_coco(self, image_id: int | str = 0) -> list[dict[str, Any]]:
        """Return COCO's results format: one entry per box and per class of the mask.

        Entries have `image_id`, `category_id` (1 is the class after the background), `bbox`
        (x y w h) and `score`; those of the mask `segmentation` (compressed RLE) and `area`
        instead of a score.
        """
        from faster_coco_eval import mask as coco_mask  # needed only here

        entries: list[dict[str, Any]] = []
        columns = [values.tolist() for values in self._detections.values()]
        for (x1, y1, x2, y2), score, label in zip(*columns, strict=True):
            entry = {"image_id": image_id, "category_id": label + 1, "score": round(score, 5)}
            entry["bbox"] = [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]
            entries.append(entry)
        for label, inside in self._regions.items():
            region = coco_mask.encode(np.asfortranarray(inside, np.uint8))
            entries.append(
                {
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [float(v) for v in coco_mask.toBbox(region)],
                    "segmentation": region | {"counts": region["counts"].decode()},
                    "area": int(coco_mask.area(region)),
                }
            )
        return entries

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`: the boxes, or without boxes one region per class.

        `class_id` counts from the class after the background; names are in
        `data["class_name"]`.

        Raises:
            InputError: supervision is not installed.
        """
        try:
            import supervision
        except ModuleNotFoundError as error:
            raise InputError(
                f"{error.name} is not installed, expected: pip install supervision"
            ) from error

        boxes, regions = self._detections, self._regions
        if boxes:
            return supervision.Detections(
                xyxy=boxes["boxes"].numpy(),
                confidence=boxes["scores"].numpy(),
                class_id=boxes["labels"].numpy(),
                data={"class_name": np.array(self.names, dtype=str)},
            )
        if not regions:
            return supervision.Detections.empty()
        masks = np.stack(list(regions.values()))
        return supervision.Detections(
            xyxy=supervision.mask_to_xyxy(masks).astype(np.float32),
            mask=masks,
            class_id=np.array(list(regions)) - 1,
            data={"class_name": np.array([self.classes.names[k] for k in regions])},
        )

    @property
    def _detections(self) -> dict[str, torch.Tensor]:
        """Boxes, scores and labels; empty without a detection head."""
        if self.boxes is None or self.scores is None or self.labels is None:
            return {}
        return {"boxes": self.boxes, "scores": self.scores, "labels": self.labels}

    @property
    def _regions(self) -> dict[int, Any]:
        """(H, W) bool by label of the mask, without background and ignored pixels."""
        if self.mask is None:
            return {}
        values = self.mask.numpy()
        present = np.unique(values).tolist()
        return {label: values == label for label in present if label not in (0, IGNORE_INDEX)}
