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
        boxes = None
        if self.boxes is not None and self.scores is not None and self.labels is not None:
            boxes = {"boxes": self.boxes, "scores": self.scores, "labels": self.labels}
        if self.mask is not None:
            return overlay(self.image, self.mask, self.classes, alpha, boxes, legend)
        assert boxes is not None  # every model has a head
        return draw_boxes(self.image, boxes, self.classes, 0.0)

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
        make_folder(path.parent)
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
        if self.boxes is not None and self.scores is not None and self.labels is not None:
            corners = self.boxes.tolist()
            for box, score, label in zip(
                corners, self.scores.tolist(), self.labels.tolist(), strict=True
            ):
                x1, y1, x2, y2 = box
                entries.append(
                    {
                        "image_id": image_id,
                        "category_id": label + 1,
                        "bbox": [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)],
                        "score": round(score, 5),
                    }
                )
        if self.mask is not None:
            values = self.mask.numpy()
            for label in np.unique(values).tolist():
                if label in (0, IGNORE_INDEX):
                    continue
                region = coco_mask.encode(np.asfortranarray(values == label, np.uint8))
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

        if self.boxes is not None and self.scores is not None and self.labels is not None:
            return supervision.Detections(
                xyxy=self.boxes.numpy(),
                confidence=self.scores.numpy(),
                class_id=self.labels.numpy(),
                data={"class_name": np.array(self.names, dtype=str)},
            )
        values = np.empty((0, 0), np.uint8) if self.mask is None else self.mask.numpy()
        present = [k for k in np.unique(values).tolist() if k not in (0, IGNORE_INDEX)]
        if not present:
            return supervision.Detections.empty()
        masks = np.stack([values == label for label in present])
        return supervision.Detections(
            xyxy=supervision.mask_to_xyxy(masks).astype(np.float32),
            mask=masks,
            class_id=np.array(present) - 1,
            data={"class_name": np.array([self.classes.names[k] for k in present])},
        )


def make_folder(folder: Path) -> None:
    """Create a folder and its parents.

    Raises:
        InputError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be created: {error.strerror}") from error
